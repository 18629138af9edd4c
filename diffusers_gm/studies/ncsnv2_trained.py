"""What NCSNv2's techniques do to trained networks: the studies `denoise` and `techniques` of `.ncsnv2`."""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from .. import AnnealedLangevinScheduler, NCSNv2Pipeline
from ..data import split_digits
from ..processes.annealed import (
    PRESETS,
    chain_variance,
    ladder_length,
    max_pairwise_distance,
    optimal_step_size,
)
from ..training.options import TrainingArguments
from .common import (
    Cells,
    images_of,
    in_words,
    mean_and_spread,
    over_floor,
    parts_of,
    quality_axes,
    quality_of,
    run,
    save_picture,
    show_rows,
    tie,
    trained,
)
from .report import Report, Table

SIGMA_MIN = 0.01
# The largest noise level of NCSN over that of Technique 1, both for CIFAR-10: 1 / 50.
TOO_SMALL = PRESETS["ncsn"].sigma_max / PRESETS["ncsnv2-cifar10"].sigma_max


def arguments(args: argparse.Namespace, seed: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(method="ncsnv2", max_train_steps=args.steps, seed=seed, **options)


def technique_1() -> float:
    """The largest distance of two training digits, as `train_gm_sgm.py` measures it."""
    return round(max_pairwise_distance(split_digits()[0]), 4)


def conditions(args: argparse.Namespace) -> str:
    return (
        f"Digits networks of `make demo`'s size, {args.steps} steps each, {args.seeds} seed(s) of training and "
        f"sampling, n = {args.num_samples}; ± is half of the range over the seeds."
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
    return before, noisy.noise_space.denoised(output, before, sigma_last, noisy.config["prediction_type"])


def denoise(args: argparse.Namespace) -> Report:
    budgets = [args.calls] if args.calls else [50, 200]
    levels = (0.01, 0.05, 0.1, 0.2)
    parts = parts_of(args.output)
    cells = Cells(parts / f"denoise steps={args.steps} n={args.num_samples}.json")
    rows: list[list[Any]] = []
    distances: dict[tuple[int, float], tuple[float, float]] = {}
    shown: dict[str, Tensor] = {}

    def measure(calls: int, level: float, seed: int) -> list[float]:
        unet, scheduler = trained(arguments(args, seed), parts)
        before, after = last_call(unet, scheduler, level, calls, args.num_samples, seed)
        return [over_floor(before), over_floor(after), float((before - after).square().mean().sqrt())]

    for calls in budgets:
        for level in levels:
            found = cells.of_seeds(f"{calls} calls, to {level:g}", partial(measure, calls, level), args.seeds)
            before, after, removed = (list(values) for values in zip(*found, strict=True))
            ratio = torch.tensor([(technique_1() / level) ** (1 / (calls - 2))], dtype=torch.float64)
            predicted = level * float(chain_variance(optimal_step_size(ratio, 1), ratio, 1)) ** 0.5
            rows.append([calls, level, in_words(before), in_words(after), mean_and_spread(removed)[0], predicted])
            distances[calls, level] = mean_and_spread(before)[0], mean_and_spread(after)[0]
    unet, scheduler = trained(arguments(args, 0), parts)
    for level in (levels[0], levels[-1]):
        pictures = last_call(unet, scheduler, level, budgets[-1], 24, 0)
        shown |= {f"to {level:g}, {when}": x for when, x in zip(("before", "after"), pictures, strict=True)}

    figure = plt.figure(figsize=(11, 5.4), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.4)))
    show_rows(top.subplots(), shown)
    axes = bottom.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for axis, calls in zip(axes, budgets, strict=True):
        for place, when in enumerate(("before", "after")):
            axis.semilogx(
                levels, [distances[calls, level][place] for level in levels], "-o", label=f"{when} the last call"
            )
        axis.set(title=f"{calls} calls", xlabel="last noise level", ylabel="sliced W2 over the floor")
        axis.set_xticks(levels, [f"{level:g}" for level in levels])
        axis.xaxis.minorticks_off()
        axis.legend(fontsize=8)
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


def technique_rows() -> dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]]:
    """Every row: what changes in the training, and in the sampler for a number of calls."""
    sigma_max = technique_1()
    length = ladder_length(sigma_max, SIGMA_MIN, 64)

    def same(_: int) -> dict[str, Any]:
        return {}

    def levels(count: int) -> Callable[[int], dict[str, Any]]:
        return lambda calls: {"num_langevin_steps": max(1, (calls - 1) // count)}

    def step(factor: float) -> Callable[[int], dict[str, Any]]:
        def config(calls: int) -> dict[str, Any]:
            ratio = torch.tensor([(sigma_max / SIGMA_MIN) ** (1 / (calls - 2))])
            return {"step_size": factor * float(optimal_step_size(ratio, 1)[0]) * SIGMA_MIN**2}

        return config

    return {
        BASE: ({}, same),
        f"Technique 1 off: sigma_1 = {TOO_SMALL * sigma_max:.2f}": (
            {"sigma_max": f"{TOO_SMALL * sigma_max:.4f}"},
            same,
        ),
        f"Technique 2: its L = {length} levels": ({}, levels(length)),
        "Technique 2 off: 10 levels": ({}, levels(10)),
        "Technique 2 off: 5 levels": ({}, levels(5)),
        "Technique 3: level not told": ({"conditioning": "none"}, same),
        "Technique 3: nor input scaled": ({"conditioning": "none", "scale_input": False}, same),
        "Technique 4 as published (prop3)": ({}, lambda _: {"step_size_criterion": "prop3"}),
        "Technique 4 off: step x 0.1": ({}, step(0.1)),
        "Technique 4 off: step x 0.5": ({}, step(0.5)),
        "Technique 4 off: step x 2": ({}, step(2)),
        "Technique 4 off: step x 10": ({}, step(10)),
        "Technique 4 off: NCSN's step": ({}, lambda _: {"step_size": PRESETS["ncsn"].step_size}),
        "Technique 5 off: no average": ({"use_ema": False}, same),
    }


def verdict_of(ratios: Sequence[float], spreads: Sequence[float], least: float) -> str:
    """Words for distances over the baseline's at several budgets, with half-ranges over seeds.

    A difference is more than `least` and more than the half-range.
    """
    sure = [abs(r - 1) > max(least, s) for r, s in zip(ratios, spreads, strict=True)]
    worse = [r > 1 for r, s in zip(ratios, sure, strict=True) if s]
    if not worse:
        return "no difference"
    return "worse" if all(worse) else "better" if not any(worse) else "mixed"


def techniques(args: argparse.Namespace) -> Report:
    budgets = [args.calls] if args.calls else [10, 20, 50, 200]
    parts = parts_of(args.output)
    rows_of = technique_rows()
    settings = {name: [options, config(100)] for name, (options, config) in rows_of.items()}
    cells = Cells(parts / f"techniques steps={args.steps} n={args.num_samples}.json", settings)

    def measure(name: str, calls: int, seed: int) -> float | None:
        options, config = rows_of[name]
        unet, scheduler = trained(arguments(args, seed, **options), parts)
        changed = AnnealedLangevinScheduler.from_config(scheduler.config, **config(calls))
        return quality_of(NCSNv2Pipeline(unet, changed), calls, args.num_samples, seed)

    found = {(name, calls): cells.of_seeds(f"{name}, {calls} calls", partial(measure, name, calls), args.seeds)
             for name in rows_of for calls in budgets}  # fmt: skip

    least = tie(args.seeds)
    base = {calls: found[BASE, calls] or [math.nan] * args.seeds for calls in budgets}
    rows, words = [], []
    for name in rows_of:
        # By number of calls, the ratios to the defaults, one per seed.
        ratios = {c: [v / b for v, b in zip(seeds, base[c], strict=True)] for c in budgets if (seeds := found[name, c])}
        means = {c: mean_and_spread(r) for c, r in ratios.items()}
        word = "no stable step"
        if means:
            word = verdict_of([mean for mean, _ in means.values()], [s for _, s in means.values()], least)
        rows.append([name, *(in_words(found[name, c]) for c in budgets), "" if name == BASE else word])
        if name != BASE:
            at = ", ".join(f"{mean:.2f} at {c}" for c, (mean, _) in means.items())
            words.append(f"{name}: {word}" + (f" ({at})" if at else ""))

    figure = plt.figure(figsize=(11, 8), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1.5, 1)))
    axis = top.subplots()
    for i, name in enumerate(rows_of):
        points = [(c, mean_and_spread(v)[0]) for c in budgets if (v := found[name, c])]
        if points:
            style = "-o" if name == BASE else ("--", ":", "-.")[i // 10] + "s"
            axis.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=3 if name == BASE else 1)
    quality_axes(axis, budgets)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    shown = {}
    for name, (options, config) in rows_of.items():
        if name == BASE or options:
            unet, scheduler = trained(arguments(args, 0, **options), parts)
            changed = AnnealedLangevinScheduler.from_config(scheduler.config, **config(budgets[-1]))
            shown[name.replace(": ", ":\n")] = images_of(NCSNv2Pipeline(unet, changed), budgets[-1], 24)
    show_rows(bottom.subplots(), shown)
    picture = save_picture(figure, args.output / "ncsnv2_techniques.png")
    return Report(
        "ncsnv2_techniques",
        "NCSNv2: Techniques 1 to 5, one at a time",
        "What does each of the five techniques contribute to a digits model, at several numbers of network calls?",
        "Distance over that of the defaults, with the numbers of calls: " + "; ".join(words) + ". The defaults are at "
        + ", ".join(f"{in_words(base[c])} at {c}" for c in budgets) + " calls.",
        [Table("Sliced W2 over the floor of held-out digits; `-` where there is no stable step.",
               ["", *(f"{c} calls" for c in budgets), "against the defaults"], rows)],
        [picture],
        conditions(args) + " The defaults are Techniques 1, 4 (for the whole chain) and 5, one Langevin step a level, "
        "and a network that is told the level (Technique 3 is not on). A difference counts from "
        f"{least:.0%}, the spread of sampling, and from the half-range of the ratio over the seeds.",
    )  # fmt: skip
