"""What the data are like."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .pixels import Resolution, as_channels, fit, resolution_of, scaled
from .seeds import EXAMINATION, order_for
from .sources import ImageSource

logger = logging.getLogger(__name__)

MAX_UNREADABLE = 0.1
NUM_EXAMINED = 2000
# 256 MiB of float32.
MAX_ELEMENTS = 2**26
# Images that tell one set from another by their brightness.
NUM_TOLD_BY = 16
# Decoders of different versions, and resizing on other machines, differ by far less in the mean of an image.
SAME_BRIGHTNESS = 0.02


@dataclass(frozen=True)
class Examination:
    """What a seeded random subset says about the training images.

    Attributes:
        images: the subset `(n, channels, height, width)`, cropped at the centre; or the latents of one.
        of_latents: where `images` are latents, the resolution of the images that these stand for.
    """

    images: Tensor
    of_latents: Resolution | None = None

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def resolution(self) -> Resolution:
        """Of the images."""
        return resolution_of(*self.size) if self.of_latents is None else self.of_latents


def examine(
    source: ImageSource,
    seed: int,
    resolution: Resolution | None = None,
    channels: int | None = None,
    num_images: int = NUM_EXAMINED,
    max_elements: int = MAX_ELEMENTS,
) -> Examination:
    """Read up to `num_images` images, or as many as have `max_elements` elements.

    `resolution=None` takes the images' own size, `channels=None` gray if all of them are.

    Raises:
        ValueError: if the images differ in size and no resolution is given, or too many cannot be read.
    """
    order = order_for(source.num_images, seed, EXAMINATION)[:num_images]
    if not order:
        raise ValueError("there are no training images in the data")
    images = torch.empty(0, channels or 1, 1, 1)
    num_read = 0
    unreadable: list[str] = []
    failure: Exception | None = None
    for index, image in source.fetch_each(order):
        if isinstance(image, Exception):
            unreadable.append(source.name(index))
            failure = image
            continue
        if resolution is None:
            _check_size(image, images[:num_read])
        fitting = scaled(fit(image, resolution or image.shape[-1]))
        num_channels = channels or max(len(fitting), images.shape[1])
        if num_read == 0 or num_channels > images.shape[1]:
            # Room for all that may come: memory that is not written to costs nothing.
            most = math.ceil(max_elements / (num_channels * fitting[0].numel()))
            room = torch.empty(max(num_read + 1, min(most, len(order))), num_channels, *fitting.shape[1:])
            room[:num_read] = images[:num_read]
            images = room
        images[num_read] = as_channels(fitting, num_channels)
        num_read += 1
        if num_read == len(images):
            break
    if unreadable:
        num_drawn = num_read + len(unreadable)
        words = f"{len(unreadable)} of {num_drawn} training images examined cannot be read"
        if len(unreadable) > MAX_UNREADABLE * num_drawn:
            raise ValueError(f"{words}, the last, {unreadable[-1]}: {failure}") from failure
        names = ", ".join(unreadable[:10]) + (", ..." if len(unreadable) > 10 else "")
        logger.warning(f"{words} and are skipped: {names}; the last: {failure}")
    return Examination(images[:num_read])


def brightness(images: Iterable[Tensor]) -> list[float]:
    """The mean of each image, in [-1, 1], by which other images, or another order, are noticed."""
    return [round(float(image.mean()), 3) for image in images]


def same_brightness(before: Iterable[float], now: Iterable[float]) -> bool:
    """Whether two lists of `brightness` can be of the same images; of the longer one, the first are compared."""
    return all(abs(one - other) <= SAME_BRIGHTNESS for one, other in zip(before, now, strict=False))


def _check_size(image: Tensor, images: Tensor) -> None:
    """Raise a ValueError unless the image is a square, as large as those before it."""
    size = f"{image.shape[-2]}x{image.shape[-1]}"
    if image.shape[-2] != image.shape[-1]:
        raise ValueError(f"the images are not square ({size}): set --resolution, to one side or to height and width")
    native = images.shape[-1] if len(images) else image.shape[-1]
    if image.shape[-1] != native:
        raise ValueError(f"the images differ in size ({native}x{native}, {size}): set --resolution")
