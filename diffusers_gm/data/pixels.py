"""From files to tensors: what the numbers in an image mean."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION
from torch import Tensor

from ..processes.random import Draw, Generators

Colour = tuple[int, int, int]
# Side of a square, or height and width.
Resolution = int | Sequence[int]


def colour(background: str | Sequence[int] | None) -> Colour:
    """A colour by any name that PIL knows (`white`, `#808080`, `rgb(0, 0, 0)`), or as three numbers from 0 to 255;
    None: white.

    Raises:
        ValueError: for anything else.
    """
    background = background or "white"
    try:
        rgb = tuple(ImageColor.getrgb(background)[:3] if isinstance(background, str) else map(int, background))
    except ValueError as error:
        raise ValueError(f"background {background!r} is no colour, such as 'white' or '#808080': {error}") from error
    if len(rgb) != 3 or not all(0 <= value <= 255 for value in rgb):
        raise ValueError(f"background {background!r} is no colour: give three numbers from 0 to 255")
    return rgb[0], rgb[1], rgb[2]


def decode(image: Image.Image, background: Colour = (255, 255, 255)) -> np.ndarray:
    """The pixels of an image as it is to be looked at: upright, its first frame, on a background where it has alpha.

    Returns:
        `(H, W)` of a gray image, `(H, W, 3)` of any other: uint8, where the mode says that 0 is black and 255 white;
        else uint16, int32 or float32 `(H, W)`, of which only the other images can tell what is black and white.

    Raises:
        whatever the decoder raises; ValueError: for pixels that are not finite, or that PIL cannot convert.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        if image.has_transparency_data:
            raise ValueError(f"an image of mode {image.mode} with a transparent colour")
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:  # PIL inverts those of 8 bits alone
            raise ValueError(f"a TIFF of mode {image.mode} in which 0 is white: save it with 0 as black")
        pixels = np.array(image)
        if image.mode == "F" and not np.isfinite(pixels).all():
            raise ValueError("pixels that are not finite")
        return pixels.astype(pixels.dtype.newbyteorder("="))
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
        image = image.convert(straight).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        gray = gray and len(set(background)) == 1
    mode = "L" if gray else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


@contextmanager
def unmapped(image: Image.Image) -> Iterator[Image.Image]:
    """An image file without its name, by which Pillow maps what is not compressed into memory, and scrambles it where
    it is to be turned."""
    name = getattr(image, "filename", None)
    if name:
        image.filename = ""  # type: ignore[attr-defined]
    try:
        yield image
    finally:
        if name:
            image.filename = name  # type: ignore[attr-defined]


def has_16_bits(image: Image.Image) -> bool:
    """Whether the file, not decoded yet, has a colour image of 16 bits a channel, of which PIL keeps the upper 8."""
    return image.mode[0] not in "IF" and any(";16" in str(tile[-1]) for tile in getattr(image, "tile", ()))


# --- Ranges ---


@dataclass(frozen=True)
class PixelRange:
    """What is black and what is white in images whose mode does not say."""

    black: float
    white: float
    words: str

    def scale(self, pixels: np.ndarray) -> Tensor:
        """`(H, W)` float32 in [-1, 1]; a ValueError if a pixel is out of the range."""
        low, high = float(pixels.min()), float(pixels.max())
        if not self.black <= low <= high <= self.white:
            raise ValueError(
                f"pixels from {low:g} to {high:g}, while the images examined are read as {self.words}: one scale must "
                "fit all"
            )
        unit = (pixels.astype(np.float64) - self.black) / (self.white - self.black)
        return torch.from_numpy((unit * 2 - 1).astype(np.float32))


FLOATS = [PixelRange(*ends, f"[{ends[0]}, {ends[1]}]") for ends in ((0, 1), (-1, 1), (0, 255), (0, 65535))]
INTEGERS = [PixelRange(0, 2**bits - 1, f"{bits} bits") for bits in (8, 10, 12, 14, 16, 24, 31)]
KINDS = {"uint16": "16-bit", "int32": "32-bit integer", "float32": "floating-point"}


def range_of(kind: str, low: float, high: float) -> PixelRange:
    """The range of a set of images of a kind whose smallest and largest pixels are these; a ValueError if there is none
    that can be meant."""
    for known in FLOATS if kind == "float32" else INTEGERS:
        if known.black <= low and high <= known.white:
            return known
    raise ValueError(
        f"{KINDS[kind]} images with pixels from {low:g} to {high:g}: which of them are black and white cannot be told; "
        "give whole numbers from 0, or floating-point numbers in [0, 1], [-1, 1] or [0, 255]"
    )


def as_tensor(pixels: np.ndarray, ranges: Mapping[str, PixelRange]) -> Tensor:
    """What `decode` returns as `(1 or 3, H, W)`: uint8 as it is, all else float32 in [-1, 1]; a ValueError if nothing
    says what the range is, or it is another."""
    if pixels.dtype == np.uint8:
        tensor = torch.from_numpy(pixels)
        return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)
    kind = pixels.dtype.name
    if kind not in ranges:
        raise ValueError(f"a {KINDS.get(kind, kind)} image, where all that were examined have 8 bits")
    return ranges[kind].scale(pixels)[None]


# --- Tensors ---


def scaled(images: Tensor) -> Tensor:
    """uint8 from 0 to 255 as float32 from -1 to 1; images that are float already as they are."""
    return images.float() / 255 * 2 - 1 if images.dtype == torch.uint8 else images


def as_channels(image: Tensor, channels: int) -> Tensor:
    """`(1 or 3, H, W)` as `(channels, H, W)`: gray repeated, or the luma of a colour (ITU-R 601)."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    return torch.einsum("chw,c->hw", scaled(image), torch.tensor([0.299, 0.587, 0.114]))[None]


def sides(resolution: Resolution) -> tuple[int, int]:
    """Height and width."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return height, width


def resolution_of(height: int, width: int) -> Resolution:
    """As options have it: one number for a square."""
    return height if height == width else [height, width]


def fit(image: Tensor, resolution: Resolution, crop: Sequence[float] = (0.5, 0.5)) -> Tensor:
    """`(C, H, W)` as `(C, *sides(resolution))`: resized until one side fits and the other is not too short, which is
    then cropped; proportions stay.

    `crop` is the place of the crop, vertical and horizontal, from 0 (top, left) to 1. What is resized becomes float32.
    """
    height, width = sides(resolution)
    if image.shape[-2:] == (height, width):
        return image
    scale = max(height / image.shape[-2], width / image.shape[-1])
    if scale != 1:
        size = (max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale)))
        image = F.interpolate(scaled(image)[None], size, mode="bilinear", antialias=True)[0]
    top, left = (round(c * n) for c, n in zip(crop, (image.shape[-2] - height, image.shape[-1] - width), strict=True))
    return image[:, top : top + height, left : left + width]


# --- Levels ---


def dequantized(images: Tensor, num_levels: int, generator: Generators = None) -> Tensor:
    """Images of `num_levels` equal levels from -1 to 1 with uniform noise of the width of a level; same shape.

    The noise is in `[-w/2, w/2)` with `w = 2 / (num_levels - 1)`: rounding to the nearest level takes it away again.
    """
    uniform = Draw.like(images, generator).uniform(images.shape)
    return images + (uniform - 0.5) * 2 / (num_levels - 1)


def check_levels(images: Tensor, num_levels: int) -> None:
    """Raise a ValueError unless every value of the images is one of `num_levels` equal levels from -1 to 1."""
    number = (images.double() + 1) * (num_levels - 1) / 2
    away = (number - number.round().clamp(0, num_levels - 1)).abs()
    if not (away < 1e-3).all():
        raise ValueError(
            f"the images hold {float(images.flatten()[away.argmax()]):.4g}, which is none of {num_levels} equal levels "
            "from -1 to 1: give the number of levels of the data (256 for 8 bits, 17 for the digits), and no images "
            "that were resized"
        )
