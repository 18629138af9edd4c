"""Coupled trajectories: a few noise levels (the student) against very many (the teacher), on the same path.

Both start from the same y and, where noise is injected, see one Brownian path. In units of sigma that noise is an
Ornstein-Uhlenbeck process of rate tau^2, so a step from level k to level m of the fine ladder takes

    N / sigma_m = sum_j e^{-tau^2 (l_m - l_{j+1})} xi_j,    xi_j ~ N(0, 1 - e^{-2 tau^2 h_j}),

over the fine steps j between. The distance of the last two denoised images bounds the Wasserstein distance of their
laws, counts how errors travel to the end, and needs no data. Along a stochastic path a student that averages over what
it cannot follow has the smallest mean square, and too narrow a law: there the two batches are compared as sets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..random import Draw
from ..samplers import Memory, Multistep

NUM_DIRECTIONS = 128

# D(y; sigma) of a batch.
Denoiser = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class PathDraw(Draw):
    """Draws that follow the path from fine level `start` to `end`: unit normal, as any other to a sampler."""

    path: "BrownianPath | None" = None
    start: int = 0
    end: int = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        assert self.path is not None
        return self.path.between(self.start, self.end)


class BrownianPath:
    """One path of the injected noise for a batch, on a fine ladder; kept as running sums, `(levels, B, ...)`.

    Args:
        sigmas: the ladder, `(levels,)` descending.
        tau: stochasticity.
        like: a sample of the batch.
        seed: decides the path.
    """

    def __init__(self, sigmas: Tensor, tau: float, like: Tensor, seed: int):
        self.rate, self.clock = tau**2, -sigmas.log()
        draw = Draw.like(like, torch.Generator().manual_seed(seed))
        total, self._sums = torch.zeros_like(like), [torch.zeros_like(like)]
        for j, h in enumerate(self.clock.diff().tolist()):
            weight = math.exp(self.rate * float(self.clock[j + 1] - self.clock[-1]))
            total = total + weight * math.sqrt(-math.expm1(-2 * self.rate * h)) * draw.normal(like.shape)
            self._sums.append(total)

    def between(self, start: int, end: int) -> Tensor:
        """The noise of a step, of unit variance."""
        h, left = (float(self.clock[end] - self.clock[k]) for k in (start, -1))
        scale = math.exp(-self.rate * left) / math.sqrt(-math.expm1(-2 * self.rate * h))
        return scale * (self._sums[end] - self._sums[start])


@dataclass
class Run:
    """A student's run, with what it takes to go on from any of its calls.

    Attributes:
        index: its levels on the fine ladder.
        states: y and memory before each call.
        denoised: D of each call.
        error: distance of the last D to the teacher's, see `Trajectories`.
    """

    index: list[int]
    states: list[tuple[Tensor, Memory]] = field(default_factory=list)
    denoised: list[Tensor] = field(default_factory=list)
    error: float = math.inf


class Trajectories:
    """Runs of one sampler on levels of one fine ladder, from one start and along one path.

    Args:
        denoiser: D of the batch.
        start: y at the first level, `(B, ...)`.
        sigmas: the fine ladder, `(levels,)` float64, descending.
        sampler: its stochasticity is that of the path.
        seed: decides the path.
        num_calls: counts the network calls made, for reports and limits.

    Raises:
        ValueError: if D is not finite.
    """

    def __init__(self, denoiser: Denoiser, start: Tensor, sigmas: Tensor, sampler: Multistep, seed: int = 0):
        self.denoiser, self.sigmas, self.sampler = denoiser, sigmas, sampler
        self.start = start
        self.num_calls = 0
        tau = sampler.stochasticity
        self.path = BrownianPath(sigmas, tau, start, seed) if tau else None
        self.teacher = self.run(list(range(len(sigmas))), keep=False)

    def run(self, index: list[int], before: Run | None = None, keep: bool = True) -> Run:
        """A run at levels `index`; of `before`, what is the same up to the first level that differs is taken over."""
        plan = self.sampler.plan(self.sigmas[index])
        same = 0
        if before is not None:
            same = next((i for i, pair in enumerate(zip(index, before.index, strict=True)) if pair[0] != pair[1]), 0)
        run = Run(index)
        if before is not None and same:
            run.states, run.denoised = before.states[:same], before.denoised[:same]
            y, memory = self._step(plan, same - 1, index, *run.states[-1], run.denoised[-1])
        else:
            y, memory = self.start, Memory()
        for i in range(same, len(index)):
            denoised = self._denoised(y, index[i])
            if keep:
                run.states.append((y, memory))
            run.denoised.append(denoised)
            if i < len(index) - 1:
                y, memory = self._step(plan, i, index, y, memory, denoised)
        if hasattr(self, "teacher"):
            run.error = self._distance(run.denoised[-1], self.teacher.denoised[-1])
        return run

    def _distance(self, denoised: Tensor, exact: Tensor) -> float:
        """The mean square over images and elements; on a stochastic path the distance of the batches as sets."""
        if self.path is None:
            return float((denoised - exact).float().square().mean())
        return sliced_distance(denoised, exact)

    def _step(
        self, plan: object, i: int, index: list[int], y: Tensor, memory: Memory, denoised: Tensor
    ) -> tuple[Tensor, Memory]:
        draw = PathDraw(None, y.device, y.dtype, self.path, index[i], index[i + 1])
        return self.sampler.step(plan, i, y, denoised, memory, draw)  # type: ignore[arg-type]

    def _denoised(self, y: Tensor, level: int) -> Tensor:
        self.num_calls += 1
        sigma = float(self.sigmas[level])
        denoised = self.denoiser(y, sigma)
        if not torch.isfinite(denoised).all():
            raise ValueError(
                f"the denoised image is not finite at sigma = {sigma:.4g}: the network overflows, in half precision "
                "perhaps; nothing can be calibrated on it"
            )
        return denoised


def sliced_distance(images: Tensor, others: Tensor) -> float:
    """The squared sliced Wasserstein distance of images `(n, ...)` to `(m, ...)` others, m >= n, per element, along
    `NUM_DIRECTIONS` directions that are always the same."""
    size = images[0].numel()
    directions = torch.randn(size, NUM_DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions = torch.nn.functional.normalize(directions, dim=0).to(images.device)
    ours, theirs = ((x.flatten(1).float() @ directions).sort(0).values for x in (images, others.to(images.device)))
    ranks = ((torch.arange(len(ours)) + 0.5) * (len(theirs) / len(ours))).long()
    return float((ours - theirs[ranks.to(theirs.device)]).square().mean())
