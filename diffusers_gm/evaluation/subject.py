"""What is measured: a pipeline under several schedulers, or images that are there already."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.guidance import check_guidance
from ..pipelines.inputs import class_indices
from .features import fingerprint
from .sampling import (
    describe_configs,
    describe_model,
    image_shape,
    load_pipeline,
    num_steps_for,
    sample,
    scheduler_by_name,
)
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
        configs: of a pipeline, a hash of those of its networks.
        shape: `(C, H, W)` of the images.
        num_samples: how many; None: as many as there is real data for.
        classes: of which all images are, samples and real ones: names, or places where the model has no names; None:
            of all classes.
        samples: the images, in [-1, 1]; or
        pipeline: what makes them, and
        runs: by name, with which scheduler and arguments of the pipeline.
    """

    name: str
    content: str
    shape: tuple[int, int, int]
    num_samples: int | None
    classes: list[str | int] | None
    samples: Tensor | None = None
    pipeline: Any = None
    configs: str | None = None
    runs: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, args: argparse.Namespace, device: torch.device) -> "Subject":
        """What the options describe."""
        if args.samples is not None:
            samples = read_samples(args.samples, args.num_samples, args.cache_dir, args.background, args.class_labels)
            channels, height, width = samples.shape[1:]
            content, shape = fingerprint(samples.nan_to_num()), (channels, height, width)
            return cls(name_of(args.samples), content, shape, len(samples), args.class_labels, samples)
        pipeline = load_pipeline(args.model, device)
        own = pipeline.scheduler
        schedulers = dict(scheduler_by_name(own, words) for words in args.scheduler or []) or {type(own).__name__: own}
        guidance = _guidance(args, pipeline)
        classes, among = (None, {}) if args.class_labels is None else _classes(args.class_labels, pipeline)
        runs = {
            f"{name}{suffix}": (scheduler, among | arguments)
            for name, scheduler in schedulers.items()
            for suffix, arguments in guidance.items()
        }
        name, content, shape = name_of(args.model), describe_model(pipeline), image_shape(pipeline)
        configs = describe_configs(pipeline)
        return cls(name, content, shape, args.num_samples, classes, None, pipeline, configs, runs)

    def cells(self, calls: Sequence[int], seeds: Sequence[int]) -> list[tuple[str, int | None, int | None]]:
        """Scheduler, calls and seed of everything to be measured; for images that are there, their name alone."""
        if self.samples is not None:
            return [(self.name, None, None)]
        return [(name, num, seed) for name in self.runs for num in calls for seed in seeds]

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
        scheduler, arguments = self.runs[name]
        num_steps = num_steps_for(scheduler, calls)
        images, made = sample(self.pipeline, scheduler, num_steps, num_images, seed, batch_size, **arguments)
        if made > calls:
            raise ValueError(f"{name} made {made} network calls where {calls} were allowed: it cannot be compared")
        return images, made


def _classes(words: Sequence[str], pipeline: Any) -> tuple[list[str | int], dict[str, Any]]:
    """The classes of `--class_labels`, names where the model has them, and how `sample` is told."""
    names, num_classes = getattr(pipeline, "class_names", None), getattr(pipeline, "num_classes", None)
    if num_classes is None:
        raise ValueError(f"--class_labels {' '.join(words)}: this model has no classes")
    given = [int(word) if word.isdecimal() and word not in (names or []) else word for word in words]
    indices = class_indices(given, num_classes, names)
    return [names[index] if names else index for index in indices], {"among": indices}


def _guidance(args: argparse.Namespace, pipeline: Any) -> dict[str, dict[str, Any]]:
    """Arguments of the pipeline for every `--guidance_scale`, by what is added to the name of a scheduler."""
    found: dict[str, dict[str, Any]] = {}
    interval = args.guidance_interval
    within = "" if interval is None else f" in [{interval[0]:g}, {interval[1]:g}]"
    null, is_conditional = getattr(pipeline, "null_class", None), getattr(pipeline, "num_classes", None) is not None
    for scale in args.guidance_scale:
        if scale == 1:
            found[""] = {}
            continue
        check_guidance(scale, interval, null, is_conditional)
        found[f", guidance {scale:g}{within}"] = {"guidance_scale": scale, "guidance_interval": interval}
    return found
