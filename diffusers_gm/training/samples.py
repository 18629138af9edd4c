"""Samples of a training, and what they were made on."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image


def sample_images(pipeline: Any, num_images: int, batch_size: int, num_inference_steps: int, seed: int) -> list:
    """PIL images, the same for the same seed whatever the batch size."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, num_images, batch_size):
        seeds = range(seed + start, seed + min(start + batch_size, num_images))
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        images += pipeline(len(generators), num_inference_steps, generators).images
    return images


def log_grid(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Show a grid of samples to the trackers that take images."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step, **layout)


def hardware(accelerator: Accelerator) -> str:
    """What the training ran on, in words."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
    else:
        name = f"{accelerator.device.type.upper()} ({torch.get_num_threads()} threads)"
    return f"{accelerator.num_processes} x {name}"
