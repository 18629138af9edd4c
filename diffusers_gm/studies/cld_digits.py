"""What the studies of critically-damped Langevin diffusion share: trained networks, their samples, words for both."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNet2DModel

from ..evaluation.results import Results
from ..schedulers import CLDSSCSScheduler
from .digits import TIE, kept_results, pipeline_of, quality, trained
from .exact import Network

# Where losses are measured.
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def train_cld(args: argparse.Namespace, **options: Any) -> tuple[UNet2DModel, CLDSSCSScheduler]:
    """A network of the digits as published, of the score of the velocity, and the scheduler that describes it; kept
    beside the reports."""
    return trained(
        args.output, method="cld", objective="score", max_train_steps=args.steps, train_batch_size=args.batch, **options
    )


def as_network(unet: UNet2DModel) -> Network:
    return lambda model_input, timestep: unet(model_input, timestep).sample


def results_of(args: argparse.Namespace, name: str, **settings: Any) -> Results:
    """What the study has measured already of networks of `train_cld`."""
    return kept_results(name, args.num_samples, args.output, steps=args.steps, batch=args.batch, **settings)


def ratios_to_floor(results: Results, name: str, network: Any, scheduler: Any, calls: Sequence[int]) -> list[float]:
    """Sliced W2 of samples over the floor at every number of calls; nan where they are not finite."""
    return [
        (quality(results, name, n, 1, lambda _: pipeline_of(network, scheduler)) or [float("nan")])[0] for n in calls
    ]


def digits_conditions(args: argparse.Namespace) -> str:
    """How networks were trained and samples measured, in words."""
    return (
        f"Digits, 8 x 8; trainings of {args.steps} steps of {args.batch} images, seed 0. Sliced W2 of "
        f"{args.num_samples} samples (seed 0) to the training digits over "
        f"that of {args.num_samples} held-out digits: 1 is as good as real ones. One training and one seed; ratios "
        f"within {TIE:.0%}, the spread of sampling, are called equal; trainings may differ by more."
    )


def against(ours: str, theirs: str, errors: Mapping[str, Sequence[float]], calls: Sequence[int]) -> str:
    """A sentence on the error of `theirs` over that of `ours` at every number of calls, and on who is better where."""
    gains = [b / a for a, b in zip(errors[ours], errors[theirs], strict=True)]
    figures = ", ".join(f"{gain:.2f} at {n}" for n, gain in zip(calls, gains, strict=True))
    better = [str(n) for n, gain in zip(calls, gains, strict=True) if gain > 1 + TIE]
    worse = [str(n) for n, gain in zip(calls, gains, strict=True) if gain < 1 / (1 + TIE)]
    words = [f"{kind} at {', '.join(where)} calls" for kind, where in (("better", better), ("worse", worse)) if where]
    return f"{theirs} over {ours}: {figures}; " + (f"{ours} is {' and '.join(words)}." if words else "no difference.")
