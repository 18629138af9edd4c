"""The noise levels of a number of calls at which a student ends closest to its teacher."""

import math

import torch
from torch import Tensor

from ..readings.grids import power_levels
from ..samplers.multistep import exponential_weights
from .trajectory import Run, Trajectories

NUM_FINE = 160
POWERS = (1.5, 2.0, 3.0)
MOVES = (8, 4, 2, 1)
# First levels below the top from which a search begins.
LOWER = (40.0, 20.0, 10.0, 6.0)

# How many times as long as the step before it a step may be: a longer one extrapolates what hardly differs, and with
# noise between the two it extrapolates the noise.
GROWTH = 3.0


def fine_ladder(high: float, low: float, num_levels: int = NUM_FINE) -> Tensor:
    """The teacher's levels, `(num_levels,)` float64, from `high` to `low`."""
    return power_levels(high, low, num_levels, 3.0)


def nearest(sigmas: Tensor, levels: Tensor) -> list[int] | None:
    """The places of levels on the ladder; None if two fall on one."""
    places = (sigmas.log()[:, None] - levels.log()).abs().argmin(0).tolist()
    return places if len(set(places)) == len(places) and places == sorted(places) else None


def search(
    trajectories: Trajectories, num_calls: int, starts: list[list[int]], last: int, max_calls: int, lower: bool = False
) -> Run:
    """The best levels that are found with about `max_calls` network calls.

    Coordinate descent on the levels' places on the fine ladder, with halving moves, from the best of `starts` and of
    `power_levels` down to place `last`, where the last level stays. Levels are moved from the last to the first: a run
    is the same up to the level that moves, so the last ones cost little. Steps stay within `GROWTH`. `lower`: the first
    level moves too, and the search begins below the top as well.

    Raises:
        ValueError: if the ladder has not as many levels.
    """
    sigmas = trajectories.sigmas
    if not 2 <= num_calls <= len(sigmas) // 2:
        raise ValueError(f"calls must be between 2 and {len(sigmas) // 2}, got {num_calls}")
    spent = trajectories.num_calls
    high, low = float(sigmas[0]), float(sigmas[last])
    tops = [high, *(top for top in LOWER if lower and low < top < high)]
    wanted = [power_levels(top, low, num_calls, power) for top in tops for power in POWERS]
    candidates = [*starts, *(places for levels in wanted if (places := nearest(sigmas, levels)) is not None)]
    best = trajectories.run(candidates[0])
    for places in candidates[1:]:
        if trajectories.num_calls - spent < max_calls // 2:
            best = min(best, trajectories.run(places), key=lambda run: run.error)
    for move in MOVES:
        for j in reversed(range(0 if lower else 1, num_calls - 1)):
            for signed in (move, -move):
                places = list(best.index)
                places[j] += signed
                falling = (places[j - 1] if j else -1) < places[j] < places[j + 1]
                left = trajectories.num_calls - spent < max_calls
                if not falling or not left or growth(sigmas, places) > max(GROWTH, growth(sigmas, best.index)):
                    continue
                trial = trajectories.run(places, best)
                if trial.error < best.error:
                    best = trial
                    break
    return best


def growth(sigmas: Tensor, places: list[int]) -> float:
    """The largest ratio of a step to the one before, in the logarithm of the level."""
    steps = sigmas[places].log().diff()
    return float((steps[1:] / steps[:-1]).max()) if len(steps) > 1 else 1.0


# --- From one run: local defects and dynamic programming -------------------------------------------------------------


def gram(denoised: list[Tensor]) -> Tensor:
    """`mean D_k D_l` over images and elements, `(K, K)` float64."""
    flat = torch.stack([d.flatten().float() for d in denoised])
    return (flat @ flat.T / flat.shape[1]).cpu().double()


class LocalDefects:
    """How far the predictor and the corrector of a single step are from the integral that they stand for.

    By the Gram matrix of D along a run, for every triple of its levels (previous, current, next), as quadratic forms.

    Args:
        sigmas: levels of the run, `(K,)`.
        matrix: `gram` of its D's.
    """

    def __init__(self, sigmas: Tensor, matrix: Tensor):
        clock, n = -sigmas.log(), len(sigmas)
        self.sigmas, self.matrix = sigmas, matrix
        eye = torch.eye(n, dtype=torch.float64)
        # The integral from each level to each later one, of D linear between neighbouring levels: weights of all D's.
        between = exponential_weights(clock[:-1], clock[1:], torch.stack([clock[:-1], clock[1:]], -1), 1.0)
        pieces = between[:, :1] * eye[:-1] + between[:, 1:] * eye[1:]
        exact = torch.zeros(n, n, n, dtype=torch.float64)
        for k in range(n - 1):
            total = torch.zeros(n, dtype=torch.float64)
            for m in range(k + 1, n):
                total = total * torch.exp(clock[m - 1] - clock[m]) + pieces[m - 1]
                exact[k, m] = total
        j, k, m = torch.combinations(torch.arange(n), 3).T
        # (previous, current, next); the first step has no previous one: it is written as (current, current, next).
        self.cost = torch.full((n, n, n), math.inf, dtype=torch.float64)
        grows = clock[m] - clock[k] > GROWTH * (clock[k] - clock[j])
        self.cost[j, k, m] = self._costs(exact[k, m], clock, m, [k, j], k).masked_fill(grows, math.inf)
        zero, later = torch.zeros(n - 1, dtype=torch.long), torch.arange(1, n)
        self.cost[0, 0, 1:] = self._costs(exact[zero, later], clock, later, [zero], zero)

    def _costs(self, exact: Tensor, clock: Tensor, end: Tensor, known: list[Tensor], start: Tensor) -> Tensor:
        """`(e_c^2 + e_p^2 / 4) s^2 / (s^2 + sigma^2)` of steps from levels `start` to `end`, with D of `known`."""
        signal = self.matrix[-1, -1]
        damping = signal / (signal + self.sigmas[end] ** 2)
        total = torch.zeros(len(end), dtype=torch.float64)
        for nodes, share in ((known, 0.25), ([end, *known], 1.0)):
            places = torch.stack(nodes, -1)
            weights = exponential_weights(clock[start], clock[end], clock[places], 1.0)
            defect = exact.clone().scatter_add_(1, places, -weights)
            total += share * torch.einsum("ik,kl,il->i", defect, self.matrix, defect).clamp(min=0)
        return total * damping

    def best(self, num_calls: int, end: int) -> list[int]:
        """The levels of the smallest sum of defects on the way to level `end`, by dynamic programming over (previous,
        current)."""
        n, last = len(self.sigmas), num_calls - 1
        value = torch.full((n, n), math.inf, dtype=torch.float64)
        value[0, 0] = 0.0
        came_from: list[Tensor] = []
        for _ in range(last):
            total = value[:, :, None] + self.cost
            value, choice = total.min(0)
            came_from.append(choice)
        previous, current = int(value[:, end].argmin()), end
        path = [current, previous]
        for choice in reversed(came_from[1:]):
            previous, current = int(choice[previous, current]), previous
            path.append(previous)
        return path[::-1][-num_calls:]
