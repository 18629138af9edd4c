"""Results as a table and as a picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .extra import evaluation_extra
from .results import Cell, Results

# Distances: the smaller the better. Those with a floor that is not 0 in the mean are also given as multiples of it.
DISTANCES = ("FD-Lite0", "FID", "KID-Lite0", "KID", "sliced W2")
WITH_RATIO = ("FD-Lite0", "FID", "sliced W2")


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds; the spread is None for one seed."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Statistic":
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")


def groups(results: Results) -> dict[tuple[str, int | None], list[Cell]]:
    """Cells that differ in the seed only, by scheduler and calls."""
    order = list(dict.fromkeys(cell.scheduler for cell in results.cells))
    grouped: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in sorted(results.cells, key=lambda c: (order.index(c.scheduler), c.calls or 0)):
        grouped.setdefault((cell.scheduler, cell.calls), []).append(cell)
    return grouped


def statistic(cells: list[dict[str, float]], metric: str) -> Statistic | None:
    """None unless every cell has the metric: a cell with NaN is not averaged away."""
    values = [scores[metric] for scores in cells if metric in scores]
    return Statistic.of(values) if values and len(values) == len(cells) else None


def markdown(results: Results) -> str:
    """A row per scheduler and number of calls, below the floor; `-` where there is no value, and why below."""
    conditions, metrics = results.conditions, [name for name in results.floor[0] if name != "num_nan"]
    floor = {name: statistic(results.floor, name) for name in metrics}

    def words(scores: list[dict[str, float]]) -> list[str]:
        row = []
        for name in metrics:
            value, of_floor = statistic(scores, name), floor[name]
            ratio = f" ({value.mean / of_floor.mean:.2f}x)" if value and of_floor and name in WITH_RATIO else ""
            row.append(f"{value}{ratio}" if value else "-")
        return row

    header = ["scheduler", "network calls", *metrics, "images with NaN", "sampling s", "scoring s"]
    rows = [["**real images (floor)**", "", *words(results.floor), "", "", ""]]
    notes = []
    for (scheduler, calls), cells in groups(results).items():
        made = {cell.network_calls for cell in cells if cell.network_calls is not None}
        bad = sum(int(cell.scores.get("num_nan", 0)) for cell in cells)
        rows.append(
            [
                scheduler,
                " ".join(map(str, sorted(made))) or str(calls or ""),
                *words([cell.scores for cell in cells]),
                f"{bad} of {conditions['num_samples'] * len(cells)}" if made or calls is None else "-",
                f"{mean(cell.sampling_seconds for cell in cells):.1f}" if made else "-",
                f"{mean(cell.scoring_seconds for cell in cells):.1f}",
            ]
        )
        notes += [f"- {scheduler}, {calls} calls: {reason}" for reason in {c.reason for c in cells} if reason]
    lines = [
        f"{conditions['num_samples']} samples of {conditions['model']}, against {conditions['num_reference']} real "
        f"images of {conditions['data']}, {'x'.join(map(str, conditions['shape']))}. "
        f"Features: {conditions['features'] or 'none'}.",
        "",
        "Floor: as many real images that are not among the others. Mean ± standard deviation over seeds (for the "
        "floor, over draws); in brackets, over the floor. The kernel distance is unbiased: its floor is chance.",
        "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)),
        *(["", *sorted(notes)] if notes else []),
    ]
    return "\n".join(lines) + "\n"


def verdict(results: Results) -> str:
    """The best scheduler at every number of calls by the first distance that has a floor, in words."""
    name = next((name for name in WITH_RATIO if name in results.floor[0]), None)
    floor = statistic(results.floor, name) if name else None
    if name is None or floor is None:
        return "No distance was measured."
    best: dict[int | None, tuple[float, str]] = {}
    for (scheduler, calls), cells in groups(results).items():
        value = statistic([cell.scores for cell in cells], name)
        if value:
            best[calls] = min(best.get(calls, (math.inf, "")), (value.mean / floor.mean, scheduler))
    if None in best:  # samples that someone else made
        return f"{name} over that of real images: {best[None][0]:.2f}."
    several = len({scheduler for scheduler, _ in groups(results)}) > 1
    words = [f"{ratio:.2f} at {calls}" + (f" ({who})" if several else "") for calls, (ratio, who) in best.items()]
    return f"{name} over that of real images, by network calls{', the best scheduler' * several}: {', '.join(words)}."


def plot(results: Results, path: Path) -> None:
    """Distances against network calls, with the floor as a line."""
    with evaluation_extra():
        from matplotlib.figure import Figure

    metrics = [name for name in DISTANCES if name in results.floor[0]]
    shown = metrics or [name for name in results.floor[0] if name != "num_nan"]
    figure = Figure(figsize=(4.6 * len(shown), 4.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _plot_metric(axis, results, name)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    conditions = results.conditions
    figure.suptitle(f"{conditions['model']}: {conditions['num_samples']} samples against {conditions['data']}")
    figure.savefig(path, dpi=110)


def _plot_metric(axis: Any, results: Results, name: str) -> None:
    """One panel. The kernel distance, which may be negative, has an axis that is linear around 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    floor = statistic(results.floor, name)
    cells = groups(results)
    ticks = sorted({calls for _, calls in cells if calls is not None})
    for scheduler in dict.fromkeys(scheduler for scheduler, _ in cells):
        points = [
            (calls, statistic([cell.scores for cell in group], name))
            for (of, calls), group in cells.items()
            if of == scheduler
        ]
        kept = [(calls, value.mean, value.spread or 0.0) for calls, value in points if value]
        x, y, spread = zip(*kept, strict=True) if kept else ((), (), ())
        axis.errorbar(x, y, spread, marker="o", capsize=3, label=scheduler)
    if floor:
        axis.axhline(floor.mean, color="gray", linestyle=":", label="floor: real images")
    axis.set(xscale="log", xlabel="network calls", title=name)
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.xaxis.minorticks_off()
    if name in WITH_RATIO:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    elif name in DISTANCES:
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(min(0.0, axis.dataLim.ymin) - 1e-2, 1.5 * max(axis.dataLim.ymax, 1e-2))
