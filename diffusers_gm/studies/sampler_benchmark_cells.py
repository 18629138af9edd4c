"""What `.sampler_benchmark` measures: every sampler on every grid, and which are worth more seeds or more samples."""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..evaluation.report import groups
from ..evaluation.results import Cell, Results, Statistic
from ..evaluation.sampling import NoGridError, num_steps_for, sample
from ..evaluation.scoring import SLICED_WASSERSTEIN
from .sampler_benchmark_models import Model
from .sampler_benchmark_schedulers import CALIBRATED, CHOSEN, OWN, Setting, name_of, theirs

# A setting that has so many times the least error on the first seed is not measured on others, nor after a first look;
# but for those that all are compared with, the best one of diffusers among them.
CONTENDS = 1.25
ALWAYS = (CALIBRATED, CHOSEN, (OWN, "default"), ("DDPM", "default"))

# Above this number of calls only the grid that was best at the number below is run.
ALL_GRIDS_UP_TO = 20


def budget(scheduler: Any, num_calls: int) -> int:
    """Set, and return, as many steps as `num_calls` network calls pay for.

    Raises:
        NoGridError: if there are none, or they leave more than one call unused.
    """
    num_steps = num_steps_for(scheduler, num_calls)
    if len(scheduler.timesteps) < num_calls - 1:
        raise NoGridError(f"its {num_steps} steps make {len(scheduler.timesteps)} network calls")
    return num_steps


@dataclass(frozen=True)
class Best:
    """A sampler at a number of calls, on the grid that is best in the mean of the seeds: over the floor."""

    grid: str
    ratio: Statistic

    def __str__(self) -> str:
        return f"{self.ratio:.2f} {self.grid}"


# By sampler and number of calls; None where there is no run.
Bests = dict[tuple[str, int], Best | None]

# A setting's name and a number of calls, as in `Results`.
Which = tuple[str, int | None]


def contending(results: Results, metric: str = SLICED_WASSERSTEIN) -> set[Which]:
    """What is measured further, by the first seed."""
    first: dict[int | None, dict[Setting, float]] = {}
    for (name, calls), cells in groups(results).items():
        for cell in cells:
            if cell.seed == 0 and metric in cell.scores:
                sampler, _, grid = name.rpartition(", ")
                first.setdefault(calls, {})[sampler, grid] = cell.scores[metric]
    return {(name_of(setting), calls) for calls, values in first.items() for setting in ahead(values)}


def ahead(values: Mapping[Setting, float]) -> set[Setting]:
    """Of settings and their distances the best ones, the best one that people have without us, and `ALWAYS`."""
    least = min(values.values(), default=math.inf)
    best_of_theirs = min(filter(theirs, values), key=values.__getitem__, default=None)
    return {s for s, value in values.items() if value <= CONTENDS * least or s in (*ALWAYS, best_of_theirs)}


def run(model: Model, setting: Setting, calls: int, seeds: Iterable[int], results: Results) -> list[Cell]:
    """The cells of a setting, measured where they are not there; none where one of them has no distance."""
    n, name, scheduler = results.conditions["num_samples"], name_of(setting), model.samplers[setting[0]][setting[1]]
    seeds = list(seeds)
    if callable(scheduler) and any(results.find(name, calls, seed) is None for seed in seeds):
        scheduler = scheduler()

    def draw(seed: int) -> tuple[Tensor, int]:
        return sample(model.pipeline, scheduler, budget(scheduler, calls), n, seed, n)

    cells = [results.measure(name, calls, seed, partial(draw, seed), model.score) for seed in seeds]
    # Neither without a grid nor with NaN.
    return cells if all(SLICED_WASSERSTEIN in cell.scores for cell in cells) else []


def best_of_each(model: Model, settings: Iterable[Setting], calls: int, seeds: int, results: Results) -> Bests:
    """The best grid of every sampler of `settings`. All are measured on the first seed; on the others those that are
    `ahead` there."""
    first = {s: cells[0].scores[SLICED_WASSERSTEIN] for s in settings if (cells := run(model, s, calls, [0], results))}
    further = ahead(first)
    floor = statistics.mean(draw[SLICED_WASSERSTEIN] for draw in results.floor)
    found: dict[str, list[Best]] = {}
    for setting in first:
        wanted = [s for s in range(seeds) if setting in further or results.find(name_of(setting), calls, s)]
        if cells := run(model, setting, calls, wanted, results):
            ratio = Statistic.of([cell.scores[SLICED_WASSERSTEIN] / floor for cell in cells])
            found.setdefault(setting[0], []).append(Best(setting[1], ratio))
    return {
        (sampler, calls): min(of, key=lambda best: (-best.ratio.num_values, best.ratio.mean))
        for sampler, of in found.items()
    }


def measure(
    model: Model, calls_of: Sequence[int], seeds: int, results: Results, among: Collection[Which] | None = None
) -> Bests:
    """The best grid of every sampler at each of some numbers of calls, ascending; `among`: of these settings alone."""
    if not results.floor:
        results.floor = [model.score(draw) for draw in model.floor.split(results.conditions["num_samples"])]
    bests: Bests = {}
    for i, calls in enumerate(calls_of):
        settings = [(sampler, grid) for sampler, grids in model.samplers.items() for grid in grids]
        if among is not None:
            settings = [s for s in settings if (name_of(s), calls) in among]
        elif i and calls > ALL_GRIDS_UP_TO:
            below = {s: best.grid for s in model.samplers if (best := bests.get((s, calls_of[i - 1])))}
            # The calibrated levels are always among them: they are what is judged.
            settings = [s for s in settings if s[1] == below.get(s[0], s[1]) or s[1] == "calibrated" or s in ALWAYS]
        found = best_of_each(model, settings, calls, seeds, results)
        lacking = {*model.samplers} - {sampler for sampler, _ in found}  # that grid has no run of so many calls
        if lacking and among is None:
            others = [(sampler, grid) for sampler in lacking for grid in model.samplers[sampler]]
            found |= best_of_each(model, others, calls, seeds, results)
        bests |= {(sampler, calls): found.get((sampler, calls)) for sampler in model.samplers}
    return bests
