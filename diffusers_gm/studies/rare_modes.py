"""Rare and far modes, with exact scores, and an image that is to become another: a study of `.gm_sgm`.

What decides is where the calls are spent, on the first level or on the way down, and not how long the steps are.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digit_labels, split_digits
from ..evaluation.report import plain_log
from ..evaluation.results import Statistic
from ..evaluation.sampling import NoGridError
from ..evaluation.table import Table
from ..pictures import curve_style
from ..processes.mixture import GaussianMixtureNoise
from ..processes.random import Draw
from ..readings.grids import sigma_grid
from ..samplers import Ancestral, Explore, Langevin, Memory, Sampler, sample
from ..samplers.langevin import EXPLORING_STEP, langevin_step
from ..samplers.sampler import Plan, Stepped
from .digits import kept_results, over_seeds
from .exact import ExactDenoiser
from .ncsnv2_trained import train_ncsnv2
from .pictures import save_picture
from .report import Report, by_calls

MIXTURE = GaussianMixtureNoise.from_power_law(1.5, 3)
WEIGHTS = (0.5, 0.2, 0.15, 0.1, 0.04, 0.01)
DISTANCE, WIDTH, SIGMA_MIN = 10.0, 0.3, 0.1
# First noise levels, in units of the distance.
FACTORS = (0.25, 0.5, 1.0)

# The level at which an image becomes another, and the first index of one that is a zero.
MIDWAY, ZERO = 1.0, 0


class ExploreByJumps(Explore):
    """`Explore` whose steps are of the random lengths of a mixture's jumps, as long as is stable."""

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma, after, a = plan.steps[i]
        if after != sigma:
            return super().step(plan, i, y, denoised, memory, draw)
        a = min(a, 0.5 / float(MIXTURE.scales.max()) ** 2) * MIXTURE.sample_scales(y.shape, draw) ** 2
        return langevin_step(y, denoised, sigma, a, draw.normal(y.shape)), memory._replace(denoised=())


LANGEVIN, EXPLORE, JUMPS = "annealed Langevin", f"explore, a = {EXPLORING_STEP:g}", "explore by jumps"


SAMPLERS: dict[str, Sampler] = {
    LANGEVIN: Langevin(),
    "annealed Langevin, told the chain's level": Langevin(follow_chain=True),
    "annealed jumps": Langevin(jumps=MIXTURE),
    "annealed jumps, exact steps": Langevin(jumps=MIXTURE, exact=True),
    "ancestral": Ancestral(),
    EXPLORE: Explore(),
    **{f"explore, a = {a}": Explore(step_size=a * SIGMA_MIN**2) for a in (0.1, 0.6)},
    JUMPS: ExploreByJumps(),
}
ON_NETWORK = (LANGEVIN, "annealed Langevin, told the chain's level", "annealed jumps", "ancestral", EXPLORE)


def far_modes() -> tuple[Tensor, Tensor]:
    """Six points in 16 dimensions, `(6, 1, 4, 4)`, all `DISTANCE` apart, and their weights `(6,)`."""
    points = torch.eye(16)[: len(WEIGHTS)] * DISTANCE / 2**0.5
    return points.view(-1, 1, 4, 4), torch.tensor(WEIGHTS)


def total_variation(samples: Tensor, points: Tensor, weights: Tensor) -> float:
    """Between the weights of modes and the shares of samples nearest to each of the points, in [0, 1]."""
    assert samples.isfinite().all()
    nearest = torch.cdist(samples.flatten(1), points.flatten(1)).argmin(1)
    return float((torch.bincount(nearest, minlength=len(points)) / len(samples) - weights).abs().sum() / 2)


def exact_draws(points: Tensor, weights: Tensor, count: int, generator: torch.Generator, width: float) -> Tensor:
    """`count` draws of the mixture of Gaussians of this width around the points."""
    chosen = points[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return chosen + width * torch.randn(chosen.shape, generator=generator)


def from_image(
    sampler: Sampler, denoiser: Callable, image: Tensor, high: float, low: float, calls: int, count: int, seed: int
) -> Tensor:
    """`count` samples of runs of `calls` from one image `(1, C, H, W)` plus noise of the level `high`.

    Raises:
        NoGridError: without a stable step.
    """
    try:
        counts = torch.tensor(sampler.calls_per_level(calls))
        sigmas = sigma_grid(high, low, len(counts), "log_snr").repeat_interleave(counts)
        sampler.plan(sigmas)
    except ValueError as error:
        raise NoGridError(str(error)) from error
    generator = torch.Generator().manual_seed(seed)
    start = image + high * torch.randn((count, *image.shape[1:]), generator=generator)
    return sample(sampler, denoiser, start, sigmas, generator)


def label_error(images: Tensor) -> float:
    """Total variation between the digits that images show, by their nearest training image, and all training digits."""
    points, labels = split_digits()[0], split_digit_labels()[0]
    shown = labels[torch.cdist(images.flatten(1), points.flatten(1)).argmin(1)]
    shares = [torch.bincount(found, minlength=10) / len(found) for found in (shown, labels)]
    return float((shares[0] - shares[1]).abs().sum() / 2)


Found = dict[tuple, Statistic | None]


def compare(found: Found, ours: str, keys: Sequence[tuple], theirs: str = LANGEVIN) -> tuple[int, int]:
    """In how many settings `ours` is better, and worse, than `theirs` by more than two standard errors."""
    better = worse = 0
    for key in keys:
        a, b = found.get((ours, *key)), found.get((theirs, *key))
        if a and b and abs(a.mean - b.mean) > 2 * (a.error**2 + b.error**2) ** 0.5:
            better, worse = better + (a.mean < b.mean), worse + (a.mean > b.mean)
    return better, worse


def plot(found: Found, budgets: Sequence[int], floor: float, path: Path) -> str:
    """The error of the weights against the first level, a panel for each number of calls; the name of the file."""
    size = (3.5 + 5 * len(budgets), 5.2)
    figure, axes = plt.subplots(1, len(budgets), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, calls in zip(axes[0], budgets, strict=True):
        for i, name in enumerate(SAMPLERS):
            curve = [(f, v.mean, v.error) for f in FACTORS if (v := found[name, f, calls])]
            shown = zip(*curve, strict=True) if curve else ((), (), ())
            axis.errorbar(*shown, label=name, capsize=2, **curve_style(i))
        axis.axhline(floor, color="gray", linestyle=":", label="exact draws")
        axis.set(title=f"{calls} calls", xlabel="first level / distance of the modes", xticks=FACTORS)
        plain_log(axis, "y")
    axes[0, 0].set_ylabel("total variation of the mode weights")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return save_picture(figure, path)


def rare_modes(args: argparse.Namespace) -> Report:
    budgets, seeds, count = args.calls or [50, 200], max(5, args.seeds), 8 * args.num_samples
    points, weights = far_modes()
    denoiser = ExactDenoiser(points, WIDTH, weights=weights)
    results = kept_results(
        "rare_modes",
        count,
        args.output,
        steps=args.steps,
        modes=[WEIGHTS, DISTANCE, WIDTH, SIGMA_MIN],
        mixture=[MIXTURE.weights.tolist(), MIXTURE.scales.tolist()],
        samplers={name: repr(sampler) for name, sampler in SAMPLERS.items()},
    )
    unet, scheduler = train_ncsnv2(args, 0)
    zero = split_digits()[0][split_digit_labels()[0] == ZERO][:1]

    def network(y: Tensor, sigma: float) -> Tensor:
        return scheduler.denoise(lambda x, t: unet(x, t).sample, y, None, torch.tensor(sigma))

    def modes(name: str, factor: float, calls: int, seed: int) -> dict[str, float]:
        high = factor * DISTANCE
        samples = from_image(SAMPLERS[name], denoiser, points[:1], high, SIGMA_MIN, calls, count, seed)
        return {"error": total_variation(samples, points, weights)}

    def subjects(name: str, calls: int, seed: int) -> dict[str, float]:
        samples = from_image(SAMPLERS[name], network, zero, MIDWAY, 0.01, calls, args.num_samples, seed)
        return {"error": label_error(samples)}

    settings = [(factor, calls) for calls in budgets for factor in FACTORS]
    found: Found = {}
    for name, (factor, calls) in itertools.product(SAMPLERS, settings):
        cell = f"{name}, first level {factor:g} distances"
        of_cell = over_seeds(results, cell, calls, seeds, partial(modes, name, factor, calls))
        found[name, factor, calls] = of_cell.get("error")
    for name, calls in itertools.product(ON_NETWORK, budgets):
        of_cell = over_seeds(results, f"{name}, digits", calls, args.seeds, partial(subjects, name, calls))
        found[name, calls] = of_cell.get("error")
    exact = (exact_draws(points, weights, count, torch.Generator().manual_seed(s), WIDTH) for s in range(seeds))
    floor = Statistic.of([total_variation(draws, points, weights) for draws in exact]).mean
    real = label_error(split_digits()[1][: args.num_samples])

    def words(key: tuple) -> str:
        value = found.get(key)
        if value is None:
            return "-"
        return f"{value.mean:.3f}" + (f" ± {value.error:.3f}" if value.spread is not None else "")

    first = [f"{words((EXPLORE, FACTORS[0], n))} against {words((LANGEVIN, FACTORS[0], n))} at {n}" for n in budgets]
    jumps = [compare(found, name, settings) for name in SAMPLERS if "annealed jumps" in name]
    by_jumps = compare(found, JUMPS, settings, EXPLORE)
    midway = [f"{words((EXPLORE, n))} against {words((LANGEVIN, n))} at {n}" for n in budgets]
    columns = [f"{factor:g} distances, {calls} calls" for factor, calls in settings]
    return Report(
        "gm_sgm_rare_modes",
        "GM-SGM: rare and far modes",
        "Started in the largest of six far modes, with exact scores, what finds the rare ones: jumps, or steps on the "
        "first level? And does an image become another in the same way?",
        f"From a first level of a quarter of the distance, exploring has an error of "
        f"{', '.join(first)} calls for annealed Langevin; exact draws have {floor:.3f}. Of {len(settings)} settings "
        f"jumps on the ladder are better than Langevin steps in {jumps[0][0]} and worse in {jumps[0][1]}, with exact "
        f"steps in {jumps[1][0]} and {jumps[1][1]} (two standard errors); exploring by jumps is better than exploring "
        f"in {by_jumps[0]} and worse in {by_jumps[1]}. From one zero at sigma = {MIDWAY:g}, a trained network: "
        f"exploring {', '.join(midway)} calls; held-out digits have {real:.3f}.",
        [
            Table(f"Six modes in 16 dimensions: total-variation error of their weights, mean ± standard error of "
                  f"{seeds} seeds, n = {count}; exact draws have {floor:.3f}. `-`: no stable step.",
                  ["sampler", *columns], [[s, *(words((s, *key)) for key in settings)] for s in SAMPLERS]),
            Table(f"A network of the digits, from one zero plus noise of {MIDWAY:g}: total variation between the "
                  f"digits shown, by the nearest training image, and all, {args.seeds} seed(s), n = "
                  f"{args.num_samples}; held-out ones have {real:.3f}.", ["sampler", *by_calls(budgets)],
                  [[s, *(words((s, n)) for n in budgets)] for s in ON_NETWORK]),
        ],
        [plot(found, budgets, floor, args.output / "gm_sgm_rare_modes.png")],
        f"Weights {', '.join(map(str, WEIGHTS))}; all modes {DISTANCE:g} apart, width {WIDTH:g}, last level "
        f"{SIGMA_MIN:g}; runs start at the largest mode plus noise of the first level. Jumps: power law, alpha = 1.5, "
        f"K = 3. The network: ncsnv2, {args.steps} steps.",
    )  # fmt: skip
