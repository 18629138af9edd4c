"""What a network's errors are, by a run of its own, and what a sampler does about them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..processes.random import Draw
from ..readings.grids import POWER, even_levels, power_levels
from ..samplers import Multistep
from ..samplers.multistep import Stochasticity
from .trajectory import SEEDS, Denoiser, denoised_images

# Levels of the run that measures the martingale defect.
NUM_MARTINGALE = 48

# The martingale defect below which a network's errors dominate: exact denoisers have about 0, networks that were
# trained as EDM says a little less, and those for epsilon, trained as long, clearly less; and below which they vary so
# much from level to level that the noise of a few steps adds to them.
ERRS, ERRS_MUCH = -0.4, -0.55

# How far it is off, of one image, with trained networks. Of four images its sign says nothing.
SPREAD = 0.3

# Where errors dominate they are largest on high levels, at which the network sees next to nothing: a run begins where
# noise is so many times as wide as the images in the direction in which they differ most, and narrows these by half a
# percent.
HIDING, MANY_IMAGES = 10.0, 16

# Runs of few calls cannot spare any there. Where noise corrects what is lost, they begin at so much for each call, of
# `FEWEST` at least, until that is as high; and end so much higher than the fixed grid.
FEWEST, HIDING_EACH, HIGHER_OF_FEW = 5, 0.7, 1.6

# At these noise levels images take shape. Where D is good there, errors of the steps add up, the less the shorter these
# are: the levels of runs that inject noise are more even than the fixed grid, the more so the more calls there are, and
# the power falls from the first number of calls to the second. Where errors of D dominate, every step adds its own.
SHAPES = 5.0, 1.0
CALLS_OF_POWERS, POWERS_OF_SHAPES = (10, 20), (2.0, 1.0)

# And those above do so the more: runs of networks whose errors dominate there, too, begin as low as they may, where
# noise is so many times as wide as the images, their mean included; of so many calls at least.
HIDING_ALL, LOWER_FROM = 3.5, 10

# Such a start is wider than its level, by what unit noise has in place of an image: by so much at most.
WIDER = 0.02

# The mean square of an exact D grows along the reverse diffusion, by that of its changes. A network that is hardly
# trained sees far too strong images in nothing but noise, and loses some of them on the way. Where less is left at the
# end than was at level `SHOWS`, noise feeds the errors, and no level can be spared.
SHOWS = 2.5

# Stochasticities of a run of enough calls to follow them: none where D is exact, which noise has nothing to correct in;
# some for a network that errs, as trained ones do, above noise level 1 less than below, where steps are short and D
# errs most; and all there is where errors dominate: of `LOST` calls, or where they vary much so many, none, and of each
# more so much, up to `FOLLOWED`.
SOME, ALL, ENOUGH = (0.5, 1.0), 1.0, 6
LOST, LOST_MUCH, GAINED, FOLLOWED = 3, 5, 0.5, 7

# Where nothing corrects them, levels of very few calls end at such a share of the first, but at most so much higher
# than the fixed grid.
LAST_SHARE, HIGHER = 0.014, 8.0


def largest_deviation(images: Tensor) -> float:
    """The standard deviation of images `(n, ...)` along the direction in which they differ most."""
    flat = images.flatten(1).float()
    return float(torch.linalg.matrix_norm(flat - flat.mean(0), 2)) / max(len(flat) - 1, 1) ** 0.5


def largest_size(images: Tensor) -> float:
    """The root mean square of images `(n, ...)`, their mean included, along the direction in which they are largest."""
    return float(torch.linalg.matrix_norm(images.flatten(1).float(), 2)) / len(images) ** 0.5


@dataclass(frozen=True)
class ReverseDiffusion:
    """What a run of the reverse diffusion says of a network.

    Attributes:
        defect: rho, how far D is from a martingale: `sum E[D_i (D_{i+1} - D_i)] / sum E|D_{i+1} - D_i|^2`. For an exact
            denoiser D is one, and rho about 0, or a little above; errors of a network that vary from level to level
            make it negative.
        left: the mean square of D at the end over that at level `SHOWS`; of an exact denoiser at least 1.
        images: D at the end.
        defect_of_shapes: rho of the levels of `SHAPES` alone.
    """

    defect: float
    left: float
    images: Tensor
    defect_of_shapes: float = 0.0

    @property
    def errs(self) -> bool:
        """Whether the network's errors dominate."""
        return self.defect < ERRS

    @property
    def errs_much(self) -> bool:
        """Whether noise of a few steps only adds to them."""
        return self.defect < ERRS_MUCH

    @property
    def errs_in_shapes(self) -> bool:
        """Whether they dominate where images take shape, too."""
        return self.defect_of_shapes < ERRS

    @property
    def exact(self) -> bool:
        """Whether its images show no errors."""
        return self.defect >= -SPREAD / len(self.images) ** 0.5

    @property
    def fades(self) -> bool:
        """Whether images lose on the way what was seen in noise; of a few it would be chance."""
        return self.left < 1 and len(self.images) >= MANY_IMAGES


def reverse_diffusion(denoiser: Denoiser, start: Tensor, high: float, low: float) -> ReverseDiffusion:
    """A run of the reverse diffusion on levels from sigma 40 to 0.05, where the network has them.

    Args:
        denoiser: from a noisy image and its noise level to D.
        start: `(n, ...)`, what a run begins with at level `high`.
        high, low: the noise levels that the network has.

    Raises:
        ValueError: for a D that is not finite.
    """
    first, last = min(high, 40.0), max(low, min(0.05, high / 2))
    sigmas = torch.logspace(math.log10(first), math.log10(last), NUM_MARTINGALE, dtype=torch.float64)
    y = start * (float(sigmas[0]) / high)
    sampler, generator = Multistep(1, corrector=False, stochasticity=1.0), torch.Generator().manual_seed(SEEDS)
    changes = []  # of D, by noise level: what of it the D before knew, and its mean square
    strengths = []  # the mean square of D below level `SHOWS`
    runs = pairwise(denoised_images(denoiser, y, sigmas, sampler, Draw.like(y, generator)))
    for (before, denoised), sigma in zip(runs, sigmas[1:].tolist(), strict=True):
        change = denoised - before
        changes.append((sigma, float((before * change).mean()), float(change.square().mean())))
        if sigma <= SHOWS:
            strengths.append(float(denoised.square().mean()))
    left = strengths[-1] / strengths[0] if strengths and strengths[0] else 1.0

    def defect(above: float, below: float) -> float:
        products, squares = (sum(x[k] for x in changes if above >= x[0] > below) for k in (1, 2))
        return products / squares if squares else 0.0

    return ReverseDiffusion(defect(math.inf, 0.0), left, denoised, defect(*SHAPES))


def stochasticity_for(found: ReverseDiffusion, num_calls: int) -> Stochasticity:
    """tau for a network: noise makes a run forget the errors of the levels before, if it has calls enough to follow
    it, and if those of the levels that follow are smaller."""
    if not found.errs:
        return SOME if not found.exact and num_calls >= ENOUGH else 0.0
    if found.fades:
        return 0.0
    return min(ALL, max(0.0, GAINED * (num_calls - (LOST_MUCH if found.errs_much else LOST))))


def levels_of_errors(
    run: ReverseDiffusion,
    num_calls: int,
    high: float,
    low: float,
    deviation: Callable[[float], float] | None = None,
    shift: float = 1.0,
    noisy: bool = True,
) -> Tensor:
    """Noise levels `(num_calls,)`, descending, in float64: the fixed grid, from where noise hides the images; of few
    calls one that begins lower, if noise corrects that, and ends higher: what is below costs steps that the noise above
    needs; from six calls on more even ones, if noise corrects errors and D is good where images take shape.

    Args:
        run: of the network.
        high, low: the noise levels that it has.
        deviation: of a y that a run starts from, at a noise level; None: all begin at `high`.
        shift: how far a pipeline moves levels for its resolution.
        noisy: whether the sampler may inject noise, if there are calls enough for that to matter.
    """
    very_few = num_calls < ENOUGH
    noisy = noisy or num_calls < FEWEST  # of so few the lower start is nearer without noise, too
    known = deviation is not None and len(run.images) >= MANY_IMAGES  # of few their deviation would be chance
    lower = HIDING_EACH * max(num_calls, FEWEST)
    corrected = noisy and known and lower < HIDING and not (run.errs_much or run.fades)
    if deviation is not None and known and (very_few or not run.fades):
        level = (lower if corrected else HIDING) * largest_deviation(run.images)
        if run.errs_in_shapes and noisy and num_calls >= LOWER_FROM:
            level = min(level, HIDING_ALL * largest_size(run.images))
        high = hiding_level(level, high, deviation)
    top = high / shift
    last = float(even_levels(top, low / shift, num_calls)[-1])
    power = power_of(run, num_calls) if noisy else POWER
    if corrected:
        last = min(HIGHER_OF_FEW * last, top / 2)
    elif very_few:
        share = LAST_SHARE / 2 if run.errs_much and not run.fades else LAST_SHARE
        last, power = min(max(last, share * top), HIGHER * last, top / 2), POWER
    return power_levels(top, last, num_calls, power) * shift


def power_of(run: ReverseDiffusion, num_calls: int) -> float:
    """The power of the levels of so many calls, where noise corrects errors."""
    if run.fades or run.errs_in_shapes:
        return POWER
    (few, many), (first, last) = CALLS_OF_POWERS, POWERS_OF_SHAPES
    return first + (last - first) * min(1.0, max(0.0, (num_calls - few) / (many - few)))


def hiding_level(level: float, high: float, deviation: Callable[[float], float]) -> float:
    """The noise level that a run begins at, from 1 to `high`: `level`, or the next one at which its start, of
    `deviation(level)`, is hardly wider than the level."""
    level = max(1.0, level)
    while level < high and deviation(level) > (1 + WIDER) * level:
        level *= 1.25
    return min(level, high)
