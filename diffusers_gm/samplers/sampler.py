"""What a sampler is, and the loop around one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..processes.random import Draw, Generators


class Memory(NamedTuple):
    """What a sampler keeps from one step to the next, besides y; empty at the start of a run.

    Attributes:
        companion: of CLD, and of networks trained on it: the unit noise c beside y.
        denoised: D of the calls before, the newest first, each with its noise level.
        level: the noise level, in units of the component's scale, at which a Langevin run really is, whatever the
            network is told; None: at that of the call.
        precision: the factor w of the score `w (D - y) / sigma^2` under mixture noise, where the reading gave it.
        clipped: what clipping has added to D at this call; None: nothing that y is to follow.
    """

    companion: Tensor | None = None
    denoised: tuple[tuple[float, Tensor], ...] = ()
    level: float | None = None
    precision: Tensor | float | None = None
    clipped: Tensor | None = None


# y after a step, and what is remembered.
Stepped = tuple[Tensor, Memory]


@dataclass(frozen=True)
class Plan:
    """A run, worked out once, in float64.

    Attributes:
        sigmas: the noise level of each network call, `(n,)` float64, descending.
        steps: of each call, the coefficients that the sampler's step goes by: Python floats, which no device waits for.
    """

    sigmas: Tensor
    steps: list[Any]


class Sampler(Protocol):
    """A plan and a step. `y` is the noisy image `x0 + sigma * noise`, `(B, ...)`."""

    def calls_per_level(self, num_calls: int) -> list[int]:
        """How many of `num_calls` network calls each noise level gets, from the first to the last.

        Raises:
            ValueError: if there are too few.
        """
        ...

    def plan(self, sigmas: Tensor) -> Plan:
        """A run with a network call at each of `sigmas` `(n,)`, descending.

        Raises:
            ValueError: if there is no such run.
        """
        ...

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        """y after call i, from y and D at that call; what is to be remembered; noise comes from `draw` alone."""
        ...


@torch.no_grad()
def sample(
    sampler: Sampler,
    denoiser: Callable[[Tensor, float], Tensor],
    y: Tensor,
    sigmas: Tensor | Sequence[float],
    generator: Generators = None,
) -> Tensor:
    """Run a sampler: `y` `(B, ...)` at noise level `sigmas[0]`, one call of `denoiser(y, sigma)` a level."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    if sigmas.ndim != 1 or not len(sigmas) or not (sigmas > 0).all() or (sigmas.diff() > 0).any():
        raise ValueError(f"sigmas must be positive noise levels, none above the one before, got {sigmas.tolist()}")
    plan, memory, draw = sampler.plan(sigmas), Memory(), Draw.like(y, generator)
    for i, sigma in enumerate(plan.sigmas.tolist()):
        y, memory = sampler.step(plan, i, y, denoiser(y, sigma), memory, draw)
    return y


# --- What samplers share ---


def check_calls(num_calls: Any, at_least: int = 1, or_one: bool = False) -> None:
    """Raise a ValueError unless `num_calls` is an integer, and enough; `or_one`: a single call will do too."""
    if int(num_calls) != num_calls or num_calls < at_least:
        one = "1 (the denoised image at the first level) or " if or_one else ""
        raise ValueError(f"num_inference_steps must be {one}an integer of at least {at_least}, got {num_calls!r}")


def check_order(order: Any) -> None:
    if order not in (1, 2):
        raise ValueError(f"the order must be 1 or 2, got {order!r}")


def one_a_level(num_calls: Any, at_least: int = 1) -> list[int]:
    """`calls_per_level` of samplers with one call a level."""
    check_calls(num_calls, at_least)
    return [1] * int(num_calls)


def levels_after(sigmas: Tensor, denoise: bool) -> list[float]:
    """The level that each call leads to, `(n,)`: the next one; after the last 0, where D ends the run, or one level
    more of the same ratio."""
    if not denoise and len(sigmas) < 2:
        raise ValueError("a run of a single call is the denoised image: it needs denoise=True")
    below = 0.0 if denoise else float(sigmas[-1] ** 2 / sigmas[-2])
    return [*sigmas[1:].tolist(), below]


def from_level_to_level(sigmas: Tensor, denoise: bool) -> Plan:
    """A plan whose steps are the level of each call and the one it leads to."""
    return Plan(sigmas, list(zip(sigmas.tolist(), levels_after(sigmas, denoise), strict=True)))


def to_the_middle(before: float, after: float) -> float:
    """The factor a of `D + a (D - D_previous)`: D extrapolated linearly in log sigma to the middle of a step.

    As in DPM-Solver++(2M) (arXiv 2211.01095).

    Args:
        before: length of the step from the previous call to the one of D, `log(sigma_previous / sigma)`; 0: no step.
        after: length of the step that follows, `log(sigma / sigma_next)`.
    """
    return after / (2 * before) if before else 0.0


def ahead(denoised: Tensor, sigma: float, after: float, memory: Memory) -> Tensor:
    """D in the middle of the step from level `sigma` to `after`, from D at `sigma` and at the call before; at the first
    call D itself. It moves by one difference of the two at most: that of a step which is more than twice as long as the
    one before, as the last of `leading` ones, says less of D than of its errors. Where the two go opposite ways, as a
    chain may that has reached its level, it does not move."""
    if not memory.denoised:
        return denoised
    level, previous = memory.denoised[0]
    further = min(max(to_the_middle(math.log(level / sigma), math.log(sigma / after)), 0.0), 1.0)
    return torch.lerp(previous, denoised, 1 + further)
