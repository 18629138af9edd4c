"""What a scheduler does without any option, over the best of its options: `python -m diffusers_gm.studies.defaults`.

Of every scheduler of ours, as `from_config` makes it for a network of each noise space (the exact denoiser of the
digits in its words) and for networks that we trained: sliced W2 over that of the best algorithm and grid that it
offers, chosen afterwards. Every finished cell is kept in `OUTPUT/.parts`: interrupted, it goes on where it was.
"""

import argparse
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, ScoreSdeVeScheduler

from ..cli import at_least
from ..data import split_digits
from ..evaluation.report import Curve, plot_curves
from ..evaluation.table import Table
from ..schedulers import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .command import parse, study_parser
from .digits import kept_results
from .pictures import as_curves, save_picture
from .report import Report, table_of
from .sampler_benchmark_cells import best_of_each
from .sampler_benchmark_models import Model, ddpm_model, exact_model, own_model
from .sampler_benchmark_schedulers import SOURCE

GRIDS = ("even", "log_snr", "karras", "trailing")
LANGEVIN = [{"algorithm_type": "langevin", "network_level": level} for level in ("chain", "ladder")]
# By scheduler: its algorithms.
OPTIONS: dict[Any, list[dict[str, Any]]] = {
    AnnealedLangevinScheduler: [
        *LANGEVIN,
        {"algorithm_type": "langevin", "network_level": "chain", "step_order": 1},
        {"algorithm_type": "consistent"},
        {"algorithm_type": "explore"},
    ],
    GMLangevinScheduler: [
        *LANGEVIN,
        {"algorithm_type": "ancestral"},
        {"algorithm_type": "ancestral", "step_order": 1},
        {"algorithm_type": "ode"},
    ],
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


# Networks by what they answer in which space, and who trained them.
EXACT: dict[str, Any] = {
    "exact, DDPM (vp)": SOURCE,
    "exact, flow matching": FlowMatchEulerDiscreteScheduler(),
    "exact, NCSN++ (ve)": ScoreSdeVeScheduler(sigma_max=98.0),
    "exact, EDM": EDMEulerScheduler(),
    "exact, CLD": CLDSSCSScheduler(prediction_type="velocity_score"),
}
TRAINED: dict[str, Callable[..., Model]] = {
    "ddpm": ddpm_model,
    **{method: partial(own_model, method) for method in ("ncsnv2", "gm-sgm", "cld")},
}


def models_of(args: argparse.Namespace) -> dict[str, Callable[[], Model]]:
    """The networks, by their titles, each made when it is its turn."""
    n, output = args.num_samples, args.output
    exact = {
        title: partial(exact_model, split_digits()[0], "the digits", n, output, 0.0, source)
        for title, source in EXACT.items()
    }
    trained = {f"trained, {method}": partial(make, n, args.steps, 0, output) for method, make in TRAINED.items()}
    return {title: make for title, make in (exact | trained).items() if title in (args.networks or (title,))}


def defaults(args: argparse.Namespace) -> Report:
    tables: list[Table] = []
    panels: dict[str, Mapping[str, Curve]] = {}
    over: dict[str, list[float]] = {}
    for title, make in models_of(args).items():
        model, cells = make(), {}
        ratios: dict[str, list[float]] = {}
        config = model.pipeline.scheduler.config
        of_mixture = config.get("model_noise") == "mixture"
        samplers = {c.__name__: settings_of(c, config) for c in OPTIONS if c.reads_mixtures or not of_mixture}
        model = replace(model, samplers=samplers)
        results = kept_results(f"defaults {title}", args.num_samples, args.output, content=model.content)
        results.floor = [model.score(draw) for draw in model.floor.split(args.num_samples)]
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
        # Every scheduler has its place: panels share their colours.
        panels[title] = {c.__name__: {} for c in OPTIONS} | as_curves(ratios, args.calls)
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
        f"n = {args.num_samples}, {args.seeds} seed(s), trainings of {args.steps} steps. The best option is picked on "
        "the same samples; sliced W2 of so few does not tell what is close to the floor.",
    )


def plot(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> str:
    """Curves by their titles, four panels a row, with one legend for all; the name of the file."""
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = (1.5 + 4 * columns, 0.5 + 4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        plot_curves(axis, curves)
        axis.set(title=title)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.supylabel("sliced W2 of the default over the best option")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return save_picture(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("defaults", __doc__, ["defaults"])
    parser.add_argument(
        "--calls", type=at_least(3), nargs="+", default=[5, 10, 20, 50], help="numbers of network calls"
    )
    names = [*EXACT, *(f"trained, {method}" for method in TRAINED)]
    parser.add_argument("--networks", nargs="+", choices=names, metavar="NAME", help="only these of the table [all]")
    args = parse(parser, arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # of what configs of other schedulers say besides
    defaults(args).write(args.output)


if __name__ == "__main__":
    main()
