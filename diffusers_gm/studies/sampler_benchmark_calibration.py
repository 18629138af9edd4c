"""Noise levels that are made for one network, for `.sampler_benchmark`: each made when first asked for, and kept."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import calibrate_in_full
from ..calibration.calibrate import CALLS, LOW, in_words
from ..calibration.oracle import MANY, with_denoiser
from ..calibration.trajectory import Denoiser, Trajectories
from ..evaluation.table import Table
from ..files import write_json
from ..readings import level_range
from ..readings.grids import calibrated_levels, sigma_grid
from ..samplers import Multistep
from ..schedulers import CalibratedMultistepScheduler

# What `calibrate` is told, by name.
WITH_IMAGES = "calibrated with images"
VARIANTS: dict[str, dict[str, Any]] = {"calibrated": {}, "fast": {"effort": "fast"}, WITH_IMAGES: {}}
GITS = "GITS-like"

# Levels of the one trajectory of `GITS`, and its images.
NUM_GITS, BATCH_GITS = 60, 64


def rules() -> str:
    """A hash of the code that calibrates: what is kept is of one version of it."""
    names = [f"calibration/{name}.py" for name in ("calibrate", "errors", "levels", "oracle", "search", "trajectory")]
    names += ["readings/grids.py", "samplers/multistep.py", "studies/sampler_benchmark_calibration.py"]
    return hashlib.sha256(b"".join(files("diffusers_gm").joinpath(name).read_bytes() for name in names)).hexdigest()


RULES = rules()  # of the code that runs, whatever becomes of the files meanwhile


class Calibrations:
    """The calibrations of a network, for the numbers of calls that `calibrate` takes by itself.

    Args:
        pipeline: of the network, with its own scheduler.
        folder: where they are kept.
        content: a hash of the network.
        images: real ones, `(n, C, H, W)`, by which `WITH_IMAGES` chooses.
    """

    def __init__(self, pipeline: Any, folder: Path, content: str, images: Tensor | None = None):
        self.pipeline, self.folder, self.content, self.images = pipeline, folder, content, images

    def scheduler(self, variant: str, stochasticity: float | None = None) -> CalibratedMultistepScheduler:
        """What `calibrate` returned; with another stochasticity, if it is given."""
        config, calibration = self.pipeline.scheduler.config, self._kept(variant)["calibration"]
        return CalibratedMultistepScheduler.from_config(config, calibration=calibration, stochasticity=stochasticity)

    def levels(self, variant: str) -> Callable[[float, float, int], Tensor]:
        """The levels of a variant for a number of calls, as `.sampler_benchmark_schedulers.on_levels` takes them."""
        return lambda high, low, n: calibrated_levels(self._kept(variant)["calibration"], n)

    def table(self) -> Table | None:
        """What was measured by those that there are."""
        rows = []
        for name in [*VARIANTS, GITS]:
            if self._path(name).is_file():
                kept = self._kept(name)
                taus = ", ".join(dict.fromkeys(map(in_words, kept["stochasticity"].values())))
                rows.append([
                    name, taus, kept["martingale_defect"] or "-", kept["network_calls"], kept["seconds"] or "-",
                ])  # fmt: skip
        header = ["calibration", "tau", "martingale defect", "network calls", "seconds"]
        caption = f"Calibrations, each for {', '.join(map(str, CALLS))} calls."
        return Table(caption, header, rows) if rows else None

    def _path(self, variant: str) -> Path:
        many = f" n={len(self.images)}" if variant == WITH_IMAGES and self.images is not None else ""
        return self.folder / f"calibration {self.content[:16]} {variant}{many}.json"

    def _kept(self, variant: str) -> dict[str, Any]:
        path = self._path(variant)
        if not path.is_file():
            made = gits(self.pipeline) if variant == GITS else self._made(variant)
            write_json(path, {**made, "rules": RULES})
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("rules") != RULES:
            raise ValueError(
                f"{path} was calibrated by other code than there is, and so were the samples that were measured on it: "
                "give another --output"
            )
        return kept

    def _made(self, variant: str) -> dict[str, Any]:
        images = self.images if variant == WITH_IMAGES else None
        found = calibrate_in_full(self.pipeline, progress=False, images=images, **VARIANTS[variant])
        print(f"{variant}: tau {found.stochasticity}, {sum(found.seconds):.1f} s", flush=True)
        return {
            "calibration": dict(found.scheduler.config.calibration),
            "stochasticity": {str(n): tau for n, tau in found.stochasticity.items()},
            "martingale_defect": found.martingale_defect,
            "network_calls": found.network_calls,
            "seconds": round(sum(found.seconds), 2),
        }


# --- One trajectory and one cost a step ------------------------------------------------------------------------------


def gits(pipeline: Any) -> dict[str, Any]:
    """Levels of the kind of GITS (arXiv 2405.11326): the ones between which single Euler steps leave a fine trajectory
    least, by dynamic programming; written anew from the idea, the costs summed as they are."""
    described = CalibratedMultistepScheduler.from_config(pipeline.scheduler.config)
    low, high = level_range(described.reading)
    sigmas = sigma_grid(high, max(low, LOW), NUM_GITS, "karras")
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()

    def work(denoiser: Denoiser, start: Tensor, _: float) -> Tensor:
        return step_costs(denoiser, start, sigmas)

    costs = with_denoiser(
        pipeline, described, work, num_inference_steps=MANY, batch_size=BATCH_GITS, generator=generator
    )
    calibration = {str(n): sigmas[cheapest_path(costs, n)].tolist() for n in CALLS}
    return {
        "calibration": calibration,
        "stochasticity": dict.fromkeys(calibration, 0.0),
        "martingale_defect": None,
        "network_calls": NUM_GITS,
        "seconds": round(time.perf_counter() - began, 2),
    }


def step_costs(denoiser: Denoiser, start: Tensor, sigmas: Tensor) -> Tensor:
    """`(K, K + 1)`: how far an Euler step from level k to level m, the last one 0, lands from the trajectory of K
    Euler steps, in the root mean square; infinite where m is not below k."""
    n = len(sigmas)
    trajectories = Trajectories(denoiser, start, sigmas, Multistep(1, corrector=False))
    run = trajectories.run(list(range(n)))
    ends = torch.stack([*(y for y, _ in run.states), run.denoised[-1]]).flatten(1)
    levels = torch.cat([sigmas, torch.zeros(1)]).to(ends)
    costs = torch.full((n, n + 1), math.inf, dtype=torch.float64)
    for k in range(n):
        slope = (ends[k] - run.denoised[k].flatten()) / levels[k]
        landed = ends[k] + (levels[k + 1 :] - levels[k])[:, None] * slope
        costs[k, k + 1 :] = (landed - ends[k + 1 :]).square().mean(1).sqrt().double()
    return costs


def cheapest_path(costs: Tensor, num_steps: int) -> list[int]:
    """The levels from which the `num_steps` steps go that lead from the first level to the last at the least cost."""
    n = len(costs)
    square = torch.cat([costs, torch.full((1, n + 1), math.inf, dtype=torch.float64)])
    left, choices = torch.full((n + 1,), math.inf, dtype=torch.float64), []
    left[n] = 0.0
    for _ in range(num_steps):
        left, choice = (square + left).min(1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices[1:]):
        path.append(int(choice[path[-1]]))
    return path
