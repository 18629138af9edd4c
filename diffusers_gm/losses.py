"""Training losses. They call the processes and own no formula of the noise themselves."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from .processes.mixture import GaussianMixtureNoise
from .processes.noise_space import NoiseSpace

Objective = Literal["denoiser", "score"]

# How a scheduler reads a network that was trained with an objective.
PREDICTION_TYPE: dict[Objective, str] = {"denoiser": "epsilon", "score": "scaled_score"}


def denoising_target(noise: Tensor, mixture: GaussianMixtureNoise, objective: Objective) -> Tensor:
    """What the network learns to output, given unit-level noise `eta` of shape `(B, ...)`; same shape.

    - `denoiser`: the noise itself. The minimiser is `(y - E[x0 | y]) / sigma` (empirical Bayes).
    - `score`: `-sigma` times the score of the noise, `sum_k rho_k(eta) eta / c_k^2`. The minimiser is
      `-sigma * grad log p(y)`, with the least variance of all targets that have it (denoising score matching).

    With one component of scale one both are the noise, and the loss is NCSNv2's.
    """
    if objective == "denoiser":
        return noise
    if objective == "score":
        return -mixture.score(noise)
    raise ValueError(f"unknown objective {objective!r}: use 'denoiser' or 'score'")


def denoising_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    space: NoiseSpace,
    mixture: GaussianMixtureNoise,
    objective: Objective = "denoiser",
) -> Tensor:
    """Denoising score matching on Gaussian-mixture noise, one value per image, shape `(B,)`.

    The squared error of `denoising_target`, averaged over the elements of an image. For one component that is
    NCSNv2's `1/2 * sum (sigma s(y) + z)^2` (arXiv 2006.09011, eq. 2 with the weight sigma^2) times `2 / d`.

    Args:
        model: `(alpha * y, timesteps) -> output`, both outputs and inputs `(B, C, H, W)`.
        images: clean images `(B, C, H, W)`.
        timesteps: labels `(B,)`, see `NoiseSpace`.
        noise: unit-level mixture noise, `mixture.sample(images.shape)`; at least float32.
        space: the network's noise space.
        mixture: the law of `noise`.
        objective: `denoiser` or `score`.
    """
    sigma = space.sigma(timesteps).to(images.dtype)[(...,) + (None,) * (images.ndim - 1)]
    output = model(space.alpha(sigma) * (images + sigma * noise), timesteps)
    error = output.to(noise.dtype) - denoising_target(noise, mixture, objective)
    return error.square().flatten(1).mean(1)
