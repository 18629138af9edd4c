"""The likelihood that a network gives to images: the probability flow of the noisy image, for networks of all kinds.

`python -m diffusers_gm.evaluation.likelihood outputs/digits` prints it for the digits, in bits per dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .extra import extra
from .processes.mixture import GAUSSIAN, GaussianMixtureNoise
from .processes.random import Draw, Generators


def flow_nll(
    denoiser: Callable[[Tensor, float], Tensor],
    images: Tensor,
    levels: tuple[float, float],
    num_steps: int = 50,
    generator: Generators = None,
    start: GaussianMixtureNoise = GAUSSIAN,
    start_scale: float | None = None,
) -> Tensor:
    """`-log p(y)` in nats of images that are taken for y at the smallest noise level, `(B,)` float64 on the CPU.

    The probability flow `dy / d log sigma = y - D(y; sigma)` turns noise into images, whatever the law of the noise
    (arXiv 2011.13456, section 4.3): `log p(y)` is that of where the flow leads at the largest level, plus the integral
    of its divergence, `d - tr dD/dy`, of which the trace is estimated with one Hutchinson probe per image.
    Fourth-order Runge-Kutta of torchdiffeq in log sigma, so `4 num_steps` network calls, each with its gradient.

    A denoiser that depends on noise besides, as the companion c of a network of CLD, has a density for each c: the mean
    of `-log p(y | c)` over c is above `-log p(y)`, and equal where D does not depend on c, as that of exact ones.

    Args:
        denoiser: `(y, sigma) -> D`, both `(B, ...)`, differentiable in y.
        images: `(B, ...)`, at least float32.
        levels: the smallest noise level and the largest, where a run starts.
        num_steps: steps of the solver.
        generator: decides the probes; one per image in a list.
        start, start_scale: what a run starts from, noise of this law times the scale; by default the largest level.

    Raises:
        ValueError: for images in half precision or not finite, fewer than one step, levels that do not rise.
        ImportError: without torchdiffeq.
    """
    low, high = levels
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not 0 < low < high:
        raise ValueError(f"levels must be positive and rise, got {levels}")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be float32 or float64, got {images.dtype}")
    if not images.isfinite().all():
        raise ValueError("the images hold values that are not finite")
    with extra("ode"):
        from torchdiffeq import odeint
    grid = torch.linspace(math.log(low), math.log(high), num_steps + 1, dtype=images.dtype, device=images.device)
    probe = torch.where(Draw.like(images, generator).normal(images.shape) >= 0, 1.0, -1.0).to(images)

    def flow(log_sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`dy / d log sigma` and its divergence, `(B,)`."""
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            denoised = denoiser(y, math.exp(float(log_sigma))).to(y)
            (slope,) = torch.autograd.grad(denoised, y, probe)
        return (y - denoised).detach(), y[0].numel() - (slope * probe).flatten(1).sum(1)

    y, divergence = odeint(
        flow,
        (images, images.new_zeros(len(images))),
        grid[[0, -1]],
        method="rk4",
        options={"grid_constructor": lambda *_: grid},
    )
    end = start.log_prob(y[-1].cpu().double(), high if start_scale is None else start_scale)
    return -(divergence[-1].cpu().double() + end)


def bits_per_dimension(nats: Tensor, num_elements: int, num_levels: int) -> Tensor:
    """Bits per element of images of `num_levels` equal levels from -1 to 1, given `-log p` of the dequantised ones.

    A model of density p gives the discrete image k, of d elements, the probability `P(k) = int p(k + u) du` over the
    cube of side `w = 2 / (num_levels - 1)`. By Jensen, for u uniform on that cube,
    `-log P(k) <= E_u[-log p(k + u)] - d log w`. The last term is the Jacobian of the unit in which images are
    measured; an upper bound on `-log p` thus gives one on `-log P(k)`:
    `bits = nats / (d log 2) + log2((num_levels - 1) / 2)`.
    """
    return nats / (num_elements * math.log(2)) + math.log2((num_levels - 1) / 2)


if __name__ == "__main__":
    # These are mathematics, which know neither data nor pipelines.
    raise SystemExit("the command is: python -m diffusers_gm.evaluation.likelihood FOLDER")
