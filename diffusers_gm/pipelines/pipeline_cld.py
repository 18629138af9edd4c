"""Unconditional generation with critically-damped Langevin diffusion."""

from torch import Tensor

from .common import UnconditionalPipeline


class CLDPipeline(UnconditionalPipeline):
    """Unconditional generation with critically-damped Langevin diffusion (arXiv 2112.07068).

    Args:
        unet: a velocity network from `cat([x, v / sqrt(M)], 1)`, `(B, 2C, H, W)`, and a timestep to `(B, C, H, W)`
            (native mode: the sample, `latents` included, is `cat([x, v], 1)`, and the image is x); or an ordinary
            network, whose output has the shape of its input (lifted mode).
        scheduler: a `CLDSSCSScheduler` that describes the network. For an ordinary network any other scheduler that
            suits its noise space works too.

    Raises:
        ValueError: from the call, for a network whose channels do not suit the scheduler's `prediction_type`.
    """

    default_num_inference_steps = 50

    @property
    def _native(self) -> bool:
        return getattr(self.scheduler, "native", False)

    def _image_shape(self) -> tuple[int, int, int]:
        channels_in, channels_out = self.unet.config["in_channels"], self.unet.config["out_channels"]
        expected = 2 * channels_out if self._native else channels_out
        if channels_in != expected:
            raise ValueError(
                f"the scheduler's prediction_type {self.scheduler.config.get('prediction_type')!r} asks for a "
                f"network with {expected} input channels for its {channels_out} output channels, "
                f"this one has {channels_in}"
            )
        return super()._image_shape()

    def _image(self, sample: Tensor) -> Tensor:
        return sample.chunk(2, 1)[0] if self._native else sample
