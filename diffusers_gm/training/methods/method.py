"""What a method of training is."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from ...processes.random import Draw
from ..option import noise, number_or_auto


@dataclass
class TimeOptions:
    """What is asked of every method."""

    num_train_timesteps: str = noise(
        "1000",
        "Number of noise levels, for cld the unit of the times; 'auto' is Technique 2 of NCSNv2.",
        aliases=("ddpm_num_steps",),
    )
    uncertainty_weighting: bool | None = noise(
        None,
        "Learn the weights of the noise levels, so that each counts as much (EDM2, arXiv 2312.02696). [true of "
        "preconditioned networks without --snr_gamma, else false]",
    )


@dataclass(frozen=True)
class Noise:
    """What the options of the noise come to for given data; None where a method has none. Named as the options."""

    num_train_timesteps: int
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float | None = None
    mixture_weights: list[float] | None = None
    mixture_scales: list[float] | None = None


def number_of_times(args: Any) -> int:
    """What `--num_train_timesteps` says; a ValueError for 'auto', for methods without a ladder."""
    number = number_or_auto("num_train_timesteps", args.num_train_timesteps, int)
    if number is None:
        raise ValueError(f"--num_train_timesteps auto is for ladders of noise levels: {args.method} needs a number")
    return number


LargestDistance = Callable[[Tensor], float]


@dataclass(frozen=True)
class Batch:
    """What a loss is of.

    Attributes:
        network: `(sample, timestep) -> output`, the output as `.sample`.
        images: `(B, C, H, W)` in [-1, 1].
        labels: of their noise levels, `(B,)` on the CPU.
        draw: of their noise.
    """

    network: Callable[..., Any]
    images: Tensor
    labels: Tensor
    draw: Draw


@dataclass(frozen=True)
class Advice:
    """Which scheduler a card advises, beside a calibrated one, by the measurements of `model_cards/results.md`.

    Attributes:
        scheduler: the name of a class of this package.
        options: its options for more calls than a calibrated scheduler is for, as arguments in Python.
        few: what else serves, in sentences.
    """

    scheduler: str
    options: str
    few: str


@dataclass(frozen=True)
class Method:
    """All that tells one method of training from another. `args` are all options of a training, its own among them.

    Attributes:
        name, short_title, title: its name for `--method`, in headings, and in sentences.
        pipeline: the class that draws images from what was trained.
        options: a dataclass of the options that say something about it, beside those for all methods.
        check: `(args)` raises a ValueError for options that do not go together.
        noise: `(args, images, largest_distance)` is the `Noise` for images `(n, C, H, W)` like those of the training.
            The largest distance of two of them takes long to measure: a function, to be called where it is needed.
        scheduler: `(args, noise, sampler)` describes network and noise; `sampler` holds further entries of its config.
        labels: `(args, noise, uniform)` are the network's labels of noise levels, `(B,)` on the CPU, from numbers that
            are uniform in [0, 1), `(B,)` float64: what decides which levels are learned, and how often.
        loss: `(args, scheduler, batch)` is one loss per image, `(B,)`.
        noise_in_words: `(args, noise)` is what the images are disturbed by.
        card: what the model card says of it, a template.
        card_values: `(record)` is what the template needs beside `$parameters`, from the options as recorded.
        choose: `(args)` is what those of its options come to that were left open: None for what then means nothing.
        formerly: what version 0.1.0, whose records say nothing of them, had for some of those that `choose` names.
        input_factor: `(args)` is how many channels enter the network for each channel of an image.
    """

    name: str
    short_title: str
    title: str
    pipeline: Any
    options: type
    check: Callable[[Any], None]
    noise: Callable[[Any, Tensor, LargestDistance], Noise]
    scheduler: Callable[[Any, Noise, dict[str, Any]], Any]
    labels: Callable[[Any, Noise, Tensor], Tensor]
    loss: Callable[[Any, Any, Batch], Tensor]
    noise_in_words: Callable[[Any, Noise], str]
    card: str
    card_values: Callable[[dict[str, Any]], dict[str, Any]]
    advice: Advice
    citation: str
    choose: Callable[[Any], dict[str, Any]] = lambda args: {}
    formerly: dict[str, Any] = field(default_factory=dict)
    input_factor: Callable[[Any], int] = lambda args: 1

    @property
    def option_names(self) -> set[str]:
        return {f.name for f in fields(self.options)}
