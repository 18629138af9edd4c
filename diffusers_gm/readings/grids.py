"""How a budget of network calls is spread over noise levels."""

import math

import torch
from torch import Tensor

from .noise_space import NoiseSpace

SIGMA_SPACINGS = ("log_snr", "karras", "beta")
TIME_SPACINGS = ("uniform", "quadratic")


def sigma_grid(high: float, low: float, num_levels: int, spacing: str) -> Tensor:
    """Noise levels from `high` down to `low`, `(num_levels,)` float64; `high` alone where there is one.

    `log_snr` takes equal ratios of sigma, `karras` equal steps of sigma^(1/7) (arXiv 2206.00364, eq. 5), `beta` the
    quantiles of a Beta(0.6, 0.6) law of sigma (arXiv 2407.12173; needs scipy).
    """
    ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    if spacing == "log_snr":
        return (math.log(high) * (1 - ramp) + math.log(low) * ramp).exp()
    if spacing == "karras":
        return (high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7
    from scipy.stats import beta

    return low + (high - low) * torch.from_numpy(beta.ppf(1 - ramp.numpy(), 0.6, 0.6))


def time_grid(high: float, low: float, num_points: int, spacing: str) -> Tensor:
    """Times from `high` down to `low`, `(num_points,)` float64: equal steps (`uniform`) or closing in (`quadratic`)."""
    ramp = torch.linspace(1, 0, num_points, dtype=torch.float64)
    return low + (high - low) * (ramp**2 if spacing == "quadratic" else ramp)


def level_grid(
    space: NoiseSpace,
    num_levels: int,
    spacing: str,
    steps_offset: int = 0,
    shift: float = 1.0,
    shift_terminal: float | None = None,
) -> Tensor:
    """Descending timestep labels of `num_levels` noise levels, shape `(num_levels,)`, float64.

    The spacings of `sigma_grid`, between the ends of the trained range. `linspace`, `leading` and `trailing` are
    those of diffusers' DDPM (arXiv 2305.08891, table 2), except that a `ve` ladder, whose labels may be fractional, is
    not rounded; `edm` networks, which have no ladder, have none of them. `shift` and `shift_terminal`: `flow`, see
    `shift_flow`.

    Raises:
        ValueError: for an unknown spacing, or more levels than the network was trained at.
    """
    first, last = space.timestep_range
    n = space.num_train_timesteps
    if num_levels > n and space.kind != "edm":
        raise ValueError(
            f"{num_levels} noise levels are more than the {n} that the network was trained at: use at most {n} "
            "(num_inference_steps counts network calls; num_langevin_steps spends several on a level)"
        )
    if spacing in SIGMA_SPACINGS:
        high, low = space.sigma(torch.tensor([last, first], dtype=torch.float64)).tolist()
        # Labels are exact integers where they should be: learned embeddings take nothing else.
        grid = space.timestep(sigma_grid(high, low, num_levels, spacing)).mul(1e8).round().div(1e8)
        grid[0] = last  # also where its sigma is capped
    elif space.kind == "edm":
        raise ValueError(f"timestep_spacing {spacing!r} is not offered in edm space: use one of {SIGMA_SPACINGS}")
    elif spacing == "linspace":
        grid = torch.linspace(last, first, num_levels, dtype=torch.float64)
    elif spacing == "leading":
        grid = torch.arange(num_levels - 1, -1, -1, dtype=torch.float64) * (n // num_levels) + first + steps_offset
    elif spacing == "trailing":
        grid = last - torch.arange(num_levels, dtype=torch.float64) * (n / num_levels)
    else:
        raise ValueError(
            f"unknown timestep_spacing {spacing!r}: use 'log_snr', 'karras', 'beta', 'linspace', 'leading' or "
            "'trailing'"
        )
    if space.kind == "vp" and spacing in ("linspace", "leading", "trailing"):
        grid = grid.round()
    if space.kind == "flow":
        grid = n * shift_flow(grid / n, shift, shift_terminal)
    return grid.clamp(first if space.kind != "flow" else None, last)


def shift_flow(s: Tensor, shift: float = 1.0, shift_terminal: float | None = None) -> Tensor:
    """Rectified flow's resolution shift of a descending grid of s in (0, 1], which multiplies sigma by `shift`:
    `s -> shift * s / (1 + (shift - 1) * s)` (arXiv 2403.03206, eq. 23).

    With `shift_terminal`, 1 - s is then stretched so that the grid ends there (LTX-Video's rule, as in diffusers).
    """
    s = shift * s / (1 + (shift - 1) * s)
    if shift_terminal is None or len(s) < 2:
        return s
    return 1 - (1 - s) * (1 - shift_terminal) / (1 - s[-1])
