"""The pictures of the demo and the studies, but for curves of quality. Needs the `evaluation` extra."""

from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..processes.cld import CLD, transform
from ..processes.mixture import GaussianMixtureNoise
from ..random import Draw


def save_picture(figure: Any, path: Path) -> str:
    """Write a matplotlib figure and close it; the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path.name


def show_rows(axis: Any, images: dict[str, Tensor], columns: int = 24) -> None:
    """Draw one row of `columns` gray images `(n, 1, H, W)` in [-1, 1] under each name."""
    rows = [torch.nn.functional.pad(x[:columns, 0].clamp(-1, 1), (0, 1, 0, 1)) for x in images.values()]
    height = rows[0].shape[1]
    axis.imshow(torch.cat([row.movedim(0, 1).flatten(1) for row in rows]), cmap="gray", vmin=-1, vmax=1)
    axis.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(images), fontsize=7)
    axis.set_xticks([])


def plot_samples(samples: Tensor, real: Tensor, title: str, path: Path, columns: int = 10) -> None:
    """As many samples as real images `(n, 1, H, W)`, side by side, in rows."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.8), layout="constrained")
    for axis, images, name in zip(axes, (samples, real), (title, "held-out digits"), strict=True):
        show_rows(axis, {str(i): row for i, row in enumerate(images.split(columns))}, columns)
        axis.set(title=name, yticks=[])
    save_picture(figure, path)


def plot_forward_noise(image: Tensor, mixture: GaussianMixtureNoise, sigma: float, path: Path) -> None:
    """One digit under several draws of noise of equal variance, and random walks with the same increments.

    Gaussian draws disturb every copy alike; mixture draws leave some nearly clean (roaming) and drown others (jumps).
    """
    generator = torch.Generator().manual_seed(0)
    columns = 14
    laws = {
        "Gaussian": GaussianMixtureNoise([1.0], [1.0]),
        **({f"this model's\nmixture (K = {len(mixture)})": mixture} if len(mixture) > 1 else {}),
        "stable, alpha = 1.5\n(K = 8)": GaussianMixtureNoise.from_stable(1.5, 8),
    }
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1.25, 1.2)))
    for row, (name, law) in zip(top.subplots(len(laws), columns), laws.items(), strict=True):
        scales = law.sample_scales((columns, 1, 1, 1), Draw(generator)).sort(0).values
        noisy = image + sigma * scales * torch.randn((columns, *image.shape), generator=generator)
        for axis, picture, scale in zip(row, noisy, scales.flatten(), strict=True):
            axis.imshow(picture[0], cmap="gray", vmin=-1.5, vmax=1.5)
            axis.set_title(f"c = {float(scale):.2f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    top.suptitle(f"one digit, noise of equal variance (sigma = {sigma:g}), sorted by the scale c that was drawn")
    for axis, (name, law) in zip(bottom.subplots(1, len(laws)), laws.items(), strict=True):
        axis.plot(*law.sample((2000, 2), generator).cumsum(0).T, linewidth=0.6)
        axis.set_title(name.replace("\n", " "), fontsize=10)
        axis.set_aspect("equal", "datalim")
    bottom.suptitle("2000 steps of a random walk, increments of equal variance")
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
            axis.imshow(track[step, row], cmap="gray", vmin=-1.5, vmax=1.5)
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
