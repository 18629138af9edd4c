"""The classes of a class-conditional training."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data import ImageSource, LabelledImages, Labels
from ..networks import num_class_embeds
from ..pipelines.inputs import by_index
from .options import TrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """Attributes:
    labels: names of the classes, and the class of each image; None in an unconditional training.
    dropout: how probably a label is dropped; where that never happens, there is no class that stands for none.
    """

    labels: Labels | None = None
    dropout: float = 0.0

    @property
    def names(self) -> list[str]:
        return self.labels.names if self.labels else []

    @property
    def num_embeds(self) -> int | None:
        """Classes of the network: those of the data and, the last one, none."""
        return len(self.names) + (self.dropout > 0) if self.names else None

    @property
    def null(self) -> int | None:
        """What a network is asked for where no class is known: none, or where that was never learned, the first."""
        if not self.names:
            return None
        return len(self.names) if self.dropout else 0

    def of(self, images: Any, seed: int) -> Any:
        """Training images with their classes, if they have any."""
        if self.labels is None or self.null is None:
            return images
        return LabelledImages(images, self.labels.of_images, self.null, self.dropout, seed)

    def on(self, device: torch.device, batch: Any) -> tuple[Tensor, Tensor | None]:
        """A batch of these, moved to a device: images and classes."""
        images, classes = (batch, None) if self.labels is None else batch
        return images.to(device, non_blocking=True), None if classes is None else classes.to(device, non_blocking=True)

    def for_pipeline(self) -> dict[str, Any]:
        """What a pipeline remembers of them."""
        if self.labels is None:
            return {}
        counts = self.labels.counts()
        return {"class_names": self.labels.names, "class_shares": [count / sum(counts) for count in counts]}

    def grid(self, num_images: int) -> tuple[int, int | None]:
        """How many of `num_images` samples a grid shows, and how many are in a row: a row is a class, if there is room
        for more than one of each."""
        of_each = num_images // len(self.names) if self.names else 0
        return (of_each * len(self.names), of_each) if of_each > 1 else (num_images, None)


def classes_of(args: TrainingArguments, source: ImageSource, unet: Any) -> Classes:
    """The classes of the training images, which a given network must have, too.

    Raises:
        ValueError: if the images have none, or a network that is fine-tuned has others.
    """
    if not args.class_conditional:
        if args.label_column is not None:
            raise ValueError(f"--label_column {args.label_column} means nothing without --class_conditional")
        return Classes()
    labels = source.labels(args.label_column)
    classes = Classes(labels, args.class_dropout)
    seen = [name for name, count in zip(labels.names, labels.counts(), strict=True) if count]
    if len(seen) < 2:
        raise ValueError(f"--class_conditional: all images are of one class, {seen[0]!r}")
    if missing := [name for name in labels.names if name not in seen]:
        logger.warning(f"--class_conditional: of {len(missing)} classes there are no images, {missing[0]!r} first")
    if unet is None:
        return classes
    option = "--model_name_or_path" if args.model_name_or_path else "--model_config"
    name, embeds = args.model_name_or_path or args.model_config, num_class_embeds(unet)
    if embeds != classes.num_embeds:
        none = ", and one that stands for none" if classes.dropout else ""
        raise ValueError(
            f"{option} {name} has {embeds} classes, and the data {len(labels.names)}{none}: it must have "
            f"num_class_embeds = {classes.num_embeds}"
        )
    if args.model_name_or_path:
        try:
            config = DiffusionPipeline.load_config(name, cache_dir=args.cache_dir, revision=args.revision)
        except OSError:  # a network alone, which has no names
            return classes
        before = by_index(config.get("class_names")) or labels.names
        differ = next((pair for pair in zip_longest(before, labels.names) if pair[0] != pair[1]), None)
        if differ is not None:
            raise ValueError(
                f"{option} {name} was trained on other classes, or in another order: the first that differs was "
                f"{differ[0]!r} and is {differ[1]!r}"
            )
    return classes


def with_labels(network: Callable[..., Any], classes: Tensor | None) -> Callable[..., Any]:
    """The network of a noisy image and a timestep that a conditional one is for these classes `(B,)`."""
    return network if classes is None else lambda sample, timestep: network(sample, timestep, classes)
