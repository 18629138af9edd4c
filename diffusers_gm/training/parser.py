"""From the words of a command line to the options of a training. What is wrong is said in one line."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import Field, fields
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ..cli import Parser
from .methods import METHODS, MethodOptions
from .option import GROUPS
from .options import TrainingArguments
from .recipe import read_recipe, recipe_names

# Options of diffusers' training script that are not ours, and what to do instead. Aliases stand beside the options.
INSTEAD = {
    "save_images_epochs": "set --validation_steps, the optimizer steps between grids of samples",
    "save_model_epochs": "set --checkpointing_steps, the optimizer steps between checkpoints",
    "local_rank": "leave it out: `accelerate launch` tells every process its rank",
    "enable_xformers_memory_efficient_attention": "leave it out: PyTorch's own memory-efficient attention is used",
    "use_auth_token": "leave it out: log in with `hf auth login`, or set HF_TOKEN",
}


class Switch(argparse.Action):
    """`--x` and `--x true`, `--no_x` and `--x false`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__([*option_strings, f"--no_{dest}"], dest, nargs="?", **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = {None: True, "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        value = words.get(values if values is None else values.lower())
        negated = option_string == f"--no_{self.dest}"
        if value is None or (negated and values is not None):
            raise argparse.ArgumentError(self, f"{values!r} is neither 'true' nor 'false'")
        setattr(namespace, self.dest, value != negated)


class OptionParser(Parser):
    """The parser of `train_gm_sgm.py`, made of the fields of `TrainingArguments`."""

    def __init__(self, description: str) -> None:
        super().__init__(
            "train_gm_sgm",
            description,
            usage="%(prog)s [--config RECIPE] [--OPTION VALUE ...]",
            epilog="The options of diffusers' train_unconditional.py are understood by their names there, too.",
            argument_default=argparse.SUPPRESS,
        )
        self.source = ""
        self.add_argument(
            "--config",
            metavar="RECIPE",
            help=f"options from a YAML file, or a recipe of this package: {', '.join(recipe_names())}; "
            "options given beside it go first",
        )
        general = set(TrainingArguments.__annotations__)
        types = get_type_hints(TrainingArguments)
        for name in GROUPS:
            group = self.add_argument_group(name)
            of_group = [f for f in fields(TrainingArguments) if f.metadata["group"] == name]
            for f in sorted(of_group, key=lambda f: f.name not in general):
                add_option(group, f, types[f.name])
        # What it asks for is what we do: 16 and 32 bits per channel are read as they are.
        self.add_argument("--preserve_input_precision", action="store_true", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        super().error(self.source + message)

    def parse(self, words: Sequence[str]) -> TrainingArguments:
        """The options that the words of a command line give, or the end of the program."""
        given = self._values(words)
        if sum(word.partition("=")[0] == "--config" for word in words) > 1:
            self.error("--config: one recipe at a time")
        name = given.pop("config", None)
        try:
            recipe = {} if name is None else read_recipe(name, given)
            self.source = f"--config {name}: "
            recipe = self._values(as_words(recipe))
            self.source = ""
            return TrainingArguments(**(named := recipe | given), named=named)
        except ValueError as error:
            self.error(str(error))

    def _values(self, words: Sequence[str]) -> dict[str, Any]:
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            instead = INSTEAD.get(word.removeprefix("--"))
            self.error(f"{word}: {instead}" if instead else f"unknown option {word}{self._guess(word)}")
        values = vars(namespace)
        values.pop("preserve_input_precision", None)
        return values

    def _guess(self, word: str) -> str:
        """Options that hold the word, or one that is nearly it; none is better than a wrong one."""
        if not word.startswith("-"):  # a value too many
            return ", see --help"
        known = [name for name in self._option_string_actions if not name.startswith("--no_")]
        near = [name for name in known if word.strip("-") in name]
        near = near if 1 <= len(near) <= 3 else difflib.get_close_matches(word, known, n=1, cutoff=0.8)
        return f": is it {' or '.join(near)}?" if near else ", see --help"


def add_option(group: Any, f: Field, kind: Any) -> None:
    """Add the option that a field describes, of type `kind`, to a parser."""
    kind, *_ = [t for t in get_args(kind) if t is not NoneType] if NoneType in get_args(kind) else [kind]
    names = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
    text = f.metadata["help"]
    methods = [method.name for method in METHODS.values() if f.name in method.option_names]
    if f.name in MethodOptions.__dataclass_fields__ and len(methods) < len(METHODS):
        text = f"({', '.join(methods)}) {text}"
    if kind is bool:
        if f.default:
            text += " [true]"
        group.add_argument(*names, dest=f.name, action=Switch, metavar="{true,false}" if f.default else "", help=text)
        return
    if f.default is not None:
        text += f" [{f.default}]"
    nargs = "+" if get_origin(kind) is list else None
    if nargs:
        (kind,) = get_args(kind)
    choices = get_args(kind) if get_origin(kind) is Literal else f.metadata["choices"]
    metavar = "PATH" if f.metadata["path"] else None
    as_type = str if choices else kind
    group.add_argument(*names, dest=f.name, type=as_type, nargs=nargs, choices=choices, metavar=metavar, help=text)


def as_words(options: dict[str, Any]) -> list[str]:
    """Options with their values as words of a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            words.append(f"--{name}={'yes' if value else 'no'}")  # as YAML reads them, and --mixed_precision no
        elif value is not None:
            words.append(f"--{name}={value}")
    return words
