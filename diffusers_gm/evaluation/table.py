"""Figures as a Markdown table, and what they were made with."""

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch


@dataclass
class Table:
    """Rows under a header; numbers stay numbers until they are shown."""

    caption: str
    header: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        """Below its caption, where it has one; floats with four significant digits.

        Three lines rather than `tabulate`, which reads numbers in words ("007" is 7, True is 1) and leaves
        None out, and would be a dependency of the training, whose cards have tables.
        """
        words = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows]
        lines = ["| " + " | ".join(row) + " |" for row in [self.header, *words]]
        table = "\n".join([lines[0], "|---" * len(self.header) + "|", *lines[1:]])
        return f"{self.caption}\n\n{table}" if self.caption else table


def machine() -> str:
    """What the figures were made on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )


def this_command(arguments: Sequence[str] | None = None) -> str:
    """The command of this process, `python -m module options`, without the folder of the results; of a path outside the
    working folder, which is nobody else's, the last two names."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("--output", "--output_dir"):
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
        words = [word for word in words if not word.startswith(f"{option}=")]
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", module, *map(_neutral, words)])


def _neutral(word: str) -> str:
    if word.startswith("--") and "=" in word:
        option, _, value = word.partition("=")
        return f"{option}={_neutral(value)}"
    path = Path(word)
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(Path.cwd())
    return (path.relative_to(Path.cwd()) if inside else Path(*path.parts[1:][-2:])).as_posix()
