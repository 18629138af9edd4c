"""Samplers side by side: measured at numbers of calls, over seeds, and drawn as curves."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..evaluation.report import Curve, plot_curves
from ..evaluation.results import Results, Statistic
from ..evaluation.table import Table
from .digits import quality, statistic_of
from .pictures import save_picture


def by_calls(calls: Iterable[int]) -> list[str]:
    """The columns of a table of numbers of network calls."""
    return [f"{n} calls" for n in calls]


def measured(
    results: Results, names: Iterable[str], calls: Sequence[int], num_seeds: int, pipeline: Callable[[str, int], Any]
) -> dict[str, dict[int, Statistic | None]]:
    """Sliced W2 over the floor by name and number of calls, of `pipeline(name, seed)`; see `quality`."""
    return {
        name: {n: statistic_of(quality(results, name, n, num_seeds, partial(pipeline, name))) for n in calls}
        for name in names
    }


def over_seeds(
    results: Results, name: str, calls: int | None, num_seeds: int, make: Callable[[int], dict[str, float]]
) -> dict[str, Statistic]:
    """What `make(seed)` scores, by the names of the scores, over seeds; empty where one of them has no scores."""
    scores = results.of_seeds(name, calls, num_seeds, make) or []
    return {key: Statistic.of([one[key] for one in scores]) for key in (scores[0] if scores else ())}


def as_curves(found: Mapping[str, Sequence[float]], calls: Sequence[int]) -> dict[str, Curve]:
    """Values of one seed each, at these numbers of calls, as curves."""
    return {
        name: {n: Statistic(value, None) for n, value in zip(calls, values, strict=True)}
        for name, values in found.items()
    }


def table_of(caption: str, found: Mapping[str, Sequence[Any]], calls: Sequence[int]) -> Table:
    """Values, a row a name and a column a number of calls."""
    return Table(caption, ["", *by_calls(calls)], [[name, *values] for name, values in found.items()])


def plot_behind(axis: Any, curves: Iterable[Curve], label: str = "", **line: Any) -> None:
    """Draw lines without points, thin and grey unless told, that other curves stand out against; `label` names all."""
    style = {"color": "0.7", "linestyle": "-", "linewidth": 0.7, "zorder": 1, **line}
    for i, curve in enumerate(curves):
        shown = {n: value.mean for n, value in curve.items() if value}
        axis.plot(list(shown), list(shown.values()), label=label if i == 0 else "", **style)


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], ylabel: str) -> str:
    """A picture of curves, side by side by their titles, with one legend for all; the name of the file."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 5 * len(panels), 5.5), layout="constrained", squeeze=False
    )
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        plot_curves(axis, curves)
        axis.set(title=title, ylabel=ylabel)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return save_picture(figure, path)
