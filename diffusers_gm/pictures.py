"""How everything here is drawn: grids of images, and curves that are told apart in grey and by the colour-blind."""

import math
from collections.abc import Sequence
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

# Okabe and Ito's colours, without the yellow that white paper swallows, in an order in which neighbours differ in grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
# In grey, lines differ by their dashes and points by their markers.
LINESTYLES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = "os^DvPX<>d*"


def style() -> Any:
    """Settings of matplotlib for all our figures: `with matplotlib.rc_context(style())`."""
    from cycler import cycler

    return {
        "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINESTYLES),
        "image.cmap": "gray",
        "image.interpolation": "nearest",
        "legend.handlelength": 3.5,  # that of the dashes
        "lines.markersize": 5,
    }


def curve_style(index: int) -> dict[str, Any]:
    """How to draw the points of a curve among others: no two of 49 share two of colour, marker and dashes."""
    turn, at = divmod(index, len(COLORS))
    dashes = LINESTYLES[(at + turn) % len(LINESTYLES)]
    return {"color": COLORS[at], "marker": MARKERS[index % len(MARKERS)], "linestyle": dashes}


def as_images(images: Tensor) -> list[Image.Image]:
    """`(n, 1 or 3, H, W)` in [-1, 1], clipped, as PIL images."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((images.float() / 2 + 0.5).clamp(0, 1)))


def image_grid(images: Sequence[Image.Image] | Tensor, columns: int | None = None, min_side: int = 64) -> Image.Image:
    """Images with white gaps between them, small ones enlarged without smoothing.

    Args:
        images: of one size and mode; PIL images, or a tensor `(n, 1 or 3, H, W)` in [-1, 1].
        columns: images in a row; None: those of the squarest full grid.
        min_side: sides that are shorter are enlarged by a whole number, to at least this.

    Raises:
        ValueError: without images, or for images that differ in size or mode.
    """
    shown = as_images(images) if isinstance(images, Tensor) else list(images)
    shown = [image.convert("RGB") if image.mode == "P" else image for image in shown]  # each has a palette of its own
    kinds = sorted({(image.size, image.mode) for image in shown})
    if len(kinds) != 1:
        raise ValueError(f"a grid needs at least one image, and all of one size and mode, got {kinds}")
    rows = next(r for r in range(math.isqrt(len(shown)), 0, -1) if len(shown) % r == 0)
    columns = columns or len(shown) // rows
    rows = math.ceil(len(shown) / columns)
    factor = math.ceil(min_side / min(shown[0].size))
    width, height = (side * factor for side in shown[0].size)
    gap = max(1, min(width, height) // 16)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new(shown[0].mode, size, "white")
    for i, image in enumerate(shown):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return grid
