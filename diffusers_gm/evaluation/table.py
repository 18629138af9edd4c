"""One network under several samplers and budgets, by sliced W2 alone: quick enough for the demo."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distances import sliced_wasserstein


@dataclass(frozen=True)
class Quality:
    """One cell of a quality table: a sampler at a number of network calls.

    Attributes:
        sampler: its name.
        calls: network calls.
        distance: sliced W2 to the reference, in pixel units; None where the sampler has no stable step.
        ratio: distance over the floor.
        seconds: wall time of sampling.
        reason: why there is no distance.
    """

    sampler: str
    calls: int
    distance: float | None
    ratio: float | None
    seconds: float
    reason: str = ""


def quality(
    pipeline: Any,
    schedulers: dict[str, Any],
    calls: Sequence[int],
    reference: Tensor,
    floor: float,
    num_samples: int,
    seed: int = 0,
) -> Iterator[Quality]:
    """Sliced W2 of one network under several schedulers and budgets, one result at a time.

    Args:
        pipeline: an unconditional image pipeline; its scheduler is replaced, and put back at the end.
        schedulers: samplers by name.
        calls: numbers of network calls.
        reference: real images `(n, C, H, W)` in [-1, 1].
        floor: the same distance between `num_samples` real images that are not in the reference, and the reference.
        num_samples: images per cell.
        seed: decides the samples.
    """
    original = pipeline.scheduler
    try:
        for name, scheduler in schedulers.items():
            pipeline.scheduler = scheduler
            for count in calls:
                start = time.perf_counter()
                try:
                    scheduler.set_timesteps(count)
                except ValueError as error:
                    yield Quality(name, count, None, None, 0.0, str(error))
                    continue
                generator = torch.Generator().manual_seed(seed)
                images = pipeline(num_samples, count, generator, output_type="pt").images
                seconds = time.perf_counter() - start
                distance = sliced_wasserstein(images.cpu() * 2 - 1, reference)
                yield Quality(name, count, distance, distance / floor, seconds)
    finally:
        pipeline.scheduler = original


def markdown_table(results: Sequence[Quality]) -> str:
    """Ratios to the floor as Markdown: a row per sampler, a column per number of calls; `-` = no stable step."""
    calls = sorted({r.calls for r in results})
    cells = {(r.sampler, r.calls): f"{r.ratio:.2f}" if r.ratio is not None else "-" for r in results}
    lines = ["| sampler | " + " | ".join(f"{n} calls" for n in calls) + " |", "|---" * (len(calls) + 1) + "|"]
    for name in dict.fromkeys(r.sampler for r in results):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, n), "") for n in calls) + " |")
    return "\n".join(lines)
