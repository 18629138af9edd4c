"""What the data are like."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from .pixels import as_channels, fit, scaled
from .seeds import EXAMINATION, generator_for
from .sources import ImageSource

logger = logging.getLogger(__name__)

MAX_UNREADABLE = 0.1
# 256 MiB of float32.
MAX_ELEMENTS = 2**26


@dataclass(frozen=True)
class Examination:
    """What a seeded random subset says about the training images.

    Attributes:
        images: the subset `(n, channels, resolution, resolution)`, cropped at the centre.
        num_unreadable: how many more were drawn that cannot be read.
    """

    images: Tensor
    num_unreadable: int

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]


def examine(
    source: ImageSource,
    seed: int,
    resolution: int | None = None,
    channels: int | None = None,
    num_images: int = 2000,
    max_elements: int = MAX_ELEMENTS,
) -> Examination:
    """Read up to `num_images` images, or as many as have `max_elements` elements.

    `resolution=None` takes the images' own size, `channels=None` gray if all of them are.

    Raises:
        ValueError: if the images differ in size and no resolution is given, or too many cannot be read.
    """
    order = torch.randperm(source.num_images, generator=generator_for(seed, EXAMINATION)).tolist()[:num_images]
    images: list[Tensor] = []
    unreadable: list[str] = []
    failure: Exception | None = None
    most_channels = channels or 1
    for index, image in source.fetch_each(order):
        if isinstance(image, Exception):
            unreadable.append(source.name(index))
            failure = image
            continue
        if resolution is None:
            _check_size(image, images)
        # A copy, where it is a part of the image: the rest need not be kept.
        images.append(fit(image, resolution or image.shape[-1]).contiguous())
        most_channels = channels or max(most_channels, len(image))
        if len(images) * most_channels * images[0][0].numel() >= max_elements:
            break
    num_read = len(images) + len(unreadable)
    if not images or len(unreadable) > MAX_UNREADABLE * num_read:
        raise ValueError(
            f"{len(unreadable)} of {num_read} training images examined cannot be read, the last, {unreadable[-1]}: "
            f"{failure}"
        ) from failure
    if unreadable:
        names = ", ".join(unreadable[:10]) + (", ..." if len(unreadable) > 10 else "")
        logger.warning(
            f"{len(unreadable)} of {num_read} training images examined cannot be read and are skipped: {names}; the "
            f"last: {failure}"
        )
    result = torch.empty(len(images), most_channels, *images[0].shape[1:])
    for i in range(len(images)):
        result[i] = as_channels(scaled(images[i]), most_channels)
        images[i] = images[i][:0]  # the image itself is freed: not all are in memory twice
    return Examination(result, len(unreadable))


def _check_size(image: Tensor, images: list[Tensor]) -> None:
    """Raise a ValueError unless the image is a square, as large as those before it."""
    size = f"{image.shape[-2]}x{image.shape[-1]}"
    if image.shape[-2] != image.shape[-1]:
        raise ValueError(f"the images are not square ({size}): set --resolution")
    native = images[0].shape[-1] if images else image.shape[-1]
    if image.shape[-1] != native:
        raise ValueError(f"the images differ in size ({native}x{native}, {size}): set --resolution")
