"""From images to latents and between latents, through the probability flow."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..processes.random import Draw, Generators
from ..readings import ImageReading, VelocityReading
from ..samplers import Memory, TwoStep
from ..schedulers import CalibratedMultistepScheduler
from ..schedulers.base import SamplerScheduler
from .guidance import Guidance, Network
from .inpainting import noised


def ours(scheduler: Any) -> Any:
    """A scheduler of this package that reads the network as `scheduler` does; it itself, if it is one; a ValueError for
    a scheduler that cannot be swapped."""
    if isinstance(scheduler, SamplerScheduler):
        return scheduler
    return CalibratedMultistepScheduler.from_config(scheduler.config)


# How far off its level a timestep in float32 may be.
ROUNDING = 1e-4


def is_within(interval: tuple[float, float], scheduler: Any, timestep: Tensor) -> bool:
    """Whether sigma of `y = x0 + sigma noise` at a timestep is in the interval, by a scheduler of this package."""
    sigma = float(scheduler.reading.sigma(timestep.cpu().double()))
    return interval[0] <= (1 + ROUNDING) * sigma and sigma <= (1 + ROUNDING) * interval[1]


def encode(
    scheduler: Any, network: Network, guidance: Guidance, images: Tensor, num_steps: int, generator: Generators
) -> Tensor:
    """The sample at the first level that the probability flow `dy / dsigma = (y - D) / sigma` leads from to `images`.

    The mirror of a run of `num_steps` calls of the scheduler on its own noise levels: one call finds the y whose D is
    the image, the others go up from there, in steps of second order. A network that sees a velocity is shown a
    companion noise that stays the same, drawn by `generator`.
    """
    reader = ours(scheduler)
    reading = reader.reading
    scheduler.set_timesteps(num_steps, device=images.device)
    labels = scheduler.timesteps.cpu().double().unique()
    if reader is not scheduler and reader.is_flow:  # of which some round their timesteps, but not their levels s
        labels = len(reader) * scheduler.sigmas[:-1].cpu().double().unique()
    sigmas = reading.sigma(labels)
    companion = None
    if isinstance(reading, VelocityReading):
        companion = Draw.like(images, generator).normal(images.shape)

    def denoised(y: Tensor, sigma: Tensor) -> Tensor:
        return reader.denoise(partial(guidance.output, network), y, companion, sigma)

    sampler, memory, draw = TwoStep(denoise=False), Memory(), Draw.like(images)
    y = 2 * images - denoised(images, sigmas[0])
    if len(sigmas) > 1:
        plan = sampler.plan(sigmas)
        for i, sigma in enumerate(sigmas[:-1]):
            y, memory = sampler.step(plan, i, y, denoised(y, sigma), memory, draw)
    # Schedulers of diffusers carry y or what ours do; of pure noise, as rectified flow begins with, y cannot be told by
    # what they make of an image.
    if companion is not None or reader is scheduler or getattr(scheduler, "init_noise_sigma", 1.0) == 1:
        return reading.visible(y, companion, reading.calls(labels)[-2])
    return noised(scheduler, y, scheduler.timesteps[0], torch.zeros_like(y))


# How far off the width of latents may be: a poor network encodes images in too narrow ones.
WIDTH = 5.0


def check_deviation(scheduler: Any, latents: Tensor, first: float | None = None) -> None:
    """Raise a ValueError for latents that are not as wide as the `first` level of a run that carries y (None: that of
    the scheduler): unit noise, or latents that were encoded on other levels."""
    reading = getattr(scheduler, "reading", None)
    if not isinstance(reading, ImageReading) or not reading.space.carries_y:
        return
    if not scheduler.model_mixture.is_standard_gaussian:  # an image may be of any component
        return
    first = scheduler.init_noise_sigma if first is None else first
    found = float(latents.std())
    if not first / WIDTH < found < first * WIDTH:
        raise ValueError(
            f"latents have a standard deviation of {found:.3g}, and the run begins at noise level {first:.3g}: "
            "multiply unit noise by that (scheduler.init_noise_sigma after set_timesteps), or encode images with as "
            "many num_inference_steps and this scheduler"
        )


def slerp(start: Tensor, end: Tensor, num_images: int) -> Tensor:
    """Latents on the great circle from one to another, both ends included.

    A straight line would leave the shell on which noise lies; on the circle its length stays, or goes evenly from that
    of one end to that of the other.

    Args:
        start, end: latents of one image, `(C, H, W)` or `(1, C, H, W)`; a ValueError for other shapes.
        num_images: at least 2, or it is a ValueError.

    Returns:
        `(num_images, C, H, W)`, for `latents` of a pipeline with a deterministic sampler.
    """
    one, other = (latents.squeeze(0) if latents.ndim == 4 else latents for latents in (start, end))
    if one.ndim != 3 or one.shape != other.shape:
        raise ValueError(
            f"slerp goes between latents of two images (1, C, H, W), got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    if num_images < 2:
        raise ValueError(f"num_images must be at least 2, both ends: got {num_images}")
    lengths = one.norm(), other.norm()
    if not lengths[0] * lengths[1] > 0:
        raise ValueError(
            "slerp goes around the origin, and latents that are all zero, or not finite, have no direction"
        )
    cosine = (one * other).sum() / (lengths[0] * lengths[1])
    angle = cosine.clamp(-1, 1).acos()
    share = torch.linspace(0, 1, num_images, dtype=one.dtype, device=one.device).reshape(-1, 1, 1, 1)
    if angle < 1e-4:
        return torch.lerp(one, other, share)
    weights = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    length = (1 - share) * lengths[0] + share * lengths[1]
    return length * (weights[0] * one / lengths[0] + weights[1] * other / lengths[1])
