"""Latents of training images, computed once and kept in files: a training reads them as it reads images."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import files
from .examination import MAX_ELEMENTS, NUM_EXAMINED, NUM_TOLD_BY, brightness, same_brightness
from .seeds import AUGMENTATION, EXAMINATION, generator_for, order_for
from .stream import TrainingImages

logger = logging.getLogger(__name__)

CONTENTS, LOCK = "latents.json", ".lock"
# What a kill can cost; and no more files than a process may open.
SHARD, MAX_SHARDS = 256, 512


def is_cache(folder: Path) -> bool:
    """Whether a folder holds latents, or a training was about to put some there."""
    return (folder / CONTENTS).is_file() or (folder / LOCK).is_file()


class LatentCache:
    """A folder of latents: `latents-00000.safetensors` ..., each there when it is whole, and `latents.json`, which says
    what they were made of: the arguments below, the height and width of the images, their background, their number, a
    hash of the names and sizes of their files, and the means of some of them, by which others are noticed.

    Args:
        folder: where it is, or is to be.
        images: the training images, cropped at the centre and not flipped.
        encode: `(B, c, H, W)` images in [-1, 1] to raw latents `(B, C, h, w)`.
        vae: class and hash of the weights of the autoencoder.
        shape: of the latents of an image, `(C, h, w)`.
        flips: whether those of the mirrored images are there too.

    Raises:
        ValueError: if the folder holds the latents of other images, or by another autoencoder.
    """

    def __init__(
        self,
        folder: Path,
        images: TrainingImages,
        encode: Callable[[Tensor], Tensor],
        vae: str,
        shape: Sequence[int],
        flips: bool,
    ):
        self.folder, self.images, self.encode = folder, images, encode
        self.shape, self.flips, self.num_images = shape, flips, len(images)
        told_by = [images[0, i * self.num_images // NUM_TOLD_BY] for i in range(min(NUM_TOLD_BY, self.num_images))]
        self.contents: dict[str, Any] = {
            "vae": vae,
            "size": list(told_by[0].shape[1:]),
            "shape": list(shape),
            "flips": flips,
            "background": images.source.background and list(images.source.background),
            "num_images": self.num_images,
            "images": images.source.fingerprint(),
            "brightness": brightness(told_by),
        }
        self.shard_size = max(SHARD, math.ceil(self.num_images / MAX_SHARDS))
        number = math.ceil(self.num_images / self.shard_size)
        self.paths = [folder / f"latents-{i:05d}.safetensors" for i in range(number)]
        self._check_folder()

    def _check_folder(self) -> None:
        if (self.folder / CONTENTS).is_file():
            before, now = json.loads((self.folder / CONTENTS).read_text(encoding="utf-8")), dict(self.contents)
            other_pixels = not same_brightness(before.pop("brightness"), now.pop("brightness"))
            other_files = before.pop("images") != now.pop("images")
            changes = [
                f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]
            ]
            if not changes and (other_files or other_pixels):
                changes = ["the images were others, or in another order"]
            if changes:
                raise ValueError(
                    f"{self.folder} holds the latents of another training set or autoencoder: {'; '.join(changes)}; "
                    "give another --latents_cache_dir, or remove that folder"
                )
        elif self.folder.exists() and not all(_is_our_own(path) for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files than latents: give another --latents_cache_dir")

    @contextmanager
    def being_filled(self) -> Iterator[None]:
        """Inside, no other training fills this folder; it waits for its turn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            self._check_folder()  # another may have begun since
            if not (self.folder / CONTENTS).is_file():
                files.write_json(self.folder / CONTENTS, self.contents)
            yield

    def fill(
        self,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        """Compute what is missing: of the shards of this process, those that are not there; a ValueError for latents
        that are not finite."""
        missing = {
            path: range(self.num_images)[i * self.shard_size : (i + 1) * self.shard_size]
            for i, path in enumerate(self.paths)
            if i % num_processes == process_index and not self._is_whole(path)
        }
        batches = [
            [(0, index) for index in some[start : start + batch_size]]
            for some in missing.values()
            for start in range(0, len(some), batch_size)
        ]
        own = torch.Generator()  # of which nothing is drawn that matters
        loader = iter(DataLoader(_Shown(self.images), batch_sampler=batches, num_workers=num_workers, generator=own))
        total = sum(map(len, missing.values()))
        with tqdm(total=total, desc="latents", unit="image", disable=not total or process_index > 0) as bar:
            for path, some in missing.items():
                made: list[Tensor] = []
                shown: list[Tensor] = []
                while sum(map(len, made)) < len(some):
                    images, indices = next(loader)
                    made.append(self._encoded(images.to(device)))
                    shown.append(indices)
                    bar.update(len(made[-1]))
                latents = torch.cat(made)
                channels = latents.double().transpose(0, 2).flatten(1)
                sums = {"sum": channels.sum(1), "squares": channels.square().sum(1)}
                with files.replacing(path) as temporary:
                    save_file({"latents": latents, "shown": torch.cat(shown), **sums}, temporary)

    def _encoded(self, images: Tensor) -> Tensor:
        """`(B, 1 or 2, C, h, w)` float16 on the CPU: of the images, and of their mirror images."""
        both = [images, images.flip(-1)] if self.flips else [images]
        latents = torch.stack([self.encode(some) for some in both], 1).half().cpu()
        if not latents.isfinite().all():
            raise ValueError("--vae makes latents that are not finite in float16: it is no autoencoder of such images")
        return latents

    def _is_whole(self, path: Path) -> bool:
        try:
            load_file(path)
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning(f"{path} cannot be read and is made anew: {error}")
            return False
        return True

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the whole set, mirror images included, `(C,)` float64."""
        shards = [load_file(path) for path in self.paths]
        channels, height, width = self.shape
        number = self.num_images * (2 if self.flips else 1) * height * width
        mean, square = (torch.stack([shard[name] for shard in shards]).sum(0) / number for name in ("sum", "squares"))
        std = (square - mean**2).clamp(min=0).sqrt()
        if not (std > 0).all():
            raise ValueError(
                f"--vae gives all images the same latents in {int((std == 0).sum())} of {channels} channels"
            )
        return mean, std


def _is_our_own(path: Path) -> bool:
    """What a kill at the very start leaves."""
    return path.name in (LOCK, files.UNFINISHED + CONTENTS)


class _Shown(Dataset):
    """Images with the index of what is shown: another where one cannot be read."""

    def __init__(self, images: TrainingImages):
        self.images = images

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        read = self.images.__getitems__(keys)
        return [(image, self.images.shown_for(index)) for image, (_, index) in zip(read, keys, strict=True)]


class TrainingLatents(Dataset):
    """Latents of training images by `(epoch, index)`, as `ImageStream` deals them out: `(C, h, w)` float32, of mean 0
    and standard deviation 1 in every channel. Flips are decided by `(seed, epoch, index)`.

    Args:
        cache: all of it is there.
        seed: decides which are flipped.
        random_flip: whether any are.
    """

    def __init__(self, cache: LatentCache, seed: int, random_flip: bool = False):
        self.paths, self.shard_size, self.num_images = cache.paths, cache.shard_size, cache.num_images
        self.mean, self.std = (values.float()[:, None, None] for values in cache.statistics())
        self.seed = seed
        self.random_flip = random_flip

    @cached_property
    def _shown(self) -> list[int]:
        shown: list[int] = []
        for path in self.paths:
            with safe_open(path, "pt") as shard:  # of which the latents are not read
                shown += shard.get_tensor("shown").tolist()
        return shown

    def shown_for(self, index: int) -> int:
        """The image whose latents these are: another where one cannot be read."""
        return self._shown[index]

    @cached_property
    def _shards(self) -> list[Tensor]:
        """Mapped files, which are read where they are used."""
        return [load_file(path)["latents"] for path in self.paths]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_shards"}  # a worker maps them itself

    def _latent(self, index: int, flip: bool) -> Tensor:
        raw = self._shards[index // self.shard_size][index % self.shard_size, int(flip)]
        return (raw.float() - self.mean) / self.std

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A batch."""
        return [self[key] for key in keys]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        flip = False
        if self.random_flip:  # drawn as for images
            flip = float(torch.rand(3, generator=generator_for(self.seed, AUGMENTATION, *key))[2]) < 0.5
        return self._latent(key[1], flip)

    def examined(self, seed: int, num_images: int = NUM_EXAMINED, max_elements: int = MAX_ELEMENTS) -> Tensor:
        """Some that the seed chooses, none of them flipped, `(n, C, h, w)`."""
        most = min(num_images, max(2, max_elements // self._latent(0, False).numel()))
        order = order_for(self.num_images, seed, EXAMINATION)
        return torch.stack([self._latent(index, False) for index in order[:most]])
