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
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor

from ..data import split_digits
from ..evaluation.report import plot_curves
from ..evaluation.results import Results
from ..evaluation.scoring import SLICED_WASSERSTEIN
from ..evaluation.table import Table
from ..schedulers import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)
from .cld_digits import as_curves
from .command import at_least, parse, study_parser
from .digits import images_of, kept_results, pipeline_of
from .pictures import save_picture
from .report import Report
from .sampler_benchmark_models import Model, own_model
from .sampler_benchmark_models import exact_model as exact
from .sampler_benchmark_scores import Scores

GRIDS = ("even", "log_snr", "karras", "trailing")
LANGEVIN: tuple[dict[str, Any], ...] = (
    {"algorithm_type": "langevin", "network_level": "chain"},
    {"algorithm_type": "langevin", "network_level": "ladder"},
)
# By scheduler: its algorithms, and grids besides `GRIDS`.
OPTIONS: dict[Any, tuple[tuple[dict[str, Any], ...], tuple[str, ...]]] = {
    AnnealedLangevinScheduler: (
        (*LANGEVIN, {"algorithm_type": "consistent"}, {"algorithm_type": "explore"}),
        GRIDS,
    ),
    GMLangevinScheduler: ((*LANGEVIN, {"algorithm_type": "ancestral"}, {"algorithm_type": "ode"}), GRIDS),
    CLDSSCSScheduler: (
        ({"algorithm_type": "sscs"}, {"algorithm_type": "probability_flow"}),
        (*GRIDS, "quadratic"),
    ),
    CalibratedMultistepScheduler: (({"stochasticity": 0.0}, {"stochasticity": 0.4}), GRIDS),
}


def settings_of(cls: Any, config: Any) -> dict[str, Any]:
    """The scheduler without any option, by the name `default`, and with all that it offers."""
    algorithms, grids = OPTIONS[cls]
    made = {"default": cls.from_config(config)}
    for changes, grid in itertools.product(algorithms, grids):
        name = f"{' '.join(map(str, changes.values()))}, {grid}"
        made[name] = cls.from_config(config, timestep_spacing=grid, **changes)
    return made


def measured(
    model: Model, cls: Any, calls: int, args: argparse.Namespace, results: Results, score: Any
) -> dict[str, float]:
    """Sliced W2 of each setting that has a run, the mean of the seeds."""

    def draw(scheduler: Any, seed: int) -> tuple[Tensor, int]:
        return images_of(pipeline_of(model.pipeline.unet, scheduler), calls, args.num_samples, seed)

    found = {}
    for name, scheduler in settings_of(cls, model.pipeline.scheduler.config).items():
        cells = [
            results.measure(f"{cls.__name__}, {name}", calls, seed, partial(draw, scheduler, seed), score)
            for seed in range(args.seeds)
        ]
        if all(SLICED_WASSERSTEIN in cell.scores for cell in cells):
            found[name] = statistics.mean(cell.scores[SLICED_WASSERSTEIN] for cell in cells)
    return found


def defaults(args: argparse.Namespace) -> Report:
    models = {
        "exact digits, as a DDPM network": lambda: exact(
            split_digits()[0], "the digits", args.num_samples, args.output
        ),
        "a network of NCSNv2": lambda: own_model("ncsnv2", args.num_samples, args.steps, args.output),
    }
    tables, over = [], {}
    for title, make in models.items():
        model, rows = make(), []
        results = kept_results(f"defaults {title}", args.num_samples, args.output, floor=False, content=model.content)
        score = Scores(model.reference)
        floor = score(model.floor[: args.num_samples])[SLICED_WASSERSTEIN]
        for cls in OPTIONS:
            cells, ratios = [], []
            for calls in args.calls:
                found = measured(model, cls, calls, args, results, score)
                best = min(found, key=found.__getitem__)
                ratios.append(found.get("default", math.inf) / found[best])
                cells.append(f"{ratios[-1]:.2f} ({found.get('default', math.inf) / floor:.2f}; {best})")
            over[f"{cls.__name__}, {title}"] = ratios
            rows.append([cls.__name__, *cells])
        header = ["scheduler", *(f"{n} calls" for n in args.calls)]
        caption = f"{title}: the default over the best of its options (over the floor; the best of them)."
        tables.append(Table(caption, header, rows))
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    plot_curves(axis, as_curves(over, args.calls), 1)
    axis.set(ylabel="sliced W2 of the default over the best option", yscale="log")
    axis.legend(fontsize=7)
    worst = max(over, key=lambda name: max(over[name]))
    most = max(over[worst])
    return Report(
        "defaults",
        "Schedulers without any option",
        "How far is what a scheduler of ours does by default from the best that its options could do?",
        f"At most {most:.2f} times ({worst}, {args.calls[over[worst].index(most)]} calls); in the geometric mean "
        f"{math.exp(statistics.mean(math.log(r) for ratios in over.values() for r in ratios)):.2f} times.",
        tables,
        [save_picture(figure, args.output / "defaults.png")],
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
