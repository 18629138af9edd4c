"""The command line of the studies: the options that they share, and one check of the values before any work."""

import argparse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ..cli import Parser, at_least
from ..data import split_digits


def study_parser(
    module: str, description: str | None, studies: Iterable[str], steps: int = 1200, seeds: bool = True
) -> Parser:
    """The parser of a module of studies, with the options that all of them have; the module adds its own.

    Args:
        module: its name in this package.
        description: its docstring, shown with the list of its studies.
        studies: names of its studies; where there is only one, the command does not ask which.
        steps: the default of `--steps`.
        seeds: whether there is an option `--seeds`.
    """
    parser = Parser(f"{__package__}.{module}", description)
    add, names = parser.add_argument, list(studies)
    if len(names) > 1:
        add("study", choices=names, help="what is measured")
    else:
        parser.set_defaults(study=names[0])
    add("--steps", type=at_least(1), default=steps, help="optimizer steps of each training")
    if seeds:
        add("--seeds", type=at_least(1), default=2, help="trainings, or runs, of each kind")
    add("--num_samples", type=at_least(2), default=256, help="images per figure; at most 360 where held-out digits are the floor")  # fmt: skip # noqa: E501
    add("--output", type=Path, default=Path("outputs/studies"), help="folder of the reports")
    return parser


def parse(parser: Parser, arguments: Sequence[str] | None, over_floor: Collection[str] = ()) -> argparse.Namespace:
    """The options of a command, `args.study` among them; studies `over_floor` need a held-out digit for every sample,
    or end the program as argparse does."""
    args = parser.parse_args(arguments)
    if args.study in over_floor:
        need_held_out(parser, args.num_samples)
    return args


def need_held_out(parser: Parser, num_samples: int) -> None:
    """End the program where there is no held-out digit for every sample."""
    if num_samples > (held_out := len(split_digits()[1])):
        parser.error(f"--num_samples {num_samples}: there are {held_out} held-out digits for the floor")
