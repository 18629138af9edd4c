"""Network calls: what a sampler knows about each of them, and how a budget of them is spread over noise levels."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One network call of a sampler: coefficients as Python floats, so that `step` never waits for the device.

    Attributes:
        timestep: the label fed to the network.
        sigma, alpha: noise level and input factor at this call; the visible sample is `alpha * y`.
        sigma_next, alpha_next: those of the next call; of the returned image (0, 1) after the last.
        step_size: dimensionless step of the update, where the sampler has one.
        last: whether this call ends the run by returning `D`.
        target: the noise level of the ladder that a Langevin step is drawn to, `sigma` unless the network is told
            where a lagging chain is.
    """

    timestep: float
    sigma: float
    alpha: float
    sigma_next: float
    alpha_next: float
    step_size: float
    last: bool
    target: float


def langevin_levels(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct levels of a run of Langevin steps `(n,)`: they `(L,)`, steps on each `(L,)`, index of each step's
    `(n,)`."""
    distinct, index, counts = levels.unique_consecutive(return_inverse=True, return_counts=True)
    if len(distinct) < 2:
        raise ValueError("annealed Langevin dynamics needs at least two noise levels: give timesteps that differ")
    return distinct, counts, index


def check_network_level(value: str) -> None:
    if value not in ("ladder", "chain"):
        raise ValueError(f"unknown network_level {value!r}: use 'ladder' or 'chain'")


def check_num_calls(num_calls: Any, at_least: int) -> None:
    """Raise a ValueError unless `num_calls` network calls are enough."""
    if int(num_calls) != num_calls or num_calls < at_least:
        raise ValueError(f"num_inference_steps must be an integer of at least {at_least}, got {num_calls!r}")


def spread_steps(num_calls: Any, num_langevin_steps: int, denoise: bool) -> list[int]:
    """Langevin steps of each level for a budget of network calls, which is met exactly.

    There are `(num_calls - denoise) // num_langevin_steps` levels; the first ones take one step more where the
    budget does not divide.
    """
    if num_langevin_steps < 1:
        raise ValueError(f"num_langevin_steps must be at least 1, got {num_langevin_steps}")
    check_num_calls(num_calls, 2 * num_langevin_steps + denoise)
    budget = num_calls - denoise
    num_levels = budget // num_langevin_steps
    steps, rest = divmod(budget, num_levels)
    return [steps + (i < rest) for i in range(num_levels)]
