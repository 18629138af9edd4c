"""Look at a trained GM-SGM: pictures, and its quality under every sampler.

    python -m diffusers_gm.demo outputs/demo [--compare outputs/demo-k1]

`make demo` runs it on the digits model it has just trained. Writes into the model's folder:
`digits.png` (samples beside real digits), `forward_noise.png` (Gaussian and mixture noise), `quality.png`,
`quality.json` and `quality.md` (sliced W2 over the floor of held-out against training digits).
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffusers_gm import GaussianMixtureNoise, GMLangevinScheduler, GMSGMPipeline
from diffusers_gm.data import split_digits
from diffusers_gm.evaluation import Quality, markdown_table, quality, sliced_wasserstein

CALLS = (10, 20, 50, 200)
ALGORITHMS = ("langevin", "jump", "exponential", "ancestral", "ode")
GRID = 10


def show_grid(axes, images: Tensor, title: str) -> None:
    """Draw GRID x GRID gray images `(n, 1, H, W)` in [-1, 1]."""
    height, width = images.shape[-2:]
    tiles = images[: GRID * GRID, 0].reshape(GRID, GRID, height, width)
    framed = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=-1.0)
    axes.imshow(framed.permute(0, 2, 1, 3).reshape(GRID * (height + 1), -1), cmap="gray", vmin=-1, vmax=1)
    axes.set_title(title)
    axes.axis("off")


def plot_samples(samples: Tensor, real: Tensor, title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.8), layout="constrained")
    show_grid(left, samples, title)
    show_grid(right, real, "held-out digits")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_forward_noise(image: Tensor, mixture: GaussianMixtureNoise, sigma: float, path: Path) -> None:
    """One digit under several draws of noise of equal variance, and random walks with the same increments.

    Gaussian draws disturb every copy alike; mixture draws leave some nearly clean (roaming) and drown others (jumps).
    """
    generator = torch.Generator().manual_seed(0)
    columns = 14
    laws = {
        "Gaussian": GaussianMixtureNoise([1.0], [1.0]),
        f"this model's\nmixture (K = {len(mixture)})": mixture,
        "stable, alpha = 1.5\n(K = 8)": GaussianMixtureNoise.from_stable(1.5, 8),
    }
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1.25, 1.2)))
    for row, (name, law) in zip(top.subplots(len(laws), columns), laws.items(), strict=True):
        scales = law.sample_scales((columns, 1, 1, 1), generator, torch.device("cpu"), torch.float32).sort(0).values
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_quality(results: dict[str, list[Quality]], floor: float, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for style, (model, cells) in zip(("-o", "--s"), results.items(), strict=False):
        axis.set_prop_cycle(None)
        for name in dict.fromkeys(cell.sampler for cell in cells):
            points = [(c.calls, c.distance) for c in cells if c.sampler == name and c.distance is not None]
            axis.plot(*zip(*points, strict=True), style, label=name if len(results) == 1 else f"{model}: {name}")
    axis.axhline(floor, color="gray", linestyle=":", label="floor: held-out digits")
    axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel="sliced W2 to the training digits (pixels)")
    axis.set_xticks(CALLS, [str(n) for n in CALLS])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.xaxis.minorticks_off()
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def samplers(scheduler: GMLangevinScheduler) -> dict[str, GMLangevinScheduler]:
    """Every sampler for the network that `scheduler` describes, each with its default step size."""
    changes = {"step_size": None, "denoise": True}
    return {
        name: GMLangevinScheduler.from_config(scheduler.config, algorithm_type=name, **changes) for name in ALGORITHMS
    }


def evaluate(folder: Path, num_samples: int) -> tuple[list[Quality], float]:
    """The quality table of one digits model, printed as it grows, and the floor."""
    train, held_out = split_digits()
    floor = sliced_wasserstein(held_out[:num_samples], train)
    pipeline = GMSGMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    cells = []
    for cell in quality(pipeline, samplers(pipeline.scheduler), CALLS, train, floor, num_samples):
        cells.append(cell)
        value = "no stable step" if cell.ratio is None else f"{cell.ratio:5.2f} x floor   {cell.seconds:5.1f} s"
        print(f"  {cell.sampler:12s} {cell.calls:4d} calls  {value}", flush=True)
    return cells, floor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a model trained by train_gm_sgm.py --dataset_name digits")
    parser.add_argument("--compare", type=Path, help="a second model, for the same table (K = 1, say)")
    parser.add_argument("--num_samples", type=int, default=256, help="images per cell of the table, at most 360")
    parser.add_argument("--seed", type=int, default=0, help="decides the samples of the grid")
    args = parser.parse_args()
    folder: Path = args.folder
    if not (folder / "model_index.json").is_file():
        parser.error(f"{folder} holds no trained pipeline: run make demo, or train_gm_sgm.py --dataset_name digits")
    if args.compare and args.compare.name == folder.name:
        parser.error(f"--compare {args.compare} needs another name than {folder}: the table tells the models by it")
    _, held_out = split_digits()
    if not 2 <= args.num_samples <= len(held_out):
        parser.error(f"--num_samples must be in [2, {len(held_out)}], the number of held-out digits")
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    pipeline = GMSGMPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(args.seed)
    images = pipeline(GRID * GRID, generator=generator, output_type="pt").images * 2 - 1
    algorithm = pipeline.scheduler.config.algorithm_type
    calls = pipeline.default_num_inference_steps
    plot_samples(images, held_out, f"GM-SGM samples, {algorithm}, {calls} network calls", folder / "digits.png")
    plot_forward_noise(held_out[0], pipeline.scheduler.mixture, 0.5, folder / "forward_noise.png")

    results = {}
    for model in filter(None, (folder, args.compare)):
        print(f"{model}: sliced W2 to the training digits, n = {args.num_samples}, over the floor of held-out digits")
        results[model.name], floor = evaluate(model, args.num_samples)
    plot_quality(results, floor, folder / "quality.png")
    text = [f"Sliced W2 to the training digits over the floor {floor:.4f} (held-out digits), n = {args.num_samples}."]
    for name, cells in results.items():
        text += [f"\n{name}\n", markdown_table(cells)]
    (folder / "quality.md").write_text("\n".join(text) + "\n")
    record = {name: [asdict(cell) for cell in cells] for name, cells in results.items()}
    (folder / "quality.json").write_text(json.dumps({"floor": floor, "n": args.num_samples, **record}, indent=1))
    print("\n".join(text))
    print("\nLook at:")
    for name in ("digits.png", "forward_noise.png", "quality.png", "quality.md", "README.md"):
        print(f"  {folder / name}")


if __name__ == "__main__":
    main()
