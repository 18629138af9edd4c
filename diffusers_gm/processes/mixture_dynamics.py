"""Updates of Gaussian-mixture score-based models, beside the Langevin steps of `annealed`.

All act on `y` with the denoiser `D` frozen over the step.
"""

import math

import torch
from torch import Tensor

from .extrapolation import to_the_middle


def exponential_step(y: Tensor, denoised: Tensor, sigma: float | Tensor, a: float | Tensor, noise: Tensor) -> Tensor:
    """Langevin dynamics over time `a` (random, for jump sizes: `a * c_k^2`), integrated exactly for frozen D.

    `D + e (y - D) + sigma sqrt(1 - e^2) z` with `e = exp(-a)`: stable for any a. For data much wider than sigma the
    stationary variance is short by the factor `(1 + e) / 2`. Arguments as in `annealed.langevin_step`.
    """
    e = torch.exp(-torch.as_tensor(a, dtype=y.dtype, device=y.device))
    return denoised + e * (y - denoised) + sigma * (1 - e**2).sqrt() * noise


def exponential_step_size(ratio: Tensor, num_steps: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """The time `a` of `exponential_step` for each level of a run; no published rule exists, this is ours.

    A long step forgets the levels above: the chain's variance is `1 + q (g^2 - 1) / (1 - q g^2)` with `q = E[e^2]^T`.
    But it narrows wide data by `(1 - E[e]) / 2`. The sum of both errors is minimised on a logarithmic grid
    (relative accuracy 2%).

    Args:
        ratio: `sigma_{i-1} / sigma_i` of each level, `(L,)`.
        num_steps: Langevin steps of each level, `(L,)`.
        weights, scales: the mixture of jump sizes, `(K,)` each.
    """
    a = torch.logspace(-6, 3, 1025, dtype=torch.float64)
    e = torch.exp(-a[:, None] * scales.double() ** 2)
    kept, contraction = (e * weights).sum(1), (e**2 * weights).sum(1)
    q, g_squared = contraction ** num_steps.double()[:, None], ratio.double()[:, None] ** 2
    lag = torch.where(q * g_squared < 1, q * (g_squared - 1) / (1 - q * g_squared), math.inf)
    return a[(lag + (1 - kept) / 2).argmin(1)]


def ancestral_step(
    y: Tensor, denoised: Tensor, sigma: float, sigma_next: float, scales: float | Tensor, noise: Tensor
) -> Tensor:
    """Reverse Gaussian-mixture Brownian motion: `y + (1 - rho)(D - y) + c sigma_next sqrt(1 - rho) z`, `rho =
    (sigma_next / sigma)^2`.

    `scales` are jump sizes c drawn from the posterior of the component given y, at every step: the sampler switches
    between large jumps and small roaming. With c = 1 it is DDPM's ancestral step. First order in the log ratio.
    """
    rho = (sigma_next / sigma) ** 2
    return y + (1 - rho) * (denoised - y) + scales * (sigma_next * math.sqrt(1 - rho)) * noise


def ode_step(
    y: Tensor,
    denoised: Tensor,
    sigma: float,
    sigma_next: float,
    previous_denoised: Tensor | None = None,
    previous_sigma: float | None = None,
) -> Tensor:
    """Probability flow `dy / dsigma = (y - D) / sigma`, exact for any fixed law of the noise.

    Second order with the previous call's denoiser, from which D is extrapolated to the middle of the step, see
    `extrapolation`: DPM-Solver++(2M). Without it, first order.
    """
    if previous_denoised is not None and previous_sigma is not None:
        ahead = to_the_middle(math.log(previous_sigma / sigma), math.log(sigma / sigma_next))
        denoised = denoised + ahead * (denoised - previous_denoised)
    return denoised + (sigma_next / sigma) * (y - denoised)
