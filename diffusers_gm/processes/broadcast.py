"""Numbers of which each image has its own."""

from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values `(B,)` or scalar, in the dtype and on the device of `like` `(B, ...)`, to broadcast against it; a scalar on
    the CPU stays there, as a number does: what is sent to a device makes the CPU wait for it."""
    values = values.to(like.dtype)
    if values.ndim == 0 and values.device.type == "cpu":
        return values
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
