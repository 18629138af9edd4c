"""Samplers that need the denoiser alone, whatever the law of the noise: reverse diffusion and probability flow."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..processes.random import Draw
from .sampler import Memory, Plan, Stepped, from_level_to_level, one_a_level, to_the_middle


@dataclass(frozen=True)
class Ancestral:
    """Reverse Gaussian-mixture Brownian motion; DDPM's sampler for Gaussian noise. First order in the log ratio.

    The jump size of every step is drawn from the posterior of the component given y: large jumps or small roaming. With
    one component for all elements y hardly leaves a doubt, and an image goes on in the component that it starts in.

    Attributes:
        noise: law of the network's noise.
        denoise: end with D.
    """

    noise: GaussianMixtureNoise = GAUSSIAN
    denoise: bool = True

    def spend(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls, 1 if self.denoise else 2)

    def plan(self, sigmas: Tensor) -> Plan:
        return from_level_to_level(sigmas, self.denoise)

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma, after = plan.steps[i]
        if after == 0:
            return denoised, memory
        scales: float | Tensor = float(self.noise.scales[0])
        if len(self.noise) > 1:
            probabilities = self.noise.responsibilities(y - denoised, sigma)
            scales = self.noise.sample_scales(y.shape, draw, probabilities)
        return ancestral_step(y, denoised, sigma, after, scales, draw.normal(y.shape)), memory


def ancestral_step(
    y: Tensor, denoised: Tensor, sigma: float, sigma_next: float, scales: float | Tensor, noise: Tensor
) -> Tensor:
    """`y + (1 - rho)(D - y) + c sigma_next sqrt(1 - rho) z`, `rho = (sigma_next / sigma)^2`; `scales` are the c."""
    rho = (sigma_next / sigma) ** 2
    spread = sigma_next * math.sqrt(1 - rho)
    mean = torch.lerp(y, denoised, 1 - rho)
    if isinstance(scales, float):
        return mean.add_(noise, alpha=scales * spread)
    return mean.addcmul_(scales, noise, value=spread)


@dataclass(frozen=True)
class TwoStep:
    """Probability flow `dy / dsigma = (y - D) / sigma`, exact for any fixed law of the noise. Deterministic.

    Second order: D is extrapolated from two calls to the middle of the step, which is DPM-Solver++(2M) (arXiv
    2211.01095). First order at the first call. Goes up as well, over noise levels that ascend, without `denoise`.

    Attributes: denoise: end with D.
    """

    denoise: bool = True

    def spend(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls, 1 if self.denoise else 2)

    def plan(self, sigmas: Tensor) -> Plan:
        return from_level_to_level(sigmas, self.denoise)

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma, after = plan.steps[i][:2]  # a plan of `Explore` has more
        before, memory = memory.denoised, memory._replace(denoised=((sigma, denoised),))
        if after == 0:
            return denoised, memory
        ahead = denoised
        if before and before[0][0] != sigma:
            length = to_the_middle(math.log(before[0][0] / sigma), math.log(sigma / after))
            ahead = torch.lerp(before[0][1], denoised, 1 + length)
        return torch.lerp(ahead, y, after / sigma), memory
