"""In which order images come, and how each is cropped and flipped."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .examination import MAX_UNREADABLE
from .pixels import Resolution, as_channels, fit, scaled, sides
from .seeds import AUGMENTATION, ORDER, generator_for, order_for
from .sources import ImageSource

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ImageStream(Sampler[list[tuple[int, int]]]):
    """Endless batches of `(epoch, index)`: one seeded shuffle after another, dealt out to the processes.

    Attributes:
        num_images: images in an epoch.
        batch_size: per process.
        seed: decides the order.
        start: images seen so far, by all processes together.
        num_processes, process_index: this process gets every `num_processes`-th batch.
    """

    num_images: int
    batch_size: int
    seed: int
    start: int = 0
    num_processes: int = 1
    process_index: int = 0

    @property
    def stride(self) -> int:
        """Images of a batch of every process."""
        return self.num_processes * self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        position = self.start + self.process_index * self.batch_size
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                if p // self.num_images != epoch:
                    epoch = p // self.num_images
                    order = order_for(self.num_images, self.seed, ORDER, epoch)
                batch.append((epoch, order[p % self.num_images]))
            yield batch
            position += self.stride


@dataclass(eq=False)
class TrainingImages(Dataset):
    """Training images by `(epoch, index)`, as `ImageStream` deals them out: `(C, H, W)` float32 in [-1, 1].

    Crops and flips are decided by `(seed, epoch, index)`. In place of an unreadable image comes the next one.
    """

    source: ImageSource
    resolution: Resolution
    channels: int
    seed: int
    center_crop: bool = False
    random_flip: bool = False
    unreadable: set[int] = field(default_factory=set)
    said: bool = False  # that there are colour images among gray ones

    def __len__(self) -> int:
        return self.source.num_images

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A batch, read in one go."""
        fetched = self._read([index for _, index in keys])
        images = [self.augmented(image, key) for image, key in zip(fetched, keys, strict=True)]
        if all(image.dtype == torch.uint8 for image in images):
            return list(scaled(torch.stack(images)))
        return [scaled(image) for image in images]

    def augmented(self, image: Tensor, key: Sequence[int]) -> Tensor:
        """An image of the source as it is learned, cropped and flipped as the key says."""
        if len(image) > self.channels and not self.said:
            self.said = True
            logger.warning(
                f"there are colour images among the training images, such as {self.source.name(key[-1])}: they are "
                "made gray, as those that were examined are, or as the network takes them"
            )
        image = as_channels(image, self.channels)
        height, width = sides(self.resolution)
        random_crop = not self.center_crop and image.shape[-2] * width != image.shape[-1] * height
        if not (random_crop or self.random_flip):
            return fit(image, self.resolution)
        vertical, horizontal, flip = torch.rand(3, generator=generator_for(self.seed, AUGMENTATION, *key)).tolist()
        image = fit(image, self.resolution, (vertical, horizontal) if random_crop else (0.5, 0.5))
        return image.flip(-1) if self.random_flip and flip < 0.5 else image

    def _read(self, indices: list[int]) -> list[Tensor]:
        while True:
            shown = [self.shown_for(index) for index in indices]
            images: list[Any] = self.source.fetch(shown)
            failures = {
                index: image for index, image in zip(shown, images, strict=True) if isinstance(image, Exception)
            }
            if not failures:
                return images
            for index, failure in failures.items():
                self.unreadable.add(index)  # from now on the next one takes its place
                skipped = len(self.unreadable)
                logger.warning(
                    f"training image {self.source.name(index)} cannot be read, {skipped} skipped so far: {failure}"
                )
                if skipped > MAX_UNREADABLE * len(self):
                    raise ValueError(f"{skipped} of {len(self)} training images cannot be read") from failure

    def shown_for(self, index: int) -> int:
        """The first image from this one on that is not known to be unreadable: what is shown in its place."""
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if candidate not in self.unreadable:
                return candidate
        raise ValueError(f"none of the {len(self)} training images can be read")
