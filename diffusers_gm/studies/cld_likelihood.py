"""What a CLD model knows of held-out digits in bits: trained on the digits, on dequantised ones, and for likelihood."""

import argparse
import math
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digits
from ..evaluation.likelihood import bits_of_images
from ..evaluation.results import Statistic
from ..evaluation.table import Table
from .cld_training import results_of
from .digits import TIE, images_of, over_floor, pipeline_of, trained
from .pictures import save_picture
from .report import Report

NUM_LEVELS = 17
PUBLISHED = {"method": "cld", "objective": "score"}
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": PUBLISHED,
    "dequantised": {**PUBLISHED, "dequantize": NUM_LEVELS},
    "dequantised, likelihood weights": {**PUBLISHED, "dequantize": NUM_LEVELS, "cld_weighting": "likelihood"},
    # The default of CLD: an ordinary network, which NCSNv2 trains likewise.
    "dequantised, preconditioned": {"method": "cld", "dequantize": NUM_LEVELS},
}
CALLS = 50


def to_levels(images: Tensor) -> Tensor:
    """The nearest level of every pixel, 0 to `NUM_LEVELS - 1`."""
    return ((images.clamp(-1, 1) + 1) * (NUM_LEVELS - 1) / 2).round()


def independent_pixels(train: Tensor, held_out: Tensor) -> Tensor:
    """Bits per dimension of held-out digits under histograms of every pixel (each level counted once more), `(n,)`."""
    levels = [to_levels(images).long().flatten(1) for images in (train, held_out)]
    counts = torch.nn.functional.one_hot(levels[0], NUM_LEVELS).sum(0) + 1
    probabilities = counts.double() / (len(train) + NUM_LEVELS)
    return -probabilities.log2().gather(1, levels[1].T).mean(0)


def likelihood(args: argparse.Namespace) -> Report:
    """Bits per dimension of the held-out digits after four trainings, and what the samples lose by them."""
    train, held_out = split_digits()
    held_out = held_out[: args.num_samples]
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    shared = {"max_train_steps": args.steps, "train_batch_size": args.batch}
    results = results_of(args, "cld_likelihood", solver_steps=args.solver_steps)
    bits: dict[str, tuple[float, float]] = {}
    ratios: dict[str, float] = {}

    def measure(name: str, seed: int) -> dict[str, float]:
        pipeline = pipeline_of(*trained(args.output, **shared, **TRAININGS[name]))
        generator = torch.Generator().manual_seed(seed)
        values = bits_of_images(pipeline, held_out, NUM_LEVELS, args.solver_steps, generator)
        samples, _ = images_of(pipeline, CALLS, args.num_samples, seed)
        ratio = over_floor(to_levels(samples) * 2 / (NUM_LEVELS - 1) - 1)
        return {"ratio": ratio, **{f"bits of image {i}": float(value) for i, value in enumerate(values)}}

    for name in TRAININGS:
        (kept,) = results.of_seeds(name, CALLS, 1, partial(measure, name)) or [{}]
        found = dict(kept)  # what is kept stays whole
        ratios[name] = found.pop("ratio")
        of_name = Statistic.of(list(found.values()))
        bits[name] = of_name.mean, of_name.error
        axis.hist(list(found.values()), bins=15, histtype="step", linewidth=1.6, label=name)
    lines = {
        "uniform over the levels": math.log2(NUM_LEVELS),
        "independent pixels": float(independent_pixels(train, held_out).mean()),
    }
    for (name, value), style in zip(lines.items(), ("--", ":"), strict=True):
        axis.axvline(value, color="black", linestyle=style, label=name)
    axis.set(xlabel="bits per dimension, at most", ylabel=f"held-out digits, of {len(held_out)}")
    axis.legend(fontsize=8)
    return Report(
        name="cld_likelihood",
        title="CLD: bits per dimension of the digits",
        question="How many bits does a CLD model need for a held-out digit, and what do dequantisation and likelihood "
        "weights change?",
        verdict=verdict_on_likelihood(bits, lines, ratios),
        tables=[
            Table(
                "Upper bounds in bits per dimension, mean and standard error over images.",
                ["training", "held-out digits", "+-", f"sliced W2 over the floor, {CALLS} calls"],
                [[name, *bits[name], ratios[name]] for name in TRAININGS] + [[*line, "", ""] for line in lines.items()],
            )
        ],
        pictures=[save_picture(figure, args.output / "cld_likelihood.png")],
        conditions=f"Digits, 8 x 8, {NUM_LEVELS} levels, {len(held_out)} held-out images; trainings of "
        f"{args.steps} steps of {args.batch} images, seed 0. Bound on the discrete likelihood: "
        f"Runge-Kutta of {args.solver_steps} steps, one companion noise, one probe and one dequantisation per image. "
        "Samples are rounded to the levels.",
    )


def verdict_on_likelihood(
    bits: dict[str, tuple[float, float]], lines: dict[str, float], ratios: dict[str, float]
) -> str:
    sentences = []
    for name, (mean, error) in bits.items():
        # An upper bound that is above says nothing about the model itself.
        places = ", ".join(
            f"{'better' if mean + 2 * error < value else 'not shown to be better'} than {line} ({value:.2f})"
            for line, value in lines.items()
        )
        sentences.append(f"{name}: at most {mean:.3f} +- {error:.3f} bits, {places}.")
    best = min(bits, key=lambda name: bits[name][0])
    quality = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    worse = [name for name, ratio in ratios.items() if ratio > (1 + TIE) * ratios["plain"]]
    words = (
        f"worse than plain by more than the spread of seeds: {', '.join(worse)}" if worse else "none worse than plain"
    )
    return " ".join(sentences) + f" Lowest bound: {best}. Sliced W2 over the floor: {quality}; {words}."
