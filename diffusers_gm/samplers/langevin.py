"""Annealed Langevin dynamics: NCSN and NCSNv2, jumps of a Gaussian mixture, consistent annealed sampling, and
exploring, which spends all its steps on one level.

With `sigma^2 score = w (D - y)`: w is 1 for Gaussian noise. Under mixture noise an image in component k is at the local
level `c_k sigma`, and steps are measured in it, as NCSNv2 measures its own in sigma: `w = E[c^-2 | y]` makes it
`sigma / sqrt(w)`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..processes.annealed import Criterion, chain_levels, fixed_step_size, optimal_step_size
from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..processes.random import Draw
from .mixture import TwoStep
from .sampler import Memory, Plan, Stepped, ahead, check_calls, check_order, from_level_to_level, one_a_level

# At how many times the last noise level a chain that is told its level may end. D removes what is left.
FURTHEST_BEHIND = 8.0


@dataclass(frozen=True)
class Langevin:
    """Annealed Langevin dynamics (arXiv 2006.09011): `num_steps` steps on each level, then D.

    Weak order 1 on a level: the stationary law is off by O(a). Down a ladder of one step a level, in the log ratio of
    its levels: of `order` with `follow_chain` and `prop3`, whose step `1 - 1 / ratio^2` is that of `Ancestral`; half
    an order less with `fixed_point`; both without jumps. With `exact`, D is held over a step and the rest integrated
    exactly: stable for any a.

    Attributes:
        num_steps: T.
        step_size: the paper's eps, `a * sigma_L^2`; None: Technique 4 for the levels of the run.
        criterion: of Technique 4. None: `prop3` for a network that is told where the chain is, which need not be near
            the ladder; but `fixed_point` for others, for jumps, and without `denoise`.
        denoise: end with D.
        follow_chain: tell the network the level at which the chain is, which lags behind the ladder. A run then takes
            no steps on the first level, at which its noise is drawn: every step leads to the level of the call after.
        jumps: law of the increments; `c_k` is drawn anew for every step. Each targets the same law: Langevin dynamics
            on a random clock.
        exact: see above.
        noise: law of the network's noise.
        max_levels: how many levels the network has; None: any.
        order: with `follow_chain`. 1: D is held over a step. 2: it is extrapolated from two calls to the middle of the
            step from where the chain is to where it will be, as in `Ancestral`.
    """

    num_steps: int = 1
    step_size: float | None = None
    criterion: Criterion | None = None
    denoise: bool = True
    follow_chain: bool = False
    jumps: GaussianMixtureNoise = GAUSSIAN
    exact: bool = False
    noise: GaussianMixtureNoise = GAUSSIAN
    max_levels: int | None = None
    order: int = 1

    def __post_init__(self) -> None:
        check_order(self.order)

    def calls_per_level(self, num_calls: int) -> list[int]:
        """`(num_calls - denoise) // num_steps` levels, the first ones with one step more where that does not divide;
        the last level once more for D. With `follow_chain` a call at the level where the run begins comes first, whose
        step leads to the next, and `(num_calls - 1) // num_steps` levels follow. A single call is D."""
        if self.num_steps < 1:
            raise ValueError(f"num_langevin_steps must be at least 1, got {self.num_steps}")
        if num_calls == 1 and self.denoise:
            return [1]
        levels_at_least = 1 if self.follow_chain else 2
        last = self.denoise or self.follow_chain
        check_calls(num_calls, levels_at_least * self.num_steps + last, or_one=self.denoise)
        budget = int(num_calls) - last
        num_levels = budget // self.num_steps
        if self.follow_chain and num_levels == self.max_levels:
            num_levels -= 1  # that of the first call is one of them
        steps, rest = divmod(budget, num_levels)
        counts = [steps + (i < rest) for i in range(num_levels)]
        return [1, *counts] if self.follow_chain else [*counts[:-1], counts[-1] + last]

    def plan(self, sigmas: Tensor) -> Plan:
        """Of each call, the level of the ladder that its step is drawn to (`sigmas` are what the network is told), the
        dimensionless step a, before jumps multiply it by `c_k^2`, and what it keeps of the variance of the noise, and
        adds in units of the level's own."""
        targets = torch.cat([sigmas[1:], sigmas[-1:]]) if self.follow_chain else sigmas
        a = self._step_sizes(float(sigmas[0]), targets[:-1] if self.denoise else targets)
        a = torch.nn.functional.pad(a, (0, int(self.denoise)))
        if self.exact:
            kept = torch.exp(-2 * a[:, None] * self.jumps.scales**2) @ self.jumps.weights
            fresh = 1 - kept
        else:
            fresh = 2 * a * self.jumps.moment(2)
            kept = 1 - fresh + a**2 * self.jumps.moment(4)
        told = chain_levels(float(sigmas[0]), targets, kept, fresh) if self.follow_chain else sigmas
        behind = float(told[-1] / sigmas[-1])
        if self.step_size is None and behind > FURTHEST_BEHIND:
            raise ValueError(
                f"steps of random size fall too far behind: {len(sigmas)} network calls would leave {behind:.3g} times "
                f"the last level, and at most {FURTHEST_BEHIND:g} can be removed. Use more network calls, more "
                "num_langevin_steps, smaller mixture_scales or another algorithm_type."
            )
        return Plan(told.clamp(sigmas[-1], sigmas[0]), torch.stack([targets, a, kept, fresh], 1).tolist())

    def _step_sizes(self, first: float, targets: Tensor) -> Tensor:
        """The dimensionless step of every call but that for D, `(n,)`: from level `first` to `targets`."""
        if len(targets) == 0:
            return targets
        levels, index, counts = targets.unique_consecutive(return_inverse=True, return_counts=True)
        if len(levels) < 2 and float(levels[0]) == first:
            raise ValueError("annealed Langevin dynamics needs at least two noise levels: give timesteps that differ")
        max_step = math.inf if self.exact else 1 / float(self.jumps.scales.max()) ** 2
        if self.step_size is not None:
            return torch.full_like(targets, fixed_step_size(self.step_size, float(targets[-1]), max_step))
        ratios = torch.cat([torch.tensor([first], dtype=levels.dtype), levels[:-1]]) / levels
        if ratios[0] == 1:  # steps on the level where the run begins, which has none above it: the second's
            ratios[0] = ratios[1]
        if self.exact:
            return exponential_step_size(ratios, counts, self.jumps.weights, self.jumps.scales)[index]
        variance = self.jumps.moment(2)
        kurtosis = self.jumps.moment(4) / variance**2
        one_level = self.follow_chain and self.denoise and self.jumps.is_standard_gaussian
        criterion = self.criterion or ("prop3" if one_level else "fixed_point")
        a = optimal_step_size(ratios, counts, criterion, kurtosis, max_step * variance, not self.follow_chain)
        return (a / variance)[index]

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        if self.denoise and i == len(plan.steps) - 1:
            return denoised, memory
        target, a, kept, fresh = plan.steps[i]
        # Where the chain is, which lags behind the ladder by Proposition 3.
        level = memory.level or float(plan.sigmas[i])
        after = math.sqrt(kept * level**2 + fresh * target**2)
        memory, towards = memory._replace(level=after), denoised
        if self.follow_chain and self.order == 2:
            towards = ahead(denoised, level, after, memory)
            memory = memory._replace(denoised=((level, denoised),))
        if not self.noise.is_standard_gaussian:
            # It tells the component of an image: at the call's own level, images would seem to be in wider components
            # than they are.
            w = memory.precision
            w = self.noise.residual_precision(y - denoised, level) if w is None else w
            target = target / w**0.5
        jump: float | Tensor = 1.0
        if not self.jumps.is_standard_gaussian:
            jump = self.jumps.sample_scales(y.shape, draw) ** 2
        update = exponential_step if self.exact else langevin_step
        return update(y, towards, target, a * jump, draw.normal(y.shape)), memory


def langevin_step(y: Tensor, denoised: Tensor, sigma: float | Tensor, a: float | Tensor, noise: Tensor) -> Tensor:
    """One Langevin step of size `a sigma^2`: `y + a (D - y) + sqrt(2 a) sigma z`, with `sigma^2 score = D - y`.

    Args:
        y: noisy images `(B, ...)`.
        denoised: `D(y)`, same shape.
        sigma: the level, a number or a tensor that broadcasts (the local level of mixture noise).
        a: dimensionless step, likewise (jump sizes).
        noise: standard normal, same shape as `y`.

    Stationary law: the density of `y` up to O(a) (Euler-Maruyama, weak order 1).
    """
    spread = (2 * a) ** 0.5 * sigma
    mean = torch.lerp(y, denoised, a)
    return mean.add_(noise, alpha=spread) if isinstance(spread, float) else mean.addcmul_(spread, noise)


def exponential_step(y: Tensor, denoised: Tensor, sigma: float | Tensor, a: float | Tensor, noise: Tensor) -> Tensor:
    """Langevin dynamics over time `a` (random, for jump sizes: `a * c_k^2`), integrated exactly for frozen D.

    `D + e (y - D) + sigma sqrt(1 - e^2) z` with `e = exp(-a)`: stable for any a. For data much wider than sigma the
    stationary variance is short by the factor `(1 + e) / 2`. Arguments as in `langevin_step`.
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


# --- Exploring -------------------------------------------------------------------------------------------------------

# Levels of a run that explores: enough for the probability flow.
DESCENT = 12

# The dimensionless step: long ones bias (rare modes get too much), short ones go nowhere.
EXPLORING_STEP = 0.25


@dataclass(frozen=True)
class Explore:
    """Langevin steps on the first level, all calls but `DESCENT`, then the probability flow down, `TwoStep`.

    A chain passes between far modes where they have grown together, and nowhere below: steps spent there find rare and
    far modes that steps on the way down do not. Up to `DESCENT` calls it is `TwoStep`. A level that custom levels name
    several times is explored, wherever it is.

    Weak order 1 in a on the level, order 2 on the way down.

    Attributes:
        step_size: the paper's eps, `a * sigma_L^2`; None: a = `EXPLORING_STEP`.
        denoise: end with D.
    """

    step_size: float | None = None
    denoise: bool = True

    def calls_per_level(self, num_calls: int) -> list[int]:
        num_levels = min(len(one_a_level(num_calls, 1 if self.denoise else 2)), DESCENT)
        return [int(num_calls) - num_levels + 1, *[1] * (num_levels - 1)]

    def plan(self, sigmas: Tensor) -> Plan:
        """Of each call, its level, the one it leads to and the dimensionless step a."""
        a = EXPLORING_STEP if self.step_size is None else fixed_step_size(self.step_size, float(sigmas[-1]))
        return Plan(sigmas, [(*levels, a) for levels in from_level_to_level(sigmas, self.denoise).steps])

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        sigma, after, a = plan.steps[i]
        if after != sigma:
            return TwoStep().step(plan, i, y, denoised, memory, draw)
        # What was known of D is of another y.
        moved = langevin_step(y, denoised, sigma, a, draw.normal(y.shape))
        return moved, memory._replace(denoised=())
