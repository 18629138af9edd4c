"""What the options come to for given data, and the record of it."""

import importlib.metadata
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import Examination, Resolution, check_levels
from ..processes.annealed import max_pairwise_distance
from ..version import __version__
from .methods import METHODS, options_of_others
from .methods.method import Noise
from .option import given
from .options import TrainingArguments, names_of


@dataclass(frozen=True, kw_only=True)
class Plan(Noise):
    """Options that depend on the data, resolved. Fields have the names of the options."""

    resolution: Resolution
    train_batch_size: int
    validation_inference_steps: int
    max_train_steps: int
    learning_rate: float
    lr_warmup_steps: int


def make_plan(
    args: TrainingArguments,
    examination: Examination,
    num_images: int,
    num_processes: int,
    largest_distance: Callable[[Tensor], float] = max_pairwise_distance,
) -> Plan:
    """Resolve what was left open. Batches larger than the data are made as large as the data; `largest_distance` of
    the images is asked for only where `sigma_max` needs it.

    Raises:
        ValueError: for options that do not fit the data.
    """
    if num_processes > num_images:
        raise ValueError(f"{num_processes} processes for {num_images} training images: launch fewer")
    batch_size = min(args.train_batch_size, num_images // num_processes)
    if args.dequantize is not None:
        try:
            check_levels(examination.images, args.dequantize)
        except ValueError as error:
            raise ValueError(f"--dequantize {args.dequantize}: {error}") from error
    method = METHODS[args.method]
    noise = method.noise(args, examination.images, largest_distance)
    if noise.num_train_timesteps < 2:
        raise ValueError(f"--num_train_timesteps must be at least 2, got {noise.num_train_timesteps}")

    steps = args.max_train_steps
    if steps is None and args.num_train_epochs is None and args.dataset_name == "digits":
        steps = 1500
    if steps is None:
        images_per_step = batch_size * num_processes * args.gradient_accumulation_steps
        steps = math.ceil((args.num_train_epochs or 100) * num_images / images_per_step)
    warmup = args.lr_warmup_steps
    if args.lr_scheduler == "constant":
        if warmup:
            raise ValueError("--lr_warmup_steps: --lr_scheduler constant has none, constant_with_warmup has")
        warmup = 0
    elif warmup is None:
        warmup = round(0.3 * steps) if args.lr_scheduler == "one_cycle" else min(500, steps // 10)
    elif warmup >= steps:
        raise ValueError(f"--lr_warmup_steps {warmup} must be smaller than the {steps} steps of the training")
    return Plan(
        **asdict(noise),
        resolution=examination.resolution,
        train_batch_size=batch_size,
        validation_inference_steps=args.validation_inference_steps or method.pipeline.default_num_inference_steps,
        max_train_steps=steps,
        learning_rate=args.learning_rate or (2e-3 if max(examination.size) <= 16 else 2e-4),
        lr_warmup_steps=warmup,
    )


def training_record(args: TrainingArguments, plan: Plan) -> dict[str, Any]:
    """All options as resolved, JSON-safe, without tokens and places on this host; None where the method has none."""
    record = {"method": args.method} | asdict(args) | asdict(plan) | dict.fromkeys(options_of_others(args.method))
    for name in names_of("path"):
        record[name] = portable(record[name])
    return {name: value for name, value in record.items() if name not in names_of("private")}


def portable(path: str | None) -> str | None:
    """`path` if it says nothing about this host, else its last part."""
    if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
        return Path(path).resolve().name
    return path


def command_line(args: TrainingArguments, num_processes: int, mixed_precision: str = "no", device: str = "cuda") -> str:
    """The command that repeats a training of these options, without tokens and places on this host, where its runs
    began and ended, and uploads; and with the precision, which accelerate may have been told of."""
    # Without GPUs accelerate launches one process, unless told.
    launcher = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" if device == "cpu" else "accelerate launch"
    several = f"{launcher} --num_processes {num_processes} -m train_gm_sgm"
    words = ["diffusers-gm-train" if num_processes == 1 else several]
    left_out, paths = names_of("private") | names_of("of_a_run"), names_of("path")
    for option in given(args, vars(args)):
        name = option.removeprefix("--")
        value = getattr(args, name)
        if name in left_out:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no_{name}")
        elif isinstance(value, list):
            words.append(f"{option} {shlex.join(map(str, value))}")
        else:
            words.append(f"{option} {shlex.quote(str(portable(value) if name in paths else value))}")
    if args.mixed_precision is None and mixed_precision != "no":
        words.append(f"--mixed_precision {mixed_precision}")
    return " ".join(words)


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    names = ("torch", "diffusers", "accelerate", "datasets")
    return {"diffusers_gm": __version__} | {name: importlib.metadata.version(name) for name in names}
