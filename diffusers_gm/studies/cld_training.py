"""Trained CLD models: which masses and initial velocities, which loss. And how the studies of `.cld` train them."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..data import split_digits
from ..evaluation.report import Curve, curve_table, plot_curves
from ..evaluation.results import Results
from ..evaluation.table import Table
from ..losses import cld_loss
from ..pictures import curve_style
from ..schedulers import CLDSSCSScheduler
from .digits import TIE, kept_results, pipeline_of, quality, trained
from .exact import Network
from .pictures import as_curves, save_picture
from .report import Report, by_calls

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
    return [(quality(results, name, n, 1, lambda _: pipeline_of(network, scheduler)) or [math.nan])[0] for n in calls]


def digits_conditions(args: argparse.Namespace) -> str:
    """How networks were trained and samples measured, in words."""
    return (
        f"Digits, 8 x 8; trainings of {args.steps} steps of {args.batch} images, seed 0. Sliced W2 of "
        f"{args.num_samples} samples (seed 0) to the training digits over "
        f"that of {args.num_samples} held-out digits: 1 is as good as real ones. One training and one seed; ratios "
        f"within {TIE:.0%}, the spread of sampling, are called equal; trainings may differ by more."
    )


# --- Robustness ---

GAMMAS = (0.04, 0.25, 1.0)
MASSES = (1 / 16, 1 / 4, 1.0)


def robustness(args: argparse.Namespace) -> Report:
    """Other gamma and mass at the same beta.

    Mass and beta act through beta / sqrt(M) alone (the rest is the unit of velocity): a light mass gets further towards
    equilibrium by t = 1, a heavy one less far.
    """
    results = results_of(args, "cld_robustness")
    rows = [
        [f"{gamma:g}", f"{mass:g}", *ratios_to_floor(
            results, f"gamma {gamma:g}, mass {mass:g}", *train_cld(args, gamma=gamma, mass=mass), args.calls)]
        for gamma in GAMMAS
        for mass in MASSES
    ]  # fmt: skip
    ratios = torch.tensor([row[2:] for row in rows]).T.reshape(len(args.calls), len(GAMMAS), len(MASSES))
    return Report(
        name="cld_robustness",
        title="CLD: masses and initial velocities",
        question="Does sample quality depend on the mass M and on gamma, the variance of the initial velocity?",
        verdict=verdict_on_robustness(ratios, args.calls),
        tables=[Table("Sliced W2 over the floor.", ["gamma", "mass", *by_calls(args.calls)], rows)],
        pictures=[plot_robustness(ratios, args.calls, args.output / "cld_robustness.png")],
        conditions=digits_conditions(args) + " HSM, mixed score, beta = 4, sscs on the quadratic grid.",
    )


def plot_robustness(ratios: Tensor, calls: Sequence[int], path: Path) -> str:
    """Ratios `(calls, gammas, masses)`, a panel for each number of calls; the name of the file."""
    figure, axes = plt.subplots(1, len(calls), figsize=(3 * len(calls), 3.6), layout="constrained", squeeze=False)
    for axis, n, grid in zip(axes[0], calls, ratios, strict=True):
        axis.imshow(grid.log(), cmap="YlOrRd", vmin=0, vmax=1.5)
        for i, row in enumerate(grid.tolist()):
            for j, ratio in enumerate(row):
                color = "white" if math.log(ratio) > 1 else "black"
                axis.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=12, color=color)
        axis.set(title=f"{n} calls", xlabel="mass M", ylabel="gamma")
        axis.set_xticks(range(len(MASSES)), [f"{mass:g}" for mass in MASSES])
        axis.set_yticks(range(len(GAMMAS)), [f"{gamma:g}" for gamma in GAMMAS])
    figure.suptitle("sliced W2 over the floor of held-out digits (1 is as good as real)")
    return save_picture(figure, path)


def verdict_on_robustness(ratios: Tensor, calls: list[int]) -> str:
    """Of ratios `(calls, gammas, masses)`."""
    sentences = []
    for n, grid in zip(calls, ratios, strict=True):
        best, worst = (divmod(int(k), grid.shape[1]) for k in (grid.argmin(), grid.argmax()))
        names = [f"gamma {GAMMAS[i]:g}, mass {MASSES[j]:g}" for i, j in (best, worst)]
        of_gamma, of_mass = (float((grid.amax(k) / grid.amin(k)).max()) for k in (0, 1))
        sentences.append(
            f"At {n} calls from {grid.min():.2f} ({names[0]}) to {grid.max():.2f} ({names[1]}); the worst over the "
            f"best gamma of a mass is at most {of_gamma:.2f}, the worst over the best mass of a gamma {of_mass:.2f}."
        )
    last = ratios[calls.index(max(calls))]
    spread = float(last.max() / last.min())
    robust = "does not matter" if spread < 1 + TIE else "still matters"
    return " ".join(sentences) + f" With the most calls the choice {robust}."


# --- Losses ---

LOSSES: dict[str, dict[str, Any]] = {
    "HSM, mixed score": {},
    "HSM, plain score": {"cld_mixed_score": False},
    "DSM, mixed score": {"cld_loss": "dsm"},
    "DSM, plain score": {"cld_loss": "dsm", "cld_mixed_score": False},
}


@torch.no_grad()
def score_errors(unet: Any, scheduler: CLDSSCSScheduler, num_images: int, hybrid: bool) -> list[float]:
    """The mean loss of a network on held-out digits at every time; of hybrid or denoising score matching."""
    images, generator = split_digits()[1][:num_images], torch.Generator().manual_seed(1)
    process, kind = scheduler.process, scheduler.config["prediction_type"]
    noise = torch.randn((len(images), 3, 8, 8), generator=generator)
    velocity = None if hybrid else noise[:, 2:] * (process.gamma * process.mass) ** 0.5
    times = [torch.full((len(images),), t, dtype=torch.float64) for t in TIMES]
    losses = [cld_loss(as_network(unet), images, of, noise[:, :2], process, kind, velocity) for of in times]
    return [float(loss.mean()) for loss in losses]


def losses(args: argparse.Namespace) -> Report:
    """Hybrid against denoising score matching, with the mixed score and without: the same network, steps and seed."""
    results = results_of(args, "cld_losses")
    ratios, errors, own = {}, {}, {}
    for name, options in LOSSES.items():
        unet, scheduler = train_cld(args, **options)
        hybrid = "cld_loss" not in options
        ratios[name] = ratios_to_floor(results, name, unet, scheduler, args.calls)
        errors[name] = score_errors(unet, scheduler, args.num_samples, True)
        own[name] = errors[name] if hybrid else score_errors(unet, scheduler, args.num_samples, False)
    curves = as_curves(ratios, args.calls)
    return Report(
        name="cld_losses",
        title="CLD: hybrid score matching and the mixed score",
        question="What do hybrid score matching (HSM in place of DSM) and the mixed score add, all else equal?",
        verdict=verdict_on_losses(ratios, errors, args.calls),
        tables=[
            curve_table("Sliced W2 over the floor.", "", curves),
            by_time(
                "Error of the score: the HSM loss (weight ell^-2) on the held-out digits, the same noise for all.",
                errors,
            ),
            by_time("The loss that each was trained on, there. That of DSM holds the variance of its own target.", own),
        ],
        pictures=[plot_losses(curves, errors, args.output / "cld_losses.png")],
        conditions=digits_conditions(args) + " beta = 4, mass 1/4, gamma 0.04, sscs on the quadratic grid.",
    )


def plot_losses(curves: Mapping[str, Curve], errors: Mapping[str, Sequence[float]], path: Path) -> str:
    """Quality against network calls, and the error of the score against time; the name of the file."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {name: {**curve_style(i), "linestyle": "--" if "cld_loss" in LOSSES[name] else "-"}
              for i, name in enumerate(curves)}  # fmt: skip
    plot_curves(left, curves, 1, styles)
    for name, values in errors.items():
        right.semilogy(TIMES, values, label=name, **styles[name])
    left.set(ylabel="sliced W2 over the floor", title="samples")
    right.set(xlabel="t", ylabel="HSM loss, held-out digits", title="error of the score")
    left.legend(fontsize=8)
    return save_picture(figure, path)


def against(ours: str, theirs: str, errors: Mapping[str, Sequence[float]], calls: Sequence[int]) -> str:
    """A sentence on the error of `theirs` over that of `ours` at every number of calls, and on who is better where."""
    gains = {n: b / a for n, a, b in zip(calls, errors[ours], errors[theirs], strict=True)}
    figures = ", ".join(f"{gain:.2f} at {n}" for n, gain in gains.items())
    better = [str(n) for n, gain in gains.items() if gain > 1 + TIE]
    worse = [str(n) for n, gain in gains.items() if gain < 1 / (1 + TIE)]
    words = [f"{kind} at {', '.join(where)} calls" for kind, where in (("better", better), ("worse", worse)) if where]
    return f"{theirs} over {ours}: {figures}; " + (f"{ours} is {' and '.join(words)}." if words else "no difference.")


def by_time(caption: str, losses: dict[str, list[float]]) -> Table:
    rows = [[name, *values, sum(values) / len(values)] for name, values in losses.items()]
    return Table(caption, ["", *(f"t = {t:g}" for t in TIMES), "mean"], rows)


def verdict_on_losses(ratios: dict[str, list[float]], errors: dict[str, list[float]], calls: list[int]) -> str:
    mean = {name: sum(values) / len(values) for name, values in errors.items()}
    pairs = [(f"HSM, {score}", f"DSM, {score}") for score in ("mixed score", "plain score")]
    pairs += [(f"{loss}, mixed score", f"{loss}, plain score") for loss in ("HSM", "DSM")]
    sentences = ["Sliced W2:"] + [against(ours, theirs, ratios, calls) for ours, theirs in pairs]
    sentences.append(
        "Error of the score, mean over the times: "
        + ", ".join(f"{theirs} over {ours} {mean[theirs] / mean[ours]:.2f}" for ours, theirs in pairs)
        + "."
    )
    return " ".join(sentences)
