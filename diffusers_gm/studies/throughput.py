"""How fast the training is beside that of diffusers: `python -m diffusers_gm.studies.throughput`.

CPU seconds per step of `train_gm_sgm.py`, by every method, and of `diffusers_loop.py`: the same data, network and
batch, in processes of one thread. The data are the digits, or a folder that is given, as PNGs, as a parquet file, and
as latents of twice the resolution: cached by a small autoencoder for `train_gm_sgm.py`, in memory for the other. The
processes take turns of a moment, and clocks are read when the optimizer steps. Also the memory of each, the efficiency
of several processes, each with a batch of its own (CPU seconds per image of one over those of all), and what a compiled
network gains and costs.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import psutil
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
from .clocked import WARM, WARM_UP
from .report import Report

# Of accelerate, and how to start some processes with it.
LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes"]
THEIRS = "diffusers"
TRAINING_SCRIPT = Path(__file__).parents[2] / "train_gm_sgm.py"
DIFFUSERS_LOOP = Path(__file__).with_name("diffusers_loop.py")
CLOCKED = ["-m", "diffusers_gm.studies.clocked"]
LATENT_CHANNELS = 4
# Steps whose mean is one measurement, as some of what is done is not done at each.
WINDOW = 10
# Seconds for which a process runs while the others stand still.
TURN = 0.3

Command = Sequence[object]


def write_digits(folder: Path, resolution: int) -> None:
    """The digits for training as gray PNGs, pixels repeated to a multiple of 8."""
    folder.mkdir()
    for i, image in enumerate((split_digits()[0][:, 0] + 1) * 127.5):
        pixels = image.round().byte().numpy().repeat(resolution // 8, 0).repeat(resolution // 8, 1)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


class Run:
    """A command, which stands still but in its turns.

    Attributes:
        cpu_seconds: of user and system, its children's too; None before it has ended.
    """

    def __init__(self, command: Command, **options: Any):
        self.command, self._options = list(map(str, command)), options
        self._errors = tempfile.TemporaryFile(dir=options["cwd"])  # noqa: SIM115 - as long as the command runs
        self._process: psutil.Popen | None = None
        self.cpu_seconds: float | None = None

    def go_on(self, seconds: float) -> None:
        """For so long, or to its end.

        Raises:
            RuntimeError: if the command fails.
        """
        if self._process is None:
            self._process = psutil.Popen(self.command, stdout=subprocess.DEVNULL, stderr=self._errors, **self._options)
        self._each(psutil.Process.resume)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
                if status:
                    self._errors.seek(0)
                    said = self._errors.read()[-2000:].decode(errors="replace")
                    raise RuntimeError(f"{' '.join(self.command)} failed:\n{said}")
                return
        self._each(psutil.Process.suspend)

    def _each(self, action: Callable[[psutil.Process], None]) -> None:
        """Do something to the command, then to its children."""
        assert self._process is not None
        action(self._process)
        for child in self._process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                action(child)

    def end(self) -> None:
        """Kill it, if it has not ended."""
        if self._process is not None and self.cpu_seconds is None:
            self._each(psutil.Process.kill)
            os.waitpid(self._process.pid, 0)
        self._errors.close()


def cpu_seconds(commands: Sequence[Command], cwd: Path, warm: Sequence[Path] = ()) -> list[float]:
    """CPU seconds of commands. They take turns, so that whatever else the machine does slows all of them alike.

    `warm`: files that they write when what is measured begins; none goes on from there before all have come so far.

    Raises:
        RuntimeError: if one fails.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(cwd),
        "PYTHONPATH": os.pathsep.join([str(TRAINING_SCRIPT.parent), os.environ.get("PYTHONPATH", "")]),
        # A compiled network is compiled each time, by children.
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    runs = [Run(command, cwd=cwd, env=environment) for command in commands]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # what stands still must be killed
    try:
        while going := [run for run in runs if run.cpu_seconds is None]:
            cold = [run for run, path in zip(runs, warm, strict=False) if run in going and not path.exists()]
            for run in cold or going:
                run.go_on(TURN if len(going) > 1 else math.inf)
        return [run.cpu_seconds for run in runs if run.cpu_seconds is not None]
    finally:
        for run in runs:
            run.end()
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Loop:
    """What was measured of a loop, one value a run.

    Attributes:
        step: CPU milliseconds of a step, over all processes: the median of means over `WINDOW` steps.
        start: CPU seconds until the first step is done, of the longest process.
        memory: the most MiB that one of the processes had.
    """

    step: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def note(self, processes: list[dict[str, Any]]) -> None:
        """Take a run: what `clocked` has left."""
        clocks = [process["seconds"] for process in processes]
        windows = ([b - a for a, b in pairwise(clock[WARM_UP - 1 :: WINDOW])] for clock in clocks)
        self.step.append(1000 / WINDOW * sum(map(statistics.median, windows)))
        self.start.append(max(clock[0] for clock in clocks))
        self.memory.append(max(process["memory"] for process in processes) / 2**20)


def measure(commands: dict[str, Callable[[Path], Command]], repeats: int, cwd: Path) -> dict[str, Loop]:
    """The cost of loops, which take turns; `commands` make a command that leaves its clocks in a folder."""
    found = {name: Loop() for name in commands}
    for i in range(repeats):
        folders = [Path(tempfile.mkdtemp(dir=cwd)) for _ in commands]
        runs = [of(folder) for of, folder in zip(commands.values(), folders, strict=True)]
        cpu_seconds(runs, cwd, [folder / WARM for folder in folders])
        for (name, loop), folder in zip(found.items(), folders, strict=True):
            loop.note([json.loads(path.read_text()) for path in folder.glob("*.json")])
            said = f"{loop.step[-1]:.1f} ms, {loop.memory[-1]:.0f} MiB, {loop.start[-1]:.1f} s to start"
            print(f"run {i + 1} of {repeats}: {name} {said}", flush=True)
    return found


def in_form(kind: str, folder: Path, images: Tensor, cwd: Path) -> tuple[list[object], Path, int]:
    """The images `(n, C, H, W)` of a folder, as PNGs, as a parquet file, or as latents of twice the resolution: options
    of `train_gm_sgm.py`, what `diffusers_loop.py` reads, and the channels that the network sees."""
    channels, side = images.shape[1], images.shape[-1]
    if kind == "png":
        return ["--train_data_dir", folder, "--resolution", side], folder, channels
    if kind == "parquet":
        table = cwd / "table"
        table.mkdir()
        files = [{"bytes": (folder / path).read_bytes(), "path": None} for path in list_folder(folder).images]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": files}, features).to_parquet(str(table / "images.parquet"))
        return ["--train_data_dir", table, "--resolution", side], table, channels
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
    options += ["--latents_cache_dir", cwd / "cache"]
    filling = ["--max_train_steps", 1, "--validation_inference_steps", 4, "--output_dir", cwd / "filling"]
    cpu_seconds([[sys.executable, TRAINING_SCRIPT, *options, *filling]], cwd)
    return options, cwd / "latents.safetensors", LATENT_CHANNELS


FORMS = ("png", "parquet", "latents")


def commands_of(kind: str, folder: Path, images: Tensor, args: Any, cwd: Path) -> dict[str, Callable[[Path], Command]]:
    """How to run the loops on images in one form with clocks, by their names."""
    options, their_data, channels = in_form(kind, folder, images, cwd)
    side, steps, config = images.shape[-1], args.steps + WARM_UP, cwd / f"{kind}.json"
    shape = TrainingArguments(block_out_channels=args.block_out_channels)
    with torch.device("meta"):  # no weights are needed
        unet = new_unet(shape, side, channels)
    config.write_text(json.dumps(dict(unet.config) | {"_class_name": "UNet2DModel"}))
    options += ["--block_out_channels", *unet.config["block_out_channels"], "--train_batch_size", args.train_batch_size,
                "--max_train_steps", steps, "--checkpointing_steps", 0, "--validation_steps", 0,
                "--num_validation_images", 1, "--validation_inference_steps", 4]  # fmt: skip

    def theirs(clocks: Path) -> Command:
        numbers = side, args.train_batch_size, steps
        return [sys.executable, *CLOCKED, clocks, DIFFUSERS_LOOP, their_data, config, *numbers]

    def ours(method: str, start: Command = (sys.executable,)) -> Callable[[Path], Command]:
        words = [TRAINING_SCRIPT, *options, "--method", method, "--output_dir"]
        return lambda clocks: [*start, *CLOCKED, clocks, *words, clocks / "out"]

    found = {f"{kind}, {THEIRS}": theirs, **{f"{kind}, {method}": ours(method) for method in args.methods}}
    if kind == args.data[0]:
        first = args.methods[0]
        if args.num_processes > 1:
            found[together(args)] = ours(first, [*LAUNCHER, args.num_processes])
        if args.dynamo_backend is not None:
            backend = ["env", f"ACCELERATE_DYNAMO_BACKEND={args.dynamo_backend}", sys.executable]
            found[f"{kind}, {first}, {args.dynamo_backend}"] = ours(first, backend)
    return found


def together(args: Any) -> str:
    """What several processes are called."""
    return f"{args.data[0]}, {args.methods[0]}, {args.num_processes} processes"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.throughput", (__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--train_data_dir", type=Path, help="a folder of images [the digits, as PNGs in a temporary folder]")
    add("--resolution", type=int, help="side of the images [that of the data, which for the digits is 8]")
    add("--block_out_channels", type=at_least(1), nargs="+", help="of the network [as for train_gm_sgm.py]")
    add("--train_batch_size", type=at_least(1), default=128, help="images per step and process")
    add("--methods", choices=list(METHODS), nargs="+", default=["gm-sgm", "ncsnv2", "cld"], help="what is trained")
    add("--data", choices=FORMS, nargs="+", default=list(FORMS), help="in which form the images are")
    add("--num_processes", type=at_least(1), default=2, help="of the first method on the first data; 1: not measured")
    add("--dynamo_backend", help="also the first method on the first data, compiled by it: inductor")
    add("--steps", type=at_least(WINDOW), default=150, help="steps that are measured in a run, after the first")
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
        found: dict[str, Loop] = {}
        for kind in args.data:
            found |= measure(commands_of(kind, folder, images, args, cwd), args.repeats, cwd)
    shape = "x".join(map(str, images.shape[1:]))
    conditions = (
        f"Images of {shape}, latents of {LATENT_CHANNELS}x{'x'.join(map(str, images.shape[2:]))}, batches of "
        f"{args.train_batch_size}; {args.steps} steps a run after {WARM_UP}, medians of {args.repeats} runs, whose "
        f"processes, of one thread, took turns of {TURN:g} s; CPU time, in a run the median of means over {WINDOW} "
        "steps. The first step: with all that is before it, and compilation."
    )
    report(found, args, conditions).write(args.output)


def report(found: dict[str, Loop], args: Any, conditions: str) -> Report:
    """What `measure` found, and the ratios."""
    median = statistics.median
    rows, rates, memory, several, verdict = [], {}, {}, together(args), ""
    for name, loop in found.items():
        kind, *words = name.split(", ")
        images = args.train_batch_size * (args.num_processes if name == several else 1)
        theirs = found[f"{kind}, {THEIRS}"]
        rate = median(other / own for other, own in zip(theirs.step, loop.step, strict=True))
        if len(words) == 1 and words != [THEIRS]:
            rates[name], memory[name] = rate, median(loop.memory) / median(theirs.memory)
        alone = found[f"{kind}, {words[0]}"]
        faster, longer = median(alone.step) / median(loop.step), median(loop.start) - median(alone.start)
        if name == several:
            verdict += f" Efficiency of {args.num_processes} processes: {args.num_processes * faster:.3f}."
        elif len(words) == 2:
            verdict += (
                f" Compiled by {words[1]}, the rate is {faster:.2f} times as high, and the start {longer:.0f} s longer."
            )
        step, span = median(loop.step), f"{min(loop.step):.1f} to {max(loop.step):.1f}"
        rates_of = f"{1000 * images / step:.0f}", "" if name == several else f"{rate:.3f}"
        rows.append([name, f"{step:.1f}", span, *rates_of, f"{median(loop.memory):.0f}", f"{median(loop.start):.1f}"])
    slowest, largest = min(rates, key=lambda name: rates[name]), max(memory, key=lambda name: memory[name])
    verdict = (
        f"The rate of train_gm_sgm.py is {rates[slowest]:.2f} ({slowest}) to {max(rates.values()):.2f} times that of "
        f"diffusers' loop, its peak memory at most {memory[largest]:.2f} times ({largest}).{verdict}"
    )
    header = ["data, loop", "CPU ms per step, median", "range", "images per CPU second", "rate over diffusers'"]
    return Report(
        name="throughput",
        title="Rate of training",
        question="How many images does a CPU second train on, beside diffusers' own loop, and in how much memory?",
        verdict=verdict,
        tables=[Table("", [*header, "peak MiB", "CPU s to the first step"], rows)],
        conditions=conditions,
    )


if __name__ == "__main__":
    main()
