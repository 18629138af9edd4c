"""Command lines that look alike: 120 columns, every default once, and what is wrong in one line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

METAVARS = {"int": "N", "whole_number": "N", "float": "X", "Path": "PATH"}


def at_least(least: int) -> Callable[[str], int]:
    """A `type` of argparse: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def _many(action: argparse.Action) -> bool:
    """Whether the choices of an option, which `nargs` shows twice, are longer than a line."""
    return len(",".join(map(str, action.choices or []))) * (2 if action.nargs else 1) > 100


class Formatter(argparse.RawDescriptionHelpFormatter):
    """An option by its first name alone, its default in brackets, which a help may end with in words."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = self._get_default_metavar_for_optional(action)
        value = action.metavar if action.nargs == "?" else self._format_args(action, metavar)
        return f"{action.option_strings[0]} {value}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(getattr(action.type, "__name__", ""), "VALUE")

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        return (lambda n: ("NAME",) * n) if _many(action) else super()._metavar_formatter(action, default_metavar)

    def _expand_help(self, action: argparse.Action) -> str:
        """Names that are too many for a line stand here, where they are wrapped."""
        return super()._expand_help(action) + (f"; of {', '.join(action.choices or [])}" if _many(action) else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        none = default is None or default is False or default in ([], argparse.SUPPRESS)
        if none or not action.option_strings or text.endswith("]"):
            return text
        return f"{text} [{' '.join(map(str, default)) if isinstance(default, list) else default}]".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """The parser of `python -m module`, or of the script of pyproject.toml that runs it.

    Args:
        module: `__package__` or the name of a module.
        description: the docstring that says what the command does.
    """

    def __init__(self, module: str, description: str | None, **kwargs: Any) -> None:
        script = Path(sys.argv[0]).name
        super().__init__(
            prog=script if script.startswith(("diffusers-gm", "train_gm_sgm")) else f"python -m {module}",
            description=(description or "").strip(),
            formatter_class=Formatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
