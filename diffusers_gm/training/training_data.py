"""What a training learns from must be the same when it is resumed: the images, and how many make a step."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from ..autoencoders import LatentSpace
from ..data import Examination, ImageSource, Labels, open_source, open_stream, subset
from ..data.examination import NUM_TOLD_BY, brightness, same_brightness
from ..launch import from_main
from ..processes.annealed import max_pairwise_distance
from .options import TrainingArguments
from .plan import Plan

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"


@dataclass(frozen=True)
class TrainingData:
    """What a checkpoint remembers of the data. None: not known, as of version 0.1.0.

    Attributes:
        num_images: size of the training set; None for a stream, whose size is what it is said to be.
        images_per_step: of an optimizer step, over all batches and processes. How they are split among these
            decides which noise is drawn for them, not what is learned.
        brightness: means of some images that the seed chooses, so that others, or another order, are noticed.
        largest_distance: between two images, where it was measured.
        classes: of a conditional training, the name of each class and its number of images.
        latents_scaling: of a training on latents, the mean and the deviation of each channel that they are scaled by.
    """

    num_images: int | None = None
    images_per_step: int | None = None
    brightness: list[float] | None = None
    largest_distance: float | None = None
    classes: list[list[Any]] | None = None
    latents_scaling: list[list[float]] | None = None

    @classmethod
    def of(cls, content: dict[str, Any]) -> "TrainingData":
        """From the content of a checkpoint's state file."""
        if "data" in content:
            return cls(**content["data"])
        # Version 0.1.0 let the batch change, and did not write down the number of processes.
        state, options = content["state"], content["arguments"]
        per_process = options["train_batch_size"] * options["gradient_accumulation_steps"]
        processes, rest = divmod(state["images_seen"], max(state["step"], 1) * per_process)
        return cls(images_per_step=None if rest else processes * per_process)

    def check_against(self, before: "TrainingData", checkpoint: str) -> None:
        """Raise a ValueError if the training of a checkpoint had other data, or other steps."""
        if before.images_per_step not in (None, self.images_per_step):
            raise ValueError(
                f"{checkpoint} was trained in steps of {before.images_per_step} images and these options make "
                f"{self.images_per_step}: --train_batch_size times --gradient_accumulation_steps times the number "
                f"of processes must stay {before.images_per_step}"
            )
        anew = "to train on others, start anew, from its finished pipeline with --model_name_or_path"
        if None not in (before.num_images, self.num_images) and before.num_images != self.num_images:
            raise ValueError(
                f"{checkpoint} was trained on {before.num_images} images and there are {self.num_images} now: {anew}"
            )
        if not same_brightness(before.brightness or [], self.brightness or []):
            raise ValueError(
                f"{checkpoint} was trained on other images, or on these in another order (are files renamed?): {anew}"
            )
        by_class = zip_longest(before.classes or [], self.classes or [])
        other_classes = [(one, other) for one, other in by_class if one != other]
        if other_classes:
            (one, other), words = other_classes[0], lambda of: f"{of[0]!r} with {of[1]} images" if of else "not there"
            raise ValueError(
                f"{checkpoint} was trained on other classes: the first that differs was {words(one)} and is "
                f"{words(other)}: {anew}"
            )


def open_training_data(args: TrainingArguments) -> ImageSource:
    """The images that the options name; of a stream the first ones, for what needs some.

    Raises:
        ValueError: if there are none.
    """
    named = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.image_column
    if args.streaming:
        source = open_stream(*named, args.background)
        logger.warning(
            f"--streaming: the first {source.num_images} images say what the data are like, --sigma_max auto and what "
            "is black and white included"
        )
        return source
    images = open_source(*named, args.cache_dir, args.background)
    return images if args.max_train_samples is None else subset(images, args.max_train_samples, args.seed)


def training_data(
    args: TrainingArguments,
    plan: Plan,
    examination: Examination,
    num_images: int,
    images_per_step: int,
    labels: Labels | None = None,
    space: LatentSpace | None = None,
) -> TrainingData:
    """What a checkpoint is to remember of the data."""
    measured = args.sigma_max == "auto" and args.timestep_sampling != "log_normal"
    return TrainingData(
        num_images=None if args.streaming else num_images,
        images_per_step=images_per_step,
        brightness=brightness(examination.images[:NUM_TOLD_BY]),
        largest_distance=plan.sigma_max if measured else None,
        classes=labels and [list(pair) for pair in zip(labels.names, labels.counts(), strict=True)],
        latents_scaling=None if space is None else [space.mean.tolist(), space.std.tolist()],
    )


def distance_measured_once(checkpoint: Path | None) -> Callable[[Tensor], float]:
    """The largest distance of images for all processes: what the checkpoint says, or the main process measures."""

    def largest_distance(images: Tensor) -> float:
        known = TrainingData.of(read_state(checkpoint)).largest_distance if checkpoint else None
        if known is not None:
            return known
        if len(images) < 2:  # for all processes to say: the others would wait for the main one
            return max_pairwise_distance(images)
        return from_main(lambda: max_pairwise_distance(images))

    return largest_distance


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's state file."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
