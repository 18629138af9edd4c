"""What NCSNv2's techniques do to trained networks: the studies `denoise` and `techniques` of `.ncsnv2`."""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..data import split_digits
from ..evaluation.report import Curve, plot_rows
from ..evaluation.results import Statistic
from ..evaluation.table import Table
from ..pictures import COLORS, curve_style
from ..processes.annealed import PRESETS, chain_variance, ladder_length, max_pairwise_distance, optimal_step_size
from ..schedulers import AnnealedLangevinScheduler
from .digits import images_of, kept_results, over_floor, over_seeds, pipeline_of, quality, tie, trained
from .exact import run
from .pictures import save_picture, show_rows
from .report import Report, by_calls

SIGMA_MIN = 0.01
# The largest noise level of NCSN over that of Technique 1, both for CIFAR-10: 1 / 50.
TOO_SMALL = PRESETS["ncsn"].sigma_max / PRESETS["ncsnv2-cifar10"].sigma_max


def train_ncsnv2(args: argparse.Namespace, seed: int, **options: Any) -> tuple[Any, Any]:
    """A network of one component and its scheduler, kept beside the reports."""
    return trained(args.output, method="ncsnv2", max_train_steps=args.steps, seed=seed, **options)


def technique_1() -> float:
    """The largest distance of two training digits, as `train_gm_sgm.py` measures it."""
    return round(max_pairwise_distance(split_digits()[0]), 4)


def conditions(args: argparse.Namespace) -> str:
    return (
        f"Digits networks of `make demo`'s size, {args.steps} steps each, {args.seeds} seed(s) of training and "
        f"sampling, n = {args.num_samples}; ± is the standard deviation over the seeds."
    )


# --- The final denoising ---


@torch.no_grad()
def last_call(
    unet: Any, scheduler: Any, sigma_last: float, num_calls: int, num_samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The images before and after the last of `num_calls` calls, the denoising, of runs that end at `sigma_last`."""
    first = scheduler.config["sigma_max"]
    sigmas = torch.logspace(math.log10(first), math.log10(sigma_last), num_calls - 1, dtype=torch.float64)
    noisy = AnnealedLangevinScheduler.from_config(scheduler.config, denoise=False)
    noisy.set_timesteps(sigmas=sigmas.clamp(sigma_last, first))
    generator = torch.Generator().manual_seed(seed)
    start = noisy.initial_sample((num_samples, 1, 8, 8), generator, torch.device("cpu"), torch.float32)
    before = run(lambda x, t: unet(x, t).sample, noisy, start, generator)
    t = noisy.timesteps[-1]
    output = unet(noisy.scale_model_input(before, t), t).sample
    return before, noisy.noise_space.denoised(output, before, sigma_last, noisy.reading.prediction_type)


def denoise(args: argparse.Namespace) -> Report:
    budgets = [args.calls] if args.calls else [50, 200]
    levels = (0.01, 0.05, 0.1, 0.2)
    results = kept_results("denoise", args.num_samples, args.output, steps=args.steps)
    rows: list[list[Any]] = []
    distances: dict[tuple[int, float], tuple[float, float]] = {}

    def measure(calls: int, level: float, seed: int) -> dict[str, float]:
        before, after = last_call(*train_ncsnv2(args, seed), level, calls, args.num_samples, seed)
        removed = float((before - after).square().mean().sqrt())
        return {"before": over_floor(before), "after": over_floor(after), "removed": removed}

    for calls, level in itertools.product(budgets, levels):
        found = over_seeds(results, f"to {level:g}", calls, args.seeds, partial(measure, calls, level))
        before, after, removed = (found[name] for name in ("before", "after", "removed"))
        ratio = torch.tensor([(technique_1() / level) ** (1 / (calls - 2))], dtype=torch.float64)
        predicted = level * float(chain_variance(optimal_step_size(ratio, 1), ratio, 1)) ** 0.5
        rows.append([calls, level, f"{before:.2f}", f"{after:.2f}", removed.mean, predicted])
        distances[calls, level] = before.mean, after.mean
    shown = {
        f"to {level:g}, {when}": images
        for level in (levels[0], levels[-1])
        for when, images in zip(
            ("before", "after"), last_call(*train_ncsnv2(args, 0), level, budgets[-1], 24, 0), strict=True
        )
    }

    figure = plt.figure(figsize=(11, 5.4), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.4)))
    show_rows(top.subplots(), shown)
    axes = bottom.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for axis, calls in zip(axes, budgets, strict=True):
        for place, when in enumerate(("before", "after")):
            values = [distances[calls, level][place] for level in levels]
            axis.semilogx(levels, values, label=f"{when} the last call", **curve_style(place))
        axis.set(title=f"{calls} calls", xlabel="last noise level", ylabel="sliced W2 over the floor")
        axis.set_xticks(levels, [f"{level:g}" for level in levels])
        axis.xaxis.minorticks_off()
    axes[0].legend(fontsize=8, loc="upper left")
    best = {c: min((distances[c, level][1], level) for level in levels) for c in budgets}
    picture = save_picture(figure, args.output / "ncsnv2_denoise.png")
    gains = {key: before / after for key, (before, after) in distances.items()}
    worth = [f"{level:g}: {', '.join(f'{gains[c, level]:.2f} at {c} calls' for c in budgets)}" for level in levels]
    at_paper = max(gains[c, levels[0]] for c in budgets)
    return Report(
        "ncsnv2_denoise",
        "NCSNv2: the final denoising",
        "What does the last network call, which returns the denoiser's mean in place of a noisy image, do to the "
        "distance from the data?",
        f"At the published last level 0.01 it {'matters' if at_paper > 1.02 else 'does not matter'} by sliced W2: "
        f"the distance without it over that with it is at most {at_paper:.2f}. Where the ladder ends higher the ratio "
        f"is, by last level, {'; '.join(worth)}. With the denoising the best last level is "
        + ", ".join(f"{level:g} at {c} calls ({d:.2f}; {distances[c, levels[0]][1]:.2f} at 0.01)"
                    for c, (d, level) in best.items())
        + ". The paper's finding, that the noise is invisible but FID sees it, concerns features that this measure "
        "does not have.",
        [Table("Sliced W2 over the floor of held-out digits, of the same chains before and after their last call.",
               ["calls", "last level", "before", "after", "rms removed", "noise predicted (Technique 4)"], rows)],
        [picture],
        conditions(args),
    )  # fmt: skip


# --- Techniques 1 to 5, one at a time ---


BASE = "the library's defaults"


# Changes of the sampler for a number of calls.
Changes = Callable[[int], dict[str, Any]]


def technique_rows() -> dict[str, tuple[dict[str, Any], Changes]]:
    """Every row: what changes in the training, and in the sampler."""
    sigma_max = technique_1()
    too_small = TOO_SMALL * sigma_max
    length = ladder_length(sigma_max, SIGMA_MIN, 64)

    def optimal(calls: int) -> float:
        return float(optimal_step_size(torch.tensor([(sigma_max / SIGMA_MIN) ** (1 / (calls - 2))]), 1)[0])

    def same(calls: int) -> dict[str, Any]:
        return {}

    def levels(count: int) -> Changes:
        return lambda calls: {"num_langevin_steps": max(1, (calls - 1) // count)}

    def step(factor: float) -> Changes:
        return lambda calls: {"step_size": factor * optimal(calls) * SIGMA_MIN**2}

    return {
        BASE: ({}, same),
        f"Technique 1 off: sigma_1 = {too_small:.2f}": ({"sigma_max": f"{too_small:.4f}"}, same),
        f"Technique 2: its L = {length} levels": ({}, levels(length)),
        **{f"Technique 2 off: {count} levels": ({}, levels(count)) for count in (10, 5)},
        "Technique 3: level not told": ({"conditioning": "none"}, same),
        "Technique 3: nor input scaled": ({"conditioning": "none", "scale_input": False}, same),
        "Technique 4 as published (prop3)": ({}, lambda _: {"step_size_criterion": "prop3"}),
        **{f"Technique 4 off: step x {factor}": ({}, step(factor)) for factor in (0.1, 0.5, 2, 10)},
        "Technique 4 off: NCSN's step": ({}, lambda _: {"step_size": PRESETS["ncsn"].step_size}),
        "Technique 5 off: no average": ({"use_ema": False}, same),
    }


def verdict_of(ratios: Sequence[float], spreads: Sequence[float], least: float) -> str:
    """Words for distances over the baseline's at several budgets, with spreads over seeds.

    A difference is more than `least` and more than the spread.
    """
    sure = [abs(r - 1) > max(least, s) for r, s in zip(ratios, spreads, strict=True)]
    worse = [r > 1 for r, s in zip(ratios, sure, strict=True) if s]
    if not worse:
        return "no difference"
    return "worse" if all(worse) else "better" if not any(worse) else "mixed"


def plot_techniques(curves: Mapping[str, Curve], shown: dict[str, Tensor], path: Path) -> str:
    """A row a technique and a panel a number of calls, above rows of images; the name of the file."""
    budgets = list(curves[BASE])
    figure = plt.figure(figsize=(13, 7.5), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1.4, 1)))
    axes = top.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for axis, calls in zip(axes, budgets, strict=True):
        plot_rows(axis, {name: curve[calls] for name, curve in curves.items()}, 1)
        if base := curves[BASE][calls]:
            axis.axvline(base.mean, color=COLORS[0], linestyle="--", linewidth=0.9, label=BASE)
        axis.set(title=f"{calls} calls", xlabel="sliced W2 over the floor")
    top.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    show_rows(bottom.subplots(), shown)
    return save_picture(figure, path)


def techniques(args: argparse.Namespace) -> Report:
    budgets = [args.calls] if args.calls else [10, 20, 50, 200]
    rows_of = technique_rows()
    settings = {name: [options, config(100)] for name, (options, config) in rows_of.items()}
    results = kept_results("techniques", args.num_samples, args.output, steps=args.steps, rows=settings)

    def pipeline(name: str, calls: int, seed: int) -> Any:
        options, config = rows_of[name]
        unet, scheduler = train_ncsnv2(args, seed, **options)
        changes: dict[str, Any] = {"step_size_criterion": "fixed_point"} | config(calls)
        return pipeline_of(unet, AnnealedLangevinScheduler.from_config(scheduler.config, **changes))

    found = {
        name: {c: quality(results, name, c, args.seeds, partial(pipeline, name, c)) for c in budgets}
        for name in rows_of
    }
    curves = {
        name: {c: Statistic.of(values) if values else None for c, values in of_name.items()}
        for name, of_name in found.items()
    }

    least = tie(args.seeds)
    base = {calls: found[BASE][calls] or [math.nan] * args.seeds for calls in budgets}
    rows, words = [], []
    for name, of_name in found.items():
        # By number of calls, the ratios to the defaults, of the seeds.
        ratios = {
            c: Statistic.of([v / b for v, b in zip(values, base[c], strict=True)])
            for c, values in of_name.items()
            if values
        }
        word = "no stable step"
        if ratios:
            word = verdict_of([r.mean for r in ratios.values()], [r.spread or 0.0 for r in ratios.values()], least)
        shown_values = [f"{value:.2f}" if value else "-" for value in curves[name].values()]
        rows.append([name, *shown_values, "" if name == BASE else word])
        if name != BASE:
            at = ", ".join(f"{ratio.mean:.2f} at {c}" for c, ratio in ratios.items())
            words.append(f"{name}: {word}" + (f" ({at})" if at else ""))

    shown = {}
    for name, (options, _) in rows_of.items():
        if name == BASE or options:
            shown[name.replace(": ", ":\n")], _ = images_of(pipeline(name, budgets[-1], 0), budgets[-1], 24)
    return Report(
        "ncsnv2_techniques",
        "NCSNv2: Techniques 1 to 5, one at a time",
        "What does each of the five techniques contribute to a digits model, at several numbers of network calls?",
        "Distance over that of the defaults, with the numbers of calls: " + "; ".join(words) + ". The defaults are at "
        + ", ".join(f"{Statistic.of(base[c]):.2f} at {c}" for c in budgets) + " calls.",
        [Table("Sliced W2 over the floor of held-out digits; `-` where there is no stable step.",
               ["", *by_calls(budgets), "against the defaults"], rows)],
        [plot_techniques(curves, shown, args.output / "ncsnv2_techniques.png")],
        conditions(args) + " The baseline is Techniques 1, 4 (for the whole chain) and 5, one Langevin step a level, "
        "and a network that is told the level (Technique 3 is not on). A difference counts from "
        f"{least:.0%}, the spread of sampling, and from the standard deviation of the ratio over the seeds.",
    )  # fmt: skip
