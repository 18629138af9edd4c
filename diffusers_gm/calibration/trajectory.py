"""Coupled trajectories: a few noise levels (the student) against very many (the teacher), from the same start.

The distance of the last two denoised images bounds the Wasserstein distance of their laws, counts how errors travel to
the end, and needs no data. Trajectories are those of the probability flow: levels that follow it serve samplers
that inject noise, too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..processes.random import Draw
from ..samplers import Memory, Multistep

NUM_DIRECTIONS = 128

# What a calibration draws by itself is of seeds from here on, which nobody gives a pipeline: it is to be independent of
# the pipeline's start.
SEEDS = 7_919_000

# D, and what clipping has added to it, if anything (`Memory.clipped`); by a batch's y and sigma.
Denoised = tuple[Tensor, Tensor | None]
Denoiser = Callable[[Tensor, float], Denoised]


@dataclass(frozen=True)
class OppositeDraw(Draw):
    """The normal numbers of `Draw` with the other sign."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        return super().normal(shape).neg_()


def answer(denoiser: Denoiser, y: Tensor, sigma: float) -> Denoised:
    """What a denoiser says; a ValueError if D is not finite."""
    denoised, clipped = denoiser(y, sigma)
    if not torch.isfinite(denoised).all():
        raise ValueError(
            f"the denoised image is not finite at sigma = {sigma:.4g}: the network overflows, in half precision "
            "perhaps; nothing can be calibrated on it"
        )
    return denoised, clipped


def denoised_images(denoiser: Denoiser, y: Tensor, sigmas: Tensor, sampler: Multistep, draw: Draw) -> Iterator[Tensor]:
    """D of every call of a run from y `(B, ...)`, the last one its result; a ValueError if one is not finite."""
    plan, memory = sampler.plan(sigmas), Memory()
    for i, sigma in enumerate(sigmas.tolist()):
        denoised, clipped = answer(denoiser, y, sigma)
        yield denoised
        y, memory = sampler.step(plan, i, y, denoised, memory._replace(clipped=clipped), draw)


@dataclass
class Run:
    """A student's run, with what it takes to go on from any of its calls.

    Attributes:
        index: its levels on the fine ladder.
        states: y and memory of each call.
        denoised: D of each call.
        error: the mean square distance of the last D to the teacher's, over images and elements.
    """

    index: list[int]
    states: list[tuple[Tensor, Memory]] = field(default_factory=list)
    denoised: list[Tensor] = field(default_factory=list)
    error: float = math.inf


class Trajectories:
    """Runs of one sampler on levels of one fine ladder, from one start.

    Args:
        denoiser: y and D of the batch.
        start: y at the first level, `(B, ...)`.
        sigmas: the fine ladder, `(levels,)` float64, descending.
        sampler: without noise.
        deviation: of a y that a run starts from, at a noise level: runs that begin below the first level start from the
            same noise. None: all begin there.
        num_calls: counts the network calls made, for reports and limits.

    Raises:
        ValueError: if D is not finite.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        start: Tensor,
        sigmas: Tensor,
        sampler: Multistep,
        deviation: Callable[[float], float] | None = None,
    ):
        self.denoiser, self.start, self.sigmas, self.sampler = denoiser, start, sigmas, sampler
        self.deviation = deviation
        self.draw = Draw.like(start)  # which no step asks for anything
        self.num_calls = 0
        self.teacher = self._run(list(range(len(sigmas))), keep=False)

    def run(self, index: list[int], before: Run | None = None) -> Run:
        """A run at levels `index`; of `before`, what is the same up to the first level that differs is taken over."""
        run = self._run(index, before)
        run.error = float((run.denoised[-1] - self.teacher.denoised[-1]).float().square().mean())
        return run

    def _run(self, index: list[int], before: Run | None = None, keep: bool = True) -> Run:
        plan = self.sampler.plan(self.sigmas[index])
        same = 0
        if before is not None:
            same = next((i for i, pair in enumerate(zip(index, before.index, strict=True)) if pair[0] != pair[1]), 0)
        run = Run(index)
        if before is not None and same:
            run.states, run.denoised = before.states[:same], before.denoised[:same]
            y, memory = run.states[-1]
            y, memory = self.sampler.step(plan, same - 1, y, run.denoised[-1], memory, self.draw)
        else:
            y, memory = self.start_at(index[0]), Memory()
        for i in range(same, len(index)):
            denoised, clipped = self._denoised(y, index[i])
            memory = memory._replace(clipped=clipped)
            if keep:
                run.states.append((y, memory))
            run.denoised.append(denoised)
            if i < len(index) - 1:
                y, memory = self.sampler.step(plan, i, y, denoised, memory, self.draw)
        return run

    def start_at(self, level: int) -> Tensor:
        """y at the start of a run that begins at a level of the ladder."""
        if level == 0:
            return self.start
        assert self.deviation is not None
        return self.start * (self.deviation(float(self.sigmas[level])) / self.deviation(float(self.sigmas[0])))

    def _denoised(self, y: Tensor, level: int) -> Denoised:
        self.num_calls += 1
        return answer(self.denoiser, y, float(self.sigmas[level]))


def sliced_distance(images: Tensor, others: Tensor) -> float:
    """The squared sliced Wasserstein distance of images `(n, ...)` to `(m, ...)` others, per element, along
    `NUM_DIRECTIONS` directions that are always the same."""
    size = images[0].numel()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(size, NUM_DIRECTIONS, generator=generator, dtype=torch.float32)
    directions = torch.nn.functional.normalize(directions, dim=0).to(images.device)
    ours, theirs = ((x.flatten(1).float() @ directions).sort(0).values for x in (images, others.to(images.device)))
    ranks = ((torch.arange(len(ours)) + 0.5) * (len(theirs) / len(ours))).long()
    return float((ours - theirs[ranks.to(theirs.device)]).square().mean())
