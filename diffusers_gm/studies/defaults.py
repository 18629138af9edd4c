"""What a scheduler does without any option, over the best of its options: `python -m diffusers_gm.studies.defaults`.

Of every scheduler of ours, as `from_config` makes it for a network of diffusers (the exact denoiser of the digits)
and as a network of ours comes with it: sliced W2 over that of the best algorithm and grid that it offers, chosen
afterwards.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..data import split_digits
from ..schedulers import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .command import at_least, parse, study_parser
from .curves import as_curves, draw_curves, table_of
from .digits import kept_results
from .report import Report
from .sampler_benchmark import best_of
from .sampler_benchmark_models import exact_model as exact
from .sampler_benchmark_models import own_model
from .sampler_benchmark_scores import Scores

GRIDS = ("even", "log_snr", "karras", "trailing")
LANGEVIN = [{"algorithm_type": "langevin", "network_level": level} for level in ("chain", "ladder")]
# By scheduler: its algorithms.
OPTIONS: dict[Any, list[dict[str, Any]]] = {
    AnnealedLangevinScheduler: [*LANGEVIN, {"algorithm_type": "consistent"}, {"algorithm_type": "explore"}],
    GMLangevinScheduler: [*LANGEVIN, {"algorithm_type": "ancestral"}, {"algorithm_type": "ode"}],
    CLDSSCSScheduler: [{"algorithm_type": "sscs"}, {"algorithm_type": "probability_flow"}],
    CalibratedMultistepScheduler: [{"stochasticity": 0.0}, {"stochasticity": 0.4}],
}


def settings_of(cls: Any, config: Any) -> dict[str, Any]:
    """The scheduler without any option, by the name `default`, and with all that it offers."""
    grids = (*GRIDS, "quadratic") if cls is CLDSSCSScheduler else GRIDS
    made = {"default": cls.from_config(config)}
    for changes, grid in itertools.product(OPTIONS[cls], grids):
        name = f"{' '.join(map(str, changes.values()))}, {grid}"
        made[name] = cls.from_config(config, timestep_spacing=grid, **changes)
    return made


def defaults(args: argparse.Namespace) -> Report:
    models = {
        "exact digits, as a DDPM network": lambda: exact(
            split_digits()[0], "the digits", args.num_samples, args.output
        ),
        "a network of NCSNv2": lambda: own_model("ncsnv2", args.num_samples, args.steps, args.output),
    }
    tables, panels = [], {}
    over: dict[str, list[float]] = {}
    for title, make in models.items():
        model, cells = make(), {}
        ratios: dict[str, list[float]] = {}
        results = kept_results(f"defaults {title}", args.num_samples, args.output, floor=False, content=model.content)
        score = Scores(model.reference)
        results.floor = [score(model.floor[: args.num_samples])]
        settings = {cls.__name__: settings_of(cls, model.pipeline.scheduler.config) for cls in OPTIONS}
        model = replace(model, samplers=settings)
        for name in settings:
            found = [
                [best_of(model, name, calls, args.seeds, results, only, score) for only in ("default", None)]
                for calls in args.calls
            ]
            pairs = [(own.ratio.mean if own else math.inf, best) for own, best in found if best]
            over[f"{name}, {title}"] = ratios[name] = [own / best.ratio.mean for own, best in pairs]
            cells[name] = [f"{own / best.ratio.mean:.2f} ({own:.2f}; {best.grid})" for own, best in pairs]
        caption = f"{title}: the default over the best of its options (over the floor; the best of them)."
        tables.append(table_of(caption, cells, args.calls))
        panels[title] = as_curves(ratios, args.calls)
    worst = max(over, key=lambda name: max(over[name]))
    most = max(over[worst])
    return Report(
        "defaults",
        "Schedulers without any option",
        "How far is what a scheduler of ours does by default from the best that its options could do?",
        f"At most {most:.2f} times ({worst}, {args.calls[over[worst].index(most)]} calls); in the geometric mean "
        f"{math.exp(statistics.mean(math.log(r) for ratios in over.values() for r in ratios)):.2f} times.",
        tables,
        [draw_curves(args.output / "defaults.png", panels, "sliced W2 of the default over the best option")],
        f"n = {args.num_samples}, {args.seeds} seed(s), a training of {args.steps} steps. The best option is picked on "
        "the same samples.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("defaults", __doc__, ["defaults"])
    parser.add_argument(
        "--calls", type=at_least(3), nargs="+", default=[5, 10, 20, 50], help="numbers of network calls"
    )
    args = parse(parser, arguments, over_floor=["defaults"])
    defaults(args).write(args.output)


if __name__ == "__main__":
    main()
