"""An option of a training: one field of a dataclass, whose metadata say everything there is to say about it."""

import math
from collections.abc import Container
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any


@dataclass(frozen=True)
class OptionSpec:
    """What is said of an option.

    Attributes:
        group: the heading that `--help` shows it under.
        help: a sentence.
        choices: the values that are known, where the type does not say it.
        at_least: the smallest value that makes sense.
        positive: whether it must be positive.
        below_one: whether it must be in [0, 1).
        aliases: other names of it, those of diffusers' own training script.
        in_place_of: options that a recipe may hold and that mean nothing beside this one.
        free_on_resume: whether a training may be resumed with another value: it does not change what is learned.
        private: never written down: a secret, or a place on this host.
        path: may be a path, of which only the last part is written down.
        of_a_run: where a run of the training begins, ends and goes to: whoever repeats the training says that anew.
    """

    group: str
    help: str
    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    positive: bool = False
    below_one: bool = False
    aliases: tuple[str, ...] = ()
    in_place_of: tuple[str, ...] = ()
    free_on_resume: bool = False
    private: bool = False
    path: bool = False
    of_a_run: bool = False


def option(group: str, default: Any, help: str, **spec: Any) -> Any:
    """A field of a dataclass of options, whose default is None where it follows from the data; see `OptionSpec`."""
    return field(default=default, metadata=vars(OptionSpec(group, help, **spec)))


SAMPLER = "Sampler, as saved with the model"
# The headings of `--help`, in its order.
GROUPS = (
    "What is trained",
    "Data",
    "Network",
    "Noise",
    SAMPLER,
    "Optimisation",
    "Checkpoints, samples and logs",
    "Hub",
)
trained, data, network, noise, sampler, optimisation, output, hub = (partial(option, group) for group in GROUPS)
# How samples are drawn, and where all goes, changes nothing of what is learned.
sampler, output, hub = (partial(of_group, free_on_resume=True) for of_group in (sampler, output, hub))
hub = partial(hub, of_a_run=True)


def check_bounds(f: Field, value: Any) -> None:
    """Raise a ValueError if `value` is out of the bounds of the option `f`, or not finite; None is in."""
    if value is None:
        return
    spec = OptionSpec(**f.metadata)
    numbers = value if isinstance(value, list) else [value]
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        raise ValueError(f"--{f.name} must be finite, got {value}")
    if spec.choices is not None and value not in spec.choices:
        raise ValueError(f"--{f.name} must be one of {', '.join(spec.choices)}, got {value!r}")
    if spec.at_least is not None and not value >= spec.at_least:
        raise ValueError(f"--{f.name} must be at least {spec.at_least}, got {value}")
    if spec.positive and not value > 0:
        raise ValueError(f"--{f.name} must be positive, got {value}")
    if spec.below_one and not 0 <= value < 1:
        raise ValueError(f"--{f.name} must be in [0, 1), got {value}")


def changed_options(args: Any) -> list[str]:
    """The options that were given another value than their default, `method` first."""
    changed = [f.name for f in fields(args) if getattr(args, f.name) != f.default and f.name not in args.left_open]
    return sorted(changed, key=lambda name: name != "method")


def given(args: Any, names: Container[str]) -> list[str]:
    """Those of these options that were given, as on a command line, be it with the value that they have without."""
    changed = changed_options(args)
    return [f"--{name}" for name in [*changed, *sorted(args.named_options - {*changed})] if name in names]


def number_or_auto(name: str, value: str, number: type) -> Any:
    """`value` as a positive number, or None for 'auto'."""
    if value == "auto":
        return None
    try:
        parsed = number(value)
    except ValueError:
        parsed = math.nan
    if not 0 < parsed < math.inf:
        raise ValueError(f"--{name} must be a positive {number.__name__} or 'auto', got {value!r}")
    return parsed
