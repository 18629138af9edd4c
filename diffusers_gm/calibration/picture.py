"""A calibration as a picture. Needs matplotlib, of the `evaluation` extra."""

from pathlib import Path
from typing import Any, BinaryIO

from ..pictures import curve_style, style
from .calibrate import Calibration, in_words


def plot(calibration: Calibration, path: Path | BinaryIO) -> None:
    """The levels of each budget before and after, with tau, its errors, where they were measured, and rho."""
    from matplotlib import rc_context

    with rc_context(style()):
        _figure(calibration).savefig(path, dpi=100)


def _figure(calibration: Calibration) -> Any:
    from matplotlib.figure import Figure

    columns = 2 if calibration.errors else 1
    figure = Figure(figsize=(5.5 * columns, max(4.4, 1.5 + 0.5 * len(calibration.levels))), layout="constrained")
    left, *others = figure.subplots(1, columns, squeeze=False)[0]
    budgets = list(calibration.levels)
    names = ("fixed grid", "calibrated")
    for at, (name, levels) in enumerate(zip(names, (calibration.fixed, calibration.levels), strict=True)):
        rows = [row + 0.3 * at for row, n in enumerate(budgets) for _ in range(n)]
        points = [sigma for n in budgets for sigma in levels[n]]
        left.plot(points, rows, label=name, **{**curve_style(at), "linestyle": "none"})
    left.set(xscale="log", xlabel="noise level sigma", ylabel="network calls", title="levels before and after")
    left.invert_xaxis()
    labels = [f"{n}, tau {in_words(calibration.stochasticity[n])}" for n in budgets]
    left.set_yticks([row + 0.15 for row in range(len(budgets))], labels)
    left.invert_yaxis()
    for right in others:
        for at, name in enumerate(names):
            values = [errors[at] ** 0.5 for errors in calibration.errors.values()]
            right.plot(list(calibration.errors), values, label=name, **curve_style(at))
        right.set(
            xscale="log", yscale="log", xlabel="network calls", ylabel="sliced Wasserstein distance, pixels in [-1, 1]",
            title="distance to very many calls from the same starts",
        )  # fmt: skip
        right.set_xticks(list(calibration.errors), [str(n) for n in calibration.errors])
        right.xaxis.minorticks_off()
    if calibration.martingale_defect is not None:
        figure.suptitle(f"rho = {calibration.martingale_defect:.2f}: about 0 for an exact network, less where it errs")
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
