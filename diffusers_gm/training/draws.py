"""The random numbers that images are disturbed by: the same for an image however the images of a step are split."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..data import LEVELS, STEP, generator_for
from ..processes.random import Draw

# Written to checkpoints. Until version 1 noise was drawn for batches; from such a checkpoint a training goes on under
# other noise of the same law.
DRAWS_VERSION = 2


@dataclass(frozen=True)
class Draws:
    """What disturbs a batch of B images.

    Attributes:
        levels: decides the noise level of each image, uniform in [0, 1); `(B,)` float64 on the CPU.
    """

    levels: Tensor
    noise: Draw

    @staticmethod
    def of(images: Tensor) -> "Draws":
        """Levels and noise by the global generators."""
        return Draws(torch.rand(len(images), dtype=torch.float64), Draw.like(images))

    @staticmethod
    def always_the_same(images: Tensor) -> "Draws":
        """Levels evenly spread, and noise, that depend on the number of images alone."""
        levels = (torch.arange(len(images), dtype=torch.float64) + 0.5) / len(images)
        return Draws(levels, Draw.like(images, _generators(range(len(images)), images.device)))


@dataclass
class StepDraws:
    """The draws of a training, the noise on `device`. Each of the `images_per_step`, over all batches and processes,
    has a seed of its own, by its place in the endless stream."""

    seed: int
    images_per_step: int
    device: torch.device
    _generators: list[torch.Generator] = field(default_factory=list)

    def of_batch(self, start_of_step: int, first: int, batch_size: int) -> Draws:
        """For `batch_size` images of a step, from the `first` on; `start_of_step` images were seen before the step."""
        mine = slice(first, first + batch_size)
        sequence = np.random.SeedSequence((self.seed, STEP, start_of_step))
        seeds = (sequence.generate_state(self.images_per_step, np.uint64)[mine] >> np.uint64(1)).tolist()
        generator = generator_for(self.seed, LEVELS, start_of_step)
        levels = torch.rand(self.images_per_step, dtype=torch.float64, generator=generator)[mine]
        if len(self._generators) != batch_size:
            self._generators = _generators(seeds, self.device)
        for generator, seed in zip(self._generators, seeds, strict=True):  # faster than making new ones
            generator.manual_seed(seed)
        return Draws(levels, Draw(self._generators, self.device))


def _generators(seeds: Iterable[int], device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
