"""The sampling loop that the unconditional image pipelines share."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DModel
from torch import Tensor

from ..random import Generators, check_generators, randn
from ..readings import VelocityReading
from .loading import HubPipeline

CALLBACK_TENSORS = ("latents",)


class UnconditionalPipeline(HubPipeline):
    """Unconditional image generation with a network in pixel space and any scheduler, of diffusers or of this package.

    Follows the whole scheduler contract (`scale_model_input`, `init_noise_sigma`), so that schedulers of diffusers
    whose noise space suits the network work too. The sample is kept in float32 whatever the network's dtype.
    """

    model_cpu_offload_seq = "unet"
    default_num_inference_steps = 50
    unet: UNet2DModel
    scheduler: Any

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def _image_shape(self) -> tuple[int, int, int]:
        channels_in, channels_out = self.unet.config["in_channels"], self.unet.config["out_channels"]
        expected = 2 * channels_out if self._sees_velocity else channels_out
        if channels_in != expected:
            raise ValueError(
                f"the scheduler's prediction_type {self.scheduler.config.get('prediction_type')!r} asks for a "
                f"network with {expected} input channels for its {channels_out} output channels, "
                f"this one has {channels_in}"
            )
        size = self.unet.config["sample_size"]
        if size is None:
            raise ValueError("the network's config has no sample_size: set unet.config.sample_size to the image size")
        height, width = (size, size) if isinstance(size, int) else size
        return channels_in, height, width

    @property
    def calibration_batch_size(self) -> int:
        """Images that `diffusers_gm.calibrate` looks at: the more the better, where they are small."""
        channels, height, width = self._image_shape()
        return min(64, max(4, 2**18 // (channels * height * width)))

    @property
    def _sees_velocity(self) -> bool:
        """Whether the network was trained on CLD: the sample is `cat([x, v], 1)`, and the image is x."""
        return isinstance(getattr(self.scheduler, "reading", None), VelocityReading)

    def _image(self, sample: Tensor) -> Tensor:
        """The image in the last sample, `(B, C, H, W)`."""
        return sample.chunk(2, 1)[0] if self._sees_velocity else sample

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images.
            num_inference_steps: network calls, all included; None: `default_num_inference_steps` of the class.
            generator: decides the images; a list of `batch_size` generators decides them one by one.
            latents: what to start from, `(B, C, H, W)`, in place of `scheduler.initial_sample`.
            output_type: `pil`, `np` (`(B, H, W, C)` in [0, 1]) or `pt` (`(B, C, H, W)` in [0, 1]).
            return_dict: whether to return an `ImagePipelineOutput` or a plain tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each call;
                the `latents` of the dict it returns replace the sample.
            callback_on_step_end_tensor_inputs: names of the tensors given to the callback; only `latents`.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs {unknown} must be among {list(CALLBACK_TENSORS)}")
        shape = self._checked_shape(batch_size, generator, latents, output_type)

        device = self._execution_device
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps or self.default_num_inference_steps, device=device)
        if latents is not None:
            sample = latents.to(device, torch.float32)
        elif hasattr(scheduler, "initial_sample"):
            sample = scheduler.initial_sample(shape, generator, device, torch.float32)
        else:
            sample = scheduler.init_noise_sigma * randn(shape, generator, device, torch.float32)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(sample, t).to(self.unet.dtype)
            model_output = self.unet(model_input, t).sample
            sample = scheduler.step(model_output.float(), t, sample, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, i, t, {"latents": sample})
                sample = changed.pop("latents", sample)

        images = self._finished(self._image(sample), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _checked_shape(
        self, batch_size: int, generator: Generators, latents: Tensor | None, output_type: str
    ) -> tuple[int, ...]:
        """The shape of the sample; a ValueError for arguments that no run can serve."""
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"unknown output_type {output_type!r}: use 'pil', 'np' or 'pt'")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_generators(generator, batch_size)
        shape = (batch_size, *self._image_shape())
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return shape

    def _finished(self, image: Tensor, output_type: str) -> Any:
        """Images in [-1, 1] as the user wants them; the end of a call."""
        images: Any = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return images
