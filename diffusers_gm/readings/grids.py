"""How a budget of network calls is spread over noise levels."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .noise_space import NoiseSpace

SIGMA_SPACINGS = ("even", "log_snr", "karras", "beta")
TIME_SPACINGS = ("uniform", "quadratic")
# Of s in rectified flow, where sigma goes to infinity.
FLOW_SPACINGS = {"karras": "karras", "beta": "beta", "exponential": "log_snr"}


def sigma_grid(high: float, low: float, num_levels: int, spacing: str) -> Tensor:
    """Noise levels from `high` down to `low`, `(num_levels,)` float64; `high` alone where there is one.

    `log_snr` takes equal ratios of sigma, `karras` equal steps of sigma^(1/7) (arXiv 2206.00364, eq. 5), `beta` the
    quantiles of a Beta(0.6, 0.6) law of sigma (arXiv 2407.12173; needs scipy); `even` those of `even_levels`, which end
    above `low` where there are few.
    """
    if spacing == "even":
        return even_levels(high, low, num_levels)
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
    those of diffusers' DDPM (arXiv 2305.08891, table 2), but for how halves are rounded, by one label, and that a
    `ve` ladder, whose labels may be fractional, is not; `edm` networks and those that are told sigma, which have no
    ladder, have none of them. `shift` and `shift_terminal`: `flow`, see `shift_flow`; there `karras`, `beta` and
    `exponential` are of s, between its shifted ends, as in diffusers.

    Raises:
        ValueError: for an unknown spacing.
    """
    first, last = space.timestep_range
    n = space.num_train_timesteps
    if space.kind == "flow" and spacing in FLOW_SPACINGS:
        high, low = shift_flow(torch.tensor([last, first], dtype=torch.float64) / n, shift, shift_terminal).tolist()
        return n * sigma_grid(high, low, num_levels, FLOW_SPACINGS[spacing])
    if spacing in SIGMA_SPACINGS:
        high, low = space.sigma(torch.tensor([last, first], dtype=torch.float64)).tolist()
        grid = space.timestep(sigma_grid(high, low, num_levels, spacing))
        if space.counts_levels:  # exact integers where they should be: learned embeddings take nothing else
            grid = grid.mul(1e8).round().div(1e8)
        grid[0] = last  # also where its sigma is capped
        if space.kind == "vp" and spacing == "even":  # what any network of diffusers takes that is swapped
            grid = distinct_labels(grid, last)
    elif not space.counts_levels:
        where = "edm space" if space.kind == "edm" else "a network that is told sigma"
        raise ValueError(f"timestep_spacing {spacing!r} is not offered in {where}: use one of {SIGMA_SPACINGS}")
    elif spacing == "linspace":
        grid = torch.linspace(last, first, num_levels, dtype=torch.float64)
    elif spacing == "leading":
        grid = torch.arange(num_levels - 1, -1, -1, dtype=torch.float64) * (n // num_levels) + first + steps_offset
    elif spacing == "trailing":
        grid = last - torch.arange(num_levels, dtype=torch.float64) * (n / num_levels)
    else:
        raise ValueError(
            f"unknown timestep_spacing {spacing!r}: use 'even', 'log_snr', 'karras', 'beta', 'linspace', 'leading' or "
            "'trailing'"
        )
    if space.kind == "vp" and spacing in ("linspace", "leading", "trailing"):
        grid = grid.round()
    if space.kind == "flow":
        grid = n * shift_flow(grid / n, shift, shift_terminal)
    return grid.clamp(first if space.kind != "flow" else None, last)


def distinct_labels(labels: Tensor, last: float) -> Tensor:
    """Whole numbers next to descending labels, `(n,)`, each once and none above `last`."""
    place = torch.arange(len(labels), dtype=torch.float64)
    above = (labels.round() + place).flip(0).cummax(0).values.flip(0) - place
    return torch.minimum(above, last - place)


def shift_flow(s: Tensor, shift: float = 1.0, shift_terminal: float | None = None) -> Tensor:
    """Rectified flow's resolution shift of a descending grid of s in (0, 1], which multiplies sigma by `shift`:
    `s -> shift * s / (1 + (shift - 1) * s)` (arXiv 2403.03206, eq. 23).

    With `shift_terminal`, 1 - s is then stretched so that the grid ends there (LTX-Video's rule, as in diffusers).
    """
    s = shift * s / (1 + (shift - 1) * s)
    if shift_terminal is None or len(s) < 2:
        return s
    return 1 - (1 - s) * (1 - shift_terminal) / (1 - s[-1])


# --- Levels for few calls --------------------------------------------------------------------------------------------


def power_levels(high: float, last: float, num_levels: int, power: float) -> Tensor:
    """Levels from `high` to `last`, `(num_levels,)` float64, even in `q^(1 / power)`, `q = sqrt(ln(1 + sigma^2))`.

    q is the logarithm of large levels' square root and small levels themselves: large powers crowd them at the end.
    """
    if num_levels == 1:
        return torch.tensor([high], dtype=torch.float64)
    ends = [math.sqrt(math.log1p(sigma**2)) ** (1 / power) for sigma in (high, last)]
    ramp = torch.linspace(ends[0], ends[1], num_levels, dtype=torch.float64)
    return torch.expm1(ramp ** (2 * power)).sqrt()


def even_levels(high: float, low: float, num_levels: int) -> Tensor:
    """The grid for any network: `power_levels` down to a level that falls with the number of calls, or to `low`, where
    the network's own levels end above it. From there D ends the run."""
    last = max(low, min(LAST_LEVEL / num_levels, high / 2))
    return power_levels(high, last, num_levels, POWER)


# Up to so many calls, one whose input is nothing but noise is a large share of them, and a run may begin lower; and
# what is called lower.
SHORT, LOWER = 7, 1.25

# Chosen on a few known denoisers, and judged on others and on trained networks.
POWER = 3.0
LAST_LEVEL = 0.5


def check_calibration(calibration: dict[str, Any] | None) -> None:
    """Raise a ValueError unless `calibration` is None or maps numbers of calls to as many descending levels, and what
    it says besides is what `calibrate` says."""
    if calibration is None:
        return
    if not all(isinstance(key, str) for key in calibration):
        raise ValueError(f"the keys of a calibration must be strings, as in JSON, got {list(calibration)}")
    budgets = [key for key in calibration if _says_calls(key)]
    if not budgets:
        raise ValueError(f"calibration must map numbers of calls to noise levels, got the keys {sorted(calibration)}")
    for key in budgets:
        levels = calibration[key]
        numbers = isinstance(levels, list | tuple) and all(isinstance(level, int | float) for level in levels)
        if not numbers or str(len(levels)) != key or not _falling(levels):
            raise ValueError(
                f"calibration for {key} calls must be {key} descending positive noise levels, got {levels}"
            )
    if unknown := calibration.keys() - {*budgets, "stochasticity", "shift"}:
        raise ValueError(f"calibration has {sorted(unknown)}: beside numbers of calls it may have stochasticity, shift")
    shift: Any = calibration.get("shift", 1.0)
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise ValueError(f"the shift of a calibration must be positive, got {shift!r}")
    taus = calibration.get("stochasticity") or {}
    if not isinstance(taus, dict) or not all(isinstance(key, str) and _says_calls(key) for key in taus):
        raise ValueError(f"the stochasticity of a calibration must be by numbers of calls, got {taus}")


def _says_calls(key: str) -> bool:
    return key.isdecimal() and str(int(key)) == key and key != "0"


def _falling(levels: Sequence[float]) -> bool:
    return math.inf > levels[0] and levels[-1] > 0 and all(a > b for a, b in pairwise(levels))


def calibrated_levels(calibration: dict[str, Any], num_levels: int) -> Tensor:
    """The noise levels of a calibration for any number of calls, `(num_levels,)` float64.

    Between two budgets, their levels at the same share of a run are blended geometrically, by the logarithm of the
    number of calls; below the smallest and above the largest, that one's are used, and so are those of the nearer one
    where one of the two begins lower: from between their starts neither's steps would do.
    """
    if num_levels == 1:
        return torch.tensor([max(max(levels) for key, levels in calibration.items() if key.isdigit())]).double()
    below, above, weight = _neighbours(calibration, num_levels)
    starts = calibration[above][0], calibration[below][0]
    if max(starts) > LOWER * min(starts):
        weight = round(weight)
    first, second = (_resampled(calibration[n], num_levels) for n in (below, above))
    return torch.lerp(first, second, weight).exp()


def calibrated_value(calibration: dict[str, Any] | None, name: str, num_calls: int | None) -> Any:
    """What a calibration says of `name` for the nearest budget; None if nothing."""
    if calibration is None or not calibration.get(name) or num_calls is None:
        return None
    below, above, weight = _neighbours(calibration[name], num_calls)
    return calibration[name][below if weight < 0.5 else above]


def _neighbours(by_calls: dict[str, Any], num_calls: int) -> tuple[str, str, float]:
    """The budgets around a number of calls, and how far it is from the first to the second, from 0 to 1."""
    budgets = sorted(int(key) for key in by_calls if key.isdigit())
    below = max((n for n in budgets if n <= num_calls), default=budgets[0])
    above = min((n for n in budgets if n >= num_calls), default=budgets[-1])
    weight = math.log(num_calls / below) / math.log(above / below) if above > below else 0.0
    return str(below), str(above), weight


def _resampled(levels: list[float], num_levels: int) -> Tensor:
    """The logarithm of levels at equal shares of a run, linear between them, `(num_levels,)` float64."""
    logs = torch.tensor(levels, dtype=torch.float64).log()
    return torch.nn.functional.interpolate(logs[None, None], num_levels, mode="linear", align_corners=True)[0, 0]
