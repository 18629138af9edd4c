"""One network and one seed under several samplers and budgets, in one picture: the first one of the README.

    python -m diffusers_gm.studies.tour outputs/fashion-ddpm --output model_cards/tour.png

Any folder of an unconditional image pipeline serves; how this one is made is in this folder's README.
Every cell starts from the same noise; below are the noise levels of the network calls, and the stochasticity tau of our
sampler, before it was calibrated on the network and after. Samplers that cannot read a network (those of diffusers one
of mixture noise, say) are left out, and said to be.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from PIL import Image

from .. import calibrate
from ..app.models import CALIBRATED, Model, Sampler
from ..app.runs import Run, Settings, advance
from ..calibration.calibrate import in_words
from ..cli import Parser, at_least
from ..evaluation.sampling import load_pipeline
from ..pictures import image_grid
from ..samplers import Multistep
from ..samplers.multistep import Stochasticity
from ..schedulers import CalibratedMultistepScheduler
from .pictures import save_picture, show_grid

CALLS = (5, 10, 20)
IMAGES_PER_ROW, IMAGES_PER_CELL = 4, 8

# Samplers as the app knows them, by what they are called in the picture.
SAMPLERS = {
    "diffusers:\nDDPM": "DDPM",
    "diffusers:\nUniPC": "UniPC",
    "diffusers:\nSDE-DPM-Solver++\n(Karras)": (
        "DPMSolverMultistepScheduler algorithm_type=sde-dpmsolver++ use_karras_sigmas=true"
    ),
    "ours,\nnot calibrated": "multistep, fixed levels",
    "ours,\ncalibrated": CALIBRATED,
}


@dataclass(frozen=True)
class Cell:
    """Attributes:
    image: a grid of samples.
    levels: noise levels of the network calls.
    stochasticity: tau; None of samplers of diffusers.
    """

    image: Image.Image
    levels: list[float]
    stochasticity: Stochasticity | None


def sample_all(
    pipe: Any, calls: Sequence[int], seed: int, effort: Literal["full", "fast"]
) -> tuple[dict[str, list[Cell]], dict[str, str]]:
    """A row of cells, one for each number of calls, by sampler; and the samplers that were left out, and why."""
    model, settings = Model.of("", pipe), Settings(seed, IMAGES_PER_CELL)
    model.samplers[CALIBRATED] = Sampler(CALIBRATED, calibrate(pipe, calls, effort=effort))
    rows, left_out = {}, {}
    for name, sampler in SAMPLERS.items():
        try:
            rows[name] = [sampled(model, Run(model.sampler(sampler), n), settings) for n in calls]
        except ValueError as error:
            left_out[name.replace("\n", " ")] = str(error)
    return rows, left_out


def sampled(model: Model, run: Run, settings: Settings) -> Cell:
    """A cell of the picture.

    Raises:
        ValueError: if the sampler has no such run.
    """
    for _ in advance(model, run, settings):
        pass
    if run.images is None or run.error:
        raise ValueError(f"{run.calls} calls: {run.error}")
    scheduler = copy.deepcopy(run.sampler.scheduler)
    scheduler.set_timesteps(run.steps)
    reading = CalibratedMultistepScheduler.from_config(scheduler.config).reading
    levels = reading.sigma(torch.as_tensor(scheduler.timesteps, dtype=torch.float64))
    sampler = getattr(scheduler, "sampler", None)
    tau = sampler.stochasticity if isinstance(sampler, Multistep) else None
    return Cell(image_grid(run.images, IMAGES_PER_ROW), levels.tolist(), tau)


def draw(rows: dict[str, list[Cell]], calls: Sequence[int], path: Path) -> None:
    """Write the picture: a row of samples for each sampler, and below the levels of all."""
    width, height = next(iter(rows.values()))[0].image.size
    heights = [2.8 * height / width] * len(rows) + [0.5 + 0.2 * len(rows)]
    size = (1.8 + 2.9 * len(calls), 1 + sum(heights))
    figure, axes = plt.subplots(
        len(heights), len(calls), figsize=size, layout="constrained", height_ratios=heights, squeeze=False
    )
    for axis, n in zip(axes[0], calls, strict=True):
        axis.set_title(f"{n} network calls", fontsize=11)
    for row, (name, cells) in zip(axes[:-1], rows.items(), strict=True):
        for axis, cell in zip(row, cells, strict=True):
            show_grid(axis, cell.image)
        row[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center")
    for axis, of_calls in zip(axes[-1], zip(*rows.values(), strict=True), strict=True):
        draw_levels(axis, of_calls)
    names = [name.removeprefix("diffusers:").replace("\n", " ") for name in rows]
    axes[-1, 0].set_yticks(range(len(rows)), names, fontsize=8)
    figure.supxlabel("noise levels of the calls; tau of ours: how much fresh noise is added at every step, 0 is none",
                     fontsize=10)  # fmt: skip
    save_picture(figure, path, dpi=110)


def draw_levels(axis: Any, cells: Sequence[Cell]) -> None:
    """A row of marks for each cell, from the highest noise level on."""
    for row, cell in enumerate(cells):
        axis.plot(cell.levels, [row] * len(cell.levels), "|", color="black", markersize=9, linestyle="none")
        if cell.stochasticity is not None:
            axis.text(0.98, row, f"tau = {in_words(cell.stochasticity)}", transform=axis.get_yaxis_transform(),
                      fontsize=8, ha="right", va="center")  # fmt: skip
    low, high = axis.dataLim.intervalx
    # Room for tau on the right.
    axis.set(xscale="log", xlim=(2 * high, low / 50), yticks=[], ylim=(len(cells) - 0.4, -0.6))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.tour", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a trained pipeline, best one of Gaussian noise, which all samplers read")
    add("--calls", type=at_least(2), nargs="+", default=list(CALLS), help="numbers of network calls")
    add("--seed", type=int, default=0, help="decides the noise that every cell starts from")
    add("--effort", choices=["full", "fast"], default="full", help="of the calibration")
    add("--output", type=Path, help="the picture [tour.png in the folder]")
    args = parser.parse_args(arguments)
    if not (args.folder / "model_index.json").is_file():
        parser.error(f"{args.folder} holds no trained pipeline: run make demo METHOD=ncsnv2")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    output = args.output or args.folder / "tour.png"
    pipe = load_pipeline(str(args.folder), torch.device("cpu"))
    rows, left_out = sample_all(pipe, args.calls, args.seed, args.effort)
    draw(rows, args.calls, output)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
