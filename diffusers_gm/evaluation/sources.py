"""Where images come from: samples that someone else made, and real ones."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data import (
    ImageSource,
    TensorImages,
    examine,
    open_folder,
    open_source,
    resolution_of,
    scaled,
    split_digit_labels,
    split_digits,
)
from ..data.seeds import SOME, order_for
from ..data.sources import Subset
from ..launch import process_state

# Real images to compare with, where there are as many.
NUM_REFERENCE = 10_000
# 2 GiB of float32.
MAX_ELEMENTS = 2**29


def read_samples(
    path: Path,
    num_samples: int | None = None,
    cache_dir: str | None = None,
    background: str | None = None,
    classes: Sequence[str] | None = None,
) -> Tensor:
    """Images `(n, C, H, W)` in [-1, 1].

    Args:
        path: a folder of images, see `open_folder`; or a .npy file `(n, H, W)` or `(n, H, W, C)`, or a .safetensors
            file with one tensor `(n, C, H, W)`, of uint8 or of floating point numbers in [0, 1], as pipelines return
            them.
        num_samples: of the images, so many of them by chance, the same ones every time: the first may be all of one
            class. None for all.
        cache_dir: where the loader of parquet files keeps its files.
        background: what is seen through transparent pixels; None: white.
        classes: of a folder that has classes, of these alone; others are taken for images of these.

    Raises:
        ValueError: if there are no such images, or fewer, or they cannot be read or differ in shape.
    """
    if not path.is_dir() and not (path.is_file() and path.suffix in (".npy", ".safetensors")):
        raise ValueError(f"--samples {path} must be a folder of images, a .npy or a .safetensors file")
    try:
        images = _read(path, num_samples, cache_dir, background, classes)
    except (ValueError, OSError, EOFError, SafetensorError) as error:  # each kind of file has its own
        raise ValueError(f"--samples {path} cannot be read: {error}") from error
    if len(images) == 0:
        raise ValueError(f"--samples {path} holds no images")
    if num_samples is not None and len(images) < num_samples:
        raise ValueError(f"--num_samples {num_samples}: {path} holds {len(images)} images")
    return images


def _read(
    path: Path, num_samples: int | None, cache_dir: str | None, background: str | None, classes: Sequence[str] | None
) -> Tensor:
    if path.is_dir():
        source = open_folder(path, cache_dir=cache_dir, background=background)
        if classes is not None and _has_classes(source):
            source = of_classes(source, classes, None)
        return _read_all(source, some_of(source.num_images, num_samples))
    images = _read_array(path)
    return images if num_samples is None else images[some_of(len(images), num_samples)]


def _has_classes(source: ImageSource) -> bool:
    try:
        source.labels()
    except ValueError:
        return False
    return True


def some_of(num_images: int, num_samples: int | None) -> list[int]:
    """So many of the images by chance, in their order, whatever is drawn of the real ones."""
    return sorted(order_for(num_images, 0, SOME)[:num_samples])


def _read_array(path: Path) -> Tensor:
    if path.suffix == ".npy":
        array = torch.from_numpy(np.load(path))
        array = array[..., None] if array.dim() == 3 else array
        return _in_range(array.movedim(-1, 1) if array.dim() == 4 else array, "(n, H, W), (n, H, W, 1) or (n, H, W, 3)")
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"it must hold one tensor, it has {sorted(tensors)}")
    return _in_range(next(iter(tensors.values())), "(n, 1 or 3, H, W)")


def _read_all(source: ImageSource, indices: Sequence[int]) -> Tensor:
    images = []
    for index, image in source.fetch_each(indices):
        if isinstance(image, Exception):
            raise ValueError(f"{source.name(index)}: {image}") from image
        images.append(scaled(image))
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(f"it holds images of different shapes: {shapes[:5]}")
    return torch.stack(images)


def _in_range(images: Tensor, layout: str) -> Tensor:
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"it must hold images {layout}, it has images {tuple(images.shape[1:])} (C, H, W)")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise ValueError(f"it must hold uint8 or floating point numbers, it has {images.dtype}")
    finite = images[torch.isfinite(images)]
    if len(finite) and not (finite.min() >= 0 and finite.max() <= 1):
        raise ValueError(
            f"it must hold numbers in [0, 1], it has {float(finite.min()):.3g} ... {float(finite.max()):.3g}"
        )
    return images.float() * 2 - 1


def of_classes(source: ImageSource, classes: Sequence[str | int], label_column: str | None) -> ImageSource:
    """The images of some classes, by name or by their place among the classes.

    Raises:
        ValueError: if the images have no classes, or not these.
    """
    try:
        names, of_images = source.labels(label_column)
    except ValueError as error:
        raise ValueError(str(error).replace("--class_conditional", "--class_labels")) from error
    chosen = [(names[each] if each < len(names) else each) if isinstance(each, int) else each for each in classes]
    kept = [i for i, label in enumerate(of_images) if names[label] in chosen]
    missing = [each for each in chosen if each not in {names[of_images[i]] for i in kept}]
    if missing:
        raise ValueError(f"--class_labels: there are no images of {missing}, their classes are {names[:10]}")
    return Subset(source, kept)


def real_images(
    args: argparse.Namespace,
    shape: tuple[int, int, int],
    num_samples: int | None,
    classes: Sequence[str | int] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """What the options of the real data describe: a reference, and draws of as many other images as there are samples.

    The draws, one for each seed if there are enough images, are the floor: of the held-out digits, or else of the
    same data as the reference.

    Args:
        args: the options.
        shape: `(C, H, W)` of the samples. Gray and colour are converted; sizes only with `--resolution`.
        num_samples: images in a draw; None: 1000, or as many as there are.
        classes: of which all are; None: of any.

    Returns:
        the reference `(m, C, H, W)` and the draws, one after another, `(draws * n, C, H, W)`, in [-1, 1], in an order
        of chance that is always the same; and n.

    Raises:
        ValueError: if there are too few real images, or they have another size than the samples.
    """
    channels, height, width = shape
    resolution = args.resolution and resolution_of(args.resolution[0], args.resolution[-1])
    with process_state().main_process_first():
        source = open_source(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.image_column,
            args.cache_dir,
            args.background,
        )
        if classes is not None:
            source = of_classes(source, classes, args.label_column)

    def read(of: ImageSource, num_images: int) -> Tensor:
        images = examine(of, 0, resolution, channels, num_images, MAX_ELEMENTS).images
        if images.shape[-2:] != (height, width):
            raise ValueError(
                f"the samples are {height}x{width}, the real images {images.shape[-2]}x{images.shape[-1]}: resize "
                f"these with --resolution {height}{f' {width}' if width != height else ''}, or give others"
            )
        return images

    if args.dataset_name == "digits":
        others: ImageSource = TensorImages(split_digits()[1], split_digit_labels()[1])
        if classes is not None:
            others = of_classes(others, classes, None)
        n = num_samples or others.num_images
        floor = read(others, n * len(args.seeds))
        reference = read(source, max(n, args.num_reference))
        num_draws, most = len(floor) // n, others.num_images
    else:
        n = num_samples or min(1000, source.num_images // 2)
        wanted = max(n, args.num_reference)
        images = read(source, wanted + n * len(args.seeds))
        # Neither the reference nor the first draws change where seeds are added.
        num_reference = max(0, min(wanted, len(images) - n))
        reference, floor = images[:num_reference], images[num_reference:]
        num_draws, most = min(len(args.seeds), len(floor) // n), len(images) // 2
    if not (1 <= n <= min(len(floor), len(reference))):
        raise ValueError(
            f"{n} samples need as many real images for the reference, and as many others for the floor: these data "
            f"have enough for {most}, set --num_samples"
        )
    return reference, floor[: num_draws * n], n
