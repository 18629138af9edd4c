"""One network and one seed under several samplers and budgets, in one picture: the first one of the README.

    python -m diffusers_gm.studies.tour outputs/demo-ncsnv2 --output model_cards/tour.png

`outputs/demo-ncsnv2` is what `make demo METHOD=ncsnv2` leaves; any folder of an unconditional image pipeline serves.
Every cell starts from the same noise. The last row is calibrated on the network first. Samplers that cannot read a
network (those of diffusers one of mixture noise, say) are left out, and said to be.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from .. import AnnealedLangevinScheduler, CLDSSCSScheduler, GMLangevinScheduler, calibrate
from ..cli import Parser, at_least
from ..evaluation.sampling import load_pipeline
from .pictures import save_picture

CALLS = (5, 10, 20, 50)
Effort = Literal["full", "fast"]
IMAGES_PER_ROW, ROWS_PER_CELL, GAP = 5, 2, 1

# Name in the picture, and the sampler for the network of a pipeline.
SAMPLERS: dict[str, Callable[[Any], Any]] = {
    "DDPM\n(diffusers)": lambda pipe: diffusers.DDPMScheduler.from_config(theirs(pipe)),
    "UniPC\n(diffusers)": lambda pipe: diffusers.UniPCMultistepScheduler.from_config(theirs(pipe)),
    "annealed\nLangevin, chain": lambda pipe: AnnealedLangevinScheduler.from_config(
        pipe.scheduler.config, algorithm_type="langevin", network_level="chain"
    ),
    "GM, ode": lambda pipe: GMLangevinScheduler.from_config(pipe.scheduler.config, algorithm_type="ode"),
    "CLD, sscs": lambda pipe: CLDSSCSScheduler.from_config(pipe.scheduler.config),
}


def theirs(pipe: Any) -> Any:
    """The config of the network, as schedulers of diffusers read it."""
    scheduler = pipe.scheduler
    return scheduler.diffusers_config() if hasattr(scheduler, "diffusers_config") else scheduler.config


def mosaic(images: Tensor) -> Tensor:
    """`(n, C, H, W)` in [0, 1] as one picture `(H', W', C)` of `IMAGES_PER_ROW` images a row, with white gaps."""
    padded = torch.nn.functional.pad(images, (GAP, GAP, GAP, GAP), value=1.0)
    rows = [torch.cat(list(row), -1) for row in padded.split(IMAGES_PER_ROW)]
    return torch.cat(rows, -2).movedim(0, -1)


def sample_all(
    pipe: Any, calls: Sequence[int], seed: int, effort: Effort = "full"
) -> tuple[dict[str, list[Tensor]], dict[str, str]]:
    """A row of cells, one for each number of calls, by sampler; and the samplers that were left out, and why."""
    own, rows, left_out = pipe.scheduler, {}, {}
    for name, make in {**SAMPLERS, "calibrated": lambda pipe: calibrate(pipe, calls, effort=effort)}.items():
        pipe.scheduler = own
        try:
            pipe.scheduler = make(pipe)
            rows[name] = [sampled(pipe, n, seed) for n in calls]
        except ValueError as error:
            left_out[name.replace("\n", " ")] = str(error)
    pipe.scheduler = own
    return rows, left_out


def draw(rows: dict[str, list[Tensor]], calls: Sequence[int], path: Path) -> None:
    """Write the picture."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    size = (1.1 + 2.1 * len(calls), 0.35 + 2.1 * height / width * len(rows))
    figure, axes = plt.subplots(len(rows), len(calls), figsize=size, layout="constrained", squeeze=False)
    for axis, n in zip(axes[0], calls, strict=True):
        axis.set_title(f"{n} calls", fontsize=11)
    for row, (name, cells) in zip(axes, rows.items(), strict=True):
        for axis, cell in zip(row, cells, strict=True):
            axis.imshow(cell.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center")
    save_picture(figure, path)


def sampled(pipe: Any, num_calls: int, seed: int) -> Tensor:
    """A cell of the picture."""
    generator = torch.Generator().manual_seed(seed)
    batch = IMAGES_PER_ROW * ROWS_PER_CELL
    return mosaic(pipe(batch, num_inference_steps=num_calls, generator=generator, output_type="pt").images.cpu())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.tour", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a trained pipeline, best one of Gaussian noise, which all samplers read")
    add("--calls", type=at_least(2), nargs="+", default=list(CALLS), help="numbers of network calls")
    add("--seed", type=int, default=0, help="decides the noise that every cell starts from")
    add("--effort", choices=get_args(Effort), default="full", help="of the calibration")
    add("--output", type=Path, default=None, help="the picture; default tour.png in the folder")
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
