"""Annealed Langevin dynamics with theory-chosen parameters (NCSNv2, arXiv 2006.09011).

Levels are counted as in the published code, `sigma_1 > ... > sigma_L`. The step size of a level is
`alpha_i = a * sigma_i^2` with one dimensionless `a` for the whole ladder; the paper's `eps` is `a * sigma_L^2`.
Its updates are in `samplers.langevin`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Criterion = Literal["prop3", "fixed_point"]


# --- Techniques 1, 2: the ladder ---------------------------------------------------------------------------------


def max_pairwise_distance(data: Tensor, chunk_size: int | None = None) -> float:
    """Technique 1: the largest Euclidean distance between two points of `data`, shape `(n, ...)`, n >= 2.

    It is the noise level at which annealing should start, in the units of the data. O(n^2): subsample large sets.
    `chunk_size` points at a time are compared with as many others; default 1024, or fewer if they are large: beside the
    data themselves, little memory is needed.

    Raises:
        ValueError: for fewer than two points, or values that are not finite.
    """
    if len(data) < 2:
        raise ValueError(f"need at least two images to measure a pairwise distance, got {len(data)}")
    flat = data.flatten(1)
    chunks = flat.split(chunk_size or max(1, min(1024, 2**24 // max(1, flat.shape[1]))))
    mean = flat.mean(0)  # far from 0, small distances would be lost in squares
    pairs = ((a - mean, b - mean) for i, a in enumerate(chunks) for b in chunks[i:])
    largest = float(torch.stack([torch.cdist(a, b).max() for a, b in pairs]).max())
    if not math.isfinite(largest):
        raise ValueError("the images hold values that are not finite")
    return largest


def ladder_ratio(dim: int, overlap: float = 0.5) -> float:
    """Technique 2: the ratio `g = sigma_{i-1} / sigma_i > 1` of neighbouring levels for data of `dim` elements.

    Solves `Phi(sqrt(2 d)(g - 1) + 3 g) - Phi(sqrt(2 d)(g - 1) - 3 g) = overlap` by bisection: the share of the
    radius of one level that lies within three standard deviations of the next. The paper's text asks for about
    0.5; its published CIFAR-10 ladder (L = 232) corresponds to 0.566.
    """
    if dim < 1 or not 0 < overlap < 0.99:
        raise ValueError(f"need dim >= 1 and 0 < overlap < 0.99, got dim={dim}, overlap={overlap}")

    def overlap_at(g: float) -> float:
        centre = math.sqrt(2 * dim) * (g - 1)
        upper, lower = torch.special.ndtr(torch.tensor([centre + 3 * g, centre - 3 * g], dtype=torch.float64)).tolist()
        return upper - lower

    low, high = 1.0, 2.0
    while overlap_at(high) > overlap and high < 1e6:
        high *= 2
    if overlap_at(high) > overlap:
        raise ValueError(f"no ladder ratio gives an overlap of {overlap} in {dim} dimensions")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap_at(middle) > overlap else (low, middle)
    return (low + high) / 2


def ladder_length(sigma_max: float, sigma_min: float, dim: int, overlap: float = 0.5) -> int:
    """Technique 2: the number of levels `L = 1 + ln(sigma_1 / sigma_L) / ln g`, rounded, at least 2."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
    return max(2, 1 + round(math.log(sigma_max / sigma_min) / math.log(ladder_ratio(dim, overlap))))


# --- Technique 4: the step size ----------------------------------------------------------------------------------


def level_variance(a: Tensor, ratio: Tensor | float, num_steps: Tensor | float, fourth_moment: float = 1.0) -> Tensor:
    """Proposition 3: `s_T^2 / sigma_i^2` after `num_steps` Langevin steps on a level entered from the one above.

    The data are a point mass and the chain enters with variance `(ratio * sigma_i)^2`. With random jump sizes of
    `E[c^2] = 1` and `E[c^4] = fourth_moment` the contraction is `1 - 2a + a^2 E[c^4]`; 1.0 is NCSNv2.
    Arguments broadcast; float64.
    """
    contraction, noise = _moments(a, fourth_moment)
    q = contraction**num_steps
    return q * (ratio**2 - noise) + noise


def chain_variance(a: Tensor, ratio: Tensor | float, num_steps: Tensor | float, fourth_moment: float = 1.0) -> Tensor:
    """The fixed point of `level_variance` along an infinite ladder: `v = f (1 - q) / (1 - q g^2)`.

    `v * sigma_i^2` is the variance with which the whole chain leaves level i. Infinite where `q g^2 >= 1`: the
    chain then falls behind the ladder for ever.
    """
    contraction, noise = _moments(a, fourth_moment)
    q = contraction**num_steps
    return torch.where(q * ratio**2 < 1, noise * (1 - q) / (1 - q * ratio**2), math.inf)


def chain_levels(first: float, levels: Tensor, kept: Tensor, fresh: Tensor) -> Tensor:
    """The noise level at which a chain really is at each of its calls, `(n,)`: it lags behind the ladder.

    Proposition 3 step by step, for a chain that starts at level `first`: `s_{i+1}^2 = kept_i s_i^2 + fresh_i
    sigma_i^2`, with `sigma_i` of `levels` the level that step i is drawn to. A Langevin step of size a keeps
    `(1 - a)^2` of the variance and adds `2 a sigma^2`.
    """
    chain = [first**2]
    for level, old, new in zip(levels[:-1].tolist(), kept[:-1].tolist(), fresh[:-1].tolist(), strict=True):
        chain.append(old * chain[-1] + new * level**2)
    return torch.tensor(chain, dtype=torch.float64).sqrt()


def _moments(a: Tensor, fourth_moment: float) -> tuple[Tensor, Tensor]:
    contraction = 1 - 2 * a + a**2 * fourth_moment
    return contraction, 2 * a / (1 - contraction)


def check_criterion(criterion: str) -> None:
    if criterion not in ("prop3", "fixed_point"):
        raise ValueError(f"unknown step_size_criterion {criterion!r}: use 'prop3' or 'fixed_point'")


def optimal_step_size(
    ratio: Tensor,
    num_steps: Tensor | float,
    criterion: Criterion = "fixed_point",
    fourth_moment: float = 1.0,
    max_step: float = 1.0,
    must_follow: bool = True,
) -> Tensor:
    """Technique 4: the dimensionless step `a` that brings the variance after a level closest to the level's own.

    Args:
        ratio: `sigma_{i-1} / sigma_i >= 1` of each level, any shape.
        num_steps: Langevin steps per level T, a number or a tensor of the same shape.
        criterion: `prop3` looks at one level (the paper); `fixed_point` at the whole chain. On a ladder whose
            ratio changes, each level gets the step of the infinite ladder of its own ratio.
        fourth_moment: `E[c^4]` of the jump sizes, with `E[c^2] = 1`.
        max_step: the step stays below this (`1 / c_max^2` for jumps).
        must_follow: False for a network that is told where the chain is, which may then fall behind for a while: where
            `fixed_point` has no step, that of `prop3` is taken.

    Returns:
        `a`, same shape as `ratio`, float64. Both variances have a single minimum above 1 in (0, max_step); it is
        bracketed on a logarithmic grid, refined three times.

    Raises:
        ValueError: if no step in (0, max_step) lets the chain follow the ladder, and it must.
    """
    check_criterion(criterion)
    variance = level_variance if criterion == "prop3" else chain_variance
    ratio = torch.as_tensor(ratio, dtype=torch.float64)[..., None]
    steps = torch.as_tensor(num_steps, dtype=torch.float64).expand(ratio.shape[:-1])[..., None]
    low = torch.full_like(ratio, math.log(1e-12))
    high = torch.full_like(ratio, math.log(max_step * (1 - 1e-9)))
    unit = torch.linspace(0, 1, 513, dtype=torch.float64)
    for _ in range(4):
        log_a = low + (high - low) * unit
        best = variance(log_a.exp(), ratio, steps, fourth_moment).argmin(-1, keepdim=True)
        low = log_a.gather(-1, (best - 1).clamp(min=0))
        high = log_a.gather(-1, (best + 1).clamp(max=len(unit) - 1))
    a = log_a.gather(-1, best).exp()
    follows = torch.isfinite(chain_variance(a, ratio, steps, fourth_moment))
    if not must_follow:
        if criterion == "fixed_point" and not follows.all():
            single = optimal_step_size(ratio[..., 0], steps[..., 0], "prop3", fourth_moment, max_step, must_follow)
            a = torch.where(follows, a, single[..., None])
    elif not follows.all():
        most = float(steps.max())
        other = "step_size_criterion='fixed_point' " * (criterion != "fixed_point")
        raise ValueError(
            f"Technique 4 ({criterion}) has no solution: with {most:g} Langevin step{'s' * (most != 1)} of at most "
            f"{max_step:.3g} a level, the chain falls behind levels {float(ratio.max()):.3g} apart. Use more network "
            f"calls, smaller mixture_scales, {other}or another algorithm_type."
        )
    return a[..., 0]


def fixed_step_size(eps: float, sigma_last: float, max_step: float = 1.0) -> float:
    """The dimensionless step `eps / sigma_L^2` of a given `eps`; a ValueError unless in (0, max_step)."""
    a = eps / sigma_last**2
    if not 0 < a < max_step:
        raise ValueError(
            f"unstable step: step_size={eps:g} is {a:.4g} of sigma_min^2 at sigma_min={sigma_last:g}, and must be in "
            f"(0, {max_step:.4g}), so step_size in (0, {max_step * sigma_last**2:.4g}); or None for Technique 4"
        )
    return a


# --- Published settings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnealedPreset:
    """Settings of a published model, for images in [0, 1]; noise levels double for images in [-1, 1].

    `AnnealedLangevinScheduler(**preset.scheduler_config())` is its sampler, `num_inference_steps` its network calls.
    """

    sigma_max: float
    sigma_min: float
    num_levels: int
    num_langevin_steps: int
    step_size: float
    denoise: bool

    @property
    def num_inference_steps(self) -> int:
        return self.num_levels * self.num_langevin_steps + self.denoise

    def scheduler_config(self, image_range: float = 1.0) -> dict:
        """Arguments of `AnnealedLangevinScheduler`; `image_range` is 1 for images in [0, 1], 2 for [-1, 1]."""
        return {
            "num_train_timesteps": self.num_levels,
            "noise_space": "ve",
            "sigma_min": self.sigma_min * image_range,
            "sigma_max": self.sigma_max * image_range,
            "num_langevin_steps": self.num_langevin_steps,
            "step_size": self.step_size * image_range**2,
            "denoise": self.denoise,
        }


# NCSN: arXiv 1907.05600, section 5; its eps = 2e-5 enters the update as alpha_i / 2, ours as alpha_i.
# NCSNv2: arXiv 2006.09011, appendix B.
PRESETS = {
    "ncsn": AnnealedPreset(1.0, 0.01, 10, 100, 1e-5, denoise=False),
    "ncsnv2-cifar10": AnnealedPreset(50.0, 0.01, 232, 5, 6.2e-6, denoise=True),
    "ncsnv2-celeba": AnnealedPreset(90.0, 0.01, 500, 5, 3.3e-6, denoise=True),
    "ncsnv2-lsun": AnnealedPreset(190.0, 0.01, 1086, 3, 1.8e-6, denoise=True),
    "ncsnv2-ffhq": AnnealedPreset(348.0, 0.01, 2311, 3, 0.9e-6, denoise=True),
}
