"""Measurements behind the claims of the README, as commands."""
