"""Numbers of which each image has its own."""

from torch import Tensor


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values `(B,)` or scalar to multiply `like` `(B, ...)` by: in its dtype and on its device.

    A scalar on the CPU is returned as it is. It acts as a number does, on every device and in every dtype, and to send
    it would let the CPU wait for the device.
    """
    if values.ndim == 0 and values.device.type == "cpu":
        return values
    return values.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))
