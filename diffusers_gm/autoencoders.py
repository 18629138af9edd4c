"""Autoencoders of diffusers: images to latents that a network is trained on, and back."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")


@dataclass(frozen=True)
class LatentSpace:
    """What a network that is trained on latents takes for images: `(what the autoencoder makes - mean) / std`.

    Attributes:
        vae: an `AutoencoderKL`, `AutoencoderTiny` or `VQModel`. Slices and tiles are switched on by its own methods,
            `vae.enable_slicing()` and `vae.enable_tiling()`.
        mean, std: of each channel, or the same for all, `(C,)` or `(1,)` float32.
    """

    vae: Any
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, vae: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> "LatentSpace":
        """The space of an autoencoder with a measured scaling, or else by diffusers' convention: `scaling_factor`,
        `shift_factor`, `latents_mean` and `latents_std` of its config."""
        if mean is None or std is None:
            config = vae.config
            scale = config.get("scaling_factor") or 1.0
            mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
            std = [s / scale for s in config.get("latents_std") or [1.0]]
        return cls(vae, torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` float32 of images `(B, c, H, W)` in [-1, 1]; of a distribution the mode."""
        with _enough_precision(self.vae):
            encoded = self.vae.encode(images.to(self.vae.dtype))
            raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (raw.float() - _per_channel(self.mean, raw)) / _per_channel(self.std, raw)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `(B, c, H, W)` float32, about [-1, 1], of latents `(B, C, h, w)`."""
        raw = latents.float() * _per_channel(self.std, latents) + _per_channel(self.mean, latents)
        with _enough_precision(self.vae):
            return self.vae.decode(raw.to(self.vae.dtype)).sample.float()


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device)[:, None, None]


@contextmanager
def _enough_precision(vae: Any) -> Iterator[None]:
    """Inside, an autoencoder that overflows in float16, as its `force_upcast` says, is in float32."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def load_autoencoder(name_or_path: str, **kwargs: Any) -> Any:
    """An autoencoder, in evaluation mode: a folder or a repository of its own, or a pipeline's component.

    Takes `revision`, `variant`, `cache_dir` as everywhere in diffusers.

    Raises:
        ValueError: if there is none, or one of another class than `AUTOENCODERS`.
    """
    places = {name: value for name, value in kwargs.items() if name != "variant"}
    for subfolder in ("vae", "vqvae", None):
        try:
            config = diffusers.AutoencoderKL.load_config(name_or_path, subfolder=subfolder, **places)
        except OSError:
            continue
        kind = config.get("_class_name")
        if kind not in AUTOENCODERS:
            raise ValueError(f"{name_or_path} is a {kind}: give one of {', '.join(AUTOENCODERS)}")
        try:
            vae = getattr(diffusers, kind).from_pretrained(name_or_path, subfolder=subfolder, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name_or_path} cannot be loaded: {error}") from error
        return vae.eval().requires_grad_(False)
    raise ValueError(
        f"{name_or_path} holds no autoencoder, neither itself nor in a folder `vae`, here or on the Hub: give one of "
        f"{', '.join(AUTOENCODERS)}"
    )


def check_scaling(scaling: dict[str, list[float] | None], vae: Any) -> None:
    """Raise a ValueError unless `latents_mean` and `latents_std` are both there or both None, and suit the `vae`."""
    given = {name: values for name, values in scaling.items() if values is not None}
    if not given:
        return
    if vae is None:
        raise ValueError(f"{sorted(given)} are those of the latents of a vae: give it, or leave them out")
    if len(given) == 1 or set(map(len, given.values())) != {latent_channels(vae)}:
        raise ValueError(
            f"latents_mean and latents_std must have {latent_channels(vae)} numbers each, one for each channel of the "
            f"latents of the vae, got {scaling}"
        )
    if min(given["latents_std"]) <= 0:
        raise ValueError(f"latents_std must be positive, got {scaling['latents_std']}")


def downsampling(vae: Any) -> int:
    """Pixels of an image along a side for each of its latents."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def latent_channels(vae: Any) -> int:
    """Channels of its latents."""
    return vae.config.get("vq_embed_dim") or vae.config["latent_channels"]


def as_learned(pipe: Any, images: Tensor, shape: Sequence[int]) -> Tensor:
    """Real images as the network of a pipeline takes them, `(n, *shape)`.

    Args:
        pipe: of diffusers or ours, with or without a `vae`.
        images: `(n, C, H, W)`: as the network takes them; or where that is latents, the images, in [-1, 1], which its
            `vae` encodes.
        shape: of one sample, `(C, H, W)`.

    Raises:
        ValueError: for other shapes or values.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor (n, C, H, W), got a {type(images).__name__}")
    wanted = [tuple(shape)]
    vae: Any = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if images.is_floating_point() and tuple(images.shape[1:]) == wanted[0]:
        if not images.isfinite().all():
            raise ValueError("images must be finite")
        if vae is None:
            _check_range(images)
        return images
    if type(vae).__name__ in AUTOENCODERS:
        pixels = downsampling(vae)
        wanted.append((vae.config["in_channels"], *(pixels * side for side in shape[1:])))
    if not images.is_floating_point() or tuple(images.shape[1:]) not in wanted:
        words = " or, of latents, ".join(f"(n, {', '.join(map(str, each))})" for each in wanted[::-1])
        raise ValueError(f"images must be {words}, floating point, got {tuple(images.shape)} {images.dtype}")
    _check_range(images)
    space = getattr(pipe, "latent_space", None) or LatentSpace.of(vae)
    return torch.cat([space.encode(some.to(vae.device)) for some in images.split(16)])


# Images that were resized go beyond their range by rounding.
ROUNDING = 1e-3


def _check_range(images: Tensor) -> None:
    if not len(images):
        raise ValueError("images must be at least one, got none")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(f"images must be in [-1, 1], they go from {low:g} to {high:g}")
    if low >= 0 and high > 0.5:
        logger.warning(f"images go from {low:g} to {high:g}: in [-1, 1], where 0 is gray, they are all bright")


def fingerprint(vae: Any) -> str:
    """Its class and a hash of its weights: what decides which latents it makes."""
    content = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        content.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{type(vae).__name__} {content.hexdigest()[:16]}"
