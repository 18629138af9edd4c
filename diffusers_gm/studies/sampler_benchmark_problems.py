"""Denoisers that are known, and known to be wrong: what `.sampler_benchmark` has beside images and networks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import CHUNK, Denoiser

NUM_FEATURES = 256


@dataclass(eq=False)
class GaussianMixture(Denoiser):
    """The exact denoiser of a mixture of Gaussians, each with a deviation of its own for every element: as all samplers
    are the same in every rotated basis, these are any covariances that share their axes.

    Attributes:
        points: centres `(K, C, H, W)`.
        deviations: `(K, C, H, W)`.
        weights: probabilities `(K,)`.
    """

    points: Tensor
    deviations: Tensor
    weights: Tensor

    @classmethod
    def drawn(cls, shape: tuple[int, int, int], seed: int, num_components: int = 12) -> "GaussianMixture":
        """A mixture that a seed decides: centres of deviation 0.35, deviations from 0.02 to 0.3 in random order."""
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(shape)
        points = (0.35 * torch.randn(num_components, *shape, generator=generator)).clamp(-0.7, 0.7)
        spectrum = torch.logspace(math.log10(0.02), math.log10(0.3), size)
        order = torch.stack([torch.randperm(size, generator=generator) for _ in range(num_components)])
        weights = torch.rand(num_components, generator=generator) + 0.2
        return cls(points, spectrum[order].view(points.shape), weights / weights.sum())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n, C, H, W)`."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.points.shape[1:], generator=generator)
        return self.points[chosen] + self.deviations[chosen] * noise

    def __call__(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        return torch.cat([self._denoised(part, float(sigma)) for part in y.split(CHUNK)])

    def _denoised(self, y: Tensor, sigma: float) -> Tensor:
        flat, centres = y.flatten(1).double(), self.points.flatten(1).double()
        variances = self.deviations.flatten(1).double().square()
        precisions = 1 / (variances + sigma**2)
        distances = flat.square() @ precisions.T - 2 * flat @ (centres * precisions).T
        constant = (centres.square() * precisions - precisions.log()).sum(1)
        posterior = torch.softmax(self.weights.log().double() - 0.5 * (distances + constant), 1)
        kept = variances * precisions
        mean = posterior @ (centres * (1 - kept)) + (posterior @ kept) * flat
        return mean.view(y.shape).to(y)


@dataclass(eq=False)
class Erring(Denoiser):
    """A denoiser with the kind of error that a network has: smooth in the image and in the noise level, the same at
    every call.

    `D + error sigma s / sqrt(sigma^2 + s^2) e(u, ln sigma)`, `u = y / sqrt(sigma^2 + s^2)`: s is the deviation of the
    data, the factor that of `x0` given y if both were Gaussian, and e a field of unit variance,
    `sqrt(2 / F) V cos(W u + a ln sigma + b)` with F features of normal weights, always the same.

    Attributes:
        denoiser: the one that is right.
        deviation: s.
        error: the relative error.
    """

    denoiser: Denoiser
    deviation: float
    error: float

    def __call__(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = float(sigma)
        flat = y.flatten(1)
        size, count = flat.shape[1], NUM_FEATURES
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(size, count, generator=generator).to(flat) / size**0.5
        of_level, phase = torch.randn(count, generator=generator).to(flat), torch.rand(count, generator=generator)
        back = torch.randn(count, size, generator=generator).to(flat) * (2 / count) ** 0.5
        scale = math.hypot(sigma, self.deviation)
        angles = flat / scale @ mixing + of_level * math.log(sigma) + 2 * math.pi * phase.to(flat)
        field = (angles.cos() @ back).view(y.shape)
        return self.denoiser(y, sigma) + self.error * sigma * self.deviation / scale * field
