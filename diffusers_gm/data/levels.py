"""Images of few levels, and the noise that fills the gaps between them."""

from torch import Tensor

from ..processes.random import Generators, rand


def dequantized(images: Tensor, num_levels: int, generator: Generators = None) -> Tensor:
    """Images of `num_levels` equal levels from -1 to 1 with uniform noise of the width of a level; same shape.

    The noise is in `[-w/2, w/2)` with `w = 2 / (num_levels - 1)`: rounding to the nearest level takes it away again.
    """
    uniform = rand(images.shape, generator, images.device, images.dtype)
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
