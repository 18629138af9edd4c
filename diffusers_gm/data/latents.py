"""Latents of training images, computed once and kept in files: a training reads them as it reads images."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .. import files
from .seeds import AUGMENTATION, EXAMINATION, generator_for
from .stream import TrainingImages

logger = logging.getLogger(__name__)

CONTENTS, LOCK = "latents.json", ".lock"
# What a kill can cost; and no more files than a process may open.
SHARD, MAX_SHARDS = 256, 512
# Images that are looked at to tell one set from another, and by how much the mean of one may differ between decoders.
NUM_TOLD_BY, SAME_BRIGHTNESS = 16, 0.02


def is_cache(folder: Path) -> bool:
    """Whether a folder holds latents, or a training was about to put some there."""
    return (folder / CONTENTS).is_file() or (folder / LOCK).is_file()


@dataclass(frozen=True)
class LatentContents:
    """What a cache holds, and what it was made of.

    Attributes:
        vae: class and hash of the weights of the autoencoder.
        size: height and width of the images, which are cropped at the centre.
        shape: of the latents of one, `(C, h, w)`.
        flips: whether those of the mirrored images are there too.
        num_images: how many.
        brightness: means of some of them, so that other images are noticed.
    """

    vae: str
    size: list[int]
    shape: list[int]
    flips: bool
    num_images: int
    brightness: list[float]

    def changes(self, other: "LatentContents") -> list[str]:
        """What is different in `other`, in words."""
        mine, others = asdict(self), asdict(other)
        pairs = list(zip(mine.pop("brightness"), others.pop("brightness"), strict=False))
        words = [f"{name} was {mine[name]} and is {others[name]}" for name in mine if mine[name] != others[name]]
        if not words and any(abs(one - another) > SAME_BRIGHTNESS for one, another in pairs):
            words.append("the images were others, or in another order")
        return words


class LatentCache:
    """A folder of latents: `latents-00000.safetensors` ..., each there when it is whole, and what they were made of.

    Args:
        folder: where it is, or is to be.
        images: the training images, cropped at the centre and not flipped.
        encode: `(B, c, H, W)` images in [-1, 1] to raw latents `(B, C, h, w)`.
        vae, shape, flips: see `LatentContents`.

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
        number = len(images)
        told_by = [images[0, i * number // NUM_TOLD_BY] for i in range(min(NUM_TOLD_BY, number))]
        self.contents = LatentContents(
            vae,
            list(told_by[0].shape[1:]),
            list(shape),
            flips,
            number,
            [round(float(image.mean()), 3) for image in told_by],
        )
        self.shard_size = max(SHARD, -(-number // MAX_SHARDS))
        self._check_folder()

    def _check_folder(self) -> None:
        if (self.folder / CONTENTS).is_file():
            before = LatentContents(**json.loads((self.folder / CONTENTS).read_text(encoding="utf-8")))
            changes = before.changes(self.contents)
            if changes:
                raise ValueError(
                    f"{self.folder} holds the latents of another training set or autoencoder: {'; '.join(changes)}; "
                    "give another --latents_cache_dir, or remove that folder"
                )
        elif self.folder.exists() and any(path.name != LOCK for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files than latents: give another --latents_cache_dir")

    @property
    def paths(self) -> list[Path]:
        """One for every `shard_size` images, in their order."""
        number = -(-self.contents.num_images // self.shard_size)
        return [self.folder / f"latents-{i:05d}.safetensors" for i in range(number)]

    @contextmanager
    def being_filled(self) -> Iterator[None]:
        """Inside, no other training fills this folder; it waits for its turn."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            self._check_folder()  # another may have begun since
            if not (self.folder / CONTENTS).is_file():
                files.write_json(self.folder / CONTENTS, asdict(self.contents))
            yield

    def fill(
        self,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        """Compute what is missing: of the shards of this process, those that are not there.

        Raises:
            ValueError: for latents that are not finite.
        """
        number = self.contents.num_images
        missing = {
            path: range(i * self.shard_size, min((i + 1) * self.shard_size, number))
            for i, path in enumerate(self.paths)
            if i % num_processes == process_index and not self._is_whole(path)
        }
        batches = [
            [(0, index) for index in some[start : start + batch_size]]
            for some in missing.values()
            for start in range(0, len(some), batch_size)
        ]
        own = torch.Generator()  # of which nothing is drawn that matters
        loader = iter(DataLoader(self.images, batch_sampler=batches, num_workers=num_workers, generator=own))
        total = sum(map(len, missing.values()))
        with tqdm(total=total, desc="latents", unit="image", disable=not total or process_index > 0) as bar:
            for path, some in missing.items():
                made: list[Tensor] = []
                while sum(map(len, made)) < len(some):
                    made.append(self._encoded(next(loader).to(device)))
                    bar.update(len(made[-1]))
                self._save(torch.cat(made), path)

    def _encoded(self, images: Tensor) -> Tensor:
        """`(B, 1 or 2, C, h, w)` float16 on the CPU: of the images, and of their mirror images."""
        both = [images, images.flip(-1)] if self.contents.flips else [images]
        latents = torch.stack([self.encode(some) for some in both], 1).half().cpu()
        if not latents.isfinite().all():
            raise ValueError("--vae makes latents that are not finite in float16: it is no autoencoder of such images")
        return latents

    @staticmethod
    def _save(latents: Tensor, path: Path) -> None:
        channels = latents.double().transpose(0, 2).flatten(1)
        sums = {"sum": channels.sum(1), "squares": channels.square().sum(1)}
        with files.replacing(path) as temporary:
            save_file({"latents": latents, **sums}, temporary)

    def _is_whole(self, path: Path) -> bool:
        if not path.is_file():
            return False
        try:
            load_file(path)
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning(f"{path} cannot be read and is made anew: {error}")
            return False
        return True

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the whole set, mirror images included, `(C,)` float64."""
        shards = [load_file(path) for path in self.paths]
        channels, *size = self.contents.shape
        number = self.contents.num_images * (2 if self.contents.flips else 1) * size[0] * size[1]
        mean, square = (torch.stack([shard[name] for shard in shards]).sum(0) / number for name in ("sum", "squares"))
        std = (square - mean**2).clamp(min=0).sqrt()
        if not (std > 0).all():
            raise ValueError(
                f"--vae gives all images the same latents in {int((std == 0).sum())} of {channels} channels"
            )
        return mean, std


@dataclass
class _Shards:
    """The latents of an image, `(1 or 2, C, h, w)`, by its index. Files are mapped, and read where they are used."""

    paths: list[Path]
    shard_size: int

    @cached_property
    def mapped(self) -> list[Tensor]:
        return [load_file(path)["latents"] for path in self.paths]

    def __getitem__(self, index: int) -> Tensor:
        return self.mapped[index // self.shard_size][index % self.shard_size]

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "shard_size": self.shard_size}  # a worker maps the files itself


class TrainingLatents(Dataset):
    """Latents of training images by `(epoch, index)`, as `ImageStream` deals them out: `(C, h, w)` float32, of mean 0
    and standard deviation 1 in every channel. Flips are decided by `(seed, epoch, index)`.

    Args:
        cache: all of it is there.
        seed: decides which are flipped.
        random_flip: whether any are.
    """

    def __init__(self, cache: LatentCache, seed: int, random_flip: bool = False):
        self.shards = _Shards(cache.paths, cache.shard_size)
        self.num_images = cache.contents.num_images
        self.mean, self.std = (values.float()[:, None, None] for values in cache.statistics())
        self.seed = seed
        self.random_flip = random_flip

    def __len__(self) -> int:
        return self.num_images

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A batch."""
        return [self[key] for key in keys]

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        flip = False
        if self.random_flip:  # drawn as for images
            flip = float(torch.rand(3, generator=generator_for(self.seed, AUGMENTATION, *key))[2]) < 0.5
        return (self.shards[key[1]][int(flip)].float() - self.mean) / self.std

    def examined(self, seed: int, num_images: int, max_elements: int) -> Tensor:
        """Some that the seed chooses, none of them flipped, `(n, C, h, w)`."""
        most = min(num_images, max(2, max_elements // self.shards[0][0].numel()))
        order = torch.randperm(self.num_images, generator=generator_for(seed, EXAMINATION)).tolist()[:most]
        return (torch.stack([self.shards[index][0] for index in order]).float() - self.mean) / self.std
