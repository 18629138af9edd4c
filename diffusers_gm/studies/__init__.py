"""Measurements behind the claims of the README, as commands. They need the `evaluation` extra."""

import sys

from ..extra import check_extra

try:
    check_extra("evaluation", "matplotlib")
except ImportError as error:
    if sys.argv[0] != "-m":
        raise
    raise SystemExit(f"error: {error}") from None  # of a command, in a line
