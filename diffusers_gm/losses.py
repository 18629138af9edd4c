"""Training losses. They call the processes and own no formula of the noise themselves."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .processes.broadcast import per_image
from .processes.cld import CLD, perturb
from .processes.mixture import GaussianMixtureNoise
from .readings import NoiseSpace
from .readings.velocity import score_coefficients

CLDWeighting = Literal["ell", "likelihood"]


def denoising_target(
    images: Tensor,
    noise: Tensor,
    sigma: Tensor | float,
    space: NoiseSpace,
    mixture: GaussianMixtureNoise,
    prediction_type: str = "epsilon",
) -> Tensor:
    """What a network of this prediction type learns to answer, same shape as the images.

    - `epsilon`: the noise itself. The minimiser is `(y - E[x0 | y]) / sigma` (empirical Bayes).
    - `sample`, `v_prediction`, `edm`: the same denoiser in the words of `NoiseSpace.output`.
    - `scaled_score`: `-sigma` times the score of the noise, `sum_k rho_k(eta) eta / c_k^2`. The minimiser is
      `-sigma * grad log p(y)`, with the least variance of all targets that have it (denoising score matching).

    With one component of scale one the first and the last are equal, and the loss is NCSNv2's.

    Args:
        images: clean images `(B, ...)`.
        noise: unit-level noise `eta` of the law `mixture`, same shape.
        sigma: noise levels that broadcast against them.
        space: the network's noise space.
    """
    if prediction_type == "scaled_score":
        return -mixture.score(noise)
    return space.output(images, noise, sigma, prediction_type)


def denoising_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    space: NoiseSpace,
    mixture: GaussianMixtureNoise,
    prediction_type: str = "epsilon",
    snr_gamma: float | None = None,
) -> Tensor:
    """Denoising score matching on Gaussian-mixture noise, one value per image, shape `(B,)`.

    The squared error of `denoising_target`, averaged over the elements of an image. For one component and `epsilon`
    that is NCSNv2's `1/2 * sum (sigma s(y) + z)^2` (arXiv 2006.09011, eq. 2 with the weight sigma^2) times `2 / d`.

    Args:
        model: `(alpha * y, timesteps) -> output`, both outputs and inputs `(B, C, H, W)`.
        images: clean images `(B, C, H, W)`.
        timesteps: labels `(B,)`, see `NoiseSpace`.
        noise: unit-level noise, `mixture.sample(images.shape)`; at least float32.
        space, prediction_type: of the network, see `denoising_target`.
        snr_gamma: see `min_snr_weight`; None: weight 1 at all levels.
    """
    sigma = per_image(space.sigma(timesteps), images)
    output = model(space.alpha(sigma) * (images + sigma * noise), timesteps)
    error = output.to(noise.dtype) - denoising_target(images, noise, sigma, space, mixture, prediction_type)
    loss = error.square().flatten(1).mean(1)
    if snr_gamma is None:
        return loss
    return loss * min_snr_weight(sigma.flatten(), space, prediction_type, snr_gamma)


def min_snr_weight(sigma: Tensor, space: NoiseSpace, prediction_type: str, gamma: float) -> Tensor:
    """Weights min-SNR-gamma (arXiv 2303.09556) of the squared error of an output, same shape as `sigma`.

    `min(SNR, gamma)` on the error of the image, `SNR = (s / sigma)^2` with s the size of the data: on that of the
    noise `min(SNR, gamma) / SNR`, of the velocity and of EDM's output `min(SNR, gamma) / (SNR + 1)`.
    """
    s = space.sigma_data
    of_output = space.denoised(torch.ones_like(sigma), torch.zeros_like(sigma), sigma, prediction_type)
    return (s / sigma).square().clamp(max=gamma) * (of_output / s).square()


def cld_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    times: Tensor,
    noise: Tensor,
    process: CLD,
    prediction_type: str = "cld_mixed",
    velocity: Tensor | None = None,
    weighting: CLDWeighting = "ell",
    num_train_timesteps: int = 1000,
) -> Tensor:
    """Score matching on the velocity (arXiv 2112.07068), one value per image, shape `(B,)`: mean over its elements.

    Without `velocity` it is hybrid score matching (eq. 8): the initial velocity is integrated out. With it, plain
    denoising score matching: same minimiser, more variance. The target is `grad_v log p(u | .) = -e_v / L22`.

    Args:
        model: `(cat([x, v / sqrt(M)], 1), t * num_train_timesteps) -> output`: `(B, 2C, H, W)` and `(B,)` float32 to
            `(B, C, H, W)`.
        images: clean images `(B, C, H, W)`, at least float32.
        times: t, `(B,)`, uniform on [1e-5, 1] in training; best on the CPU, where the coefficients are worked out.
        noise: standard normal, `(B, 2C, H, W)`.
        prediction_type: how the output becomes a score, see `score_coefficients`: `cld_mixed` (eq. 9), or
            `scaled_velocity_score` for the same network without the mixed score.
        velocity: v0, `(B, C, H, W)`, normal of variance `gamma M`; None for hybrid score matching.
        weighting: `ell`: `ell^-2`, which leaves `|s_v / -ell - e_v|^2` (the default); `likelihood`: `Gamma beta(t)`.
        num_train_timesteps: the unit of the labels.

    Raises:
        ValueError: for a time outside [0, 1], a shape that does not fit, an unknown weighting or prediction type.
    """
    if weighting not in ("ell", "likelihood"):
        raise ValueError(f"unknown weighting {weighting!r}: use 'ell' or 'likelihood'")
    x, v = perturb(process, images, times, noise, velocity)
    labels = (times * num_train_timesteps).float().to(images.device)
    output = model(torch.cat([x, v / process.velocity_scale], 1), labels)
    if output.shape != v.shape:
        raise ValueError(f"a velocity network answers {tuple(v.shape)}, got {tuple(output.shape)}")

    clock = process.clock(times.cpu())
    marginal = process.marginal(clock)
    deviation = (marginal if velocity is None else process.kernel(clock)).root[..., 1, 1]
    # s_v L22 + e_v, from coefficients multiplied in float64: at t = 1e-5 the score itself is of order 1e3.
    of_velocity, of_output = (per_image(deviation * c, v) for c in score_coefficients(marginal, prediction_type))
    error = of_velocity * v + of_output * output.to(v.dtype) + noise.chunk(2, 1)[1]
    loss = error.square().flatten(1).mean(1)
    if weighting == "likelihood":
        loss = loss * (process.friction * process.beta(times.cpu()) / deviation**2).to(loss.dtype).to(loss.device)
    return loss
