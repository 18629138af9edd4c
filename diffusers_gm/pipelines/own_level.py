"""Images that are noisy already: how noisy, and what is behind the noise."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..processes.noise_level import NoiseLevel, estimate_noise_level
from ..processes.random import Draw, Generators
from ..readings import VelocityReading, level_range
from ..readings.grids import even_levels
from ..samplers import sample
from .guidance import Guidance, Network


class OwnLevel:
    """A network that is told a level for each image of a batch.

    Under mixture noise an image of standard deviation tau is told to be where tau is that of the commonest component:
    with one component, at tau.

    Args:
        scheduler: of this package; says how the network sees noise.
        network, guidance: as in a run.
        generator: draws the companion noise of a network that sees velocities; nothing else is drawn.
    """

    def __init__(self, scheduler: Any, network: Network, guidance: Guidance, generator: Generators = None):
        self.scheduler, self.reading = scheduler, scheduler.reading
        self.network, self.guidance, self.generator = network, guidance, generator
        self.unit = scheduler.model_mixture.commonest_scale
        self.low, self.high = (self.unit * end for end in level_range(self.reading))

    def of_each(self, images: Tensor) -> Iterator[tuple["OwnLevel", Tensor]]:
        """The same for each image of the batch alone, with that image."""
        labels = self.guidance.labels
        for i, image in enumerate(images.split(1)):
            guidance = self.guidance if labels is None else replace(self.guidance, labels=labels[[i]])
            generator = self.generator[i] if isinstance(self.generator, list | tuple) else self.generator
            yield OwnLevel(self.scheduler, self.network, guidance, generator), image

    def measured(self, y: Tensor, num_looks: int) -> NoiseLevel:
        """The level of each of the noisy images `(B, C, H, W)`; the generator draws the probe as well."""
        return estimate_noise_level(self.denoiser(y), y, self.low, self.high, num_looks, self.generator)

    def denoiser(self, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`(y, tau) -> D`, a level for each image, for batches that are copies of `images`, one after the other."""
        companion = None
        if isinstance(self.reading, VelocityReading):
            companion = Draw.like(images, self.generator).normal(images.shape)

        def denoised(y: Tensor, tau: Tensor) -> Tensor:
            sigmas = tau.cpu().double() / self.unit
            labels = self.reading.timestep(sigmas)
            calls = self.reading.calls(labels, sigmas)[: len(y)]
            copies = len(y) // len(images)
            beside = [None] * len(y) if companion is None else companion.repeat(copies, 1, 1, 1).split(1)
            samples = [self.reading.visible(*one) for one in zip(y.split(1), beside, calls, strict=True)]
            inputs = [self.reading.model_input(one, call.label, call) for one, call in zip(samples, calls, strict=True)]
            output = self.guidance.copied(copies).output(self.network, torch.cat(inputs), labels.float().to(y.device))
            return torch.cat([
                self.scheduler.denoised(out, one, noisy, call)
                for out, one, noisy, call in zip(output.split(1), samples, y.split(1), calls, strict=True)
            ])  # fmt: skip

        return denoised

    def clean(self, y: Tensor, tau: Tensor, num_calls: int) -> Tensor:
        """What is behind the noise of level `tau` `(B,)` of `y`: D, or the end of a run of the scheduler's sampler,
        all of whose calls are from that level down."""
        denoiser, sampler = self.denoiser(y), self.scheduler.sampler_for(num_calls)
        if num_calls == 1:
            return denoiser(y, tau)
        assert len(tau.unique()) == 1, "a run has one level at a time"
        counts = torch.tensor(sampler.calls_per_level(num_calls))
        first = float(tau[0]) / self.unit
        levels = even_levels(first, min(self.low / self.unit, first / 2), len(counts)).repeat_interleave(counts)
        return sample(
            sampler,
            lambda noisy, sigma: denoiser(noisy, torch.full((len(y),), self.unit * sigma)),
            y,
            levels,
            self.generator,
        )
