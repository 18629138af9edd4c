"""Measurements behind the claims of the README, as commands. They need the `evaluation` extra."""

from ..extra import check_extra

check_extra("evaluation", "matplotlib")
