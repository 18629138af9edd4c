"""Samples of a training, and what they were made on."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..launch import over_processes, process_state


def sample_images(pipeline: Any, num_images: int, batch_size: int, num_inference_steps: int, seed: int) -> list:
    """PIL images, the same for the same seed whatever the batch size; each process draws a part, and has all. Those of
    a conditional network are of all classes in turn."""
    pipeline.set_progress_bar_config(disable=True)
    classes = pipeline.labels_in_turn(num_images)

    def draw(seeds: Tensor) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(s) for s in seeds.tolist()]
        labels = classes and [classes[s - seed] for s in seeds.tolist()]
        return pipeline(len(generators), num_inference_steps, generators, class_labels=labels).images

    share = math.ceil(num_images / process_state().num_processes)
    parts = over_processes(draw, torch.arange(seed, seed + num_images), min(batch_size, share), "samples")
    return [image for part in parts for image in part]


def start_tracker(accelerator: Accelerator, record: dict[str, Any], step: int) -> None:
    """Begin a run of the tracker, if there is one, with the options: numbers as numbers. What tensorboard has in this
    folder of steps after `step` is of a branch that was left, or another training, and hidden."""
    simple = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in record.items()}
    given = {name: simple[name] for name in record if record[name] is not None}
    accelerator.init_trackers("diffusers_gm", given, {"tensorboard": {"purge_step": step + 1}})


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Show a grid of samples to the tracker; call it on the main process."""
    grid = grid.convert("RGB")
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({"samples": trackio.Image(grid)}, step=step)
        elif tracker.name == "mlflow":
            import mlflow

            mlflow.log_image(grid, key="samples", step=step)
        else:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step, **layout)


def hardware(accelerator: Accelerator) -> str:
    """What the training ran on, in words."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    else:
        threads = torch.get_num_threads()
        name = f"{accelerator.device.type.upper()} ({threads} thread{'s' * (threads != 1)})"
    return f"{accelerator.num_processes} x {name}"
