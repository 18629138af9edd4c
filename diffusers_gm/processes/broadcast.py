"""Numbers of which each image has its own."""

from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values `(B,)` or scalar, in the dtype and on the device of `like` `(B, ...)`, to broadcast against it."""
    return values.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))
