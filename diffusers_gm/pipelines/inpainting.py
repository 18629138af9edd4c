"""Runs that start from an image, and keep some of its pixels.

All that is asked of a scheduler is `set_timesteps`, `add_noise` and, where it has it, `set_begin_index`: so that every
one takes part, those of diffusers too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..processes.mixture import GAUSSIAN
from ..processes.random import Draw, Generators
from ..readings import VelocityReading


@dataclass(frozen=True)
class Picture:
    """Attributes:
    image: where a run starts from, `(B, C, H, W)` in [-1, 1].
    mask: 1 where pixels are new and 0 where they stay those of `image`, `(B, 1, H, W)`; None: all are new.
    strength: the share of the run that is made, its end.
    num_resamples: how often the finished image is given noise again and is denoised again, from ever lower levels, so
        that known and new pixels come to agree. That is RePaint's jump (arXiv 2201.09865), made from the clean image,
        from where every scheduler knows the law of the noise: exactly the forward process, whatever the process.
    """

    image: Tensor
    mask: Tensor | None = None
    strength: float = 1.0
    num_resamples: int = 0

    def begins(self, num_steps: int) -> list[int]:
        """The steps that the run begins with, and those that repeat its end; a ValueError if one of them would make no
        network call."""
        n = self.num_resamples + 1
        # As diffusers counts; but `.3 * 10` are 3.
        made = [int(num_steps * (self.strength * (1 - k / n)) + 1e-9) for k in range(n)]
        if made[-1] < 1:
            raise ValueError(
                f"strength={self.strength:g}"
                + (f" with num_resamples={self.num_resamples}" if self.num_resamples else "")
                + f" of num_inference_steps={num_steps} leaves no network call: give more of them"
            )
        return [num_steps - steps for steps in made]

    def start(self, scheduler: Any, timestep: Tensor, noise: Tensor, finished: Tensor | None) -> Tensor:
        """The sample that a run starts from at `timestep`; `finished` is the image that the run before made. Of a whole
        run new pixels start as those of a run without an image: a grid that begins lower would not hide it."""
        if finished is not None or self.strength < 1:
            return noised(scheduler, self.image if finished is None else finished, timestep, noise)
        if isinstance(getattr(scheduler, "reading", None), VelocityReading):
            kept = torch.zeros_like(self.image) if self.mask is None else self.image * (1 - self.mask)
            return noised(scheduler, kept, timestep, noise)
        new = getattr(scheduler, "init_noise_sigma", 1.0) * noise
        return new if self.mask is None else torch.lerp(noised(scheduler, self.image, timestep, noise), new, self.mask)

    def keep(self, scheduler: Any, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """A sample at `timestep` with the known pixels at that level in their places."""
        if self.mask is None:
            return sample
        return torch.lerp(noised(scheduler, self.image, timestep, noise), sample, self.mask)

    def finish(self, image: Tensor) -> Tensor:
        """The denoised image with the known pixels in their places."""
        return image if self.mask is None else torch.lerp(self.image.to(image), image, self.mask.to(image))


def noised(scheduler: Any, image: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    """The sample at `timestep` of a clean image, in the scheduler's own convention."""
    at = timestep.reshape(1)
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(image, noise, at)
    return scheduler.scale_noise(image, at, noise)  # schedulers of rectified flow


def unit_noise(
    scheduler: Any, shape: tuple[int, ...], generator: Generators, device: torch.device
) -> Callable[[], Tensor]:
    """Draws noise of the law that the network was trained with, anew each time, as RePaint does; but of one jump size
    for the whole run, so that under mixture noise known and new pixels are of one component."""
    draw = Draw(generator, device)
    scales = getattr(scheduler, "model_mixture", GAUSSIAN).sample_scales(shape, draw)
    return lambda: scales * draw.normal(shape)
