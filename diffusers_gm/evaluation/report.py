"""Results as a table, as a picture and in words."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..extra import extra
from ..pictures import curve_style, style
from .results import Cell, Results, Statistic
from .sampling import in_short
from .scoring import SLICED_WASSERSTEIN
from .table import Table

# Distances: the smaller the better. Those with a floor that is not 0 in the mean are also given as multiples of it.
DISTANCES = ("FD-Lite0", "FID", "KID-Lite0", "KID", SLICED_WASSERSTEIN)
WITH_RATIO = ("FD-Lite0", "FID", SLICED_WASSERSTEIN)
SCALES = dict.fromkeys(DISTANCES, "symlog") | dict.fromkeys(WITH_RATIO, "log")

# What the distances are, in a table.
EXPLAINED = {
    **dict.fromkeys(("FD-Lite0", "FID"), "the Fréchet distance of features, which is a square"),
    **dict.fromkeys(("KID-Lite0", "KID"), "the kernel distance of features, unbiased, so that its floor is chance"),
    SLICED_WASSERSTEIN: "the sliced 2-Wasserstein distance of pixels",
}
# The line of the floor in a picture.
FLOOR = {"color": "gray", "linestyle": ":", "linewidth": 0.9, "label": "floor: as many other real images"}
BELOW = " (0."  # how a ratio below 1 begins

# Quality by number of calls; None where there is none.
Curve = Mapping[int, Statistic | None]


def groups(results: Results) -> dict[tuple[str, int | None], list[Cell]]:
    """Cells that differ in the seed only, by scheduler and calls."""
    order = list(dict.fromkeys(cell.scheduler for cell in results.cells))
    grouped: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in sorted(results.cells, key=lambda c: (order.index(c.scheduler), c.calls or 0)):
        grouped.setdefault((cell.scheduler, cell.calls), []).append(cell)
    return grouped


def statistic(cells: Sequence[Mapping[str, float]], metric: str) -> Statistic | None:
    """None unless every cell has the metric: a cell with NaN is not averaged away."""
    values = [scores[metric] for scores in cells if metric in scores]
    return Statistic.of(values) if values and len(values) == len(cells) else None


def curves(results: Results, metric: str) -> dict[str, dict[int, Statistic | None]]:
    """A metric by scheduler and number of calls."""
    found: dict[str, dict[int, Statistic | None]] = {}
    for (scheduler, calls), cells in groups(results).items():
        if calls is not None:
            found.setdefault(scheduler, {})[calls] = statistic([cell.scores for cell in cells], metric)
    return found


def curve_table(caption: str, first: str, curves: Mapping[str, Curve]) -> Table:
    """A row per curve, a column per number of calls; `-` where there is no value."""
    calls = sorted({n for curve in curves.values() for n in curve})
    rows = [[name, *(f"{curve[n]:.2f}" if curve.get(n) else "-" for n in calls)] for name, curve in curves.items()]
    return Table(caption, [first, *(f"{n} calls" for n in calls)], rows)


def ratios(results: Results, metric: str = SLICED_WASSERSTEIN) -> dict[str, dict[int, Statistic | None]]:
    """`curves` of a distance over its mean floor."""
    floor = statistic(results.floor, metric)
    if floor is None:
        raise ValueError(f"{results.path} has no floor of {metric}")
    return {
        name: {n: value and value.over(floor.mean) for n, value in curve.items()}
        for name, curve in curves(results, metric).items()
    }


def table(results: Results) -> Table:
    """A row per scheduler and number of calls, below the floor; `-` where there is no value, and why in the caption.
    How many images have NaN is a column where some have."""
    num_samples, metrics = results.conditions["num_samples"], [name for name in results.floor[0] if name != "num_nan"]
    units = {name: floor.mean for name in WITH_RATIO if (floor := statistic(results.floor, name))}

    def words(scores: list[dict[str, float]]) -> list[str]:
        row = []
        for name in metrics:
            value, unit = statistic(scores, name), units.get(name)
            ratio = f" ({value.mean / unit:.2f}x)" if value and unit else ""
            row.append(f"{value}{ratio}" if value else "-")
        return row

    any_nan = any(cell.scores.get("num_nan") for cell in results.cells)
    rows = [["**real images (floor)**", "", *words(results.floor), *[""] * any_nan, "", ""]]
    for (scheduler, calls), cells in groups(results).items():
        made = {cell.network_calls for cell in cells if cell.network_calls is not None}
        bad = sum(int(cell.scores.get("num_nan", 0)) for cell in cells)
        nan = f"{bad} of {num_samples * len(cells)}" if made or calls is None else "-"
        rows.append(
            [
                scheduler,
                " ".join(map(str, sorted(made))) or str(calls or ""),
                *words([cell.scores for cell in cells]),
                *[nan] * any_nan,
                f"{mean(cell.sampling_seconds for cell in cells):.1f}" if made else "-",
                f"{mean(cell.scoring_seconds for cell in cells):.1f}",
            ]
        )
    header = ["scheduler", "network calls", *metrics, *["images with NaN"] * any_nan, "sampling s", "scoring s"]
    return Table(_caption(results, "".join(map(str, rows))), header, rows)


def _caption(results: Results, shown: str) -> str:
    """What a table is of, and what the words and signs that are shown in it mean."""
    conditions = results.conditions
    of_digits = (conditions["data"], list(conditions["shape"])) == ("digits", [1, 8, 8])
    data = f"{conditions['data']}{', the training set' * of_digits}"
    size = "x".join(map(str, conditions["shape"]))
    of_classes = f", of the classes {', '.join(conditions['classes'])}" if "classes" in conditions else ""
    features = f" Features: {conditions['features']}." if conditions["features"] else ""
    distances = [f"{name}, {EXPLAINED[name]}" for name in results.floor[0] if name in EXPLAINED]
    legend = [f"Distances, lower is better: {'; '.join(distances)}."] if distances else []
    legend.append("Floor: of as many real images that are not among the others; in brackets, multiples of it.")
    if BELOW in shown:
        legend.append(
            "Below 1.00x, samples are nearer to these images than other real ones are: images without what is rare can "
            "be, and copies."
        )
    if "±" in shown:
        legend.append("Mean ± standard deviation over seeds (for the floor, over draws).")
    parts = [
        f"{conditions['num_samples']} samples of {conditions['model']}, against {conditions['num_reference']} real "
        f"images of {data}, {size}{of_classes}.{features}",
        " ".join(legend),
    ]
    notes = _reasons(results)
    return "\n\n".join(parts + (["Without a value:", "\n".join(notes)] if notes else []))


def _reasons(results: Results) -> list[str]:
    """Why there are no values, a line for all budgets of a scheduler, as items of Markdown."""
    found: dict[tuple[str, str], list[int | None]] = {}
    for (scheduler, calls), cells in groups(results).items():
        for reason in dict.fromkeys(in_short(cell.reason) for cell in cells if cell.reason):
            found.setdefault((scheduler, reason), []).append(calls)
    return sorted(f"- {scheduler}, {_listed(calls)} calls: {reason}" for (scheduler, reason), calls in found.items())


def _listed(words: Sequence[Any]) -> str:
    """`1, 2 and 3`."""
    *others, last = map(str, words)
    return f"{', '.join(others)} and {last}" if others else last


def _leaders(results: Results) -> tuple[str, dict[int | None, tuple[float, str]]]:
    """The first distance that has a floor, and its smallest value at every number of calls, over the floor, with the
    scheduler whose it is. An empty name where there is none, and no values either where the floor is 0."""
    name = next((name for name in WITH_RATIO if name in results.floor[0]), "")
    floor = statistic(results.floor, name)
    found: dict[int | None, tuple[float, str]] = {}
    for (scheduler, calls), cells in groups(results).items() if floor and floor.mean else ():
        value = statistic([cell.scores for cell in cells], name)
        if value and floor:
            found[calls] = min(found.get(calls, (math.inf, "")), (value.mean / floor.mean, scheduler))
    return name if floor else "", dict(sorted(found.items(), key=lambda item: item[0] or 0))


def verdict(results: Results) -> str:
    """The best scheduler at every number of calls by the first distance that has a floor, in words."""
    name, leaders = _leaders(results)
    if not name:
        return "No distance was measured."
    if not any(scores.get(name) for scores in results.floor):
        return f"{name} of real images is 0: nothing is a multiple of it."
    if not leaders:
        return f"{name} of no samples has a value."
    if None in leaders:  # samples that someone else made
        return f"{name} over that of real images: {leaders[None][0]:.2f}."
    several = len({cell.scheduler for cell in results.cells}) > 1
    words = [f"{ratio:.2f} at {calls}" + (f" ({who})" if several else "") for calls, (ratio, who) in leaders.items()]
    return f"{name} over that of real images, by network calls{', the best scheduler' * several}: {', '.join(words)}."


def best(results: Results) -> str:
    """What a card says of the schedulers that were compared, by number of calls; empty where there was one alone."""
    name, leaders = _leaders(results)
    if not leaders or len({cell.scheduler for cell in results.cells}) < 2:
        return ""
    calls_of: dict[str, list[int | None]] = {}
    for calls, (_, who) in leaders.items():
        calls_of.setdefault(who, []).append(calls)
    words = [f"`{who}` at {_listed(calls)}" for who, calls in calls_of.items()]
    below = " Below the floor of real images, less is not better." * any(ratio < 1 for ratio, _ in leaders.values())
    return (
        f"Measured on this model, the nearest to real images by {name} "
        f"([table](#quality-against-network-calls)): {', '.join(words)} network calls.{below}"
    )


def plot(results: Results, path: Path) -> None:
    """Distances against network calls, with the floor as a line; of one number of calls, a row a scheduler."""
    with extra("evaluation"):
        from matplotlib import rc_context

    with rc_context(style()):
        _figure(results).savefig(path, dpi=110)


def _figure(results: Results) -> Any:
    from matplotlib.figure import Figure

    metrics = [name for name in DISTANCES if name in results.floor[0]]
    shown = metrics or [name for name in results.floor[0] if name != "num_nan"]
    budgets = {cell.calls for cell in results.cells if cell.calls is not None}
    single, conditions = len(budgets) == 1, results.conditions
    height = 1.6 + 0.28 * len({cell.scheduler for cell in results.cells}) if single else 4.8
    names = 0.085 * max(len(cell.scheduler) for cell in results.cells) if single else 0.0
    figure = Figure(figsize=(max(6.0, 4.6 * len(shown)) + names, height), layout="constrained")
    order: list[str] = []  # of the first metric, for all
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False, sharey=single)[0], shown, strict=True):
        floor, found = statistic(results.floor, name), curves(results, name)
        level, scale = floor.mean if floor else None, SCALES.get(name, "linear")
        if single:
            values = {who: next(iter(curve.values())) for who, curve in found.items()}
            order = order or sorted(values, key=lambda who: value.mean if (value := values[who]) else math.inf)
            plot_rows(axis, {who: values[who] for who in order}, level, scale)
        else:
            plot_curves(axis, found, level, scale=scale)
        axis.set_title(f"{name}, lower is better" if name in DISTANCES else name)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    at = f" at {budgets.pop()} network calls" if single else ""
    figure.suptitle(
        f"{conditions['model']}{at}: {conditions['num_samples']} samples against {conditions['num_reference']} real "
        f"images of {conditions['data']}",
        parse_math=False,
    )
    return figure


def plot_rows(
    axis: Any, values: Mapping[str, Statistic | None], floor: float | None = None, scale: str = "log"
) -> None:
    """Draw quality at one number of calls, a row each from above; arguments as in `plot_curves`."""
    for row, value in enumerate(values.values()):
        if value:
            axis.errorbar(value.mean, row, xerr=value.spread, fmt="o", color="black", capsize=2)
        else:
            axis.text(0.5, row, "none", va="center", ha="center", fontsize=8, transform=axis.get_yaxis_transform())
    if floor is not None:
        axis.axvline(floor, **FLOOR)
    axis.set_yticks(range(len(values)), list(values))
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.grid(axis="x", linewidth=0.3)
    if scale == "log":
        plain_log(axis, "x", (1, 1.5, 2, 3, 5, 7))


def plot_curves(
    axis: Any,
    curves: Mapping[str, Curve],
    floor: float | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    scale: str = "log",
) -> None:
    """Draw quality against network calls, with bars for the spread over seeds, ticks in plain numbers.

    Args:
        axis: of matplotlib.
        curves: by name; what is None is left out.
        floor: where to draw the line of real images.
        styles: how to draw some of them.
        scale: of the ordinate: `log`, `linear`, or `symlog`, which is linear around 0, for the kernel distance.
    """
    for i, (name, curve) in enumerate(curves.items()):
        kept = [(n, value.mean, value.spread or 0.0) for n, value in curve.items() if value]
        x, y, spread = zip(*kept, strict=True) if kept else ((), (), ())
        style = {**curve_style(i), **(styles or {}).get(name, {})}
        axis.plot(x, y, label=name, **style)
        if any(spread):
            axis.errorbar(x, y, spread, fmt="none", ecolor=style["color"], capsize=2)
    if floor is not None:
        axis.axhline(floor, **FLOOR)
    ticks = sorted({n for curve in curves.values() for n in curve})
    axis.set(xscale="log", xlabel="network calls")
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.xaxis.minorticks_off()
    if scale == "log":
        plain_log(axis, "y")
    elif scale == "symlog":
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(min(0.0, axis.dataLim.ymin) - 1e-2, 1.5 * max(axis.dataLim.ymax, 1e-2))


def plain_log(axis: Any, of: str, fine: Sequence[float] = (1, 1.2, 1.5, 2, 3, 5, 7)) -> None:
    """A logarithmic x or y with ticks in plain numbers, at these multiples of powers of ten, fewer for more powers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = getattr(axis.dataLim, f"interval{of}")
    ticks = fine if high < 12 * low else (1, 2, 5) if high < 100 * low else (1,)
    axis.set(**{f"{of}scale": "log"})
    line = getattr(axis, f"{of}axis")
    line.set_major_locator(LogLocator(subs=ticks))
    line.set_major_formatter("{x:g}")
    line.set_minor_locator(NullLocator())
