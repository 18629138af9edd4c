"""A calibration as a picture. Needs matplotlib, of the `evaluation` extra."""

from pathlib import Path
from typing import Any, BinaryIO

from ..pictures import curve_style, style
from .calibrate import Calibration


def plot(calibration: Calibration, path: Path | BinaryIO) -> None:
    """The levels of each budget, and its errors before and after."""
    from matplotlib import rc_context

    with rc_context(style()):
        _figure(calibration).savefig(path, dpi=100)


def _figure(calibration: Calibration) -> Any:
    from matplotlib.figure import Figure

    columns = 2 if calibration.errors else 1
    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    left, *others = figure.subplots(1, columns, squeeze=False)[0]
    budgets = list(calibration.levels)
    for row, n in enumerate(budgets):
        left.plot(
            calibration.levels[n], [row] * n, marker="|", markersize=12, linewidth=0.5, color="black", linestyle="-"
        )
    left.set(xscale="log", xlabel="noise level sigma", ylabel="network calls", title="levels")
    left.invert_xaxis()
    left.set_yticks(range(len(budgets)), [str(n) for n in budgets])
    for right in others:
        for at, name in enumerate(("fixed grid", "calibrated")):
            values = [calibration.errors[n][at] ** 0.5 for n in budgets]
            right.plot(budgets, values, label=name, **curve_style(at))
        right.set(
            xscale="log", yscale="log", xlabel="network calls", ylabel="sliced Wasserstein distance, pixels in [-1, 1]",
            title="distance to very many calls from the same starts",
        )  # fmt: skip
        right.set_xticks(budgets, [str(n) for n in budgets])
        right.minorticks_off()
        right.legend()
    return figure
