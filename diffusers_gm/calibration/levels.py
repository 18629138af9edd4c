"""The noise levels of each number of calls: found along a pipeline's own runs, and samples on them judged."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..processes.random import Draw
from ..readings.grids import POWER, SHORT, calibrated_levels, power_levels
from ..samplers import Multistep
from ..samplers.multistep import Stochasticity
from .search import LocalDefects, fine_ladder, gram, nearest, search
from .trajectory import SEEDS, Denoiser, OppositeDraw, Trajectories, denoised_images, sliced_distance

# Network calls that a budget may cost, besides the teachers' runs: in units of itself, and in all.
MAX_RUNS, MAX_CALLS = 40, 240

# Levels of the one run of `effort="fast"`.
NUM_FAST = 56

# Pairs of batches that stochasticities are judged by, and how many standard errors closer to real images another than
# that of the rules must be: of so few pairs less is chance.
JUDGED, SURE = 4, 2.0

# Of each budget: its levels, and its errors on the fixed grid and on them, if they were measured.
Found = dict[int, tuple[list[float], tuple[float, float] | None]]


@dataclass(frozen=True)
class Ladder:
    """A pipeline as a denoiser, the y that its run starts from, the range of noise levels, the sampler without noise
    (levels that follow the probability flow serve every stochasticity), the law of the network's noise, the factor by
    which the pipeline moves levels for its resolution, and the deviation of a y that a run starts from at a lower
    level, if it may."""

    denoiser: Denoiser
    start: Tensor
    high: float
    low: float
    sampler: Multistep
    noise: GaussianMixtureNoise = GAUSSIAN
    shift: float = 1.0
    deviation: Callable[[float], float] | None = None

    def trajectories(self, start: Tensor, sigmas: Tensor) -> Trajectories:
        """The runs from a y."""
        return Trajectories(self.denoiser, start, sigmas, self.sampler, self.deviation)

    def fresh_start(self, seed: int) -> Tensor:
        """Another y of the same kind."""
        generator = torch.Generator().manual_seed(SEEDS + seed)
        # A batch of mixture noise does not tell how wide it is.
        scale = self.start.std() if self.noise.is_standard_gaussian else self.high
        return self.noise.sample(self.start.shape, generator).to(self.start) * scale

    def closest(
        self, ruled: Stochasticity, taus: Sequence[Stochasticity], levels: list[float], images: Tensor
    ) -> Stochasticity:
        """The stochasticity whose samples are closest to real images, where that is more than chance, else `ruled`;
        from starts that no levels were chosen on.

        Batches come in pairs of opposite noise: without, the mean of the noise, which decides how bright images are,
        is most of what chance does to the distance. The variance of a difference is that of the jackknife over pairs,
        and that over as many parts of the real images.
        """
        sigmas = torch.tensor(levels, dtype=torch.float64)
        lower = 1.0 if self.deviation is None else self.deviation(levels[0]) / self.deviation(self.high)
        shown = float(images.min()), float(images.max())  # a pipeline clips what it makes, too

        some = torch.arange(len(images)) % JUDGED
        parts = [images[some != k] for k in range(JUDGED)]

        def distances(tau: Stochasticity) -> Tensor:
            """Of all to all, of all but a pair to all, and of all to all but a part, `(1 + 2 JUDGED,)`."""
            sampler = replace(self.sampler, stochasticity=tau)
            batches = []
            for seed, (sign, draw) in product(range(JUDGED), ((1, Draw), (-1, OppositeDraw))):
                # The noise of the steps is not that of the start: y would be wider than its level.
                generator = torch.Generator().manual_seed(SEEDS + 100 + seed)
                y = sign * lower * self.fresh_start(3 + seed)
                *_, last = denoised_images(self.denoiser, y, sigmas, sampler, draw(generator, y.device, y.dtype))
                batches.append(last.clamp(*shown))
            made = torch.cat(batches)
            without = [torch.cat(batches[: 2 * k] + batches[2 * k + 2 :]) for k in range(JUDGED)]
            pairs = [(made, images), *((fewer, images) for fewer in without), *((made, part) for part in parts)]
            return torch.tensor([sliced_distance(*pair) for pair in pairs])

        best, gained, of_rule = ruled, 0.0, distances(ruled)
        for tau in (tau for tau in taus if tau != ruled):
            gain, *without = of_rule - distances(tau)
            variances = torch.stack(without).view(2, JUDGED).var(1, correction=0) * (JUDGED - 1)
            if gain > max(gained, SURE * float(variances.sum().sqrt())):
                best, gained = tau, float(gain)
        return best


def levels_from_one_run(ladder: Ladder, scheduler: Any, budgets: list[int]) -> Found:
    """By the local errors of all steps, from the Gram matrix of the denoised images of one run."""
    sigmas = fine_ladder(ladder.high, ladder.low, NUM_FAST)
    defects = LocalDefects(
        sigmas, gram(Trajectories(ladder.denoiser, ladder.start, sigmas, ladder.sampler).teacher.denoised)
    )
    found: Found = {}
    for n in budgets:
        levels = scheduler.calibrated_or_even_levels(n, ladder.shift)
        if n <= len(sigmas) // 2:  # else the run is too coarse to judge steps by
            levels = sigmas[defects.best(n, last_place(sigmas, scheduler, n))]
        found[n] = levels.tolist(), None
    return found


def levels_from_trajectories(ladder: Ladder, scheduler: Any, budgets: list[int], lower: bool) -> Found:
    """By the end of every run beside that of a very long one from the same start. The search goes by the mean square,
    which prefers runs that average: what was found is compared with what it was found from, as sets of images and from
    another start, and the closest one stays. `lower`: levels of few calls may begin below the highest one."""
    trajectories = ladder.trajectories(ladder.start, fine_ladder(ladder.high, ladder.low))
    sigmas = trajectories.sigmas
    some = list(range(0, len(sigmas), 3))
    defects = LocalDefects(sigmas[some], gram([trajectories.teacher.denoised[k] for k in some]))
    others = ladder.trajectories(ladder.fresh_start(2), sigmas)
    found: Found = {}
    for n in budgets:
        last = last_place(sigmas, scheduler, n)
        # First the fixed grid, not shifted, as far as the ladder can have it.
        wanted = [power_levels(ladder.high, float(sigmas[last]), n, POWER)]
        if found:  # what suits fewer calls, with levels in between
            wanted.append(calibrated_levels({str(m): levels for m, (levels, _) in found.items()}, n))
        starts = [[0, *places[1:]] for levels in wanted if (places := nearest(sigmas, levels)) is not None]
        if n <= len(some) // 2:
            starts.append([some[k] for k in defects.best(n, last_place(sigmas[some], scheduler, n))])
        starts = [[*places[:-1], last] for places in starts if places[-2] < last]
        most = min(MAX_RUNS * n, MAX_CALLS)
        candidates = [search(trajectories, n, starts, last, most).index, *starts]
        if n <= SHORT and lower:
            candidates.append(search(trajectories, n, starts, last, most, lower=True).index)
        fixed = nearest(sigmas, scheduler.calibrated_or_even_levels(n, ladder.shift)) or starts[0]
        distinct = list(dict.fromkeys(map(tuple, [*candidates, fixed])))
        errors = {
            places: sliced_distance(others.run(list(places)).denoised[-1], others.teacher.denoised[-1])
            for places in distinct
        }
        best = min(distinct, key=errors.__getitem__)
        found[n] = sigmas[list(best)].tolist(), (errors[tuple(fixed)], errors[best])
    return found


def last_place(sigmas: Tensor, scheduler: Any, num_calls: int) -> int:
    """The place on a ladder of the last level of the fixed grid, not shifted, which stays: the mean square would have
    it higher, and blur what is below it."""
    last = float(scheduler.calibrated_or_even_levels(num_calls)[-1])
    return int((sigmas.log() - math.log(last)).abs().argmin())
