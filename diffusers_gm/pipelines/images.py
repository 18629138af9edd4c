"""What a pipeline of images knows of itself: its network, classes, sizes and latents, and what may be asked of it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..autoencoders import LatentSpace, check_scaling, downsampling
from ..networks import as_unet_call, channels_of, images_at_once, null_class, num_class_embeds, size_of
from ..processes.random import Draw, Generators, check_generators
from ..readings import VelocityReading
from ..schedulers.base import SamplerScheduler
from . import encoding
from .guidance import Guidance, check_guidance
from .inputs import ClassLabels, by_index, check_classes, class_indices
from .loading import HubPipeline


class ImagePipeline(HubPipeline):
    """Abstract: the components of `UnconditionalPipeline`, which says what they are."""

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers has it
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
        check_classes(names, shares, num_class_embeds(self.unet))
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
        return num_class_embeds(self.unet) if self.null_class is None else self.null_class

    @property
    def null_class(self) -> int | None:
        """The class that stands for none: the last one, unless it has a name or a share like all; None where there is
        none."""
        embeds = num_class_embeds(self.unet)
        known = self.config.get("class_names") or self.config.get("class_shares") or ()
        return None if embeds is None or len(known) == embeds else embeds - 1

    def labels_in_turn(self, num_images: int) -> list[int] | None:
        """All classes one after the other, as many of each as there is room for; None for a network without."""
        if self.num_classes is None or not self._needs_labels:
            return None
        return [i * self.num_classes // num_images for i in range(num_images)]

    @property
    def _needs_labels(self) -> bool:
        """Whether it knows classes; but a network that has them by its nature may have been trained without."""
        return self.num_classes is not None and (self._classes_are_known or null_class(self.unet) is None)

    @property
    def _classes_are_known(self) -> bool:
        return (self.config.get("class_names"), self.config.get("class_shares")) != (None, None)

    @property
    def _no_class(self) -> int | None:
        """`null_class` of a network whose classes are known: the last one of others may be a class like all."""
        return self.null_class if self._classes_are_known else None

    def draw_labels(
        self, num_images: int, generator: Generators = None, among: Sequence[int] | None = None, evenly: bool = False
    ) -> list[int] | None:
        """A class for each image, of all or of those `among`, in the proportions of the training data, by chance
        or `evenly`; None, and nothing drawn, for a network without. What a call does that is given no `class_labels`.
        """
        if self.num_classes is None or not (self._needs_labels or among):
            return None
        even = (torch.arange(num_images) + 0.5) / num_images
        quantiles = even if evenly else Draw(generator).uniform((num_images,))
        classes = torch.tensor(sorted(set(among or range(self.num_classes))))
        shares = torch.tensor(by_index(self.config.get("class_shares")) or [1.0] * self.num_classes)[classes]
        if not shares.any():  # of classes that the training data had none of
            shares = torch.ones_like(shares)
        return classes[torch.searchsorted(shares.cumsum(0)[:-1] / shares.sum(), quantiles, right=True)].tolist()

    # --- Shapes ---

    def _sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """`(C, H, W)` of the sample, of CLD `cat([x, v], 1)`; its own size unless told that of the images."""
        channels_in, channels_out = channels_of(self.unet)
        if (self.scheduler.config.get("variance_type") or "").startswith("learned") and channels_out == 2 * channels_in:
            channels_out = channels_in
        sees_velocity = isinstance(getattr(self.scheduler, "reading", None), VelocityReading)
        expected = 2 * channels_out if sees_velocity else channels_out
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

    def _image_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """`(C, H, W)` of the images that samples of this size are, or stand for."""
        if self.vae is not None:
            pixels = downsampling(self.vae)
            return self.vae.config["out_channels"], pixels * height, pixels * width
        channels_in, channels_out = channels_of(self.unet)  # more come in with velocities, out with a variance
        return min(channels_in, channels_out), height, width

    def calibration_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `diffusers_gm.calibrate` runs this pipeline with, which was `given` these arguments: many images, where
        they are small, and unless told of all classes, in the proportions of the training data."""
        channels, height, width = self._sample_shape(given.get("height"), given.get("width"))
        most: Any = given.get("batch_size")
        for each in (given.get("latents"), given.get("generator")):
            if most is None and isinstance(each, Tensor | list | tuple):
                most = len(each)
        most = images_at_once(64, channels, height, width) if most is None else most
        labels = given.get("class_labels", self.draw_labels(most, evenly=True))
        if labels is None:
            return {"batch_size": most}
        if "batch_size" not in given and (several := self._batch_size(None, labels, None)) > 1:
            labels = list(labels) * max(1, most // several)
            most = len(labels)
        return {"batch_size": most, "class_labels": labels}

    def _image(self, sample: Tensor) -> Tensor:
        """The image in the last sample, `(B, C, H, W)`."""
        return self.scheduler.reading.image(sample) if isinstance(self.scheduler, SamplerScheduler) else sample

    # --- The network ---

    def _network(self, model_input: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output, in float32."""
        classes = {} if labels is None else {"class_labels": labels}
        return as_unet_call(self.unet)(model_input.to(self.unet.dtype), timestep, **classes).sample.float()

    def _initial_sample(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
        if hasattr(self.scheduler, "initial_sample"):
            return self.scheduler.initial_sample(shape, generator, device, torch.float32)
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)  # which schedulers of flow networks do not name
        return scale * Draw(generator, device).normal(shape)

    def _as_learned(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] as the network takes them: their latents, with `vae`."""
        space = self.latent_space
        return images if space is None else space.encode(images)

    def _finished(self, image: Tensor, output_type: str) -> Any:
        """Images in [-1, 1], or latents of some, as the user wants them; the end of a call."""
        space = self.latent_space
        if output_type != "latent" and space is not None:
            image = space.decode(image)
        self.maybe_free_model_hooks()
        return VaeImageProcessor().postprocess(image, output_type)

    # --- What may be asked of it ---

    @staticmethod
    def _batch_size(batch_size: int | None, class_labels: ClassLabels | None, latents: Tensor | None) -> int:
        if batch_size is not None:
            return batch_size
        if class_labels is not None and (shape := np.shape(class_labels)):
            return shape[0]
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
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        check_generators(generator, batch_size)
        shape = (batch_size, *self._sample_shape(height, width))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return shape

    def _guidance(
        self,
        batch_size: int,
        class_labels: ClassLabels | None,
        scale: float,
        interval: tuple[float, float] | None,
        draw: Callable[[], list[int] | None] | None = None,
    ) -> Guidance:
        """What the arguments ask of the network; a ValueError for what it does not have. Labels that are not given are
        those of `draw`, when all else was checked."""
        embeds, null = num_class_embeds(self.unet), self.null_class
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
        if class_labels is None and draw is not None:
            class_labels = draw()
        if class_labels is None and scale == 1 and not self._needs_labels:
            return Guidance()
        if class_labels is None:
            some = f", such as {self.class_names[:3]}" if self.class_names else ""
            raise ValueError(
                f"this network is class-conditional: give class_labels, of {self.num_classes} classes{some}"
            )
        labels = class_indices(class_labels, embeds, self.class_names)
        if len(labels) not in (1, batch_size):
            raise ValueError(f"class_labels must be one or {batch_size}, one for each image; got {len(labels)}")
        acts_at = None if interval is None else partial(encoding.is_within, interval, encoding.ours(self.scheduler))
        indices = torch.tensor(labels, device=self._execution_device).expand(batch_size)
        return Guidance(indices, null or 0, scale, acts_at)
