"""SSCS against Euler-Maruyama in squared distances, as its paper has it: a study of `.cld`.

FID is squared: a factor of 2.6 there is one of 1.6 in the distance. On Gaussians both are exact; the digits have FD.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digits
from ..evaluation.distances import frechet_distance
from ..evaluation.report import Curve, plot_curves
from ..evaluation.sampling import describe_model
from ..pictures import curve_style
from ..pipelines import CLDPipeline
from ..processes.random import Draw
from ..samplers import Memory
from ..schedulers import CalibratedMultistepScheduler, CLDSSCSScheduler
from .cld_training import results_of, train_cld
from .digits import images_of
from .exact import ExactDenoiser, NetworkOf, exact_network
from .pictures import as_curves, plot_behind, save_picture
from .report import Report, table_of

# Euler-Maruyama's FID over that of SSCS, CIFAR-10 (arXiv 2112.07068, table 2), by network calls.
PUBLISHED = {50: 2.6, 150: 2.3, 275: 1.4}

# Variances of the directions of data: what SSCS is made for, narrower and wider data, and a spectrum as images have it.
SPECTRA = {
    "variance 1": [1.0],
    "variance 0.25": [0.25],
    "variance 0.04": [0.04],
    "variance 4": [4.0],
    "deviations 1 / k": [1 / k**2 for k in (1, 2, 4, 8, 16, 32)],
}

GRIDS, MULTISTEP = ("uniform", "quadratic", "log_snr"), "multistep with corrector"
EM, SSCS = "euler_maruyama, quadratic", "sscs, quadratic"
OF_CLD: dict[str, dict[str, Any]] = {
    "euler_maruyama": {"algorithm_type": "euler_maruyama"},
    "sscs": {},
    "sscs, order 2": {"splitting_order": 2},
    "probability_flow": {"algorithm_type": "probability_flow"},
}
# Of a network that sees a velocity; the last two leave the velocity out: its probability flow is that of y alone.
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"{name}, {grid}": (CLDSSCSScheduler, {"algorithm_type": "sscs", "timestep_spacing": grid} | options)
        for name, options in OF_CLD.items()
        for grid in GRIDS
    },
    f"{MULTISTEP}, log_snr": (CalibratedMultistepScheduler, {"grid": None, "timestep_spacing": "log_snr"}),
    MULTISTEP: (CalibratedMultistepScheduler, {}),
}


def terminal_variance(scheduler: Any, num_calls: int, data_variance: float = 0.25) -> float:
    """Variance of x after a run with the exact denoiser of `N(0, data_variance)`, without sampling.

    A run is linear in what it draws: of a batch of runs, each has one unit draw and zeros else, and squares add up.
    """
    scheduler.set_timesteps(num_calls)
    reading, sampler, num_runs = scheduler.reading, scheduler.sampler, 2 * num_calls + 2
    draw = Pulses(unused=iter(torch.eye(num_runs, dtype=torch.float64)))
    labels = scheduler.timesteps.double()
    plan, start = sampler.plan(reading.sigma(labels)), reading.calls(labels)[0]
    y, companion = reading.coordinates(reading.initial_sample(draw.normal((num_runs, 2)), start.sigma), start)
    memory = Memory(companion=companion)
    for i, sigma in enumerate(plan.sigmas.tolist()):
        y, memory = sampler.step(plan, i, y, data_variance / (data_variance + sigma**2) * y, memory, draw)
    return float(y.square().sum())


@dataclass(frozen=True)
class Pulses(Draw):
    """Draws for as many runs as there are rows: every number drawn is 1 in one run of its own, and 0 in the others."""

    unused: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([next(self.unused) for _ in range(math.prod(shape[1:]))], -1).view(tuple(shape))


def scheduler_of(name: str, config: Any) -> Any:
    """The sampler for the network of a `CLDSSCSScheduler`'s config."""
    cls, options = SAMPLERS[name]
    return cls.from_config(config, **options)


def squared_w2(scheduler: Any, num_calls: int, spectrum: Sequence[float]) -> float:
    """W2^2, per direction, between Gaussian data and what a run with their exact score leaves."""
    left = [terminal_variance(scheduler, num_calls, variance) for variance in spectrum]
    return sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(left, spectrum, strict=True)) / len(spectrum)


def with_root(factor: float) -> str:
    """A factor of squared distances, and its root."""
    return f"{factor:.3g} ({math.sqrt(factor):.3g})"


def factors(by_name: dict[str, list[float]]) -> list[str]:
    """Euler-Maruyama over SSCS, by number of calls."""
    return [with_root(em / sscs) for em, sscs in zip(by_name[EM], by_name[SSCS], strict=True)]


EXACT, TRAINED = "exact denoiser", "trained network"


def models_of(args: argparse.Namespace) -> dict[str, tuple[Any, CLDSSCSScheduler]]:
    """Networks of the digits that see a velocity, and the schedulers that describe them: exact, and trained."""
    if args.model:
        pipeline = CLDPipeline.from_pretrained(args.model)
        trained = pipeline.unet, pipeline.scheduler
    else:
        trained = train_cld(args)
    exact = CLDSSCSScheduler.from_config(trained[1].config, prediction_type="velocity_score")
    network = NetworkOf(exact_network(ExactDenoiser(split_digits()[0]), exact), (1, 8, 8), 2)
    return {EXACT: (network, exact), TRAINED: trained}


# FD of 64 pixels needs more images than that.
FEWEST = 80


def fd_of_digits(images: Tensor) -> dict[str, float]:
    """FD of pixels to the training digits; nothing where samples are not finite."""
    if not images.isfinite().all():
        return {}
    return {"fd": frechet_distance(images.clamp(-1, 1).flatten(1), split_digits()[0].flatten(1))}


def on_digits(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """FD by network, sampler and number of calls; nan where samples are not finite."""
    models = models_of(args)
    results = results_of(args, "cld_squared", model=describe_model(CLDPipeline(*models[TRAINED])))
    found: dict[str, dict[str, list[float]]] = {model: {} for model in models}
    for model, (network, described) in models.items():
        for name in SAMPLERS:
            pipeline = CLDPipeline(network, scheduler_of(name, described.config))
            draws = {n: partial(images_of, pipeline, n, max(args.num_samples, FEWEST)) for n in args.calls}
            cells = [results.measure(f"{model}, {name}", n, 0, draw, fd_of_digits) for n, draw in draws.items()]
            found[model][name] = [cell.scores.get("fd", math.nan) for cell in cells]
    return found


def plot(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> str:
    """A row of panels for each of these, one a sampler: its grids, among the thin lines of all others; the name of the
    file."""
    families = [*OF_CLD, MULTISTEP]
    size = (2.7 * len(families), 0.8 + 3 * len(panels))
    figure, axes = plt.subplots(len(panels), len(families), figsize=size, layout="constrained", sharey="row")
    for row, (title, curves) in zip(axes, panels.items(), strict=True):
        for axis, family in zip(row, families, strict=True):
            named = {grid: curves[name] for grid in GRIDS if (name := f"{family}, {grid}") in curves}
            named |= {"even": curves[family]} if family in curves else {}
            plot_behind(axis, [curve for curve in curves.values() if curve not in named.values()])
            plot_curves(axis, named, styles={grid: curve_style([*GRIDS, "even"].index(grid)) for grid in named})
            axis.label_outer()
        row[0].set_ylabel(title)
    for axis, family in zip(axes[0], families, strict=True):
        axis.set_title(family, fontsize=10)
    shown = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), title="levels of the calls"
    )
    return save_picture(figure, path)


def squared(args: argparse.Namespace) -> Report:
    """Euler-Maruyama over SSCS, squared and not, on Gaussians and on the digits."""
    described = CLDSSCSScheduler(prediction_type="velocity_score")
    gaussian = {
        spectrum: {
            name: [squared_w2(scheduler_of(name, described.config), n, of) for n in args.calls] for name in SAMPLERS
        }
        for spectrum, of in SPECTRA.items()
    }
    digits = on_digits(args)
    published = [with_root(PUBLISHED[n]) if n in PUBLISHED else "-" for n in args.calls]
    quarter = gaussian["variance 0.25"]
    panels = {"Gaussian of variance 0.25, W2^2": quarter, "digits, trained network, FD": digits[TRAINED]}
    curves = {title: as_curves(by_name, args.calls) for title, by_name in panels.items()}

    def best(by_name: dict[str, list[float]], i: int) -> str:
        name = min(by_name, key=lambda name: by_name[name][i])
        return f"{name} ({by_name[name][i]:.3g})"

    losing = [s for s, by in gaussian.items() if all(e < b for e, b in zip(by[EM], by[SSCS], strict=True))]
    known = set(args.calls) & PUBLISHED.keys() or set(args.calls)
    nearest = ", ".join(f"{f} at {n}" for f, n in zip(factors(quarter), args.calls, strict=True) if n in known)
    return Report(
        name="cld_squared",
        title="CLD: SSCS and Euler-Maruyama in squared distances",
        question="Is SSCS ahead of Euler-Maruyama by the published factors, in a squared distance as FID is?",
        verdict=f"Euler-Maruyama over SSCS, squared (root), Gaussian data of variance 0.25: {nearest} calls; published "
        f"{', '.join(f'{p:g} at {n}' for n, p in PUBLISHED.items())}. SSCS is behind at every number of calls on: "
        f"{', '.join(losing) or 'none'}. On the digits: "
        + "; ".join(
            f"{model}, {', '.join(f'{f} at {n}' for f, n in zip(factors(by), args.calls, strict=True))}, the least FD "
            f"at {args.calls[0]} calls {best(by, 0)}, at {args.calls[-1]} {best(by, -1)}"
            for model, by in digits.items()
        )
        + ".",
        tables=[
            table_of(
                "Euler-Maruyama over SSCS, squared distances (their roots), quadratic grid.",
                {"published, CIFAR-10, FID": published}
                | {f"Gaussian, {spectrum}, W2^2": factors(by) for spectrum, by in gaussian.items()}
                | {f"digits, {model}, FD": factors(by) for model, by in digits.items()},
                args.calls,
            ),
            *(
                table_of(f"Gaussian, {spectrum}: W2^2 a direction.", by, args.calls)
                for spectrum, by in gaussian.items()
            ),
            *(
                table_of(f"Digits, {model}: FD of pixels to the training digits.", by, args.calls)
                for model, by in digits.items()
            ),
        ],
        pictures=[plot(curves, args.output / "cld_squared.png")],
        conditions=f"Gaussians: exact, no sampling. Digits, 8 x 8: a training of {args.steps} steps of {args.batch} "
        f"images, seed 0; one seed of {max(args.num_samples, FEWEST)} samples. The multistep sampler on a velocity "
        "network follows the probability flow of the noisy image alone, which the velocity does not enter, with a "
        "corrector.",
    )
