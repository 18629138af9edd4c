"""GM-SGM's claims, measured: each command writes a table, a picture and a verdict.

    python -m diffusers_gm.studies.gm_sgm claim        a network that works out its own noise level, and what for
    python -m diffusers_gm.studies.gm_sgm lag          why the Langevin samplers differ: who knows where the chain is
    python -m diffusers_gm.studies.gm_sgm increments   tails of mixture noise against the alpha-stable law
    python -m diffusers_gm.studies.gm_sgm rare_modes   rare and far modes: jumps, or steps on the first level

Finished trainings and measurements are kept in the folder `.parts` of `--output`: a second run takes up where the first
ended.
"""

import argparse
import math
from typing import Any

from torch import Tensor

from ..cli import at_least
from ..evaluation.report import curve_table
from ..processes.random import Draw
from ..samplers import Langevin, Memory, Sampler
from ..samplers.langevin import LangevinPlan
from ..samplers.sampler import Stepped
from ..schedulers import GMLangevinScheduler
from .command import parse, study_parser
from .curves import draw_curves, measured
from .digits import kept_results, pipeline_of, tie, trained
from .increments import increments
from .ncsnv2_trained import conditions, train_ncsnv2
from .own_level import claim
from .rare_modes import rare_modes
from .report import Report

GAUSSIAN = "K = 1"
MIXTURE = "power law 1.5, K = 2"  # that of `make demo`, the default of the training


def model(args: argparse.Namespace, name: str, seed: int) -> tuple[Any, Any]:
    """A trained digits network and a `GMLangevinScheduler` that describes it."""
    if name == GAUSSIAN:
        unet, scheduler = train_ncsnv2(args, seed)
        return unet, GMLangevinScheduler.from_config(scheduler.config, algorithm_type="langevin")
    return trained(args.output, max_train_steps=args.steps, seed=seed)


# --- Why do the Langevin samplers differ? ---


class UnawareChain(Langevin):
    """The component of an image is told at the level of the call, as if the chain were there."""

    def step(self, plan: LangevinPlan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        y, memory = super().step(plan, i, y, denoised, memory._replace(level=None), draw)
        return y, memory._replace(level=None)


class Unaware(GMLangevinScheduler):
    def _make_sampler(self) -> Sampler:
        return UnawareChain(**vars(super()._make_sampler()))


def lag(args: argparse.Namespace) -> Report:
    budgets = args.calls or [10, 20, 50, 200]
    least = tie(args.seeds)
    results = kept_results("lag", args.num_samples, args.output, steps=args.steps, mixture=[MIXTURE, {}])
    plain, ours, blind, unaware = "K = 1", "mixture", "K = 1, not told any level", "mixture, unaware of the lag"
    told, ours_told = f"{plain}, told where the chain is", f"{ours}, told where the chain is"
    names = (plain, told, blind, ours, ours_told, unaware)

    def pipeline(name: str, seed: int) -> Any:
        if name == blind:
            unet, source = train_ncsnv2(args, seed, conditioning="none")
        else:
            unet, source = model(args, MIXTURE if name.startswith("mixture") else GAUSSIAN, seed)
        kind = Unaware if name == unaware else GMLangevinScheduler
        level = "chain" if name in (told, ours_told) else "ladder"
        return pipeline_of(unet, kind.from_config(source.config, algorithm_type="langevin", network_level=level))

    found = measured(results, names, budgets, args.seeds, pipeline)
    mean = {(name, c): value.mean if value else math.nan for name in names for c, value in found[name].items()}
    # Where the mixture is clearly ahead of K = 1, how much of that the label alone makes up for.
    gap = {c: (mean[plain, c] - mean[told, c]) / (mean[plain, c] - mean[ours, c])
           for c in budgets if mean[ours, c] < (1 - least) * mean[plain, c]}  # fmt: skip

    panel, styles = (
        {"annealed Langevin dynamics, T = 1": found},
        {name: {"linestyle": "--"} for name in (told, ours_told)},
    )
    picture = draw_curves(args.output / "gm_sgm_lag.png", panel, "sliced W2 over the floor", 1, styles)
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
        conditions(args) + f" The mixture: {MIXTURE}, denoiser.",
    )  # fmt: skip


STUDIES = {f.__name__: f for f in (claim, lag, increments, rare_modes)}


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("gm_sgm", __doc__, STUDIES)
    parser.add_argument("--calls", type=at_least(2), nargs="+", help="numbers of network calls")
    parser.add_argument(
        "--trainings", type=at_least(1), default=1, help="claim: trainings that the seeds take turns with"
    )
    args = parse(parser, argv, over_floor=("claim", "lag"))
    if args.study == "rare_modes" and args.calls and min(args.calls) < 12:
        parser.error(f"--calls {args.calls}: rare_modes needs at least 12")
    STUDIES[args.study](args).write(args.output)


if __name__ == "__main__":
    main()
