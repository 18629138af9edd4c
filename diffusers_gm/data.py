"""Training images: where they come from, how they become `(C, H, W)` tensors in [-1, 1], in which order.

Everything random is a pure function of the seed and of where in the endless stream of images we are, so a
training that is resumed sees exactly what it would have seen without the interruption, whatever the number of
workers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

logger = logging.getLogger(__name__)

# What a seed is used for: keys that keep the streams of random numbers apart.
ORDER, AUGMENTATION, STEP, EXAMINATION, SAMPLES = range(5)

MAX_UNREADABLE = 0.1


def seed_for(*key: int) -> int:
    """One well-mixed seed for a tuple of non-negative integers, such as `(seed, STEP, position)`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator seeded with `seed_for(*key)`."""
    return torch.Generator().manual_seed(seed_for(*key))


# --- Digits: real handwriting, without a download ---


def load_digits_images() -> Tensor:
    """The handwritten digits of scikit-learn, `(1797, 1, 8, 8)` float32 in [-1, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def split_digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The digits in two parts, `(1437, 1, 8, 8)` for training and `(360, 1, 8, 8)` held out.

    Trainings on `digits` always use the split of seed 0, so that its held-out part gives an honest floor.
    """
    images = load_digits_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = len(images) * 4 // 5
    return images[order[:cut]], images[order[cut:]]


# --- Sources ---


@dataclass(frozen=True)
class ImageSource:
    """Images that can be read one by one.

    Attributes:
        read: from an index to the image `(1 or 3, H, W)`, float32 in [-1, 1]; raises what the decoder raises. Can be
            pickled, for the workers of a DataLoader.
        num_images: valid indices are `0 ... num_images - 1`.
        image_column: the column of the data set they come from; None for digits.
    """

    read: Callable[[int], Tensor]
    num_images: int
    image_column: str | None = None


def open_source(
    dataset_name: str | None = "digits",
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str | None = None,
    cache_dir: str | None = None,
) -> ImageSource:
    """Open the training images, as named by the options of the same names.

    Raises:
        ValueError: if there are no such data, or no such column.
    """
    if train_data_dir is None and dataset_name == "digits":
        images = split_digits()[0]
        return ImageSource(images.__getitem__, len(images))
    dataset = _load(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    columns = list(dataset.features)
    if image_column is None:
        image_column = next((name for name in ("image", "img") if name in columns), None)
        if image_column is None:
            raise ValueError(f"no column is called 'image' or 'img': set --image_column to one of {columns}")
    elif image_column not in columns:
        raise ValueError(f"--image_column {image_column!r} is not in the data: use one of {columns}")

    import datasets

    try:
        # Decoding is left to `read`, so that one unreadable image does not end the training.
        dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"--image_column {image_column!r} holds {dataset.features[image_column]}, not images"
        ) from error

    return ImageSource(partial(_read_row, dataset, image_column), len(dataset), image_column)


def _read_row(dataset: Any, image_column: str, index: int) -> Tensor:
    import datasets

    return image_to_tensor(datasets.Image().decode_example(dataset[index][image_column]))


def subset(source: ImageSource, num_images: int, seed: int) -> ImageSource:
    """`num_images` images of `source` (all, if it has fewer), chosen at random by `seed`."""
    chosen = torch.randperm(source.num_images, generator=generator_for(seed, SAMPLES)).tolist()[:num_images]
    return ImageSource(partial(_read_chosen, source, chosen), len(chosen), source.image_column)


def _read_chosen(source: ImageSource, chosen: list[int], index: int) -> Tensor:
    return source.read(chosen[index])


def _load(name: str | None, config_name: str | None, data_dir: str | None, cache_dir: str | None) -> Any:
    import datasets

    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(f"--train_data_dir {data_dir!r} is not a folder")
        has_parquet = next(Path(data_dir).rglob("*.parquet"), None) is not None
        name, source = ("parquet" if has_parquet else "imagefolder"), f"--train_data_dir {data_dir!r}"
    else:
        source = f"--dataset_name {name!r}"
    try:
        return datasets.load_dataset(name, config_name, data_dir=data_dir, cache_dir=cache_dir, split="train")
    except Exception as error:  # every loader and file system has its own
        raise ValueError(
            f"{source} has no training images that can be loaded; give 'digits', a data set of the Hub or a "
            f"folder of images or parquet files: {error}"
        ) from error


# --- From files to tensors ---


def image_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image as `(1 or 3, H, W)` float32 in [-1, 1]; one channel if its mode is gray."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which PIL's own conversion to 8 clips
        pixels = torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535
    else:
        gray = image.mode in ("1", "L", "LA")
        pixels = torch.from_numpy(np.array(image.convert("L" if gray else "RGB"))).float() / 255
        pixels = pixels[None] if gray else pixels.permute(2, 0, 1)
    return pixels * 2 - 1


def as_channels(image: Tensor, channels: int) -> Tensor:
    """`(1 or 3, H, W)` as `(channels, H, W)`: gray repeated, or the luma of a colour (ITU-R 601)."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    return torch.einsum("chw,c->hw", image, torch.tensor([0.299, 0.587, 0.114]))[None]


def fit(image: Tensor, resolution: int, crop: Sequence[float] = (0.5, 0.5)) -> Tensor:
    """`(C, H, W)` as `(C, resolution, resolution)`: the shorter side is resized, the longer one cropped.

    `crop` is the place of the crop, vertical and horizontal, from 0 (top, left) to 1.
    """
    height, width = image.shape[-2:]
    if min(height, width) != resolution:
        scale = resolution / min(height, width)
        size = (max(resolution, round(height * scale)), max(resolution, round(width * scale)))
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    top, left = (round(c * (n - resolution)) for c, n in zip(crop, image.shape[-2:], strict=True))
    return image[:, top : top + resolution, left : left + resolution]


# --- What the data are like ---


@dataclass(frozen=True)
class Examination:
    """What a seeded random subset says about the training images.

    Attributes:
        images: the subset `(n, channels, resolution, resolution)`, cropped at the centre.
        num_unreadable: how many more were drawn that cannot be read.
    """

    images: Tensor
    num_unreadable: int

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]


def examine(
    source: ImageSource,
    seed: int,
    resolution: int | None = None,
    channels: int | None = None,
    num_images: int = 2000,
    max_elements: int = 2**29,
) -> Examination:
    """Read up to `num_images` images, or as many as have `max_elements` elements.

    `resolution=None` takes the images' own size, `channels=None` gray if all of them are.

    Raises:
        ValueError: if the images differ in size and no resolution is given, or too many cannot be read.
    """
    order = torch.randperm(source.num_images, generator=generator_for(seed, EXAMINATION)).tolist()[:num_images]
    images: list[Tensor] = []
    unreadable: list[int] = []
    failure: Exception | None = None
    for index in order:
        try:
            image = source.read(index)
        except Exception as error:  # a decoder may raise anything; the share of failures is what counts
            unreadable.append(index)
            failure = error
            continue
        if resolution is None:
            if image.shape[-2] != image.shape[-1]:
                raise ValueError(f"the images are not square ({_size(image)}): set --resolution")
            native = images[0].shape[-1] if images else image.shape[-1]
            if image.shape[-1] != native:
                raise ValueError(f"the images differ in size ({native}x{native}, {_size(image)}): set --resolution")
        images.append(fit(image, resolution or image.shape[-1]))
        if len(images) * images[0].numel() >= max_elements:
            break
    num_read = len(images) + len(unreadable)
    if not images or len(unreadable) > MAX_UNREADABLE * num_read:
        raise ValueError(
            f"{len(unreadable)} of {num_read} training images examined cannot be read, the last: {failure}"
        ) from failure
    if unreadable:
        logger.warning(
            f"{len(unreadable)} of {num_read} training images examined cannot be read and are skipped: "
            f"{unreadable[:10]}"
        )
    channels = channels or max(len(image) for image in images)
    return Examination(torch.stack([as_channels(image, channels) for image in images]), len(unreadable))


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"


# --- The stream ---


class ImageStream(Sampler[list[tuple[int, int]]]):
    """Endless batches of `(epoch, index)`: one seeded shuffle after another, dealt out to the processes.

    Args:
        num_images: images in an epoch.
        batch_size: per process.
        seed: decides the order.
        start: images seen so far, by all processes together.
        num_processes, process_index: this process gets every `num_processes`-th batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start = start + process_index * batch_size
        self.stride = num_processes * batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        position = self.start
        while True:
            batch = []
            for p in range(position, position + self.batch_size):
                if p // self.num_images != epoch:
                    epoch = p // self.num_images
                    generator = generator_for(self.seed, ORDER, epoch)
                    order = torch.randperm(self.num_images, generator=generator).tolist()
                batch.append((epoch, order[p % self.num_images]))
            yield batch
            position += self.stride


class TrainingImages(Dataset):
    """Training images by `(epoch, index)`, as `ImageStream` deals them out: `(C, R, R)` float32 in [-1, 1].

    Crops and flips are decided by `(seed, epoch, index)`. In place of an unreadable image comes the next one.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: int,
        channels: int,
        seed: int,
        center_crop: bool = False,
        random_flip: bool = False,
    ):
        self.source = source
        self.resolution = resolution
        self.channels = channels
        self.seed = seed
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return self.source.num_images

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        image = as_channels(self._read(key[1]), self.channels)
        random_crop = not self.center_crop and image.shape[-2] != image.shape[-1]
        if not (random_crop or self.random_flip):
            return fit(image, self.resolution)
        vertical, horizontal, flip = torch.rand(3, generator=generator_for(self.seed, AUGMENTATION, *key)).tolist()
        image = fit(image, self.resolution, (vertical, horizontal) if random_crop else (0.5, 0.5))
        return image.flip(-1) if self.random_flip and flip < 0.5 else image

    def _read(self, index: int) -> Tensor:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if candidate in self.unreadable:
                continue
            try:
                return self.source.read(candidate)
            except Exception as error:  # as in `examine`
                self.unreadable.add(candidate)
                logger.warning(
                    f"training image {candidate} cannot be read, {len(self.unreadable)} skipped so far: {error}"
                )
                if len(self.unreadable) > MAX_UNREADABLE * len(self):
                    raise ValueError(f"{len(self.unreadable)} of {len(self)} training images cannot be read") from error
        raise ValueError(f"none of the {len(self)} training images can be read")
