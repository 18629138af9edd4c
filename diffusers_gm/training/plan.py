"""What the options come to for given data, and the record of it."""

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import Examination, check_levels
from ..pipelines import CLDPipeline, GMSGMPipeline, NCSNv2Pipeline
from ..processes.annealed import ladder_length, max_pairwise_distance
from ..version import __version__
from .options import NOT_FOR, TrainingArguments, build_mixture, number_or_auto

PIPELINES = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}


@dataclass(frozen=True)
class Plan:
    """Options that depend on the data, resolved. Fields have the names of the options."""

    resolution: int
    image_column: str | None
    mixture_weights: list[float]
    mixture_scales: list[float]
    sigma_max: float
    num_train_timesteps: int
    validation_inference_steps: int
    max_train_steps: int
    learning_rate: float
    lr_warmup_steps: int


def make_plan(
    args: TrainingArguments,
    examination: Examination,
    num_images: int,
    image_column: str | None,
    num_processes: int,
    largest_distance: Callable[[Tensor], float] = max_pairwise_distance,
) -> Plan:
    """Resolve what was left open; `largest_distance` of the images is asked for only where `sigma_max` needs it.

    Raises:
        ValueError: for options that do not fit the data.
    """
    if args.train_batch_size * num_processes > num_images:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} times {num_processes} process(es) is more than the "
            f"{num_images} training images"
        )
    if args.dequantize is not None:
        try:
            check_levels(examination.images, args.dequantize)
        except ValueError as error:
            raise ValueError(f"--dequantize {args.dequantize}: {error}") from error
    sigma_max = number_or_auto("sigma_max", args.sigma_max, float)
    if args.method == "cld":
        sigma_max = math.nan  # no ladder
    elif sigma_max is None:
        sigma_max = round(largest_distance(examination.images), 4)
    if args.method != "cld" and not args.sigma_min < sigma_max:
        raise ValueError(
            f"--sigma_min {args.sigma_min} must be smaller than --sigma_max {sigma_max}"
            + (" (measured: are all images the same?)" if args.sigma_max == "auto" else "")
        )
    num_levels = number_or_auto("num_train_timesteps", args.num_train_timesteps, int)
    if num_levels is None:
        num_levels = ladder_length(sigma_max, args.sigma_min, examination.images[0].numel())
    if num_levels < 2:
        raise ValueError(f"--num_train_timesteps must be at least 2, got {num_levels}")

    steps = args.max_train_steps
    if steps is None and args.num_train_epochs is None and args.on_digits:
        steps = 1500
    if steps is None:
        images_per_step = args.train_batch_size * num_processes * args.gradient_accumulation_steps
        steps = math.ceil((args.num_train_epochs or 100) * num_images / images_per_step)
    warmup = args.lr_warmup_steps
    if warmup is None:
        warmup = round(0.3 * steps) if args.lr_scheduler == "one_cycle" else min(500, steps // 10)
    elif warmup >= steps:
        raise ValueError(f"--lr_warmup_steps {warmup} must be smaller than the {steps} steps of the training")
    mixture = build_mixture(args)
    return Plan(
        resolution=examination.resolution,
        image_column=image_column,
        mixture_weights=mixture.weights.tolist(),
        mixture_scales=mixture.scales.tolist(),
        sigma_max=sigma_max,
        num_train_timesteps=num_levels,
        validation_inference_steps=args.validation_inference_steps
        or PIPELINES[args.method].default_num_inference_steps,
        max_train_steps=steps,
        learning_rate=args.learning_rate or (2e-3 if examination.resolution <= 16 else 2e-4),
        lr_warmup_steps=warmup,
    )


def noise_in_words(args: TrainingArguments, plan: Plan) -> str:
    """What the images are disturbed by."""
    if args.method == "cld":
        return f"CLD, beta(t) = {args.beta_0:g} + {args.beta_1:g} t, mass {args.mass:g}, gamma {args.gamma:g}"
    levels = f"{plan.num_train_timesteps} levels from {args.sigma_min:g} to {plan.sigma_max:g}"
    return f"{build_mixture(args)}, {levels}"


def training_record(args: TrainingArguments, plan: Plan) -> dict[str, Any]:
    """All options as resolved, JSON-safe, without tokens and places on this host; None where the method has none."""
    record = asdict(args) | asdict(plan) | dict.fromkeys(NOT_FOR[args.method])
    for name in PATHS:
        record[name] = portable(record[name])
    return {name: value for name, value in record.items() if name not in PRIVATE}


PATHS = (
    "dataset_name",
    "train_data_dir",
    "model_name_or_path",
    "model_config",
    "output_dir",
    "resume_from_checkpoint",
)
PRIVATE = ("hub_token", "cache_dir", "logging_dir")


def portable(path: str | None) -> str | None:
    """`path` if it says nothing about this host, else its last part."""
    if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
        return Path(path).resolve().name
    return path


def command_line(args: TrainingArguments, num_processes: int) -> str:
    """The command that gives these options, without tokens and places on this host."""
    words = ["accelerate launch"]
    if num_processes > 1:
        words.append(f"--num_processes {num_processes}")
    words.append("train_gm_sgm.py")
    for f in fields(args):
        value = getattr(args, f.name)
        if value == f.default or f.name in PRIVATE:
            continue
        if isinstance(value, bool):
            words.append(f"--{f.name}" if value else f"--no_{f.name}")
        elif isinstance(value, list):
            words.append(f"--{f.name} {' '.join(map(str, value))}")
        else:
            words.append(f"--{f.name} {portable(value) if f.name in PATHS else value}")
    return " ".join(words)


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    names = ("torch", "diffusers", "accelerate", "datasets")
    return {"diffusers_gm": __version__} | {name: importlib.metadata.version(name) for name in names}
