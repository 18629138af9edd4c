"""What a network of mixture noise is good for: it works its noise level out by itself. A study of `.gm_sgm`."""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digits
from ..evaluation.report import plain_log
from ..evaluation.results import Statistic
from ..evaluation.table import Table
from ..pictures import curve_style
from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..processes.noise_level import estimate_noise_level
from ..processes.random import Draw
from ..readings.grids import sigma_grid
from ..samplers import Langevin, Memory, Sampler, TwoStep, sample
from ..samplers.sampler import Stepped
from .digits import kept_results, over_floor, over_seeds, tie, trained
from .exact import ExactDenoiser
from .pictures import save_picture
from .report import Report

# Data of the exact denoisers: Gaussians of this width around every fourth training digit. Ends of the runs.
WIDTH, FOURTH = 0.05, slice(None, None, 4)
FIRST, LAST = 9.63, 0.01
MIXTURE = GaussianMixtureNoise.from_power_law(1.5, 2)
PER_ELEMENT = GaussianMixtureNoise.from_power_law(1.5, 2, per_element=True)

# `(y, sigma) -> D`, told a level for each image.
Denoiser = Callable[[Tensor, Tensor], Tensor]
# Quality by exact or trained, column, calls and what is off.
Runs = dict[Any, Statistic | None]

LEVELS = (0.05, 0.2, 0.8, 3.2)
LOOKS = (1, 2, 3, 6)
FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
# By which factors the first noise of a run is off, and all levels that the network is told.
RIGHT = "as it should be"
RUNS = {RIGHT: (1.0, 1.0), "first noise x 0.5": (0.5, 1.0), "first noise x 2": (2.0, 1.0),
        "told x 0.5": (1.0, 0.5), "told x 2": (1.0, 2.0)}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Attributes:
    denoiser: what it answers to noisy images, told `(B,)` levels.
    noise: that it knows.
    images: clean ones it was not trained on, `(n, 1, 8, 8)`.
    """

    denoiser: Denoiser
    noise: GaussianMixtureNoise
    images: Tensor

    def own(self, y: Tensor, tau: Tensor) -> Tensor:
        """D of images whose noise is of standard deviation tau."""
        return self.denoiser(y, tau / self.noise.commonest_scale)


def per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


EXACT, TRAINED = "exact", "trained"
ONE, MIXED, ELEMENTS = "K = 1", "K = 2", "K = 2 per element"
KINDS: dict[str, tuple[GaussianMixtureNoise, dict[str, Any]]] = {
    ONE: (GAUSSIAN, {"method": "ncsnv2"}),
    MIXED: (MIXTURE, {}),
    ELEMENTS: (PER_ELEMENT, {"mixture_per_element": True}),
}


@cache
def training_digits() -> Tensor:
    return split_digits()[0]


def subject(args: argparse.Namespace, where: str, kind: str, seed: int) -> Subject:
    """A denoiser of the digits, and images for it: held-out digits, or draws of what the exact one knows."""
    noise, options = KINDS[kind]
    draws = torch.Generator().manual_seed(1000 + seed)
    if where == EXACT:
        points = training_digits()[FOURTH]
        chosen = points[torch.randint(len(points), (args.num_samples,), generator=draws)]
        images = chosen + WIDTH * torch.randn(chosen.shape, generator=draws)
        return Subject(ExactDenoiser(points, WIDTH, noise), noise, images)
    unet, scheduler = trained(args.output, max_train_steps=args.steps, seed=seed % args.trainings, **options)
    space, prediction_type = scheduler.noise_space, scheduler.reading.prediction_type

    @torch.no_grad()
    def denoiser(y: Tensor, sigma: Tensor) -> Tensor:
        levels = per_image(sigma)
        output = unet(space.alpha(levels) * y, space.timestep(sigma).float()).sample
        return space.denoised(output, y, levels, prediction_type)

    return Subject(denoiser, noise, split_digits()[1][: args.num_samples])


# --- What is measured ---


def noise_found(of: Subject, tau: float, seed: int) -> dict[str, float]:
    """Of measured levels of images at tau, by number of looks: mean and spread of the logarithm of their ratio to it;
    the spread that the estimate says of itself; and what the length of `y - D` alone says at the true level."""
    draws = torch.Generator().manual_seed(seed)
    y = of.images + tau * torch.randn(of.images.shape, generator=draws)
    found: dict[str, float] = {}
    for looks in LOOKS:
        sigma, error = estimate_noise_level(of.own, y, LAST, FIRST, looks, torch.Generator().manual_seed(seed))
        off = (sigma / tau).log()
        found |= {f"bias {looks}": float(off.mean()), f"spread {looks}": float(off.std())}
    residual = y - of.own(y, torch.full((len(y),), tau))
    found["said"] = float(error.median())
    return found | {"residual": float((residual.flatten(1).square().mean(1).sqrt() / tau).log().mean())}


def errors(of: Subject, seed: int) -> dict[str, float]:
    """Mean squared errors of D by level of the noise: told that times each of the factors, and the measured one."""
    found: dict[str, float] = {}
    for tau in LEVELS:
        y = of.images + tau * torch.randn(of.images.shape, generator=torch.Generator().manual_seed(seed))
        measured = estimate_noise_level(of.own, y, LAST, FIRST, generator=torch.Generator().manual_seed(seed)).sigma
        answers: dict[Any, Tensor] = {f: of.denoiser(y, torch.full((len(y),), f * tau)) for f in FACTORS}
        answers |= {"own": of.own(y, measured), "known": of.own(y, torch.full((len(y),), tau))}
        found |= {f"{name}, {tau}": float((d - of.images).square().mean()) for name, d in answers.items()}
    return found


@dataclass(frozen=True)
class OnTheLadder:
    """A sampler whose images are brought to the level of the ladder at every call, each from its own by the length of
    `y - D`: the far ones jump, the near ones roam."""

    sampler: Sampler
    kept: dict[float, float]  # `div D / d` at the levels of the run, by which `y - D` is shorter than the noise

    def plan(self, sigmas: Tensor) -> Any:
        return self.sampler.plan(sigmas)

    def step(self, plan: Any, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma = float(plan.sigmas[i])
        length = (y - denoised).flatten(1).square().mean(1)
        own = (length / (1 - self.kept[sigma])).sqrt().clamp(sigma / 4, 4 * sigma)
        return self.sampler.step(plan, i, denoised + per_image(sigma / own) * (y - denoised), denoised, memory, draw)


def kept_by_level(of: Subject, sigmas: Tensor) -> dict[float, float]:
    """The mean of `div D / d` over training digits at each of the levels."""
    images, draws = training_digits()[:64], torch.Generator().manual_seed(0)
    found = {}
    for sigma in sigmas.tolist():
        y = images + sigma * torch.randn(images.shape, generator=draws)
        probe, level = torch.randn(images.shape, generator=draws).sign(), torch.full((len(y),), sigma)
        moved = (of.own(y + 0.1 * sigma * probe, level) - of.own(y, level)) / (0.1 * sigma)
        found[sigma] = min(max(float((probe * moved).mean()), 0.0), 0.95)
    return found


LADDER, CHAIN, EVERY_CALL, ONCE = "ladder", "chain", "own level, every call", "own level, measured once"


def quality(of: Subject, sampler: str, way: str, calls: int, run: str, seed: int) -> dict[str, float]:
    """Sliced W2 over the floor of a run whose first noise, or what the network is told, is off."""
    (first_noise, told), noise, draws = RUNS[run], of.noise, torch.Generator().manual_seed(seed)
    start = FIRST * first_noise * noise.sample(of.images.shape, draws)
    steps: Any = TwoStep() if sampler == "ode" else Langevin(noise=noise, follow_chain=way == CHAIN)
    sigmas = sigma_grid(FIRST, LAST, len(steps.calls_per_level(calls)), "log_snr")
    sigmas = sigmas.repeat_interleave(torch.tensor(steps.calls_per_level(calls)))

    def denoiser(y: Tensor, sigma: float | Tensor) -> Tensor:
        return of.denoiser(y, told * torch.as_tensor(sigma, dtype=y.dtype).expand(len(y)))

    scale: Any = 1.0
    if way == EVERY_CALL:
        steps = OnTheLadder(steps, kept_by_level(of, sigmas))
    if way == ONCE:
        # The flow knows ratios of levels alone: each image has a ladder of its own, a multiple of the others.
        own = replace(of, denoiser=denoiser).own
        measured = estimate_noise_level(own, start, LAST, 4 * FIRST, generator=draws).sigma
        scale = measured / (noise.commonest_scale * FIRST)
    return {"error": over_floor(sample(steps, lambda y, sigma: denoiser(y, scale * sigma), start, sigmas, draws))}


# --- The report ---

# Samplers, and how the network learns the level; those of one network of Gaussian noise alone are ways to help it.
COLUMNS = [(ONE, "ode", LADDER), (ONE, "ode", EVERY_CALL), (ONE, "ode", ONCE), (MIXED, "ode", LADDER),
           (ELEMENTS, "ode", LADDER), (ONE, "langevin", LADDER), (ONE, "langevin", CHAIN),
           (ONE, "langevin", EVERY_CALL), (MIXED, "langevin", LADDER), (MIXED, "langevin", CHAIN),
           (ELEMENTS, "langevin", LADDER), (ELEMENTS, "langevin", CHAIN)]  # fmt: skip


def claim(args: argparse.Namespace) -> Report:
    budgets = args.calls or [10, 20, 50]
    middle = budgets[len(budgets) // 2]
    settings = {"steps": args.steps, "trainings": args.trainings, "levels": LEVELS, "runs": RUNS, "width": WIDTH}
    results = kept_results("claim", args.num_samples, args.output, **settings)
    subjects = [(where, kind) for where in (EXACT, TRAINED) for kind in KINDS]
    of = cache(partial(subject, args))

    def of_subject(
        key: tuple[str, str], what: str, calls: int | None, measure: Callable[..., dict[str, float]], *arguments: Any
    ) -> dict[str, Statistic]:
        name = f"{', '.join(key)}: {what}"
        return over_seeds(results, name, calls, args.seeds, lambda seed: measure(of(*key, seed), *arguments, seed))

    found = {(*s, tau): of_subject(s, f"level {tau:g}", None, noise_found, tau) for s in subjects for tau in LEVELS}
    squared = {s: of_subject(s, "errors", None, errors) for s in subjects}
    cells = [(middle, run) for run in RUNS] + [(calls, RIGHT) for calls in budgets if calls != middle]
    runs: Runs = {}
    for where, column, (calls, run) in itertools.product((EXACT, TRAINED), COLUMNS, cells):
        kind, sampler, way = column
        cell = of_subject((where, kind), f"{sampler}, {way}, {run}", calls, quality, sampler, way, calls, run)
        runs[where, column, calls, run] = cell.get("error")

    def over_one(where: str, kind: str, told: Any) -> float:
        """The error over that of K = 1 told rightly, geometric mean over the levels."""
        own, one = squared[where, kind], squared[where, ONE]
        return statistics.geometric_mean(own[f"{told}, {tau}"].mean / one[f"1.0, {tau}"].mean for tau in LEVELS)

    level_rows = [
        [", ".join(key[:2]), key[2], *(words(f, n) for n in LOOKS), f["said"].mean, math.exp(f["residual"].mean)]
        for key, f in found.items()
    ]
    told_rows = [[", ".join(s), *(over_one(*s, f) for f in (*FACTORS, "own"))] for s in subjects]
    run_tables = [
        Table(
            f"Sliced W2 over the floor of held-out digits, {where} denoiser.",
            ["sampler", "network", "level", *(f"{run}, {calls} calls" for calls, run in cells)],
            [
                [sampler, kind, way, *(f"{runs[where, (kind, sampler, way), *cell]:.2f}" for cell in cells)]
                for kind, sampler, way in COLUMNS
            ],
        )
        for where in (EXACT, TRAINED)
    ]
    looks = [f"{n} look{'s' * (n > 1)}" for n in LOOKS]
    return Report(
        "gm_sgm_claim",
        "GM-SGM: a network that works out its own noise level",
        "Under mixture noise a network is not told the exact level of an image, and must see it there. How well can a "
        "level be read off a network, and is one of mixture noise better for it, or of more use where levels are "
        "misjudged, than an ordinary one (K = 1) of the same size and training?",
        verdict(found, told_rows, runs, middle, tie(args.seeds)),
        [
            Table(
                "Measured noise levels over the true ones, by number of looks (a network call of twice the batch "
                "each), and in brackets the spread of the logarithm over images; the spread that the estimate says of "
                "itself; the ratio that the length of y - D alone gives at the true level.",
                ["denoiser", "sigma", *looks, "spread said", "by length alone"],
                level_rows,
            ),
            Table(
                "Mean squared error of D over that of K = 1 told rightly, by the factor that the told level is off; "
                "geometric mean over the levels above.",
                ["denoiser", *(f"told x {f:g}" for f in FACTORS), "own level, measured"],
                told_rows,
            ),
            *run_tables,
        ],
        [plot(args, told_rows, runs, middle)],
        f"Digits networks of `make demo`'s size, {args.steps} steps each, {args.trainings} training(s), {args.seeds} "
        f"seed(s) of noise, n = {args.num_samples}; exact denoisers of Gaussians of width {WIDTH:g} around every "
        f"fourth training digit. Mixtures: {MIXTURE}, per image and per element. Runs on equal ratios of levels from "
        f"{FIRST:g} to {LAST:g}; they end with D. `{EVERY_CALL}`: y is brought to the level of the ladder by the "
        f"length of y - D; `{ONCE}`: that of the first noise, and each image has a ladder of its own from there.",
    )


def words(found: dict[str, Statistic], looks: int) -> str:
    return f"{math.exp(found[f'bias {looks}'].mean):.2f} ({found[f'spread {looks}'].mean:.2f})"


def verdict(
    found: dict[Any, dict[str, Statistic]], told_rows: list[list[Any]], runs: Runs, calls: int, least: float
) -> str:
    """How well levels are measured, what a misjudged level costs, and whom least, with the trained networks."""

    def off(kind: str, name: str) -> str:
        """The largest error in the mean, over the levels."""
        return f"{max(abs(math.expm1(found[TRAINED, kind, tau][name].mean)) for tau in LEVELS):.0%}"

    def better(column: tuple[str, str, str], base: tuple[str, str, str]) -> str:
        pairs = {name: [mean_of(runs[TRAINED, of, calls, name]) for of in (base, column)] for name in RUNS}
        gains = [f"{name} {a:.2f} to {b:.2f}" for name, (a, b) in pairs.items() if b < (1 - least) * a]
        losses = [f"{name} {a:.2f} to {b:.2f}" for name, (a, b) in pairs.items() if b > (1 + least) * a]
        return f"{', '.join(column)}: better {'; '.join(gains) or 'nowhere'}, worse {'; '.join(losses) or 'nowhere'}"

    errors = {kind: next(row[1:] for row in told_rows if row[0] == f"{TRAINED}, {kind}") for kind in KINDS}
    off_by_two = ", ".join(f"{kind} {e[0]:.2f} and {e[len(FACTORS) - 1]:.2f}" for kind, e in errors.items())
    against = [better(column, (ONE, column[1], LADDER)) for column in COLUMNS if column != (ONE, column[1], LADDER)]
    return (
        f"Any network measures noise levels: after six looks they are off by at most {off(ONE, 'bias 6')} in the mean "
        f"with K = 1 and {off(MIXED, 'bias 6')} with K = 2, where the length of y - D alone is off by up to "
        f"{off(ONE, 'residual')}. A mixture needs fewer looks: after two, {off(MIXED, 'bias 2')} where K = 1 is off by "
        f"{off(ONE, 'bias 2')}. Told half and twice the level, the error of D over that of K = 1 told rightly is "
        f"{off_by_two}; at its measured level, K = 1 has {errors[ONE][-1]:.2f}. Runs of {calls} calls against K = 1 on "
        f"the ladder, differences of more than {least:.0%}: {'. '.join(against)}."
    )


def mean_of(value: Statistic | None) -> float:
    return value.mean if value else math.nan


def plot(args: argparse.Namespace, told_rows: list[list[Any]], runs: Runs, calls: int) -> str:
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 5.8), layout="constrained")
    for i, (name, *values) in enumerate(told_rows):
        axes[0].semilogx(FACTORS, values[: len(FACTORS)], label=name, **curve_style(i))
    axes[0].set(title="one answer", xlabel="told level / true level", ylabel="squared error over K = 1 told rightly")
    axes[0].set_xticks(FACTORS, [f"{f:g}" for f in FACTORS])
    axes[0].xaxis.minorticks_off()
    ways = list(dict.fromkeys((kind, way) for kind, _, way in COLUMNS))
    for axis, sampler in zip(axes[1:], ("ode", "langevin"), strict=True):
        for column in (column for column in COLUMNS if column[1] == sampler):
            kind, _, way = column
            values = [mean_of(runs[TRAINED, column, calls, run]) for run in RUNS]
            axis.plot(list(RUNS), values, label=f"{kind}, {way}", **curve_style(ways.index((kind, way))))
        axis.set(title=f"{sampler}, trained networks, {calls} calls", ylabel="sliced W2 over the floor")
        axis.tick_params(axis="x", labelrotation=20, labelsize=7)
        plain_log(axis, "y")
    for axis in axes:
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return save_picture(figure, args.output / "gm_sgm_claim.png")
