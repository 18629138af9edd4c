"""The sampling loop that the image pipelines share."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from ..autoencoders import LatentSpace, check_scaling, downsampling
from ..networks import asked, channels_of, null_class, num_class_embeds, size_of
from ..processes.noise_level import NoiseLevel
from ..random import Generators, check_generators, rand, randn
from ..readings import VelocityReading
from . import encoding
from .guidance import Guidance, check_guidance
from .inpainting import Picture, begins, unit_noise
from .inputs import ClassLabels, as_images, by_index, check_classes, class_indices
from .loading import HubPipeline
from .own_level import OwnLevel

CALLBACK_TENSORS = ("latents",)

# Of a run that starts from an image, where all of it may change; as in diffusers.
STRENGTH = 0.8


class UnconditionalPipeline(HubPipeline):
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
        class_shares: share of each class in the training data; None: all alike.

    Raises:
        ValueError: for names or shares that do not suit the network.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers has it
    default_num_inference_steps = 50
    unet: Any
    scheduler: Any
    vae: Any

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        class_names: Sequence[str] | Mapping[Any, str] | None = None,
        class_shares: Sequence[float] | Mapping[Any, float] | None = None,
        vae: ModelMixin | None = None,
        latents_mean: Sequence[float] | Mapping[Any, float] | None = None,
        latents_std: Sequence[float] | Mapping[Any, float] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        scaling = {"latents_mean": by_index(latents_mean), "latents_std": by_index(latents_std)}
        check_scaling(scaling, vae)
        names, shares = by_index(class_names), by_index(class_shares)
        check_classes(names, shares, self._num_class_embeds)
        for argument, values in {"class_names": names, "class_shares": shares, **scaling}.items():
            if values is not None:  # a mapping, as lists in model_index.json are components
                self.register_to_config(**{argument: {str(i): value for i, value in enumerate(values)}})

    @property
    def latent_space(self) -> LatentSpace | None:
        """What the network takes for images; None where they are images."""
        if self.vae is None:
            return None
        return LatentSpace.of(self.vae, *(by_index(self.config.get(name)) for name in ("latents_mean", "latents_std")))

    # --- Classes ---

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, by index; None where nobody named them."""
        return by_index(self.config.get("class_names"))

    @property
    def num_classes(self) -> int | None:
        """Classes to choose from; None for a network without."""
        embeds = self._num_class_embeds
        return embeds if embeds is None or self.null_class is None else embeds - 1

    @property
    def _num_class_embeds(self) -> int | None:
        return num_class_embeds(self.unet)

    @property
    def _may_go_without_labels(self) -> bool:
        """Whether the network, which has classes by its nature, may have been trained without."""
        named = (self.config.get("class_names"), self.config.get("class_shares"))
        return null_class(self.unet) is not None and named == (None, None)

    @property
    def null_class(self) -> int | None:
        """The class that stands for none: the last one, unless all have names; None where there is none."""
        embeds, names = self._num_class_embeds, self.class_names
        return None if embeds is None or (names is not None and len(names) == embeds) else embeds - 1

    def labels_in_turn(self, num_images: int) -> list[int] | None:
        """All classes one after the other, as many of each as there is room for; None for a network without."""
        if self.num_classes is None or self._may_go_without_labels:
            return None
        return [i * self.num_classes // num_images for i in range(num_images)]

    @property
    def _needs_labels(self) -> bool:
        return self.num_classes is not None and not self._may_go_without_labels

    def draw_labels(self, generators: Sequence[torch.Generator]) -> list[int] | None:
        """A class for each generator, in the proportions of the training data; None, and nothing drawn, for a network
        without."""
        if not self._needs_labels:
            return None
        return self._labels_at(rand((len(generators),), list(generators), "cpu", torch.float32))

    def _labels_at(self, quantiles: Tensor) -> list[int] | None:
        """The classes at quantiles of their law in the training data, `(n,)` in [0, 1)."""
        if self.num_classes is None or not self._needs_labels:
            return None
        shares = torch.tensor(by_index(self.config.get("class_shares")) or [1.0] * self.num_classes)
        return torch.searchsorted(shares.cumsum(0)[:-1] / shares.sum(), quantiles, right=True).tolist()

    # --- Shapes ---

    def _image_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """`(C, H, W)` of the sample; its own size unless told that of the images."""
        channels_in, channels_out = channels_of(self.unet)
        if (self.scheduler.config.get("variance_type") or "").startswith("learned") and channels_out == 2 * channels_in:
            channels_out = channels_in
        expected = 2 * channels_out if self._sees_velocity else channels_out
        if channels_in != expected:
            raise ValueError(
                f"the scheduler's prediction_type {self.scheduler.config.get('prediction_type')!r} asks for a "
                f"network with {expected} input channels for its {channels_out} output channels, "
                f"this one has {channels_in}"
            )
        own, pixels = size_of(self.unet), downsampling(self.vae) if self.vae is not None else 1
        if own is None and None in (height, width):
            raise ValueError(
                "the network's config has no sample_size: set unet.config.sample_size to the image size, or give "
                "height and width"
            )
        given, levels = (height, width), len(self.unet.config.get("block_out_channels") or [])
        factor = pixels * 2 ** max(levels - 1, 0)
        for argument, side in zip(("height", "width"), given, strict=True):
            if side is not None and (side < 1 or side % factor):
                raise ValueError(
                    f"{argument}={side} must be a positive multiple of {factor}: the network halves images so often"
                )
        size = [own[i] if side is None and own else (side or 0) // pixels for i, side in enumerate(given)]
        if not levels and own is not None and size != list(own):
            raise ValueError(
                f"height={height} and width={width}: a {type(self.unet).__name__} makes images of "
                f"{own[0] * pixels}x{own[1] * pixels} alone"
            )
        return channels_in, size[0], size[1]

    def _picture_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`(C, H, W)` of the images that samples of this size are, or stand for."""
        if self.vae is not None:
            pixels = downsampling(self.vae)
            return self.vae.config["out_channels"], pixels * height, pixels * width
        channels_in, channels_out = channels_of(self.unet)  # more come in with velocities, out with a variance
        return min(channels_in, channels_out), height, width

    def calibration_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `diffusers_gm.calibrate` runs this pipeline with, which was `given` these arguments: many images, where
        they are small, and unless told of all classes, in the proportions of the training data."""
        channels, height, width = self._image_shape(given.get("height"), given.get("width"))
        most = given.get("batch_size") or min(64, max(4, 2**18 // (channels * height * width)))
        labels = given.get("class_labels", self._labels_at((torch.arange(most) + 0.5) / most))
        if labels is None:
            return {"batch_size": most}
        if "batch_size" not in given and (several := self._batch_size(None, labels, None)) > 1:
            labels = list(labels) * max(1, most // several)
            most = len(labels)
        return {"batch_size": most, "class_labels": labels}

    @property
    def _sees_velocity(self) -> bool:
        """Whether the network was trained on CLD: the sample is `cat([x, v], 1)`, and the image is x."""
        return isinstance(getattr(self.scheduler, "reading", None), VelocityReading)

    def _image(self, sample: Tensor) -> Tensor:
        """The image in the last sample, `(B, C, H, W)`."""
        return self.scheduler.reading.image(sample) if hasattr(self.scheduler, "reading") else sample

    # --- Sampling ---

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
            generator: decides the images; a list of `batch_size` generators decides them one by one.
            latents: what to start from, `(B, C, H, W)`, in place of `scheduler.initial_sample`.
            output_type: `pil`, `np` (`(B, H, W, C)` in [0, 1]), `pt` (`(B, C, H, W)` in [0, 1]), or `latent`: what the
                network takes for images, `(B, C, h, w)`, with `vae` not decoded.
            return_dict: whether to return an `ImagePipelineOutput` or a plain tuple.
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})` after each call;
                the `latents` of the dict it returns replace the sample.
            callback_on_step_end_tensor_inputs: names of the tensors given to the callback; only `latents`.
            class_labels: of a class-conditional network: a class for all images, or one for each; an index or one of
                `class_names`. The network's last class, which stands for none, has an index too.
            guidance_scale: how much the class counts, see `pipelines.guidance`: 1 as the network learned it, 0 not at
                all. Every call for which it is not 1 is of twice the batch.
            guidance_interval: the noise levels (low, high) in which there is guidance: sigma of `y = x0 + sigma noise`,
                which means the same for every scheduler and number of calls.
            image: what to start from: a PIL image, an array or a tensor in [0, 1], or a list of `batch_size`.
            strength: how much noise the image is given: the share of the run that is made, in (0, 1]. Of
                `num_inference_steps` calls only that share is made. By default .8; 1 with a mask.
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
        guidance = self._guidance(batch_size, class_labels, guidance_scale, guidance_interval)
        picture = self._picture(shape, num_steps, latents, image, strength, mask_image, num_resamples)

        device, scheduler = self._execution_device, self.scheduler
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        scaled = getattr(scheduler, "scale_model_input", lambda sample, _: sample)  # some have no need of it
        steps, finished = itertools.count(), None
        for begin in begins(picture, num_steps):
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
            finished = finished if picture is None else picture.finish(finished)

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
            class_labels, guidance_scale, guidance_interval: as in the call.

        Returns:
            `(B, C, H, W)`, with velocities `(B, 2C, H, W)`.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        num_steps = self.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        channels, *_ = self._picture_shape(1, 1)
        images = as_images(image, "image", (None, channels, None, None))
        self._image_shape(*images.shape[2:])
        check_generators(generator, len(images))
        guidance = self._guidance(len(images), class_labels, guidance_scale, guidance_interval)
        images = self._as_learned((2 * images - 1).to(self._execution_device))
        latents = encoding.encode(self.scheduler, self._network, guidance, images, num_steps, generator)
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def estimate_noise_level(
        self,
        image: Any,
        generator: Generators = None,
        class_labels: ClassLabels | None = None,
        num_looks: int = 6,
    ) -> NoiseLevel:
        """How noisy images are: the most probable sigma of `y = x0 + sigma noise`, for images in [-1, 1].

        In values from 0 to 1 that is twice the standard deviation of the noise. The network is asked what the noise is
        at `num_looks` levels, each time of twice the batch; see `processes.noise_level`.

        Args:
            image: as in the call, but values may lie outside [0, 1].
            generator: draws the probe; a list decides one image each.
            class_labels: as in the call.
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
        """Remove the noise that images have, without adding any.

        Args:
            image: as in `estimate_noise_level`.
            noise_level: sigma of the images; None: each has its own, which is measured.
            num_inference_steps: 1: the mean of all images that may be behind the noise, which has the smallest squared
                error. More: a run of the scheduler's sampler, all of it from the image's own level down, to one of
                these images: sharper, with a larger error. Where levels are measured, each image has its own run.
            generator, output_type, return_dict, class_labels: as in the call.

        Raises:
            ValueError: for any argument out of range, before the first network call.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        own, noisy = self._own_level(image, generator, class_labels)
        self._checked_shape(len(noisy), generator, None, output_type, *noisy.shape[2:])
        if noise_level is not None and not own.low <= noise_level <= own.high:
            raise ValueError(f"noise_level must be in [{own.low:.4g}, {own.high:.4g}], got {noise_level}")
        if noise_level is not None or num_inference_steps == 1:
            sigma = own.measured(noisy, 6).sigma if noise_level is None else noisy.new_full((len(noisy),), noise_level)
            clean = own.clean(noisy, sigma, num_inference_steps)
        else:
            alone = own.of_each(len(noisy))
            clean = torch.cat([
                one.clean(y, one.measured(y, 6).sigma, num_inference_steps)
                for one, y in zip(alone, noisy.split(1), strict=True)
            ])  # fmt: skip
        images = self._finished(clean, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _own_level(
        self, image: Any, generator: Generators, class_labels: ClassLabels | None
    ) -> tuple[OwnLevel, Tensor]:
        """What asks the network at the images' own levels, and the images, `(B, C, H, W)` about [-1, 1]."""
        if self.vae is not None:
            raise ValueError(
                "noise of images is none of their latents: this needs a network in pixel space, without vae"
            )
        channels, *_ = self._picture_shape(1, 1)
        noisy = as_images(image, "image", (None, channels, None, None), noisy=True)
        self._image_shape(*noisy.shape[2:])
        check_generators(generator, len(noisy))
        guidance = self._guidance(len(noisy), class_labels, 1.0, None)
        own = OwnLevel(encoding.ours(self.scheduler), self._network, guidance, generator)
        return own, (2 * noisy - 1).to(self._execution_device)

    def _network(self, model_input: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output, in float32."""
        classes = {} if labels is None else {"class_labels": labels}
        return asked(self.unet)(model_input.to(self.unet.dtype), timestep, **classes).sample.float()

    def _initial_sample(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
        if hasattr(self.scheduler, "initial_sample"):
            return self.scheduler.initial_sample(shape, generator, device, torch.float32)
        return self.scheduler.init_noise_sigma * randn(shape, generator, device, torch.float32)

    @staticmethod
    def _batch_size(batch_size: int | None, class_labels: ClassLabels | None, latents: Tensor | None) -> int:
        if batch_size is not None:
            return batch_size
        if class_labels is not None and not isinstance(class_labels, int | str):
            return 1 if getattr(class_labels, "ndim", 1) == 0 else len(class_labels)
        return 1 if latents is None else len(latents)

    def _checked_shape(
        self,
        batch_size: int,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[int, ...]:
        """The shape of the sample; a ValueError for arguments that no run can serve."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}: use 'pil', 'np', 'pt' or 'latent'")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_generators(generator, batch_size)
        shape = (batch_size, *self._image_shape(height, width))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return shape

    def _guidance(
        self,
        batch_size: int,
        class_labels: ClassLabels | None,
        scale: float,
        interval: tuple[float, float] | None,
    ) -> Guidance:
        """What the arguments ask of the network; a ValueError for what it does not have."""
        embeds, null = self._num_class_embeds, self.null_class
        if self.unet.config.get("class_embed_type") is not None:
            raise ValueError(
                f"the network's class_embed_type {self.unet.config['class_embed_type']!r} takes no indices of classes: "
                "this pipeline needs a network with num_class_embeds, or without classes"
            )
        check_guidance(scale, interval, null, embeds is not None)
        if embeds is None:
            if class_labels is not None:
                raise ValueError(f"class_labels={class_labels!r}: this network has no classes, leave them out")
            return Guidance()
        if class_labels is None and scale == 1 and self._may_go_without_labels:
            return Guidance()
        if class_labels is None:
            some = f", such as {self.class_names[:3]}" if self.class_names else ""
            raise ValueError(
                f"this network is class-conditional: give class_labels, of {self.num_classes} classes{some}"
            )
        labels = class_indices(class_labels, embeds, self.class_names)
        if labels.ndim > 1 or (labels.ndim == 1 and len(labels) not in (1, batch_size)):
            raise ValueError(f"class_labels must be one or {batch_size}, one for each image; got {tuple(labels.shape)}")
        labels = labels.expand(batch_size).to(self._execution_device)
        level = None if interval is None else partial(encoding.noise_level, encoding.ours(self.scheduler))
        return Guidance(labels, null or 0, scale, interval, level)

    def _picture(
        self,
        shape: tuple[int, ...],
        num_steps: int,
        latents: Tensor | None,
        image: Any,
        strength: float | None,
        mask_image: Any,
        num_resamples: int,
    ) -> Picture | None:
        """What the arguments say of an image to start from; None if nothing."""
        if image is None:
            for argument, value in (("strength", strength), ("mask_image", mask_image)):
                if value is not None:
                    raise ValueError(f"{argument} means nothing without image")
            if num_resamples:
                raise ValueError("num_resamples means nothing without image")
            return None
        if latents is not None:
            raise ValueError("give image or latents to start from, not both")
        if strength is None:
            strength = STRENGTH if mask_image is None else 1.0
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if num_resamples < 0 or int(num_resamples) != num_resamples:
            raise ValueError(f"num_resamples must be a whole number of at least 0, got {num_resamples}")
        batch, (channels, height, width) = shape[0], self._picture_shape(*shape[2:])
        clean = 2 * as_images(image, "image", (batch, channels, height, width)) - 1
        mask = None if mask_image is None else as_images(mask_image, "mask_image", (batch, 1, height, width)).round()
        if mask is not None and self.vae is not None:
            mask = F.adaptive_max_pool2d(mask, shape[2:])
        device = self._execution_device
        picture = Picture(
            self._as_learned(clean.to(device)).expand(batch, -1, -1, -1),
            None if mask is None else mask.to(device),
            strength,
            num_resamples,
        )
        picture.check(num_steps)
        return picture

    def _as_learned(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] as the network takes them: their latents, with `vae`."""
        space = self.latent_space
        return images if space is None else space.encode(images)

    def _finished(self, image: Tensor, output_type: str) -> Any:
        """Images in [-1, 1], or latents of some, as the user wants them; the end of a call."""
        if output_type == "latent":
            self.maybe_free_model_hooks()
            return image
        space = self.latent_space
        images: Any = ((image if space is None else space.decode(image)) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return images
