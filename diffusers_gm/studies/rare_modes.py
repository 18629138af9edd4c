"""Rare and far modes, and heavy-tailed data, with exact scores: a study of `.gm_sgm`.

No network: what is left is what the noise law and the sampler do.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..evaluation import mode_weights_error as total_variation
from ..evaluation.results import Statistic
from ..evaluation.sampling import NoGridError
from ..evaluation.table import Table
from ..pictures import curve_style
from ..processes.mixture import GaussianMixtureNoise
from ..schedulers import GMLangevinScheduler
from .digits import kept_results
from .exact import ExactDenoiser, exact_network, run
from .pictures import save_picture
from .report import Report

MIXTURE = GaussianMixtureNoise.from_power_law(1.5, 3)
WEIGHTS = (0.5, 0.2, 0.15, 0.1, 0.04, 0.01)
DISTANCE, WIDTH, SIGMA_MIN = 10.0, 0.3, 0.1
# Largest noise levels in units of the distance, and Langevin steps a level.
FACTORS, LANGEVIN_STEPS = (0.25, 0.5, 1.0), (1, 3, 5)

# Samplers: whether the score is that of mixture noise, the algorithm, and whether its clock is random (jumps).
GAUSSIAN_LANGEVIN = "Gaussian noise, langevin"
JUMP = "Gaussian noise, jump"
EXPONENTIAL, NO_JUMPS = "Gaussian noise, exponential", "Gaussian noise, exponential, no jumps"
SAMPLERS = {
    GAUSSIAN_LANGEVIN: (False, "langevin", False),
    JUMP: (False, "jump", True),
    NO_JUMPS: (False, "exponential", False),
    EXPONENTIAL: (False, "exponential", True),
    "mixture noise, langevin": (True, "langevin", True),
    "mixture noise, jump": (True, "jump", True),
    "Gaussian noise, ancestral": (False, "ancestral", False),
    "mixture noise, ancestral": (True, "ancestral", True),
}


def far_modes() -> tuple[Tensor, Tensor]:
    """Six points in 16 dimensions, `(6, 1, 4, 4)`, all `DISTANCE` apart, and their weights `(6,)`."""
    points = torch.eye(16)[: len(WEIGHTS)] * DISTANCE / 2**0.5
    return points.view(-1, 1, 4, 4), torch.tensor(WEIGHTS)


def heavy_tailed_points(count: int = 400, degrees: float = 1.5) -> Tensor:
    """Draws of a multivariate Student law in 4 dimensions, `(count, 1, 2, 2)`: their radius has the tail r^-degrees."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((count, 4), generator=generator)
    # A chi-squared variable of fractional degrees, by its quantiles.
    from scipy.stats import chi2

    uniform = torch.rand(count, generator=generator).numpy()
    scale = (degrees / torch.from_numpy(chi2.ppf(uniform, degrees)).float()).sqrt()
    return (normal * scale[:, None]).view(-1, 1, 2, 2)


def radius_distance(samples: Tensor, reference: Tensor) -> float:
    """W1 distance of the logarithms of the norms of as many samples and reference draws, `(n, ...)` each."""
    a, b = (x.flatten(1).norm(dim=1).log().sort().values for x in (samples, reference))
    return float((a - b).abs().mean())


def exact_draws(points: Tensor, weights: Tensor, count: int, generator: torch.Generator, width: float) -> Tensor:
    """`count` draws of the mixture of Gaussians of this width around the points."""
    chosen = points[torch.multinomial(weights, count, replacement=True, generator=generator)]
    return chosen + width * torch.randn(chosen.shape, generator=generator)


def sample(
    data: tuple[Tensor, Tensor, float], start: Tensor, sampler: str, sigma_max: float, steps: int, calls: int,
    count: int, seed: int,
) -> Tensor:  # fmt: skip
    """Samples from `start` plus noise of the first level, with the exact score.

    Raises:
        NoGridError: without a stable step.
    """
    points, weights, width = data
    mixture, algorithm, jumps = SAMPLERS[sampler]
    law = MIXTURE if jumps else GaussianMixtureNoise([1.0], [1.0])
    scheduler = GMLangevinScheduler(
        noise_space="ve",
        sigma_min=SIGMA_MIN,
        sigma_max=sigma_max,
        prediction_type="score" if mixture else "epsilon",
        model_noise="mixture" if mixture else "gaussian",
        mixture_weights=law.weights.tolist(),
        mixture_scales=law.scales.tolist(),
        algorithm_type=algorithm,
        num_langevin_steps=steps,
    )
    try:
        scheduler.set_timesteps(calls)
    except ValueError as error:
        raise NoGridError(str(error)) from error
    denoiser = ExactDenoiser(points, width, MIXTURE if mixture else None, weights)
    generator = torch.Generator().manual_seed(seed)
    first = start + scheduler.initial_sample((count, *points.shape[1:]), generator, torch.device("cpu"), torch.float32)
    return run(exact_network(denoiser, scheduler), scheduler, first, generator)


Found = dict[tuple, tuple[float, float] | None]


def compare(found: Found, ours: str, keys: Sequence[tuple]) -> tuple[list[str], list[str]]:
    """Where `ours` is better, and where worse, than Gaussian Langevin by more than two standard errors, in words.

    The largest ratio comes first.
    """
    better: list[tuple[float, str]] = []
    worse: list[tuple[float, str]] = []
    for key in keys:
        a, b = found.get((ours, *key)), found.get((GAUSSIAN_LANGEVIN, *key))
        if a is None or b is None:
            continue
        difference, error = a[0] - b[0], (a[1] ** 2 + b[1] ** 2) ** 0.5
        if abs(difference) > 2 * error:
            text = "sigma_1 {:g}, T = {}, {} calls" if len(key) == 3 else "{}, {} calls"
            case = max(a[0], b[0]) / min(a[0], b[0]), f"{text.format(*key)} ({b[0]:.3f} to {a[0]:.3f})"
            (better if difference < 0 else worse).append(case)
    return [text for _, text in sorted(better, reverse=True)], [text for _, text in sorted(worse, reverse=True)]


def summary(found: Found, keys: Sequence[tuple]) -> str:
    """Every sampler against Gaussian Langevin: in how many settings better and worse, and the largest gain."""
    words = []
    for sampler in SAMPLERS:
        measured = sum(found.get((sampler, *key)) is not None for key in keys)
        if sampler != GAUSSIAN_LANGEVIN and measured:
            better, worse = compare(found, sampler, keys)
            gain = f", most at {better[0]}" if better else ""
            words.append(f"{sampler}: {len(better)} better{gain}, {len(worse)} worse, of {measured}")
    return "; ".join(words)


def plot(found: Found, exact: float, levels: Sequence[str], calls: int, path: Path) -> str:
    figure, axes = plt.subplots(1, 4, figsize=(13, 4.6), layout="constrained")
    for axis, steps in zip(axes, LANGEVIN_STEPS, strict=False):
        for i, sampler in enumerate(SAMPLERS):
            curve = [(f, *v) for f in FACTORS if (v := found.get((sampler, f, steps, calls)))]
            if curve:
                axis.errorbar(*zip(*curve, strict=True), markersize=3, label=sampler, **curve_style(i))
        axis.axhline(exact, color="gray", linestyle=":", label="exact draws")
        axis.set(title=f"six modes, T = {steps}, {calls} calls", xlabel="sigma_1 / distance of the modes", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_ylim(0.01, 0.6)
    axes[0].set_ylabel("total variation of the mode weights")
    for i, sampler in enumerate(SAMPLERS):
        shown = [found[sampler, level, calls] for level in levels]
        axes[3].plot(levels, [v[0] if v else math.nan for v in shown], markersize=3, **curve_style(i))
    axes[3].set(title=f"heavy tails, T = 1, {calls} calls", ylabel="W1 of log radius", yscale="log", xlabel="sigma_1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return save_picture(figure, path)


def rare_modes(args: argparse.Namespace) -> Report:
    budgets = args.calls or [50, 200]
    seeds, count = max(5, args.seeds), 8 * args.num_samples
    points, weights = far_modes()
    heavy = heavy_tailed_points()
    even = torch.full((len(heavy),), 1 / len(heavy))
    distances = torch.pdist(heavy.flatten(1))
    levels = {"Technique 1": float(distances.max()), "median distance": float(distances.median())}
    results = kept_results(
        "rare_modes",
        count,
        args.output,
        floor=False,
        modes=[WEIGHTS, DISTANCE, WIDTH, SIGMA_MIN],
        mixture=[MIXTURE.weights.tolist(), MIXTURE.scales.tolist()],
        samplers=SAMPLERS,
    )

    def modes(sampler: str, factor: float, steps: int, calls: int, seed: int) -> dict[str, float]:
        data = (points, weights, WIDTH)
        samples = sample(data, points[0], sampler, factor * DISTANCE, steps, calls, count, seed)
        return {"error": total_variation(samples, points, weights)}

    def tails(sampler: str, level: str, calls: int, seed: int) -> dict[str, float]:
        samples = sample((heavy, even, 0.1), torch.zeros(1), sampler, levels[level], 1, calls, count, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        return {"error": radius_distance(samples, exact_draws(heavy, even, count, generator, 0.1))}

    def over_seeds(name: str, calls: int, make: Callable[[int], dict[str, float]]) -> tuple[float, float] | None:
        scores = results.of_seeds(name, calls, seeds, make)
        if scores is None:
            return None
        value = Statistic.of([score["error"] for score in scores])
        return value.mean, value.error

    settings = [(f, t, c) for c in budgets for f in FACTORS for t in LANGEVIN_STEPS]
    found: Found = {}
    for sampler in SAMPLERS:
        for factor, steps, calls in settings:
            if sampler.endswith("ancestral") and steps > 1:
                continue
            name = f"{sampler}, sigma_1 {factor:g} distances, T = {steps}"
            make = partial(modes, sampler, factor, steps, calls)
            found[sampler, factor, steps, calls] = over_seeds(name, calls, make)
        for level in levels:
            for calls in budgets:
                make = partial(tails, sampler, level, calls)
                found[sampler, level, calls] = over_seeds(f"{sampler}, heavy tails, {level}", calls, make)
    exact = [
        total_variation(exact_draws(points, weights, count, torch.Generator().manual_seed(s), WIDTH), points, weights)
        for s in range(seeds)
    ]

    from scipy.stats import t as student

    # That two means over seeds of one law differ by more than two standard errors.
    by_chance = 2 * float(student.sf(2, 2 * seeds - 2))

    def words(key: tuple) -> str:
        value = found.get(key)
        return "-" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}"

    rows = [[f"{f:g}", t, c, *(words((s, f, t, c)) for s in SAMPLERS)] for f, t, c in settings]
    heavy_rows = [[lv, c, *(words((s, lv, c)) for s in SAMPLERS)] for lv in levels for c in budgets]

    better, worse = compare(found, JUMP, settings)
    tail_keys = [(lv, c) for lv in levels for c in budgets]
    pairs = [(found[EXPONENTIAL, *key], found[NO_JUMPS, *key]) for key in settings]
    logs = [math.log(a[0] / b[0]) for a, b in pairs if a and b]
    typical = math.exp(sum(logs) / len(logs))
    best = {key: min((v[0], s) for s in SAMPLERS if (v := found.get((s, *key))) is not None) for key in settings}
    winners = [b[1] for b in best.values()]
    most = max(set(winners), key=winners.count)

    floor = sum(exact) / len(exact)
    picture = plot(found, floor, list(levels), budgets[-1], args.output / "gm_sgm_rare_modes.png")
    return Report(
        "gm_sgm_rare_modes",
        "GM-SGM: rare and far modes, heavy-tailed data",
        "Started in the largest of six far modes, with exact scores, do jumps or mixture noise find the rare modes "
        "better than Langevin dynamics with Gaussian noise? And do they get the tails of heavy-tailed data?",
        f"Jumps on the ordinary score help {'in places' if better else 'nowhere'}: they are better than Langevin "
        f"steps in {len(better)} and worse in {len(worse)} of {len(settings)} settings (two standard "
        f"errors, which {by_chance:.0%} of comparisons of equals exceed by chance). "
        f"Where steps are integrated exactly, jumps change the error by a factor {typical:.2f} (geometric mean, "
        f"exponential with over without jumps). All samplers against Gaussian Langevin: {summary(found, settings)}. "
        f"On the heavy-tailed data: {summary(found, tail_keys)}. The best sampler of the modes is most often "
        f"'{most}' ({winners.count(most)} of {len(settings)} settings).",
        [
            Table(f"Six modes in 16 dimensions, total-variation error of their weights, mean ± standard error of "
                  f"{seeds} seeds, n = {count}; exact draws have {floor:.3f}. `-`: no stable step, or the "
                  "sampler has no T.", ["sigma_1 / distance", "T", "calls", *SAMPLERS], rows),
            Table("400 points of a Student law in 4 dimensions (1.5 degrees of freedom), W1 of the log radius, T = 1.",
                  ["sigma_1", "calls", *SAMPLERS], heavy_rows),
        ],
        [picture],
        f"Weights {', '.join(map(str, WEIGHTS))}; all modes {DISTANCE:g} apart, width {WIDTH:g}, sigma_L = "
        f"{SIGMA_MIN:g}; chains start at the largest mode plus noise of the first level. Mixture: power law, alpha = "
        f"1.5, K = 3. Heavy tails: runs start at the origin; Technique 1 is {levels['Technique 1']:.3g}, the median "
        f"distance {levels['median distance']:.3g}.",
    )  # fmt: skip
