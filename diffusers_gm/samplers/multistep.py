"""A predictor-corrector exponential multistep sampler, from the probability flow to the reverse diffusion.

On the clock `l = -ln sigma`, with `a = 1 + tau^2`, a run from l to l' obeys exactly

    y' = e^{-a h} y + int a e^{-a (l' - r)} D(r) dr + sigma' sqrt(1 - e^{-2 tau^2 h}) z,    h = l' - l.

D is replaced by the polynomial through its values at the last calls (predictor) and, once D at y' is known, through
that one too (corrector, at no extra call): tau = 0 is of the kind of UniPC (arXiv 2302.04867), tau = 1 solves the
reverse diffusion as SDE-DPM-Solver++ (arXiv 2211.01095) and SA-Solver (arXiv 2309.05019) do.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from numbers import Real

import torch
from torch import Tensor

from ..processes.random import Draw
from .sampler import Memory, Plan, Stepped, one_a_level

# How the predictor gives way to first order where a stochastic step is long: `1 / (1 + DAMPING h^4 r)`, where h counts
# tau^2 times for tau above 1, and r >= 1 is the step over the one before: the difference of the two D's is of noise,
# which a longer step extrapolates.
DAMPING = 0.2

# D's are interpolated whose clocks are at least this share of the step apart: a polynomial through two that are nearer
# leads far from both, as in the last step of levels that are even in time, or after two nearly equal ones. No grid of
# ours has such.
APART = 0.25

# Where D is clipped, the noise that the network saw stays in a long step, as in DDIM (arXiv 2010.02502): y moves as D
# does; else what is out of range would stay in y, and come back. In short ones y moves at this rate, `FOLLOWS h`: moves
# that do not shrink with the steps would add up, the more of them the further.
FOLLOWS = 0.6

# Where the second of two stochasticities begins: above this noise level an image of [-1, 1] takes shape, below it has
# its details.
FINE = 1.0

# tau, or that above `FINE` and that below.
Stochasticity = float | Sequence[float]


@dataclass(frozen=True)
class Multistep:
    """See the module; ends with D.

    Order of convergence on smooth D: `order`, with the corrector one more; for tau > 0 the same in the weak sense on
    Gaussian data, but 2 at most, as D along a noisy run is no polynomial.

    Attributes:
        order: 1 to 3, the number of D's that a step is predicted from.
        corrector: see above.
        stochasticity: tau >= 0; or two, of the steps from levels above `FINE` and of all others.
    """

    order: int = 2
    corrector: bool = True
    stochasticity: Stochasticity = 0.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"the order must be 1, 2 or 3, got {self.order!r}")
        taus = self._taus
        if len(taus) != 2 or not all(isinstance(tau, Real) and 0 <= tau < math.inf for tau in taus):
            raise ValueError(
                f"stochasticity must be a number that is at least 0, or two of them, got {self.stochasticity!r}"
            )

    @property
    def _taus(self) -> Sequence[float]:
        tau = self.stochasticity
        return tuple(tau) if isinstance(tau, Iterable) else (tau, tau)

    def calls_per_level(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls)

    def plan(self, sigmas: Tensor) -> Plan:
        """Of each call, its level, the factors of its step on y, on what clipping added to D, and on the noise, and for
        each number of D's that are remembered the weights of the new D and of these, the newest first; `sigmas`: noise
        levels `(n,)`, descending, in float64."""
        clock, n = -sigmas.log(), len(sigmas)
        above, below = torch.tensor(self._taus, dtype=torch.float64)
        tau, h = torch.where(sigmas[:-1] > FINE, above, below), clock.diff()
        a = 1 + tau**2
        decay = torch.exp(-a * h)
        follows = (decay * (FOLLOWS * h).clamp(max=1)).tolist()
        spread = (sigmas[1:] * torch.sqrt(-torch.expm1(-2 * tau**2 * h))).tolist()
        # The clocks of the last calls, each once, the newest first.
        known = [list(dict.fromkeys(reversed(clock[: i + 1].tolist())))[: self.order] for i in range(n - 1)]
        known = [apart(clocks, APART * float(step)) for clocks, step in zip(known, h, strict=True)]
        before = torch.tensor([k[0] - k[1] if len(k) > 1 else math.inf for k in known], dtype=torch.float64)
        growth = (h / before).clamp(min=1)
        blend = torch.where(tau > 0, 1 / (1 + DAMPING * (h * tau.clamp(min=1) ** 2) ** 4 * growth), 1.0)
        predictor: list[list[list[float]]] = [[] for _ in range(n)]
        corrector: list[list[list[float]]] = [[] for _ in range(n)]
        for k in range(1, self.order + 1):
            steps = [i for i in range(n - 1) if len(known[i]) >= k and h[i] > 0]
            if not steps:
                break
            nodes = torch.tensor([known[i][:k] for i in steps], dtype=torch.float64)
            start, end = clock[steps], clock[[i + 1 for i in steps]]
            weights = exponential_weights(start, end, nodes, a[steps])
            first = exponential_weights(start, end, nodes[:, :1], a[steps])
            weights = torch.lerp(torch.nn.functional.pad(first, (0, k - 1)), weights, blend[steps][:, None])
            # What corrects y: the weights of the new D and of the known ones, less those already used.
            correction = exponential_weights(start, end, torch.cat([end[:, None], nodes], 1), a[steps])
            correction[:, 1:] -= weights
            for row, i in enumerate(steps):
                predictor[i].append(weights[row].tolist())
                if self.corrector:
                    corrector[i + 1].append(correction[row].tolist())
        decays, follows, spread = [*decay.tolist(), 0.0], [*follows, 0.0], [*spread, 0.0]
        of_calls = [
            [in_one(*step, remembered) for remembered in range(self.order + 1)]
            for step in zip(decays, predictor, corrector, strict=True)
        ]
        return Plan(sigmas, list(zip(sigmas.tolist(), decays, follows, spread, of_calls, strict=True)))

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        """y at the next level, D at the last one. The correction of y goes with the step from it, so that an edit
        between two steps stays. `y`, `denoised`: `(n, ...)`, of one shape and a floating point type."""
        if i == len(plan.steps) - 1:
            return denoised, memory
        sigma, decay, follows, spread, weights = plan.steps[i]
        known = [item for item in memory.denoised if item[0] > sigma]
        items = ((sigma, denoised), *known)
        y = draw.normal(y.shape).mul_(spread).add_(y, alpha=decay) if spread else decay * y
        if memory.clipped is not None:
            y = y.add_(memory.clipped, alpha=follows)
        for weight, (_, image) in zip(weights[len(known)], items, strict=False):
            y = y.add_(image, alpha=weight)
        return y, memory._replace(denoised=items[: self.order])


def apart(clocks: list[float], least: float) -> list[float]:
    """Descending clocks up to the first that is less than `least` below the one before."""
    near = (i for i, (later, earlier) in enumerate(pairwise(clocks), 1) if later - earlier < least)
    return clocks[: next(near, len(clocks))]


def in_one(decay: float, predictor: list[list[float]], corrector: list[list[float]], remembered: int) -> list[float]:
    """The weights of a call's D's, the newest first, that correct y and step on from it at once: `decay` of the
    corrector's and the predictor's. Both are given for each number of known D's, the newest among the predictor's; none
    of a step of no length."""
    corrects = corrector[min(remembered, len(corrector)) - 1] if remembered and corrector else []
    predicts = predictor[min(remembered + 1, len(predictor)) - 1] if predictor else []
    return [decay * c + p for c, p in zip_longest(corrects, predicts, fillvalue=0.0)]


def exponential_weights(start: Tensor, end: Tensor, nodes: Tensor, a: float | Tensor) -> Tensor:
    """`int_start^end a e^{-a (end - r)} l_j(r) dr` for the Lagrange polynomials l_j of distinct nodes.

    The weights that integrate `1, u, u^2, ...` exactly, `u = (r - start) / (end - start)`.

    Args:
        start, end: clocks `(...)`, float64, that differ.
        nodes: `(..., K)`.
        a: a number, or one of each.

    Returns:
        `(..., K)`.
    """
    h, count = end - start, nodes.shape[-1]
    u = (nodes - start[..., None]) / h[..., None]
    powers = u[..., None, :] ** torch.arange(count, dtype=torch.float64)[:, None]
    return torch.linalg.solve(powers, exponential_moments(a * h, count))


def exponential_moments(x: Tensor, count: int) -> Tensor:
    """`m_k = int_0^1 x e^{-x (1 - u)} u^k du`, `(..., count)`, for x > 0 `(...)` float64, to 14 digits.

    `m_0 = 1 - e^{-x}` and `m_k = 1 - k / x m_{k-1}`, which cancels for small x: there the series
    `m_k = x sum_j (-x)^j k! / (k + j + 1)!`.
    """
    moments, series = [-torch.expm1(-x)], []
    for k in range(1, count):
        moments.append(1 - k / x * moments[-1])
    small = x.clamp(max=2.0)
    for k in range(count):
        term, total = small / (k + 1), torch.zeros_like(x)
        for j in range(1, 30):
            total = total + term
            term = term * -small / (k + j + 1)
        series.append(total)
    return torch.where(x[..., None] > 2, torch.stack(moments, -1), torch.stack(series, -1))
