"""The noise level of an image, found by what a denoiser makes of it.

For `y = x0 + sigma n` the level is a parameter like any other, and its likelihood follows from the denoiser alone.
`p_sigma` obeys the heat equation, and by Tweedie's formula `D(y; sigma) = y + sigma^2 grad log p_sigma(y)`, so that

    d log p_sigma(y) / d log sigma = |y - D|^2 / sigma^2 + div D - d

for an image of d elements. At the maximum of the likelihood `|y - D|^2 = sigma^2 (d - div D)`: what is left of y
is shorter than the noise, by what D mistakes for image. `sigma^2 div D` is the posterior variance of x0, and `div D`
what MacKay's evidence framework (Neural Computation 4, 1992) calls the number of well-determined parameters; to leave
it out makes levels too small. The information on `log sigma` is `2 |I - J|^2`, J the Jacobian of D and the norm
Frobenius', exactly where p is Gaussian: it gives the step of Newton's method, and an error for the answer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .broadcast import per_image
from .random import Draw, Generators

# The divergence is that over a stretch of this many noise levels, over which D is as good as linear.
STRETCH = 0.1
# No step takes the level further than by e^2, and no fewer elements than this share of them are taken for noise.
LONGEST_STEP, LEAST_NOISE = 2.0, 0.01


class NoiseLevel(NamedTuple):
    """Attributes:
    sigma: standard deviation of the noise per element, `(B,)`.
    error: standard error of `log sigma`, `(B,)`: 0.1 is 10%. Large where the noise is finer than what the images
        themselves differ by, from which nobody could tell it; infinite where the level is beyond `low` or `high`.
    """

    sigma: Tensor
    error: Tensor


def estimate_noise_level(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    low: float,
    high: float,
    num_looks: int = 6,
    generator: Generators = None,
) -> NoiseLevel:
    """The noise level that is most probable given each image, at `2 num_looks` calls of the denoiser.

    Args:
        denoiser: `(y, sigma) -> E[x0 | y]`, `(B, ...)` and `(B,)` to `(B, ...)`: a level for each image.
        y: noisy images `(B, ...)`, at least float32.
        low, high: between these, positive.
        num_looks: levels that are tried; from the middle of a range of 1 to 1000, six are enough.
        generator: draws the probe of the divergence (Hutchinson's), one for an image; a list decides one by one.

    Raises:
        ValueError: for levels out of order, fewer than one look, or images in half precision or not finite.
    """
    if not 0 < low < high:
        raise ValueError(f"need 0 < low < high, got low={low}, high={high}")
    if num_looks < 1:
        raise ValueError(f"num_looks must be at least 1, got {num_looks}")
    if y.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the images must be float32 or float64, got {y.dtype}")
    if not y.isfinite().all():
        raise ValueError("the images hold values that are not finite")
    size = y[0].numel()
    probe = torch.where(Draw.like(y, generator).uniform(y.shape) < 0.5, -1.0, 1.0).to(y)
    bounds = torch.tensor([low, high], dtype=y.dtype, device=y.device).log()
    below, above = bounds[:, None].expand(2, len(y))
    log_sigma = bounds.mean().expand(len(y))
    for _ in range(num_looks):
        sigma = log_sigma.exp()
        stretch = per_image(STRETCH * sigma, y)
        here, there = denoiser(torch.cat([y, y + stretch * probe]), sigma.repeat(2)).chunk(2)
        moved = (there - here) / stretch
        residual = ((y - here) / per_image(sigma, y)).flatten(1).square().sum(1)
        noise = (size - (probe * moved).flatten(1).sum(1)).clamp(min=LEAST_NOISE * size)
        information = 2 * (probe - moved).flatten(1).square().sum(1)
        # Newton's step for the logarithm of `|y - D|^2 / (sigma^2 (d - div D))`, which is nearly linear. Its factor is
        # at least 1/2, MacKay's step, unless D spreads images, as it may far below their level.
        factor = (noise / information).clamp(min=0.5)
        step = (factor * (residual / noise).log()).clamp(-LONGEST_STEP, LONGEST_STEP)
        below, above = torch.where(step > 0, log_sigma, below), torch.where(step > 0, above, log_sigma)
        wanted = log_sigma + step
        ahead = torch.where(wanted > above, (log_sigma + above) / 2, wanted)
        log_sigma = torch.where(ahead < below, (log_sigma + below) / 2, ahead)
    error = information.rsqrt()
    beyond = (wanted < bounds[0] - error) | (wanted > bounds[1] + error)
    return NoiseLevel(log_sigma.exp(), torch.where(beyond, torch.inf, error))
