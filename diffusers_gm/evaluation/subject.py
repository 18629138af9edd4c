"""What is measured: a pipeline under several schedulers, or images that are there already."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .features import fingerprint
from .sampling import build_scheduler, describe_model, image_shape, load_pipeline, num_steps_for, sample
from .sources import read_samples


def name_of(path: str | Path) -> str:
    """What a file or a folder is called, wherever it lies; names on the Hub stay whole."""
    return Path(path).resolve().name if Path(path).exists() else str(path)


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: what it is called.
        content: a hash of the weights or of the images.
        shape: `(C, H, W)` of the images.
        num_samples: how many; None: as many as there is real data for.
        pipeline, schedulers: what makes the images, schedulers by name; or
        samples: the images, in [-1, 1].
    """

    name: str
    content: str
    shape: tuple[int, int, int]
    num_samples: int | None
    pipeline: Any = None
    schedulers: dict[str, Any] = field(default_factory=dict)
    samples: Tensor | None = None

    @classmethod
    def open(cls, args: argparse.Namespace, device: torch.device) -> "Subject":
        """What the options describe."""
        if args.samples is not None:
            samples = read_samples(args.samples, args.num_samples, args.cache_dir, args.background)
            channels, height, width = samples.shape[1:]
            content = fingerprint(samples.nan_to_num())
            return cls(name_of(args.samples), content, (channels, height, width), len(samples), samples=samples)
        pipeline = load_pipeline(args.model, device)
        own = pipeline.scheduler
        given = dict(build_scheduler(own, words) for words in args.scheduler or [])
        schedulers = given or {type(own).__name__: own}
        name, content, shape = name_of(args.model), describe_model(pipeline), image_shape(pipeline)
        return cls(name, content, shape, args.num_samples, pipeline, schedulers)

    def cells(self, calls: Sequence[int], seeds: Sequence[int]) -> list[tuple[str, int | None, int | None]]:
        """Scheduler, calls and seed of everything to be measured; for images that are there, their name alone."""
        if self.samples is not None:
            return [(self.name, None, None)]
        return [(name, num, seed) for name in self.schedulers for num in calls for seed in seeds]

    def images(
        self, name: str, calls: int | None, seed: int | None, num_images: int, batch_size: int
    ) -> tuple[Tensor, int | None]:
        """The images of a cell, `(n, C, H, W)` in [-1, 1], and the network calls that were made.

        Raises:
            NoGridError: if the scheduler cannot do with so many calls.
            ValueError: if more calls were made than allowed.
        """
        if calls is None or seed is None:
            assert self.samples is not None
            return self.samples, None
        scheduler = self.schedulers[name]
        num_steps = num_steps_for(scheduler, calls)
        images, made = sample(self.pipeline, scheduler, num_steps, num_images, seed, batch_size)
        if made > calls:
            raise ValueError(f"{name} made {made} network calls where {calls} were allowed: it cannot be compared")
        return images, made
