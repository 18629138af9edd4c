"""Training on the latents of an autoencoder: they are computed once, and take the place of the images."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from .. import files
from ..autoencoders import LatentSpace, downsampling, fingerprint, latent_channels, load_autoencoder
from ..data import Examination, ImageSource, LatentCache, TrainingImages, TrainingLatents, sides
from .folder import LATENTS
from .network import fit_unet, new_unet
from .objective import build_scheduler
from .options import TrainingArguments
from .plan import make_plan

# Images whose latents say, before all are computed, whether the options go together.
FEW = 16


class FewLatents(Dataset):
    """Some latents over and over: for a dry run, which computes no others."""

    def __init__(self, latents: Tensor):
        self.latents = latents

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [self.latents[index % len(self.latents)] for _, index in keys]


def given_vae(args: TrainingArguments) -> Any | None:
    """The autoencoder that the options name, in float32; None if none.

    Raises:
        ValueError: if there is none where they say, or its images are neither gray nor in colour.
    """
    if args.vae is None:
        return None
    try:
        vae = load_autoencoder(args.vae, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir)
    except ValueError as error:
        raise ValueError(f"--vae {error}") from error
    channels = vae.config["in_channels"], vae.config["out_channels"]
    if channels not in ((1, 1), (3, 3)):
        raise ValueError(f"--vae {args.vae} goes from {channels[0]} to {channels[1]} channels: images have 1 or 3")
    return vae


def latents_of(
    args: TrainingArguments,
    vae: Any,
    source: ImageSource,
    examination: Examination,
    accelerator: Accelerator,
    unet: Any,
    network: dict[str, Any],
) -> tuple[Dataset, Examination, LatentSpace]:
    """The latents of the training images, computed where they are not kept already; call it on all processes. Whether
    the options go together is seen by a few, before all are computed, which may take hours.

    Args:
        unet, network: the network that was given, if any, and what the scheduler's config needs of it.

    Returns:
        The latents by `(epoch, index)`, of mean 0 and standard deviation 1; what some are like; what decodes them.

    Raises:
        ValueError: for options, a network or images that do not suit the autoencoder, or a cache of other latents.
    """
    size, factor = sides(examination.resolution), downsampling(vae)
    if any(side % factor for side in size):
        raise ValueError(
            f"--vae makes one latent of {factor}x{factor} pixels, and the images are {size[0]}x{size[1]}: set "
            f"--resolution to multiples of {factor}"
        )
    space = LatentSpace.of(vae.to(accelerator.device), [0.0], [1.0])
    images = TrainingImages(source, examination.resolution, examination.channels, args.seed, center_crop=True)
    few = space.encode(examination.images[:FEW].to(accelerator.device)).cpu()
    shape = (latent_channels(vae), *(side // factor for side in size))
    if few.shape[1:] != shape:
        raise ValueError(f"--vae makes latents {tuple(few.shape[1:])} of {size[0]}x{size[1]} pixels, not {shape}")
    mean, std = few.mean((0, 2, 3)), few.std((0, 2, 3)).clamp(min=1e-12)
    some = (few - mean[:, None, None]) / std[:, None, None]
    rehearsed = Examination(some, examination.resolution)
    rehearse(args, rehearsed, source.num_images, unet, network)

    folder = Path(args.latents_cache_dir or Path(args.output_dir) / LATENTS)
    anew = args.overwrite_output_dir and args.resume_from_checkpoint is None
    if anew and args.latents_cache_dir is None and not args.dry_run:
        with accelerator.main_process_first():
            if folder.is_dir():
                files.discard(folder)
    cache = LatentCache(folder, images, space.encode, fingerprint(vae), shape, args.random_flip)
    if args.dry_run:
        return FewLatents(some), rehearsed, replace(space, mean=mean, std=std)
    if accelerator.device.type == "cpu":
        vae.to(memory_format=torch.channels_last)  # a third faster there
    with cache.being_filled() if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        share = accelerator.process_index, accelerator.num_processes
        cache.fill(args.eval_batch_size, *share, args.dataloader_num_workers, accelerator.device)
        accelerator.wait_for_everyone()
    dataset = TrainingLatents(cache, args.seed, args.random_flip)
    vae.to(memory_format=torch.contiguous_format)
    if hasattr(vae, "use_slicing"):
        vae.enable_slicing()  # a grid of samples needs no more memory than one
    examination = Examination(dataset.examined(args.seed), examination.resolution)
    return dataset, examination, replace(space, mean=dataset.mean.flatten(), std=dataset.std.flatten())


def rehearse(args: TrainingArguments, few: Examination, num_images: int, unet: Any, network: dict[str, Any]) -> None:
    """Raise the ValueError that a training with these options would end with once its latents are there."""
    plan = make_plan(args, few, num_images, num_processes=1)
    build_scheduler(args, plan, network)
    if unet is None:
        with torch.random.fork_rng([]), torch.device("meta"):
            fit_unet(new_unet(args, few.size, few.channels), args, few.size)
    else:
        fit_unet(unet, args, few.size)
