"""`calibrate(pipe)`: from a pipeline to a scheduler whose config holds the noise levels made for its network."""

import inspect
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..autoencoders import as_learned
from ..networks import channels_of, images_at_once, size_of
from ..readings import ImageReading, level_range
from ..samplers import Multistep
from ..samplers.multistep import Stochasticity
from ..schedulers import CalibratedMultistepScheduler
from ..schedulers.base import SamplerScheduler
from ..schedulers.swap import refuse_unreadable
from .errors import (
    ALL,
    ENOUGH,
    FOLLOWED,
    LOST,
    SOME,
    levels_of_errors,
    reverse_diffusion,
    stochasticity_for,
)
from .levels import JUDGED, MAX_CALLS, Found, Ladder, levels_from_one_run, levels_from_trajectories
from .oracle import MANY, with_denoiser
from .refused import refuse_noise, refuse_what_cannot_be
from .trajectory import Denoised, Denoiser

CALLS, MOST_CALLS = (5, 8, 10, 15, 20, 30, 50), 80

# Stochasticities that real images may have in place of that of the rules.
CANDIDATES = (0.0, 0.4, SOME, ALL)

# Images of a pipeline that makes a single one unless told, and what else tells it how many.
NUM_IMAGES = 16
TELLS_HOW_MANY = ("batch_size", "num_images_per_prompt", "prompt", "image", "latents", "class_labels")

# What a budget costs at most beside runs of its own, and so many of these, and by real images.
MOST_OF_A_BUDGET, RUNS_BESIDE, RUNS_BY_IMAGES = 2 * MAX_CALLS, 10, 50

# What a pipeline's scheduler may have been told, and a calibration says anew.
OWN_GRID: dict[str, Any] = {"grid": "calibrated", "stochasticity": None}

# Lowest level of the fine ladder, for images in [-1, 1]: below, D is the image.
LOW = 0.01


@dataclass
class Calibration:
    """What was measured.

    Attributes:
        scheduler: the result.
        levels: of each budget; `fixed`: those of `even_levels`, the grid without one.
        errors: of each budget, the squared sliced Wasserstein distance of the last D's to the teacher's: of the fixed
            grid, and of what was found. From a start that levels were not moved on, but by which the best of those
            that were found, and of the fixed grid, is taken. None where no run was judged:
            with `effort="fast"`, where errors dominate, and of very few calls of a network that errs.
        martingale_defect: rho, see `errors.ReverseDiffusion`; None for mixture noise per element, of which it tells
            nothing.
        stochasticity: tau of each budget, one or two.
        elsewhere: of other numbers of calls, which follow noise more or less far; none where tau was given.
        network_calls: in all, each for the whole batch.
        seconds: of work beside the network, and of the network and the pipeline around it.
    """

    scheduler: CalibratedMultistepScheduler
    levels: dict[int, list[float]] = field(default_factory=dict)
    fixed: dict[int, list[float]] = field(default_factory=dict)
    errors: dict[int, tuple[float, float]] = field(default_factory=dict)
    martingale_defect: float | None = None
    stochasticity: dict[int, Stochasticity] = field(default_factory=dict)
    elsewhere: dict[int, Stochasticity] = field(default_factory=dict)
    network_calls: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)

    def in_config(self, shift: float) -> dict[str, Any]:
        """As a scheduler's config has it; `shift`: the factor by which the pipeline moved levels for its resolution."""
        content: dict[str, Any] = {  # six digits are plenty, and a config is to be read
            str(n): [float(f"{sigma:.6g}") for sigma in levels] for n, levels in self.levels.items()
        }
        taus = dict(sorted((self.elsewhere | self.stochasticity).items()))
        if any(taus.values()):
            content["stochasticity"] = {
                str(n): [float(t) for t in tau] if isinstance(tau, Sequence) else float(tau) for n, tau in taus.items()
            }
        return content if shift == 1.0 else {**content, "shift": shift}


def calibrate(
    pipe: Any,
    calls: Sequence[int] | None = None,
    *,
    effort: Literal["full", "fast"] = "full",
    stochasticity: Stochasticity | None = None,
    images: Tensor | None = None,
    progress: bool = True,
    **arguments: Any,
) -> CalibratedMultistepScheduler:
    """The sampler made for a pipeline's network: `pipe.scheduler = calibrate(pipe, prompt=..., guidance_scale=...)`.

    The pipeline is run as you run it: its prompt, guidance, resolution and batch are what the levels are made for. For
    each number of calls, a few levels are compared with very many along the same trajectories, and moved until the last
    denoised images are closest (see `trajectory`). No data, no training.

    Args:
        pipe: a pipeline with a network and a scheduler; its scheduler is put back at the end.
        calls: numbers of network calls, each from 2 to 80. Others are interpolated afterwards. None: those of `CALLS`
            that the network was trained at enough noise levels for.
        effort: `full`; or `fast`: one run, from whose denoised images the local errors of all steps are estimated.
        stochasticity: tau of the sampler; 0 is the probability flow, deterministic; or two, of the steps from levels
            above 1 and of the others. None: by the martingale defect of the network and the number of calls, see
            `errors.stochasticity_for`; or by `images`.
        images: real ones, `(n, C, H, W)` in [-1, 1], such as those that the network was trained on; with a `vae` these
            or their latents, as the network takes them (`autoencoders.as_learned`). Then that of tau = 0, 0.4, (0.5, 1)
            and 1 whose samples are closest to these in sliced Wasserstein distance, for each number of calls, takes the
            place of what the defect says, if that is more than chance.
        progress: show a bar.
        arguments: of the pipeline. `num_inference_steps` is not among them. Our own pipelines take `batch_size` 64,
            fewer where images are large, and all classes, unless told; others that have a `batch_size`, as
            `DDPMPipeline`, take 16. Those that have none need as many images as fit: 4 will do.

    Returns:
        a `CalibratedMultistepScheduler` for the network; `save_pretrained` and `push_to_hub` carry its levels.

    Raises:
        ValueError: for a pipeline whose scheduler cannot be swapped or that cannot be calibrated, numbers of calls out
            of range, a denoised image that is not finite, `images` where `stochasticity` is given.
    """
    return calibrate_in_full(
        pipe, calls, effort=effort, stochasticity=stochasticity, images=images, progress=progress, **arguments
    ).scheduler


def calibrate_in_full(
    pipe: Any,
    calls: Sequence[int] | None = None,
    *,
    effort: Literal["full", "fast"] = "full",
    stochasticity: Stochasticity | None = None,
    images: Tensor | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Calibration:
    """`calibrate`, with all that was measured: the same arguments, and the same errors are raised."""
    budgets = None if calls is None else _checked_calls(calls)
    if effort not in ("full", "fast"):
        raise ValueError(f"unknown effort {effort!r}: use 'full' or 'fast'")
    if stochasticity is not None and images is not None:
        raise ValueError(f"stochasticity={stochasticity} is what images would choose: leave one of the two out")
    if isinstance(images, Tensor) and len(images) < JUDGED:
        raise ValueError(f"images has {len(images)}, of which nothing can be told: give some hundreds, or none")
    scheduler = _swapped(pipe)
    most = scheduler.config.num_train_timesteps if scheduler.reading.counts_levels else MOST_CALLS
    if budgets is None:
        budgets = [n for n in CALLS if n <= most] or [most]
    if budgets[-1] > most:
        raise ValueError(f"calls={budgets}: the network was trained at {most} noise levels; use at most {most}")
    if refuse_noise(pipe, arguments, stochasticity, images):
        stochasticity = 0.0
    sampler = Multistep(scheduler.config.multistep_order, scheduler.config.corrector)
    replace(sampler, stochasticity=stochasticity or 0.0)  # raises a ValueError
    low, high = level_range(scheduler.reading)
    pace = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(total=None, desc="calibrating", unit="call", mininterval=pace, disable=not progress)
    began = time.perf_counter()

    def work(denoiser: Denoiser, start: Tensor, shift: float) -> Calibration:
        counted = Counted(denoiser, bar)
        deviation = scheduler.reading.start_deviation if isinstance(scheduler.reading, ImageReading) else None
        noise = scheduler.model_mixture
        ladder = Ladder(counted, start, high, min(max(low, LOW), high / 2), sampler, noise, shift, deviation)
        real = None if images is None else as_learned(pipe, images, start.shape[1:])
        result = measured(ladder, scheduler, budgets, effort, stochasticity, real)
        result.network_calls, result.seconds = counted.calls, (0.0, counted.seconds)
        return result

    with bar, _quiet(pipe):
        runs = RUNS_BESIDE + (0 if images is None else RUNS_BY_IMAGES)
        most_calls = sum(MOST_OF_A_BUDGET + runs * n for n in budgets)
        result = with_denoiser(pipe, scheduler, work, **_arguments(pipe, arguments, MANY + most_calls))
    in_network = result.seconds[1]
    result.seconds = (time.perf_counter() - began - in_network, in_network)
    return result


def measured(
    ladder: Ladder,
    scheduler: CalibratedMultistepScheduler,
    budgets: list[int],
    effort: Literal["full", "fast"],
    stochasticity: Stochasticity | None,
    images: Tensor | None,
) -> Calibration:
    """The levels and the stochasticity of each budget, and the scheduler that has them; `images` as the network takes
    them."""
    run = reverse_diffusion(ladder.denoiser, ladder.start, ladder.high, ladder.low)
    result = Calibration(scheduler, martingale_defect=run.defect)
    if ladder.noise.per_element and not ladder.noise.is_standard_gaussian:
        # Where every element has a component of its own, Gaussian noise is of another law: no exact D is a martingale
        # under it, and images only get worse.
        run, result.martingale_defect = replace(run, defect=0.0), None
    if run.errs:  # levels that follow the network's runs would follow its errors
        span = ladder.high, ladder.low, ladder.deviation, ladder.shift
        noisy = stochasticity is None or bool(torch.as_tensor(stochasticity).any())
        found: Found = {n: (levels_of_errors(run, n, *span, noisy).tolist(), None) for n in budgets}
    else:  # a long run that errs is no judge of very few calls
        unjudged = [n for n in budgets if n < ENOUGH and not run.exact]
        found = {n: (scheduler.calibrated_or_even_levels(n, ladder.shift).tolist(), None) for n in unjudged}
        judged = [n for n in budgets if n not in unjudged]
        lower = run.exact and ladder.deviation is not None
        if judged and effort == "fast":
            found |= levels_from_one_run(ladder, scheduler, judged)
        elif judged:
            found |= levels_from_trajectories(ladder, scheduler, judged, lower)
    for n, (levels, errors) in found.items():
        result.levels[n] = levels
        result.fixed[n] = scheduler.calibrated_or_even_levels(n, ladder.shift).tolist()
        result.errors |= {n: errors} if errors else {}
        if stochasticity is not None:
            result.stochasticity[n] = stochasticity
        else:
            ruled = stochasticity_for(run, n)
            chosen = ruled if images is None else ladder.closest(ruled, CANDIDATES, levels, images)
            result.stochasticity[n] = chosen
            if run.errs and chosen == 0.0 != ruled:  # levels that need noise are of no use without
                result.levels[n] = levels_of_errors(run, n, *span, False).tolist()
    if stochasticity is None:
        others = [n for n in range(LOST, FOLLOWED + 1) if n < budgets[0] or (images is None and n not in budgets)]
        result.elsewhere = {n: stochasticity_for(run, n) for n in others}
    result.scheduler = CalibratedMultistepScheduler.from_config(
        scheduler.config, **OWN_GRID, calibration=result.in_config(ladder.shift)
    )
    return result


@dataclass
class Counted:
    """A denoiser that counts its calls and the seconds that they took, and shows them."""

    denoiser: Denoiser
    bar: tqdm
    calls: int = 0
    seconds: float = 0.0

    def __call__(self, y: Tensor, sigma: float) -> Denoised:
        asked = time.perf_counter()
        answer = self.denoiser(y, sigma)
        self.seconds += time.perf_counter() - asked
        self.calls += 1
        self.bar.update()
        return answer


def in_words(tau: Stochasticity) -> str:
    return " then ".join(f"{t:g}" for t in tau) if isinstance(tau, Sequence) else f"{tau:g}"


def _checked_calls(calls: Sequence[int]) -> list[int]:
    if not isinstance(calls, Iterable):
        raise ValueError(f"calls must be several whole numbers, such as (5, 10, 20), got {calls!r}")
    calls = list(calls)
    if not calls or any(int(n) != n or not 2 <= n <= MOST_CALLS for n in calls):
        raise ValueError(f"calls must be whole numbers from 2 to {MOST_CALLS}, at least one, got {calls}")
    return sorted({int(n) for n in calls})


def _swapped(pipe: Any) -> CalibratedMultistepScheduler:
    """Our scheduler for the pipeline's network."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "config"):
        raise ValueError(f"a {type(pipe).__name__} has no scheduler that can be swapped: calibrate needs one")
    try:
        if not isinstance(scheduler, SamplerScheduler):  # a config in memory does not say which class it is of
            refuse_unreadable({**scheduler.config, "_class_name": type(scheduler).__name__})
        return CalibratedMultistepScheduler.from_config(scheduler.config, **OWN_GRID, calibration=None)
    except ValueError as error:
        raise ValueError(f"the scheduler of this {type(pipe).__name__} cannot be swapped: {error}") from error


def _arguments(pipe: Any, given: dict[str, Any], most_calls: int) -> dict[str, Any]:
    """The arguments of the call: steps enough for `most_calls`, a seed, and no decoding, where the pipeline knows of
    these."""
    if "num_inference_steps" in given:
        raise ValueError("num_inference_steps is what is calibrated: give calls=(...), the numbers of network calls")
    parameters = inspect.signature(pipe.__call__).parameters
    refuse_what_cannot_be(pipe, {name: parameter.default for name, parameter in parameters.items()}, given)
    strength = given.get("strength")  # the share of the steps that is made
    share = strength if isinstance(strength, float) and 0 < strength < 1 else 1.0
    arguments: dict[str, Any] = {"num_inference_steps": math.ceil(most_calls / share)}
    if "generator" in parameters:
        arguments["generator"] = torch.Generator().manual_seed(0)
    if hasattr(pipe, "calibration_arguments"):
        given = given | pipe.calibration_arguments(given)
    elif "batch_size" in parameters and not (
        isinstance(given.get("generator"), list | tuple) or any(name in given for name in TELLS_HOW_MANY)
    ):
        unet = pipe.components.get("unet")
        size = None if unet is None else size_of(unet)
        arguments["batch_size"] = (
            NUM_IMAGES if size is None else images_at_once(NUM_IMAGES, channels_of(unet)[0], *size)
        )
    return arguments | given


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar is off inside."""
    show = getattr(pipe, "set_progress_bar_config", lambda **_: None)
    kept = getattr(pipe, "_progress_bar_config", None)
    show(**{**(kept or {}), "disable": True})
    try:
        yield
    finally:
        if kept is not None:
            show(**kept)
        elif hasattr(pipe, "_progress_bar_config"):  # what is not said is decided where a bar is made
            del pipe._progress_bar_config
