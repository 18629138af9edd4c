"""The sampling loop that the image pipelines share, and what else a denoiser is good for."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from torch import Tensor

from ..processes.noise_level import NoiseLevel
from ..processes.random import Generators, check_generators
from ..schedulers.base import SamplerScheduler
from . import encoding
from .images import ImagePipeline
from .inpainting import Picture, unit_noise
from .inputs import ClassLabels, as_images
from .own_level import OwnLevel

CALLBACK_TENSORS = ("latents",)

# Of a run that starts from an image, where all of it may change; as in diffusers.
STRENGTH = 0.8


class UnconditionalPipeline(ImagePipeline):
    """Images without a prompt, by class where the network knows any, with any scheduler of diffusers or ours: in pixel
    space, or with `vae` in the space of its latents.

    Follows the whole scheduler contract (`scale_model_input`, `init_noise_sigma`), so that schedulers of diffusers
    whose noise space suits the network work too. The sample is kept in float32 whatever the network's dtype.

    Args:
        unet: the network, any of `(sample, timestep[, class_labels])`. With `num_class_embeds` in its config it is
            class-conditional, and the last of these classes stands for none, for guidance.
        scheduler: see the class.
        vae: what the network takes for images are latents of this `AutoencoderKL`, `AutoencoderTiny` or `VQModel`;
            None: images. `vae.enable_slicing()` and `vae.enable_tiling()` save memory.
        latents_mean, latents_std: of each channel of what `vae` makes: the network's latents are scaled by them to
            mean 0 and standard deviation 1. None: scaled as the config of `vae` says, by its `scaling_factor`.
        class_names: of the classes, by index; saved with the pipeline. As many as the network has classes if none of
            them stands for none.
        class_shares: share of each of these classes in the training data; None: all alike.

    Raises:
        ValueError: for names or shares that do not suit the network.
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        *,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        num_resamples: int = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images, or change one.

        Args:
            batch_size: number of images; None: as many as there are `class_labels`, or `latents`; else 1.
            num_inference_steps: network calls, all included; None: `default_num_inference_steps` of the class.
            generator: decides the images, and their classes; a list of `batch_size` generators decides them one by one.
            latents: what to start from, `(B, C, H, W)`, in place of `scheduler.initial_sample`: in the spaces `ve` and
                `edm` as wide as the first level, which a calibration may have lower for some numbers of calls.
            output_type: `pil`, `np` (`(B, H, W, C)` in [0, 1]), `pt` (`(B, C, H, W)` in [0, 1]), or `latent`: what the
                network takes for images, `(B, C, h, w)`, with `vae` not decoded.
            return_dict: whether to return an `ImagePipelineOutput` or a plain tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each call;
                the `latents` of the dict it returns replace the sample.
            callback_on_step_end_tensor_inputs: names of the tensors given to the callback; only `latents`.
            class_labels: of a class-conditional network: a class for all images, or one for each; an index or one of
                `class_names`. The network's last class, which stands for none, has an index too. None: drawn as often
                as in the training data; from an `image`, which has a class of its own, that which stands for none, if
                the pipeline knows names or shares of classes.
            guidance_scale: how much the class counts, see `pipelines.guidance`: 1 as the network learned it, 0 not at
                all. Every call for which it is not 1 is of twice the batch.
            guidance_interval: the noise levels (low, high) in which there is guidance: sigma of `y = x0 + sigma noise`,
                which means the same for every scheduler and number of calls.
            image: what to start from: a PIL image, an array or a tensor in [0, 1], or a list of `batch_size`.
            strength: how much noise the image is given: the share of the run that is made, in (0, 1]. Of
                `num_inference_steps` calls only that share is made. By default 0.8; 1 with a mask.
            mask_image: which pixels of `image` are new (white, 1) and which stay (black, 0): these are put back at
                their own noise level before every call. With `vae`, latents stay all whose pixels do.
            num_resamples: how often the finished image is given noise again and is denoised again, from ever lower
                levels, so that known and new pixels come to agree; costs half a run for each. See
                `pipelines.inpainting`.
            height, width: of the images; by default those that the network was trained on.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs {unknown} must be among {list(CALLBACK_TENSORS)}")
        num_steps = self.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        batch_size = self._batch_size(batch_size, class_labels, latents)
        shape = self._checked_shape(batch_size, generator, latents, output_type, height, width)
        picture = self._picture(shape, latents, image, strength, mask_image, num_resamples)
        begins = [0] if picture is None else self._begins(picture, num_steps)
        draw = None
        if image is None:
            draw = partial(self.draw_labels, batch_size, generator)
        elif class_labels is None and guidance_scale == 1:
            class_labels = self._no_class
        guidance = self._guidance(batch_size, class_labels, guidance_scale, guidance_interval, draw)

        device, scheduler = self._execution_device, self.scheduler
        step_kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)  # some have no need of it
        steps, finished = itertools.count(), None
        for begin in begins:
            scheduler.set_timesteps(num_steps, device=device)
            first = begin * scheduler.order
            timesteps = scheduler.timesteps[first:]
            if picture is not None:
                if hasattr(scheduler, "set_begin_index"):
                    scheduler.set_begin_index(first)
                noise = unit_noise(scheduler, shape, generator, device)
                sample = picture.start(scheduler, timesteps[0], noise(), finished)
            elif latents is not None:
                sample = latents.to(device, torch.float32)
                encoding.check_deviation(scheduler, sample)
            else:
                sample = self._initial_sample(shape, generator, device)

            for i, t in enumerate(self.progress_bar(timesteps)):
                output = guidance.output(self._network, scaled(sample, t), t)
                sample = scheduler.step(output, t, sample, **step_kwargs).prev_sample
                if picture is not None and i + 1 < len(timesteps):
                    sample = picture.keep(scheduler, sample, timesteps[i + 1], noise())
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, next(steps), t, {"latents": sample})
                    sample = changed.pop("latents", sample)
            finished = self._image(sample)
            if picture is not None:
                finished = picture.finish(finished)

        assert finished is not None
        images = self._finished(finished, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """The `latents` from which a deterministic sampler makes these images, by the probability flow upwards.

        The flow of the denoiser is that of `CalibratedMultistepScheduler` without stochasticity, of `ode` of
        `GMLangevinScheduler` and of diffusers' DDIM, Euler and DPM-Solver++; not of `probability_flow` of
        `CLDSSCSScheduler`, which turns noise into velocities.

        Args:
            image: as in the call; all in the list are encoded, in their own size.
            num_inference_steps: network calls, all included, on the noise levels of the scheduler.
            generator: draws the companion noise of a network that sees velocities; nothing else is drawn.
            class_labels, guidance_scale, guidance_interval: as in the call that is to make the images again; nothing is
                drawn, a network with classes has to be told.

        Returns:
            `(B, C, H, W)`, with velocities `(B, 2C, H, W)`.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        num_steps = self.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        images = self._in_its_own_size(image, generator)
        guidance = self._guidance(len(images), class_labels, guidance_scale, guidance_interval)
        images = self._as_learned(images)
        latents = encoding.encode(self.scheduler, self._network, guidance, images, num_steps, generator)
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def estimate_noise_level(
        self, image: Any, generator: Generators = None, class_labels: ClassLabels | None = None, num_looks: int = 6
    ) -> NoiseLevel:
        """How noisy images are: the most probable sigma of `y = x0 + sigma noise`, for images in [-1, 1].

        In values from 0 to 1 that is twice the standard deviation of the noise. The network is asked what the noise is
        at `num_looks` levels, each time of twice the batch; see `processes.noise_level`. A level beyond those that it
        was trained on has an infinite `error`.

        Args:
            image: as in the call, but values may lie outside [0, 1].
            generator: draws the probe; a list decides one image each.
            class_labels: as in the call; None: that which stands for none.
            num_looks: levels that are tried. Networks of mixture noise find theirs in three.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        own, noisy = self._own_level(image, generator, class_labels)
        found = own.measured(noisy, num_looks)
        self.maybe_free_model_hooks()
        return found

    @torch.no_grad()
    def denoise(
        self,
        image: Any,
        noise_level: float | None = None,
        num_inference_steps: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Remove the noise that images have, adding none but what the sampler puts between its steps.

        Args:
            image: as in `estimate_noise_level`.
            noise_level: sigma of the images; None: each has its own, which is measured.
            num_inference_steps: 1: the mean of all images that may be behind the noise, which has the smallest squared
                error. More: a run of the scheduler's sampler (with a scheduler of diffusers that of
                `CalibratedMultistepScheduler`), all of it from the image's own level down, to one of these images:
                sharper, with a larger error. Where levels are measured, each image has its own run. Langevin samplers
                forget on the way what the image was.
            generator, output_type, return_dict: as in the call.
            class_labels: as in `estimate_noise_level`.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        own, noisy = self._own_level(image, generator, class_labels)
        own.scheduler.sampler_for(num_inference_steps).calls_per_level(num_inference_steps)  # raises a ValueError
        self._checked_shape(len(noisy), generator, None, output_type, *noisy.shape[2:])
        if noise_level is not None and not own.low <= noise_level <= own.high:
            raise ValueError(f"noise_level must be in [{own.low:.4g}, {own.high:.4g}], got {noise_level}")
        clean = []
        for one, y in own.of_each(noisy) if noise_level is None and num_inference_steps > 1 else [(own, noisy)]:
            sigma = one.measured(y, 6).sigma if noise_level is None else y.new_full((len(y),), noise_level)
            clean.append(one.clean(y, sigma, num_inference_steps))
        images = self._finished(torch.cat(clean), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _own_level(
        self, image: Any, generator: Generators, class_labels: ClassLabels | None
    ) -> tuple[OwnLevel, Tensor]:
        """What asks the network at the images' own levels, and the images, `(B, C, H, W)` about [-1, 1]."""
        if self.vae is not None:
            raise ValueError(
                "noise of images is none of their latents: this needs a network in pixel space, without vae"
            )
        noisy = self._in_its_own_size(image, generator, noisy=True)
        class_labels = self._no_class if class_labels is None else class_labels
        guidance = self._guidance(len(noisy), class_labels, 1.0, None)
        return OwnLevel(encoding.ours(self.scheduler), self._network, guidance, generator), noisy

    def _in_its_own_size(self, image: Any, generator: Generators, noisy: bool = False) -> Tensor:
        """Images that the network can take, `(B, C, H, W)` in [-1, 1], or about that if noisy."""
        channels, *_ = self._image_shape(1, 1)
        images = as_images(image, "image", (None, channels, None, None), noisy)
        self._sample_shape(*images.shape[2:])
        check_generators(generator, len(images))
        return (2 * images - 1).to(self._execution_device)

    def _begins(self, picture: Any, num_steps: int) -> list[int]:
        """The steps at which the runs from a picture begin; a ValueError for a scheduler that begins nowhere else than
        at the first."""
        begins = picture.begins(num_steps)
        theirs = not isinstance(self.scheduler, SamplerScheduler)
        if theirs and self.scheduler.config.get("skip_prk_steps") is False and any(begins):
            raise ValueError(
                f"a {type(self.scheduler).__name__} cannot begin in the middle of a run, as image asks for: make it "
                "with skip_prk_steps=True"
            )
        return begins

    def _picture(
        self,
        shape: tuple[int, ...],
        latents: Tensor | None,
        image: Any,
        strength: float | None,
        mask_image: Any,
        num_resamples: int,
    ) -> Picture | None:
        """What the arguments say of an image to start from; None if nothing."""
        if image is None:
            given = {"strength": strength, "mask_image": mask_image, "num_resamples": num_resamples or None}
            for argument, value in given.items():
                if value is not None:
                    raise ValueError(f"{argument} means nothing without image")
            return None
        if latents is not None:
            raise ValueError("give image or latents to start from, not both")
        if strength is None:
            strength = STRENGTH if mask_image is None else 1.0
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if num_resamples < 0 or int(num_resamples) != num_resamples:
            raise ValueError(f"num_resamples must be a whole number of at least 0, got {num_resamples}")
        batch, (channels, height, width) = shape[0], self._image_shape(*shape[2:])
        clean = 2 * as_images(image, "image", (batch, channels, height, width)) - 1
        mask = None if mask_image is None else as_images(mask_image, "mask_image", (batch, 1, height, width)).round()
        if mask is not None and self.vae is not None:
            mask = F.adaptive_max_pool2d(mask, shape[2:])
        device = self._execution_device
        learned = self._as_learned(clean.to(device)).expand(batch, -1, -1, -1)
        return Picture(learned, None if mask is None else mask.to(device), strength, num_resamples)
