"""One network and one seed under several samplers and budgets, in one picture: the first one of the README.

    python -m diffusers_gm.studies.tour outputs/fashion-ddpm --output model_cards/tour.png

Any folder of an unconditional image pipeline serves; how this one is made is in this folder's README.
Every cell starts from the same noise. The last row is calibrated on the network first. Samplers that cannot read a
network (those of diffusers one of mixture noise, say) are left out, and said to be.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from .. import calibrate
from ..app.models import CALIBRATED, Model, Sampler
from ..app.runs import Run, Settings, advance
from ..cli import Parser, at_least
from ..evaluation.sampling import load_pipeline
from ..pictures import image_grid
from .pictures import save_picture, show_grid

CALLS = (5, 10, 20, 50)
Effort = Literal["full", "fast"]
IMAGES_PER_ROW, IMAGES_PER_CELL = 5, 10

# Samplers of the app, by what they are called in the picture.
SAMPLERS = {
    "DDPM\n(diffusers)": "DDPM",
    "UniPC\n(diffusers)": "UniPC",
    "annealed\nLangevin, chain": "annealed Langevin, chain",
    "GM, ode": "GM, ode",
    "CLD, sscs": "CLD, sscs",
    "calibrated": CALIBRATED,
}


def sample_all(
    pipe: Any, calls: Sequence[int], seed: int, effort: Effort = "full"
) -> tuple[dict[str, list[Image.Image]], dict[str, str]]:
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


def sampled(model: Model, run: Run, settings: Settings) -> Image.Image:
    """A cell of the picture."""
    for _ in advance(model, run, settings):
        pass
    if run.images is None or run.error:
        raise ValueError(f"{run.calls} calls: {run.error}")
    return image_grid(run.images, IMAGES_PER_ROW)


def draw(rows: dict[str, list[Image.Image]], calls: Sequence[int], path: Path) -> None:
    """Write the picture."""
    width, height = next(iter(rows.values()))[0].size
    size = (1.1 + 2.1 * len(calls), 0.35 + 2.1 * height / width * len(rows))
    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08)
    figure, axes = plt.subplots(len(rows), len(calls), figsize=size, layout=layout, squeeze=False)
    for axis, n in zip(axes[0], calls, strict=True):
        axis.set_title(f"{n} calls", fontsize=11)
    for row, (name, cells) in zip(axes, rows.items(), strict=True):
        for axis, cell in zip(row, cells, strict=True):
            show_grid(axis, cell)
        row[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center")
    save_picture(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.tour", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a trained pipeline, best one of Gaussian noise, which all samplers read")
    add("--calls", type=at_least(2), nargs="+", default=list(CALLS), help="numbers of network calls")
    add("--seed", type=int, default=0, help="decides the noise that every cell starts from")
    add("--effort", choices=get_args(Effort), default="full", help="of the calibration")
    add("--output", type=Path, default=None, help="the picture [tour.png in the folder]")
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
