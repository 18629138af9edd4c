"""How fast the training is beside that of diffusers: `python -m diffusers_gm.studies.throughput`.

CPU seconds per step of `train_gm_sgm.py`, by every method, and of `diffusers_loop.py`: the same data, network and
batch, in processes of one thread. The data are the digits, or a folder that is given, as PNGs, as a parquet file, and
as latents of twice the resolution: cached by a small autoencoder for `train_gm_sgm.py`, in memory for the other. A run
of few steps is taken from one of many, so that what happens once does not count; the runs take turns. Also the
efficiency of several processes, each with a batch of its own: CPU seconds per image of one over those of all.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..autoencoders import LatentSpace
from ..cli import Parser, at_least
from ..data import examine, list_folder, open_folder, split_digits
from ..evaluation.table import Table
from ..training.methods import METHODS
from ..training.network import new_unet
from ..training.options import TrainingArguments
from .report import Report

# Of accelerate, and how to start some processes with it.
LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes"]
THEIRS = "diffusers"
TRAINING_SCRIPT = Path(__file__).parents[2] / "train_gm_sgm.py"
# What happens once is over after this many steps.
FIRST_STEPS = 10
LATENT_CHANNELS = 4


def write_digits(folder: Path, resolution: int) -> None:
    """The digits for training as gray PNGs, pixels repeated to a multiple of 8."""
    folder.mkdir()
    for i, image in enumerate((split_digits()[0][:, 0] + 1) * 127.5):
        pixels = image.round().byte().numpy().repeat(resolution // 8, 0).repeat(resolution // 8, 1)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def cpu_seconds(command: Sequence[object], cwd: Path) -> float:
    """CPU seconds, of user and system, of a command and its children.

    Raises:
        RuntimeError: if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cwd)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TRAINING_SCRIPT.parent), environment.get("PYTHONPATH", "")])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(
    commands: dict[str, Callable[[int], Sequence[object]]], steps: int, repeats: int, cwd: Path
) -> dict[str, list[float]]:
    """CPU milliseconds per step of each loop, `repeats` values; `commands` make a command of a number of steps."""
    found: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(repeats):
        for name, command in commands.items():
            few, many = (cpu_seconds(command(n), cwd) for n in (FIRST_STEPS, FIRST_STEPS + steps))
            found[name].append(1000 * (many - few) / steps)
            print(f"run {i + 1} of {repeats}: {name} {found[name][-1]:.1f} ms", flush=True)
    return found


@dataclass(frozen=True)
class Data:
    """Training images in one form, for both loops.

    Attributes:
        kind: what the form is called.
        ours: options of `train_gm_sgm.py`.
        theirs: what `diffusers_loop.py` reads.
        channels: of what the network sees.
    """

    kind: str
    ours: list[object]
    theirs: Path
    channels: int


def in_form(kind: str, folder: Path, images: Tensor, cwd: Path) -> Data:
    """The images `(n, C, H, W)` of a folder, as PNGs, as a parquet file, or as latents of twice the resolution."""
    channels, side = images.shape[1], images.shape[-1]
    if kind == "png":
        return Data(kind, ["--train_data_dir", folder, "--resolution", side], folder, channels)
    if kind == "parquet":
        table = cwd / "table"
        table.mkdir()
        files = [{"bytes": (folder / path).read_bytes(), "path": None} for path in list_folder(folder).images]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": files}, features).to_parquet(str(table / "images.parquet"))
        return Data(kind, ["--train_data_dir", table, "--resolution", side], table, channels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            channels, channels, block_out_channels=(8, 8), latent_channels=LATENT_CHANNELS, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    vae.save_pretrained(cwd / "vae")
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    encoded = torch.cat([LatentSpace.of(vae).encode(some) for some in large.split(64)])
    save_file({"latents": ((encoded - encoded.mean()) / encoded.std()).contiguous()}, cwd / "latents.safetensors")
    options = ["--train_data_dir", folder, "--resolution", 2 * side, "--vae", cwd / "vae"]
    return Data(kind, [*options, "--latents_cache_dir", cwd / "cache"], cwd / "latents.safetensors", LATENT_CHANNELS)


FORMS = ("png", "parquet", "latents")


def commands_of(data: Data, args: Any, side: int, cwd: Path) -> Iterator[tuple[str, Callable[[int], list[object]]]]:
    """Names of loops, and how to run so many steps of them."""
    shape = TrainingArguments(block_out_channels=args.block_out_channels)
    with torch.device("meta"):  # no weights are needed
        unet = new_unet(shape, side, data.channels)
    config = cwd / f"{data.kind}.json"
    config.write_text(json.dumps(dict(unet.config) | {"_class_name": "UNet2DModel"}))

    def theirs(steps: int) -> list[object]:
        numbers = side, args.train_batch_size, steps
        return [sys.executable, "-m", "diffusers_gm.studies.diffusers_loop", data.theirs, config, *numbers]

    def of(method: str, num_processes: int = 1) -> Callable[[int], list[object]]:
        network = ["--block_out_channels", *unet.config["block_out_channels"]]
        start = [sys.executable] if num_processes == 1 else [*LAUNCHER, num_processes]

        def ours(steps: int) -> list[object]:
            options = [*data.ours, "--method", method, *network, "--train_batch_size", args.train_batch_size,
                       "--max_train_steps", steps, "--checkpointing_steps", 0, "--validation_steps", 0,
                       "--num_validation_images", 1, "--validation_inference_steps", 4, "--output_dir", cwd / "ours",
                       "--overwrite_output_dir"]  # fmt: skip
            return [*start, TRAINING_SCRIPT, *options]

        return ours

    yield f"{data.kind}, {THEIRS}", theirs
    for method in args.methods:
        yield f"{data.kind}, {method}", of(method)
    if args.num_processes > 1 and data.kind == args.data[0]:
        yield together(args), of(args.methods[0], args.num_processes)


def together(args: Any) -> str:
    """What several processes are called."""
    return f"{args.data[0]}, {args.methods[0]}, {args.num_processes} processes"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.throughput", (__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--train_data_dir", type=Path, help="a folder of images; default: the digits, as PNGs in a temporary folder")
    add("--resolution", type=int, help="side of the images; default that of the data, which for the digits is 8")
    add("--block_out_channels", type=at_least(1), nargs="+", help="of the network; default as for train_gm_sgm.py")
    add("--train_batch_size", type=at_least(1), default=128)
    add("--methods", choices=list(METHODS), nargs="+", default=["gm-sgm", "ncsnv2", "cld"])
    add("--data", choices=FORMS, nargs="+", default=list(FORMS), help="in which form the images are")
    add("--num_processes", type=at_least(1), default=2, help="of the first method on the first data; 1: not measured")
    add("--steps", type=at_least(1), default=150, help="steps that are measured in a run")
    add("--repeats", type=at_least(1), default=5, help="runs of each loop")
    add("--output", type=Path, default=Path("outputs/studies"), help="folder of the report")
    args = parser.parse_args(arguments)
    if args.train_data_dir is None and (args.resolution or 8) % 8:
        parser.error(f"--resolution {args.resolution}: the digits come in multiples of 8")

    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        folder = args.train_data_dir and args.train_data_dir.resolve()
        if folder is None:
            folder = cwd / "digits"
            write_digits(folder, args.resolution or 8)
        try:
            images = examine(open_folder(folder), 0, args.resolution).images
        except ValueError as error:
            parser.error(f"--train_data_dir {folder}: {error}")
        loops: dict[str, Callable[[int], Sequence[object]]] = {}
        for kind in args.data:
            loops |= dict(commands_of(in_form(kind, folder, images, cwd), args, images.shape[-1], cwd))
        found = measure(loops, args.steps, args.repeats, cwd)
    shape = "x".join(map(str, images.shape[1:]))
    conditions = (
        f"Images of {shape}, latents of {LATENT_CHANNELS}x{'x'.join(map(str, images.shape[2:]))}, batches of "
        f"{args.train_batch_size}; {args.steps} steps a run, medians of {args.repeats} runs that took turns; CPU time, "
        "of processes of one thread."
    )
    report(found, args, conditions).write(args.output)


def report(found: dict[str, list[float]], args: Any, conditions: str) -> Report:
    """What `measure` found, and the ratios."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    rows, rates, several = [], {}, together(args)
    for name, values in found.items():
        images = args.train_batch_size * (args.num_processes if name == several else 1)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        row: list[Any] = [name, f"{medians[name]:.1f}", spread, f"{1000 * images / medians[name]:.0f}", ""]
        if name != several:
            rates[name] = medians[f"{name.partition(', ')[0]}, {THEIRS}"] / medians[name]
            row[-1] = f"{rates[name]:.3f}"
        rows.append(row)
    ours = {name: rate for name, rate in rates.items() if not name.endswith(THEIRS)}
    slowest = min(ours, key=lambda name: ours[name])
    verdict = f"The rate of train_gm_sgm.py is {min(ours.values()):.2f} ({slowest}) to {max(ours.values()):.2f} times "
    verdict += "that of diffusers' loop."
    if several in found:
        efficiency = args.num_processes * medians[several.rpartition(", ")[0]] / medians[several]
        verdict += f" Efficiency of {args.num_processes} processes: {efficiency:.3f}."
    header = ["data, loop", "CPU ms per step, median", "range", "images per CPU second", "rate over diffusers'"]
    return Report(
        name="throughput",
        title="Rate of training",
        question="How many images does a CPU second train on, beside diffusers' own loop?",
        verdict=verdict,
        tables=[Table("", header, rows)],
        conditions=conditions,
    )


if __name__ == "__main__":
    main()
