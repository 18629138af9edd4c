"""A predictor-corrector exponential multistep sampler, from the probability flow to the reverse diffusion.

On the clock `l = -ln sigma`, with `a = 1 + tau^2`, a run from l to l' obeys exactly

    y' = e^{-a h} y + int a e^{-a (l' - r)} D(r) dr + sigma' sqrt(1 - e^{-2 tau^2 h}) z,    h = l' - l.

D is replaced by the polynomial through its values at the last calls (predictor) and, once D at y' is known, through
that one too (corrector, at no extra call): tau = 0 is of the kind of UniPC (arXiv 2302.04867), tau = 1 solves the
reverse diffusion as SDE-DPM-Solver++ (arXiv 2211.01095) and SA-Solver (arXiv 2309.05019) do.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..random import Draw
from .sampler import Memory, Plan, one_a_level

# How the predictor gives way to first order where a stochastic step is long: `1 / (1 + DAMPING h^4)`.
DAMPING = 0.2


@dataclass(frozen=True)
class MultistepPlan(Plan):
    """Attributes:
    levels: noise levels as floats.
    decay, spread: of every step, the factors on y and on the noise; 0 at the last call.
    predictor: of every step and for each number of known D's, their weights, the newest first.
    corrector: of every call likewise, the weights of the new D and of those that led to it, which correct y there.
    """

    levels: list[float]
    decay: list[float]
    spread: list[float]
    predictor: list[list[list[float]]]
    corrector: list[list[list[float]]]


@dataclass(frozen=True)
class Multistep:
    """See the module; ends with D.

    Order of convergence on smooth D: `order` without the corrector and for tau > 0 in the weak sense on Gaussian data,
    `order + 1` with it for tau = 0.

    Attributes:
        order: 1 to 3, the number of D's that a step is predicted from.
        corrector: see above.
        stochasticity: tau >= 0.
    """

    order: int = 2
    corrector: bool = True
    stochasticity: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"the order must be 1, 2 or 3, got {self.order!r}")
        if not 0 <= self.stochasticity < math.inf:
            raise ValueError(f"stochasticity must be at least 0, got {self.stochasticity!r}")

    def spend(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls)

    def plan(self, sigmas: Tensor) -> MultistepPlan:
        clock = (-sigmas.log()).tolist()
        a, tau = 1 + self.stochasticity**2, self.stochasticity
        decay, spread = [], []
        predictor: list[list[list[float]]] = []
        corrector: list[list[list[float]]] = [[]]
        for i, (start, end) in enumerate(pairwise(clock)):
            h = end - start
            decay.append(math.exp(-a * h))
            spread.append(math.exp(-end) * math.sqrt(-math.expm1(-2 * tau**2 * h)))
            known = distinct(clock[: i + 1])[: self.order]
            damping = 1 / (1 + DAMPING * h**4) if tau else 1.0
            first = [exponential_weights(start, end, known[:1], a)[0]]
            weights = [exponential_weights(start, end, known[:k], a) for k in range(1, len(known) + 1)]
            predictor.append([damped(w, first, damping) for w in weights])
            corrector.append(
                [self._correction(start, end, known[:k], a, predictor[-1][k - 1]) for k in range(1, len(known) + 1)]
            )
        return MultistepPlan(sigmas, sigmas.tolist(), [*decay, 0.0], [*spread, 0.0], [*predictor, []], corrector)

    def _correction(
        self, start: float, end: float, known: list[float], a: float, predicted: list[float]
    ) -> list[float]:
        """What the corrector adds to y: the weights of the new D and of the known ones, less those already used."""
        if not self.corrector or end == start:
            return []
        new, *old = exponential_weights(start, end, [end, *known], a)
        return [new, *(w - used for w, used in zip(old, predicted, strict=True))]

    def step(
        self, plan: MultistepPlan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw
    ) -> tuple[Tensor, Memory]:
        """The correction is added to the y that is given, so that an edit between two steps stays."""
        if i == len(plan.levels) - 1:
            return denoised, memory
        known = [d for sigma, d in memory.denoised if sigma > plan.levels[i]]
        if known and plan.corrector[i]:
            y = combined(y, 1.0, plan.corrector[i][len(known) - 1], [denoised, *known])
        history = ((plan.levels[i], denoised), *(item for item in memory.denoised if item[0] > plan.levels[i]))
        history = history[: self.order]
        y = combined(y, plan.decay[i], plan.predictor[i][len(history) - 1], [d for _, d in history])
        if plan.spread[i]:
            y = y.add_(draw.normal(y.shape), alpha=plan.spread[i])
        return y, memory._replace(denoised=history)


def distinct(clock: list[float]) -> list[float]:
    """The clocks of calls, each once, the newest first."""
    return list(dict.fromkeys(reversed(clock)))


def damped(weights: list[float], first: list[float], damping: float) -> list[float]:
    """A blend of a predictor's weights and those of first order."""
    return [
        damping * w + (1 - damping) * b for w, b in zip(weights, [*first, *[0.0] * (len(weights) - 1)], strict=True)
    ]


def combined(y: Tensor, factor: float, weights: list[float], images: list[Tensor]) -> Tensor:
    """`factor * y` and the weighted images, a new tensor."""
    if not weights:
        return factor * y
    total = torch.add(factor * y if factor != 1 else y, images[0], alpha=weights[0])
    for weight, image in zip(weights[1:], images[1:], strict=True):
        total.add_(image, alpha=weight)
    return total


def exponential_weights(start: float, end: float, nodes: list[float], a: float) -> list[float]:
    """`int_start^end a e^{-a (end - r)} l_j(r) dr` for the Lagrange polynomials l_j of distinct `nodes`.

    The weights that integrate `1, u, u^2, ...` exactly, `u = (r - start) / (end - start)`.
    """
    h = end - start
    if h == 0:
        return [0.0] * len(nodes)
    u = torch.tensor([(node - start) / h for node in nodes], dtype=torch.float64)
    powers = u ** torch.arange(len(nodes), dtype=torch.float64)[:, None]
    moments = torch.tensor(exponential_moments(a * h, len(nodes)), dtype=torch.float64)
    return torch.linalg.solve(powers, moments).tolist()


def exponential_moments(x: float, count: int) -> list[float]:
    """`m_k = int_0^1 x e^{-x (1 - u)} u^k du` for `k < count`, x > 0, to 14 digits.

    `m_0 = 1 - e^{-x}` and `m_k = 1 - k / x m_{k-1}`, which cancels for small x: there the series
    `m_k = x sum_j (-x)^j k! / (k + j + 1)!`.
    """
    if x > 2:
        moments = [-math.expm1(-x)]
        for k in range(1, count):
            moments.append(1 - k / x * moments[-1])
        return moments
    moments = []
    for k in range(count):
        term, total = x / (k + 1), 0.0
        for j in range(1, 40):
            total += term
            term *= -x / (k + j + 1)
        moments.append(total)
    return moments
