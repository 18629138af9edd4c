"""The pictures of the demo and the studies, but for curves of quality. Needs the `evaluation` extra."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..app.runs import Run
from ..evaluation.report import Curve
from ..evaluation.results import Statistic
from ..evaluation.sampling import in_short
from ..pictures import COLORS, image_grid, style
from ..processes.cld import CLD, transform
from ..processes.mixture import GaussianMixtureNoise

matplotlib.use("Agg")  # pictures go to files
matplotlib.rcParams.update(style())

# A component of noise is a jump where it is drawn for fewer images than this.
RARE = 0.05


def save_picture(figure: Any, path: Path, dpi: int = 90) -> str:
    """Write a matplotlib figure and close it; the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path.name


def as_curves(found: Mapping[str, Sequence[float]], calls: Sequence[int]) -> dict[str, Curve]:
    """Values of one seed each, at these numbers of calls, as curves."""
    return {name: {n: Statistic(v, None) for n, v in zip(calls, of, strict=True)} for name, of in found.items()}


def plot_behind(axis: Any, curves: Iterable[Curve], label: str = "", **line: Any) -> None:
    """Draw lines without points, thin and grey unless told, that other curves stand out against; `label` names all."""
    look = {"color": "0.7", "linestyle": "-", "linewidth": 0.7, "zorder": 1, **line}
    for i, curve in enumerate(curves):
        shown = {n: value.mean for n, value in curve.items() if value}
        axis.plot(list(shown), list(shown.values()), label=label if i == 0 else "", **look)


def show_rows(axis: Any, images: dict[str, Tensor], columns: int = 24) -> None:
    """Draw one row of `columns` images `(n, 1 or 3, H, W)` in [-1, 1], where there are as many, under each name."""
    columns = min(columns, *(len(x) for x in images.values()))
    grid = image_grid(torch.cat([x[:columns] for x in images.values()]), columns)
    show_grid(axis, grid)
    name_rows(axis, grid, list(images), fontsize=7)


def name_rows(axis: Any, grid: Any, names: Sequence[str], **text: Any) -> None:
    """Names beside the rows of an `image_grid`."""
    axis.set_yticks([grid.height * (i + 0.5) / len(names) for i in range(len(names))], names, **text)
    axis.tick_params(axis="y", length=0)


def number_columns(axis: Any, count: int) -> None:
    """Numbers from 1 on above the columns of the `image_grid` on an axis."""
    left, right = axis.get_xlim()
    places = [left + (right - left) * (i + 0.5) / count for i in range(count)]
    axis.set_xticks(places, [str(i + 1) for i in range(count)], fontsize=7)
    axis.tick_params(axis="x", length=0, pad=1, labeltop=True, labelbottom=False)


def show_grid(axis: Any, grid: Any) -> None:
    """Draw an `image_grid`, without a frame."""
    axis.imshow(grid, vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def plot_samples(
    samples: Tensor, real: Tensor, title: str, path: Path, columns: int = 10, rows: Sequence[str] = ()
) -> None:
    """As many samples as real images `(n, 1 or 3, H, W)`, side by side, in rows, which may have names."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.8), layout="constrained")
    for axis, images, name in zip(axes, (samples, real), (title, "held-out digits"), strict=True):
        show_grid(axis, grid := image_grid(images, columns))
        axis.set(title=name)
        name_rows(axis, grid, rows)
    save_picture(figure, path)


def plot_trajectories(runs: Sequence[Run], path: Path) -> None:
    """The way of one image through each run: what the network saw, and the denoised image, at every call. Runs that
    could not be done are named, with their reason."""
    shown, failed = [run for run in runs if run.finished], [run for run in runs if not run.finished]
    calls = max(len(run.looks) for run in shown)
    height = 0.8 + 1.6 * len(shown) + 0.2 * len(failed)
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(0.4 + 0.65 * calls, height), layout="constrained", squeeze=False
    )
    for axis, run in zip(axes[:, 0], shown, strict=True):
        seen, denoised = (torch.cat([getattr(look, of)[:1] for look in run.looks]) for of in ("seen", "denoised"))
        show_rows(axis, {"y": seen, "D": denoised}, calls)
        number_columns(axis, len(run.looks))
        axis.set_ylabel(run.sampler.name, fontsize=9)
    left_out = "".join(f"\nnot shown: {run.sampler.name}: {in_short(run.error)}" for run in failed)
    figure.suptitle(
        f"one image in {calls} network calls, numbered above: y as the network sees it, D denoised{left_out}",
        fontsize=10,
    )
    save_picture(figure, path)


def shares_and_jumps(law: GaussianMixtureNoise, count: int) -> tuple[list[float], list[tuple[float, float]]]:
    """What `count` pictures show of a law of noise: scales of equal shares of the draws, ascending, and every scale
    that is drawn more rarely than `RARE`, with its probability. Which are shown is not left to chance: the largest
    jump of a law may be one draw in thousands."""
    pairs = sorted(zip(law.scales.tolist(), law.weights.tolist(), strict=True))
    rare = [pair for pair in pairs if pair[1] < RARE][-count // 3 :]
    common = [pair for pair in pairs if pair[1] >= RARE]
    ends = torch.tensor([share for _, share in common]).cumsum(0)
    places = (torch.arange(count - len(rare)) + 0.5) / (count - len(rare)) * ends[-1]
    return [common[int(i)][0] for i in torch.searchsorted(ends, places)], rare


def plot_forward_noise(image: Tensor, mixture: GaussianMixtureNoise, sigma: float, path: Path) -> None:
    """One digit under several draws of noise of equal variance, and random walks with the same increments.

    Gaussian draws disturb every copy alike; mixture draws leave most nearly clean (roaming) and drown some (jumps).
    """
    generator = torch.Generator().manual_seed(0)
    columns, jump = 14, COLORS[4]
    laws = {
        "Gaussian": GaussianMixtureNoise([1.0], [1.0]),
        **({f"this model's\nmixture (K = {len(mixture)})": mixture} if len(mixture) > 1 else {}),
        "stable, alpha = 1.5\n(K = 8)": GaussianMixtureNoise.from_stable(1.5, 8),
    }
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1.25, 1.2)))
    for row, (name, law) in zip(top.subplots(len(laws), columns), laws.items(), strict=True):
        shares, rare = shares_and_jumps(law, columns)
        titles = [f"c = {c:.2f}" for c in shares] + [f"c = {c:.2f}\n1 draw in {1 / share:,.0f}" for c, share in rare]
        scales = torch.tensor(shares + [c for c, _ in rare]).view(-1, 1, 1, 1)
        noisy = image + sigma * scales * torch.randn((columns, *image.shape), generator=generator)
        for i, (axis, picture, title) in enumerate(zip(row, noisy, titles, strict=True)):
            axis.imshow(picture[0], vmin=-1.5, vmax=1.5)
            axis.set_title(title, fontsize=8)
            axis.set(xticks=[], yticks=[])
            if i >= len(shares):
                axis.spines[:].set(color=jump, linewidth=3)
        row[0].set_ylabel(name, fontsize=9)
    top.suptitle(
        f"One digit and c * sigma * Gaussian noise, sigma = {sigma:g}: a row is a law of the scale c, E[c^2] = 1, a "
        "column one draw of it.\nThe scales are ascending, in equal shares of the draws; framed: the rare ones, one of "
        "each."
    )
    for axis, (name, law) in zip(bottom.subplots(1, len(laws)), laws.items(), strict=True):
        increments = law.sample((2000, 2), generator)
        walk = torch.cat([torch.zeros(1, 2), increments.cumsum(0)])
        axis.plot(*walk.T, linewidth=0.6)
        for i in (increments.norm(dim=1) > 5).nonzero().flatten().tolist():
            axis.plot(*walk[i : i + 2].T, color=jump, linestyle="-", linewidth=1.5)
        axis.set_title(name.replace("\n", " "), fontsize=10)
        axis.set(xlabel="one pixel / sigma", ylabel="another / sigma")
        axis.set_aspect("equal", "datalim")
    bottom.suptitle("The same noise added up: a walk of two pixels in 2000 steps; thick: steps of more than 5 sigma")
    save_picture(figure, path)


def plot_forward_cld(image: Tensor, process: CLD, path: Path) -> None:
    """One path of a digit and its velocity through critically-damped Langevin diffusion, and of three of its pixels.

    Noise acts on the velocities alone: they fluctuate, and the image, their integral, moves smoothly.
    """
    generator = torch.Generator().manual_seed(0)
    num_steps, shown = 400, (0, 4, 12, 24, 40, 64, 100, 140, 200, 280, 400)
    clocks = process.clock(torch.linspace(0, 1, num_steps + 1))
    kernels = process.kernel(clocks.diff())
    scale = process.velocity_scale
    x, v = image, process.gamma**0.5 * scale * torch.randn(image.shape, generator=generator)
    states = [torch.stack([x, v / scale])]
    for transition, root in zip(kernels.transition, kernels.root, strict=True):
        mean, drawn = (
            transform(transition, x, v),
            transform(root, *torch.randn((2, *image.shape), generator=generator)),
        )
        x, v = mean[0] + drawn[0], mean[1] + drawn[1]
        states.append(torch.stack([x, v / scale]))
    track = torch.stack(states)[:, :, 0]

    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.3)))
    for row, axes in enumerate(top.subplots(2, len(shown))):
        for axis, step in zip(axes, shown, strict=True):
            axis.imshow(track[step, row], vmin=-1.5, vmax=1.5)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"t = {step / num_steps:.2f}", fontsize=8)
        axes[0].set_ylabel(("data x", "velocity v")[row])
    top.suptitle(f"one digit and its velocity (M = {process.mass:g}, gamma = {process.gamma:g})")
    pixels = track.flatten(2)[:, :, [10, 27, 45]]
    times = torch.linspace(0, 1, num_steps + 1)
    names = ("data x of three pixels", "velocity v / sqrt(M) of the same pixels")
    for axis, name, values in zip(bottom.subplots(1, 2), names, pixels.unbind(1), strict=True):
        axis.plot(times, values, linewidth=0.8)
        axis.set(title=name, xlabel="t")
    save_picture(figure, path)
