"""Training on the latents of an autoencoder: they are computed once, and take the place of the images."""

import logging
from collections.abc import Callable, Sequence
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
from ..data.latents import is_cache
from ..pipelines.inputs import by_index
from .folder import LATENTS
from .network import decoder_in, fit_unet, new_unet, pipeline_index
from .objective import build_scheduler
from .options import TrainingArguments
from .plan import make_plan
from .training_data import TrainingData, read_state

logger = logging.getLogger(__name__)

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


def kept_space(args: TrainingArguments, vae: Any, checkpoint: Path | None) -> LatentSpace | None:
    """The latents that the network knows: those of its training until the checkpoint, or of its pipeline. None where
    their scaling is to be measured: for a new network, and after a checkpoint of a training on images, which
    is refused later."""
    if checkpoint is not None:
        scaling = TrainingData.of(read_state(checkpoint)).latents_scaling
        return None if scaling is None else LatentSpace.of(vae, *scaling)
    index = {} if args.model_name_or_path is None else pipeline_index(args)
    if decoder_in(index) is None:
        return None
    mean, std = (by_index(index.get(name)) for name in ("latents_mean", "latents_std"))
    if mean is not None:
        its_own = load_autoencoder(
            str(args.model_name_or_path), revision=args.revision, variant=args.variant, cache_dir=args.cache_dir
        )
        if fingerprint(its_own) != fingerprint(vae):
            logger.warning(
                f"--vae {args.vae} is not the autoencoder of --model_name_or_path {args.model_name_or_path}: the "
                "scaling of its latents is measured, and the network learns others from here on"
            )
            return None
    space = LatentSpace.of(vae, mean, std)
    channels = latent_channels(vae)
    return replace(space, mean=space.mean.expand(channels), std=space.std.expand(channels))


def latents_of(
    args: TrainingArguments,
    vae: Any,
    source: ImageSource,
    examination: Examination,
    accelerator: Accelerator,
    unet: Any,
    network: dict[str, Any],
    checkpoint: Path | None,
    claim: Callable[[], None],
) -> tuple[Dataset, Examination, LatentSpace]:
    """The latents of the training images, computed where they are not kept already; call it on all processes. Whether
    the options go together is seen by a few, before all are computed, which may take hours.

    Args:
        unet, network: the network that was given, if any, and what the scheduler's config needs of it.
        checkpoint: that the training goes on from, if any.
        claim: makes the output folder this training's, or raises; called before anything changes there.

    Returns:
        The latents by `(epoch, index)`, as the network knows them (`kept_space`), else of mean 0 and standard deviation
        1; what some are like; what decodes them.

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
    kept = kept_space(args, vae, checkpoint)
    of_few = kept or replace(space, mean=few.mean((0, 2, 3)), std=few.std((0, 2, 3)).clamp(min=1e-12))
    some = (few - of_few.mean[:, None, None]) / of_few.std[:, None, None]
    rehearsed = Examination(some, examination.resolution)
    check_plan(args, rehearsed, source.num_images, unet, network)

    folder = Path(args.latents_cache_dir or Path(args.output_dir) / LATENTS)
    anew = args.overwrite_output_dir and args.resume_from_checkpoint is None
    if anew and args.latents_cache_dir is None and not args.dry_run:
        claim()
        with accelerator.main_process_first():
            if is_cache(folder):  # another is refused below
                files.discard(folder)
    cache = LatentCache(folder, images, space.encode, fingerprint(vae), shape, args.random_flip)
    if args.dry_run:
        return FewLatents(some), rehearsed, of_few
    claim()
    if accelerator.device.type == "cpu":
        vae.to(memory_format=torch.channels_last)  # a third faster there
    with cache.being_filled() if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        share = accelerator.process_index, accelerator.num_processes
        cache.fill(args.eval_batch_size, *share, args.dataloader_num_workers, accelerator.device)
        accelerator.wait_for_everyone()
    dataset = TrainingLatents(cache, args.seed, args.random_flip)
    if kept is not None:
        dataset.mean, dataset.std = kept.mean[:, None, None], kept.std[:, None, None]
    vae.to(memory_format=torch.contiguous_format)
    if hasattr(vae, "use_slicing"):
        vae.enable_slicing()  # a grid of samples needs no more memory than one
    examination = Examination(dataset.examined(args.seed), examination.resolution)
    return dataset, examination, replace(space, mean=dataset.mean.flatten(), std=dataset.std.flatten())


def check_plan(args: TrainingArguments, few: Examination, num_images: int, unet: Any, network: dict[str, Any]) -> None:
    """Raise the ValueError that a training with these options would end with once its latents are there."""
    plan = make_plan(args, few, num_images, num_processes=1)
    build_scheduler(args, plan, network)
    if unet is None:
        with torch.random.fork_rng([]), torch.device("meta"):
            fit_unet(new_unet(args, few.size, few.channels), args, few.size)
    else:
        fit_unet(unet, args, few.size)
