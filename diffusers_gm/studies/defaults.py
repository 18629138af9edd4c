"""What a scheduler does without any option, over the best of its options: `python -m diffusers_gm.studies.defaults`.

Of every scheduler of ours, as `from_config` makes it for a network of diffusers (the exact denoiser of the digits)
and as a network of ours comes with it: sliced W2 over that of the best algorithm and grid that it offers, chosen
afterwards.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..cli import at_least
from ..data import split_digits
from ..evaluation.report import Curve, plot_curves
from ..schedulers import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .command import parse, study_parser
from .digits import kept_results
from .pictures import as_curves, save_picture
from .report import Report, table_of
from .sampler_benchmark_cells import best_of_each
from .sampler_benchmark_models import Model, exact_model, own_model

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
    n = args.num_samples
    models: dict[str, Callable[[], Model]] = {
        "exact digits, as a DDPM network": partial(exact_model, split_digits()[0], "the digits", n, args.output),
        "a network of NCSNv2": partial(own_model, "ncsnv2", n, args.steps, 0, args.output),
    }
    tables, panels = [], {}
    over: dict[str, list[float]] = {}
    for title, make in models.items():
        model, cells = make(), {}
        ratios: dict[str, list[float]] = {}
        config = model.pipeline.scheduler.config
        model = replace(model, samplers={cls.__name__: settings_of(cls, config) for cls in OPTIONS})
        results = kept_results(f"defaults {title}", n, args.output, content=model.content)
        results.floor = [model.score(model.floor[:n])]
        for name in model.samplers:
            settings = [(name, grid) for grid in model.samplers[name]]
            found = [
                [
                    best_of_each(model, some, calls, args.seeds, results).get((name, calls))
                    for some in ([(name, "default")], settings)
                ]
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
        f"{statistics.geometric_mean(itertools.chain.from_iterable(over.values())):.2f} times.",
        tables,
        [plot(panels, args.output / "defaults.png")],
        f"n = {n}, {args.seeds} seed(s), a training of {args.steps} steps. The best option is picked on "
        "the same samples.",
    )


def plot(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> str:
    """Curves side by side by their titles, with one legend for all; the name of the file."""
    size = (1.5 + 5 * len(panels), 5.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        plot_curves(axis, curves)
        axis.set(title=title, ylabel="sliced W2 of the default over the best option")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return save_picture(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("defaults", __doc__, ["defaults"])
    parser.add_argument(
        "--calls", type=at_least(3), nargs="+", default=[5, 10, 20, 50], help="numbers of network calls"
    )
    args = parse(parser, arguments, over_floor=["defaults"])
    defaults(args).write(args.output)


if __name__ == "__main__":
    main()
