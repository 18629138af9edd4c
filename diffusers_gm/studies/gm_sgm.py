"""GM-SGM's claims, measured: each command writes a table, a picture and a verdict.

    python -m diffusers_gm.studies.gm_sgm claim        mixture noise against Gaussian noise, at equal training and calls
    python -m diffusers_gm.studies.gm_sgm lag          why the Langevin samplers differ: who knows where the chain is
    python -m diffusers_gm.studies.gm_sgm switching    large jumps and small roaming along a run
    python -m diffusers_gm.studies.gm_sgm increments   tails of mixture noise against the alpha-stable law
    python -m diffusers_gm.studies.gm_sgm rare_modes   rare and far modes: jumps, or steps on the first level

Finished trainings and measurements are kept in the folder `.parts` of `--output`: a second run takes up where the first
ended.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor

from ..cli import at_least
from ..evaluation.report import curve_table, plot_curves
from ..evaluation.results import Statistic
from ..evaluation.table import Table
from ..random import Draw
from ..samplers import Langevin, Memory, Sampler
from ..samplers.langevin import LangevinPlan
from ..schedulers import GMLangevinScheduler
from .command import parse, study_parser
from .digits import kept_results, pipeline_of, quality, statistic_of, tie, trained
from .increments import increments
from .ncsnv2_trained import conditions, train_ncsnv2, verdict_of
from .pictures import save_picture
from .rare_modes import rare_modes
from .report import Report
from .switching import switching

SAMPLERS = ("langevin", "jump", "exponential", "ancestral", "ode")

# Mixture noises, as options of the training; the first is the one of `make demo`.
MODELS: dict[str, dict[str, Any]] = {
    "power law 1.5, K = 2": {},
    "the same, score": {"objective": "score"},
    "power law 1.2, K = 3": {"power_alpha": 1.2, "num_components": 3},
    "power law 1.8, K = 2": {"power_alpha": 1.8},
    "stable 1.8, K = 2": {"stable_alpha": 1.8, "num_components": 2},
}
GAUSSIAN = "K = 1"

# Quality by model, sampler and number of calls: one value per seed, or None where there is no stable step.
Found = dict[tuple[str, str, int], list[float] | None]


def model(args: argparse.Namespace, name: str, seed: int) -> tuple[Any, Any]:
    """A trained digits network and a `GMLangevinScheduler` that describes it."""
    if name == GAUSSIAN:
        unet, scheduler = train_ncsnv2(args, seed)
        return unet, GMLangevinScheduler.from_config(scheduler.config, algorithm_type="langevin")
    return trained(args.output, max_train_steps=args.steps, seed=seed, **MODELS[name])


# --- Is a mixture better? ---


def claim(args: argparse.Namespace) -> Report:
    budgets = args.calls or [10, 20, 50, 200]
    names = args.models or list(MODELS)
    results = kept_results("claim", args.num_samples, args.output, steps=args.steps, models=MODELS)
    least = tie(args.seeds)

    def pipeline(name: str, sampler: str, seed: int) -> Any:
        unet, scheduler = model(args, name, seed)
        return pipeline_of(unet, GMLangevinScheduler.from_config(scheduler.config, algorithm_type=sampler))

    found: Found = {}
    for name in (GAUSSIAN, *names):
        for sampler in SAMPLERS:
            # With one component, jumps are Langevin steps, to the bit.
            same = "langevin" if name == GAUSSIAN and sampler == "jump" else sampler
            for calls in budgets:
                make = partial(pipeline, name, same)
                found[name, sampler, calls] = quality(results, f"{name}, {same}", calls, args.seeds, make)

    def ratios(name: str, sampler: str, calls: int) -> list[float] | None:
        ours, base = found[name, sampler, calls], found[GAUSSIAN, sampler, calls]
        return None if ours is None or base is None else [a / b for a, b in zip(ours, base, strict=True)]

    def best(name: str, calls: int) -> list[float]:
        """The best sampler of a model in the mean of the seeds."""
        return min((v for s in SAMPLERS if (v := found[name, s, calls])), key=sum)

    rows: list[list[Any]] = []
    counts = dict.fromkeys(("better", "worse", "no difference", "mixed"), 0)
    # Ratios by objective and sampler: what the two objectives do must not hide in one mean.
    per_sampler: dict[str, dict[str, list[float]]] = {}
    for sampler in SAMPLERS:
        for calls in budgets:
            row: list[Any] = [sampler, calls, words(found[GAUSSIAN, sampler, calls])]
            for name in names:
                seeds = ratios(name, sampler, calls)
                row.append(words(seeds))
                if seeds is not None:
                    ratio = Statistic.of(seeds)
                    counts[verdict_of([ratio.mean], [ratio.spread or 0.0], least)] += 1
                    learned = MODELS[name].get("objective", "denoiser")
                    per_sampler.setdefault(learned, {}).setdefault(sampler, []).append(ratio.mean)
            rows.append(row)
    at_best = {
        calls: [
            Statistic.of([a / b for a, b in zip(best(name, calls), best(GAUSSIAN, calls), strict=True)]).mean
            for name in names
        ]
        for calls in budgets
    }
    for calls in budgets:
        rows.append(["**best sampler of each**", calls, words(best(GAUSSIAN, calls)), *at_best[calls]])

    picture = plot_claim(args, budgets, names, found, at_best)
    total = sum(counts.values())
    everywhere = counts["better"] == total
    return Report(
        "gm_sgm_claim",
        "GM-SGM: mixture noise against Gaussian noise",
        "Is a model of Gaussian-mixture noise better than the ordinary model (K = 1) of the same network and training, "
        "across numbers of sampling iterations?",
        f"{'Confirmed' if everywhere else 'Not across the board'}: of {total} cells (mixture, sampler, calls) the "
        f"mixture is better in {counts['better']}, worse in {counts['worse']}, no different in "
        f"{counts['no difference']}. " + " ".join(in_mean(*kind, least) for kind in per_sampler.items()) + " "
        "With the best sampler of each model, the ratios are "
        + ", ".join(f"{span(at_best[c])} at {c} calls" for c in budgets)
        + ": what a user who picks the best sampler gets from a mixture.",
        [Table("Sliced W2 over the floor of held-out digits for K = 1, and the ratio of each mixture to it (below 1 "
               "the mixture is better); `-` where there is no stable step.",
               ["sampler", "calls", "K = 1, over the floor", *(f"{n}: ratio" for n in names)], rows)],
        [picture],
        conditions(args) + f" A difference counts from {least:.0%}, the spread of sampling, and from the "
        "standard deviation of the ratio. Mixtures learn the denoiser unless it says score. With one component, "
        "`jump` is `langevin`.",
    )  # fmt: skip


def words(values: list[float] | None) -> str:
    return f"{Statistic.of(values):.2f}" if values else "-"


def in_mean(learned: str, ratios: dict[str, list[float]], least: float) -> str:
    """The geometric mean of the ratios of every sampler, for mixtures that learned the same thing."""
    typical = {s: math.exp(sum(map(math.log, v)) / len(v)) for s, v in ratios.items()}
    wins = [s for s, v in typical.items() if v < 1 - least]
    losses = [s for s, v in typical.items() if v > 1 + least]
    return (
        f"Mixtures that learn the {learned}, geometric mean of the ratio by sampler: "
        + ", ".join(f"{s} {v:.2f}" for s, v in typical.items())
        + f"; by more than {least:.0%} they gain with {', '.join(wins) or 'no sampler'}, and lose with "
        f"{', '.join(losses) or 'none'}."
    )


def span(values: Sequence[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def plot_claim(
    args: argparse.Namespace,
    budgets: Sequence[int],
    names: Sequence[str],
    found: Found,
    at_best: dict[int, list[float]],
) -> str:
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, sampler in zip(axes.flat, SAMPLERS, strict=False):
        curves = {name: {c: statistic_of(found[name, sampler, c]) for c in budgets} for name in (GAUSSIAN, *names)}
        plot_curves(axis, curves, 1, {GAUSSIAN: {"linewidth": 2.5}})
        axis.set(title=sampler, ylim=(0.95, 1.1 * max(max(v) for v in found.values() if v)))
        axis.set_ylabel("sliced W2 over the floor")
    last = axes.flat[-1]
    last.axhline(1, color="C0", linewidth=2.5, label=GAUSSIAN)
    of_best = {name: {c: Statistic(at_best[c][i], None) for c in budgets} for i, name in enumerate(names)}
    plot_curves(last, of_best, None, {name: {"color": f"C{i + 1}"} for i, name in enumerate(names)}, "linear")
    last.set(title="best sampler of each", ylabel="ratio to K = 1")
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return save_picture(figure, args.output / "gm_sgm_claim.png")


# --- Why do the Langevin samplers differ? ---


class UnawareChain(Langevin):
    """The component of an image is told at the level of the call, as if the chain were there."""

    def step(
        self, plan: LangevinPlan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw
    ) -> tuple[Tensor, Memory]:
        y, memory = super().step(plan, i, y, denoised, memory._replace(level=None), draw)
        return y, memory._replace(level=None)


class Unaware(GMLangevinScheduler):
    def _make_sampler(self) -> Sampler:
        return UnawareChain(**vars(super()._make_sampler()))


def lag(args: argparse.Namespace) -> Report:
    budgets = args.calls or [10, 20, 50, 200]
    mixture, least = next(iter(MODELS)), tie(args.seeds)
    results = kept_results("lag", args.num_samples, args.output, steps=args.steps, mixture=[mixture, MODELS[mixture]])
    plain, ours, blind, unaware = "K = 1", "mixture", "K = 1, not told any level", "mixture, unaware of the lag"
    told, ours_told = f"{plain}, told where the chain is", f"{ours}, told where the chain is"
    names = (plain, told, blind, ours, ours_told, unaware)

    def pipeline(name: str, seed: int) -> Any:
        if name == blind:
            unet, source = train_ncsnv2(args, seed, conditioning="none")
        else:
            unet, source = model(args, mixture if name.startswith("mixture") else GAUSSIAN, seed)
        kind = Unaware if name == unaware else GMLangevinScheduler
        level = "chain" if name in (told, ours_told) else "ladder"
        return pipeline_of(unet, kind.from_config(source.config, algorithm_type="langevin", network_level=level))

    found = {
        name: {c: statistic_of(quality(results, name, c, args.seeds, partial(pipeline, name))) for c in budgets}
        for name in names
    }
    mean = {(name, c): value.mean if value else math.nan for name in names for c, value in found[name].items()}
    # Where the mixture is clearly ahead of K = 1, how much of that the label alone makes up for.
    gap = {c: (mean[plain, c] - mean[told, c]) / (mean[plain, c] - mean[ours, c])
           for c in budgets if mean[ours, c] < (1 - least) * mean[plain, c]}  # fmt: skip

    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    plot_curves(axis, found, 1, {name: {"linestyle": "--"} for name in (told, ours_told)})
    axis.set_ylabel("sliced W2 over the floor")
    axis.set_title("annealed Langevin dynamics, T = 1")
    axis.legend(fontsize=8)
    picture = save_picture(figure, args.output / "gm_sgm_lag.png")
    if not gap:
        answer = f"There is no gain to explain: the mixture is nowhere {least:.0%} ahead of K = 1."
    else:
        most = min(gap.values()) > 0.5
        answer = (
            f"{'Largely the lag' if most else 'Only in part the lag'}. Told where the chain is, K = 1 closes "
            + ", ".join(f"{share:.0%} of the gap at {c} calls" for c, share in gap.items())
            + ("; more than 100% means that it is then ahead of the mixture" if max(gap.values()) > 1 else "")
            + "."
        )
    return Report(
        "gm_sgm_lag",
        "GM-SGM: why Langevin sampling gains at few calls",
        "A Langevin chain lags behind its ladder of noise levels. Does a mixture model gain because it tells the level "
        "of an image from the image, and would an ordinary model gain as much if it were told where the chain is "
        "(`network_level='chain'`)?",
        answer + " A K = 1 network that is told no level at all, and so must see it in the image, is at "
        + ", ".join(f"{mean[blind, c]:.2f} at {c}" for c in budgets)
        + " calls; the mixture, if its component is told at the call's level instead of where the chain is, at "
        + ", ".join(f"{mean[unaware, c]:.2f} at {c}" for c in budgets)
        + ". With both networks told where the chain is, the mixture's distance over that of K = 1 is "
        + ", ".join(f"{mean[ours_told, c] / mean[told, c]:.2f} at {c}" for c in budgets) + " calls.",
        [curve_table("Sliced W2 over the floor of held-out digits.", "", found)],
        [picture],
        conditions(args) + f" The mixture: {mixture}, denoiser.",
    )  # fmt: skip


STUDIES = {f.__name__: f for f in (claim, lag, switching, increments, rare_modes)}


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("gm_sgm", __doc__, STUDIES)
    parser.add_argument("--calls", type=at_least(2), nargs="+", help="numbers of network calls")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="claim: some of the mixtures")
    args = parse(parser, argv, over_floor=("claim", "lag"))
    if args.study == "rare_modes" and args.calls and min(args.calls) < 12:
        parser.error(f"--calls {args.calls}: rare_modes needs at least 12")
    STUDIES[args.study](args).write(args.output)


if __name__ == "__main__":
    main()
