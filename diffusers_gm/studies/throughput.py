"""How fast the training is beside that of diffusers: `python -m diffusers_gm.studies.throughput`.

CPU seconds per step of `train_gm_sgm.py` and of `diffusers_loop.py`: the same folder of PNGs (the digits, or one that
is given), the same network, the same batch, in processes of one thread. A run of few steps is taken from one of many,
so that what happens once does not count. The runs take turns; the medians and their ratio are printed, with machine
and versions. With `--num_processes 2` also the efficiency of two processes, each with a batch of its own: CPU seconds
per image of one over those of two.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
from PIL import Image

from ..cli import Parser, at_least
from ..data import examine, open_folder, split_digits
from ..evaluation.table import Table
from ..training.network import new_unet
from ..training.options import TrainingArguments

# Of accelerate, and how to start some processes with it.
LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes"]
OURS, THEIRS, TOGETHER = "train_gm_sgm.py", "diffusers", "train_gm_sgm.py, all processes"
TRAINING_SCRIPT = Path(__file__).parents[2] / "train_gm_sgm.py"
# What happens once is over after this many steps.
FIRST_STEPS = 10


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
        print(f"run {i + 1} of {repeats}: " + ", ".join(f"{n} {v[-1]:.1f} ms" for n, v in found.items()), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.throughput", (__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--train_data_dir", type=Path, help="a folder of images; default: the digits, as PNGs in a temporary folder")
    add("--resolution", type=int, help="side of the images; default that of the data, which for the digits is 8")
    add("--block_out_channels", type=at_least(1), nargs="+", help="of the network; default as for train_gm_sgm.py")
    add("--train_batch_size", type=at_least(1), default=128)
    add("--num_processes", type=at_least(1), default=1, help="also measure so many processes of train_gm_sgm.py")
    add("--method", choices=["gm-sgm", "ncsnv2", "cld"], default="gm-sgm")
    add("--steps", type=at_least(1), default=150, help="steps that are measured in a run")
    add("--repeats", type=at_least(1), default=5, help="runs of each loop")
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
            examination = examine(open_folder(folder), 0, args.resolution, num_images=100)
        except ValueError as error:
            parser.error(f"--train_data_dir {folder}: {error}")
        resolution, channels = examination.resolution, examination.channels
        shape = TrainingArguments(block_out_channels=args.block_out_channels)
        with torch.device("meta"):  # no weights are needed
            unet = new_unet(shape, resolution, channels)
        config = cwd / "config.json"
        config.write_text(json.dumps(dict(unet.config) | {"_class_name": "UNet2DModel"}))

        network = ["--model_config", config]
        if args.method == "cld":  # whose networks see velocities too
            network = ["--block_out_channels", *unet.config["block_out_channels"]]

        def ours(steps: int) -> list[object]:
            options = ["--train_data_dir", folder, "--resolution", resolution, "--method", args.method, *network,
                       "--train_batch_size", args.train_batch_size, "--max_train_steps", steps,
                       "--checkpointing_steps", 0, "--validation_steps", 0, "--num_validation_images", 1,
                       "--validation_inference_steps", 2, "--output_dir", cwd / "ours",
                       "--overwrite_output_dir"]  # fmt: skip
            return [sys.executable, TRAINING_SCRIPT, *options]

        def many(steps: int) -> list[object]:
            _, *words = ours(steps)
            return [*LAUNCHER, args.num_processes, *words]

        def theirs(steps: int) -> list[object]:
            numbers = resolution, args.train_batch_size, steps
            return [sys.executable, "-m", "diffusers_gm.studies.diffusers_loop", folder, config, *numbers]

        versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        print(
            f"{platform.machine()}, {platform.system()}, {versions}; images of {channels}x{resolution}x{resolution}, "
            f"batches of {args.train_batch_size}, {unet.num_parameters():,} parameters, {args.method}; {args.steps} "
            "steps a run"
        )
        loops: dict[str, Callable[[int], Sequence[object]]] = {OURS: ours, THEIRS: theirs}
        if args.num_processes > 1:
            loops[TOGETHER] = many
        found = measure(loops, args.steps, args.repeats, cwd)
    print("\n" + report(found, args.train_batch_size, args.num_processes))


def report(found: dict[str, list[float]], batch_size: int, num_processes: int) -> str:
    """What `measure` found as a table, and the ratios."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    rows = []
    for name, values in found.items():
        images = batch_size * (num_processes if name == TOGETHER else 1)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        rows.append([name, f"{medians[name]:.1f}", spread, f"{1000 * images / medians[name]:.0f}"])
    lines = [Table("", ["loop", "CPU ms per step, median", "range", "images per CPU second"], rows).markdown(), ""]
    lines.append(f"rate of {OURS} over that of {THEIRS}: {medians[THEIRS] / medians[OURS]:.3f}")
    if TOGETHER in found:
        efficiency = num_processes * medians[OURS] / medians[TOGETHER]
        lines.append(f"efficiency of {num_processes} processes: {efficiency:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
