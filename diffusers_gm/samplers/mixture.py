"""Samplers that need the denoiser alone, whatever the law of the noise: reverse diffusion and probability flow."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..processes.random import Draw
from .sampler import Memory, Plan, Stepped, ahead, check_order, from_level_to_level, one_a_level


@dataclass(frozen=True)
class Ancestral:
    """Reverse Gaussian-mixture Brownian motion; for Gaussian noise DDPM's sampler or, of order 2, SDE-DPM-Solver++(2M).

    The jump size of every step is drawn from the posterior of the component given y: large jumps or small roaming. With
    one component for all elements y hardly leaves a doubt, and an image goes on in the component that it starts in.
    With a `step_size` it is consistent annealed sampling (arXiv 2009.05475).

    Attributes:
        noise: law of the network's noise.
        denoise: end with D.
        step_size: `eta * sigma_L^2`; None: the ancestral step.
        order: 1: D is held over a step. 2: it is extrapolated from two calls to the middle of the step (arXiv
            2211.01095). For Gaussian noise the law of what is left is of this order in the log ratio of the levels.
    """

    noise: GaussianMixtureNoise = GAUSSIAN
    denoise: bool = True
    step_size: float | None = None
    order: int = 1

    def __post_init__(self) -> None:
        check_order(self.order)

    def calls_per_level(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls, 1 if self.denoise else 2)

    def plan(self, sigmas: Tensor) -> Plan:
        """Of each call, its level, the one it leads to and eta."""
        steps = []
        for sigma, after in from_level_to_level(sigmas, self.denoise).steps:
            size = self.step_size
            eta = 1 - (after / sigma) ** 2 if size is None else size / float(sigmas[-1]) ** 2
            if after:
                check_consistent_step(eta, sigma, after)
            steps.append((sigma, after, eta))
        return Plan(sigmas, steps)

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma, after, eta = plan.steps[i]
        if after == 0:
            return denoised, memory
        towards = denoised
        if self.order == 2:
            towards = ahead(denoised, sigma, after, memory)
            memory = memory._replace(denoised=((sigma, denoised),))
        if len(self.noise) > 1:
            probabilities = self.noise.responsibilities(y - denoised, sigma)
            scales = self.noise.sample_scales(y.shape, draw, probabilities)
            noise = draw.normal(y.shape).mul_(scales)
        else:
            noise = draw.normal(y.shape).mul_(float(self.noise.scales[0]))
        return consistent_step(y, towards, sigma, after, eta, noise), memory


def consistent_step(y: Tensor, denoised: Tensor, sigma: float, sigma_next: float, eta: float, noise: Tensor) -> Tensor:
    """One step of consistent annealed sampling (arXiv 2009.05475, algorithm 1): the noise left is `sigma_next`.

    `y + eta (D - y) + sigma_next beta z` with `beta^2 = 1 - ((1 - eta) sigma / sigma_next)^2`, which asks for
    `1 - sigma_next / sigma <= eta <= 1 + sigma_next / sigma`. `eta = 1 - sigma_next / sigma` is the probability
    flow (first order), `eta = 1 - (sigma_next / sigma)^2` the ancestral step.
    """
    beta_squared = 1 - ((1 - eta) * sigma / sigma_next) ** 2
    return torch.lerp(y, denoised, eta).add_(noise, alpha=sigma_next * math.sqrt(max(beta_squared, 0.0)))


def check_consistent_step(eta: float, sigma: float, sigma_next: float) -> None:
    """Raise a ValueError unless `consistent_step` can leave exactly `sigma_next`."""
    ratio = sigma_next / sigma
    if not 1 - ratio - 1e-12 <= eta <= 1 + ratio + 1e-12:
        raise ValueError(
            f"consistent annealed sampling from sigma={sigma:.4g} to {sigma_next:.4g} needs a step "
            f"eps / sigma_min^2 in [{1 - ratio:.4g}, {1 + ratio:.4g}], got {eta:.4g}: change step_size, "
            "use more levels, or leave it None"
        )


@dataclass(frozen=True)
class TwoStep:
    """Probability flow `dy / dsigma = (y - D) / sigma`, exact for any fixed law of the noise. Deterministic.

    Second order: D is extrapolated from two calls to the middle of the step, which is DPM-Solver++(2M) (arXiv
    2211.01095). First order at the first call. Goes up as well, over noise levels that ascend, without `denoise`.

    Attributes: denoise: end with D.
    """

    denoise: bool = True

    def calls_per_level(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls, 1 if self.denoise else 2)

    def plan(self, sigmas: Tensor) -> Plan:
        return from_level_to_level(sigmas, self.denoise)

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma, after = plan.steps[i][:2]  # a plan of `Explore` has more
        if after == 0:
            return denoised, memory
        towards = ahead(denoised, sigma, after, memory)
        return torch.lerp(towards, y, after / sigma), memory._replace(denoised=((sigma, denoised),))
