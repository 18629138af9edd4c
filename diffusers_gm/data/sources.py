"""Where images are read from: tensors, files of a folder, tables."""

import glob
import hashlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .digits import split_digit_labels, split_digits
from .folders import Listing, list_folder, split_of_image, split_of_table, training_part
from .labels import Labels, labels_from, labels_of_files, labels_of_table
from .pixels import KINDS, Colour, PixelRange, as_tensor, colour, decode, has_16_bits, range_of, scaled, unmapped
from .seeds import SAMPLES, order_for
from .tables import holds_images, images_of, load_table

logger = logging.getLogger(__name__)

# How many images of a set are looked at for what its pixels mean.
NUM_LOOKED_AT = 1000


class ImageSource(ABC):
    """Images that are read by their index, many at a time. Can be pickled, for the workers of a DataLoader.

    Attributes:
        num_images: valid indices are `0 ... num_images - 1`.
        image_column: the column of the data set they come from; None for tensors.
        background: what is seen through transparent pixels; None for tensors.
    """

    num_images: int
    image_column: str | None = None
    background: Colour | None = None

    @abstractmethod
    def fetch(self, indices: Sequence[int]) -> list[Tensor | Exception]:
        """The images of these indices, `(1 or 3, H, W)`, uint8 or float32 in [-1, 1]; see `scaled`.

        In place of one that cannot be read comes what its decoder raised.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person would look for: a file, or a row of a table."""

    def fingerprint(self) -> str:
        """A hash that tells these images, in this order, from others, without decoding them: of the names and sizes of
        their files."""
        content = hashlib.sha256()
        for part in self._told_by():
            content.update(part)
        return content.hexdigest()

    @abstractmethod
    def _told_by(self) -> Iterable[bytes]: ...

    @abstractmethod
    def labels(self, label_column: str | None = None) -> Labels:
        """The classes of all images; of tables by a column; a ValueError if they have none."""

    def read(self, index: int) -> Tensor:
        """One image, `(1 or 3, H, W)` float32 in [-1, 1]; raises what the decoder raises."""
        (image,) = self.fetch([index])
        if isinstance(image, Exception):
            raise image
        return scaled(image)

    def fetch_each(self, indices: Sequence[int], batch_size: int = 32) -> Iterator[tuple[int, Tensor | Exception]]:
        """`fetch` for any number of images, of which `batch_size` are in memory: each with its index."""
        for start in range(0, len(indices), batch_size):
            some = indices[start : start + batch_size]
            yield from zip(some, self.fetch(some), strict=True)


class TensorImages(ImageSource):
    """Images that are there already, `(n, 1 or 3, H, W)`, uint8 or float32 in [-1, 1]."""

    def __init__(self, images: Tensor, classes: Tensor | None = None):
        self.images = images
        self.num_images = len(images)
        self.classes = classes

    def fetch(self, indices: Sequence[int]) -> list[Tensor | Exception]:
        return list(self.images[list(indices)])

    def name(self, index: int) -> str:
        return f"image {index}"

    def _told_by(self) -> Iterable[bytes]:
        yield self.images.cpu().numpy().tobytes()

    def labels(self, label_column: str | None = None) -> Labels:
        if self.classes is None:
            raise ValueError("--class_conditional: these images have no classes")
        if label_column is not None:
            raise ValueError(f"--label_column {label_column!r} is not in the data: these images have no columns")
        return labels_from(self.classes.tolist())


class EncodedImages(ImageSource):
    """Images as PIL opens them.

    What the pixels mean where the mode does not say so, is told by the first look at the set: the same for all images
    and, as it depends on the data alone, for every run. It is logged; a ValueError if there is no such meaning.
    """

    background: Colour

    def __init__(self, num_images: int, background: Colour):
        self.num_images = num_images
        self.background = background
        self.ranges: dict[str, PixelRange] = {}
        extremes: dict[str, tuple[float, float]] = {}
        deep: list[int] = []  # largest values of colour images of 16 bits, of which PIL keeps the upper 8
        examined = range(0, num_images, math.ceil(num_images / NUM_LOOKED_AT) or 1)
        stacks = []  # files of several images
        for index in examined:
            (row,) = self._rows([index])
            try:
                with self._open(row) as image, unmapped(image):
                    if image.format != "MPO" and getattr(image, "is_animated", False):  # others of which are previews
                        stacks.append(index)
                    of_16_bits = has_16_bits(image)
                    if image.mode[0] not in "IF" and not of_16_bits:
                        continue
                    pixels = decode(image, background)
            except Exception:  # counted where images are read
                continue
            if of_16_bits:
                deep.append(int(pixels.max()))
                continue
            low, high = extremes.get(pixels.dtype.name, (math.inf, -math.inf))
            extremes[pixels.dtype.name] = min(low, float(pixels.min())), max(high, float(pixels.max()))
        if stacks:
            logger.warning(
                f"{len(stacks)} of {len(examined)} files that were looked at hold several images, such as "
                f"{self.name(stacks[0])}: of each, the first is used"
            )
        for kind, (low, high) in extremes.items():
            self.ranges[kind] = range_of(kind, low, high)
            logger.warning(
                f"{KINDS[kind]} images whose smallest value is {low:g} and largest value is {high:g}: read as "
                f"{self.ranges[kind].words}"
            )
        if deep and max(deep) < 64:
            logger.warning(
                f"colour images of 16 bits whose largest value is below {(max(deep) + 1) * 256} are read as dark ones, "
                "with 65535 as white: if they are of fewer bits, save them with 8"
            )

    @abstractmethod
    def _rows(self, indices: list[int]) -> Sequence[Any]:
        """Whatever `_open` makes images of; one access for all."""

    @abstractmethod
    def _open(self, row: Any) -> Image.Image: ...

    def fetch(self, indices: Sequence[int]) -> list[Tensor | Exception]:
        return [self.decoded(row) for row in self._rows(list(indices))]

    def decoded(self, row: Any) -> Tensor | Exception:
        """The image of one of the `_rows`."""
        try:
            with self._open(row) as image, unmapped(image):
                return as_tensor(decode(image, self.background), self.ranges)
        except Exception as error:  # a decoder may raise anything; the share of failures is what counts
            return error


class FolderImages(EncodedImages):
    """Image files, `paths` relative to a folder."""

    image_column = "image"

    def __init__(self, folder: Path, paths: list[str], background: Colour):
        self.folder = str(folder)
        self.paths = paths
        super().__init__(len(paths), background)

    def _rows(self, indices: list[int]) -> list[str]:
        return [self.name(index) for index in indices]

    def _open(self, row: str) -> Image.Image:
        return Image.open(row)

    def name(self, index: int) -> str:
        return f"{self.folder}/{self.paths[index]}"

    def _told_by(self) -> Iterable[bytes]:
        for path in self.paths:
            yield os.fsencode(f"{path} {Path(self.folder, path).stat().st_size}\n")

    def labels(self, label_column: str | None = None) -> Labels:
        if label_column is not None:
            raise ValueError(
                f"--label_column {label_column!r} is not in the data: the files of a folder have no columns, "
                "folders are their classes"
            )
        return labels_of_files(self.paths)


class TableImages(EncodedImages):
    """The images of a column of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, image_column: str | None, background: Colour, name: str):
        self.table = dataset
        self.dataset, self.image_column = images_of(dataset, image_column)
        self.dataset_name = name
        super().__init__(len(dataset), background)

    def _rows(self, indices: list[int]) -> Sequence[Any]:
        return self.dataset[indices][self.image_column]

    def _open(self, row: Any) -> Image.Image:
        if row["bytes"] is not None:
            return Image.open(BytesIO(row["bytes"]))
        if row["path"] and os.path.isfile(row["path"]):
            return Image.open(row["path"])
        import datasets

        return datasets.Image().decode_example(row)  # a path in an archive, or of the Hub

    def name(self, index: int) -> str:
        return f"row {index} of {self.dataset_name}"

    def _told_by(self) -> Iterable[bytes]:
        import pyarrow.compute as pc

        for rows in self.dataset.data.column(self.image_column).chunks:
            sizes = pc.fill_null(pc.binary_length(pc.struct_field(rows, "bytes")), 0)
            yield sizes.to_numpy(zero_copy_only=False).astype(np.int64).tobytes()

    def labels(self, label_column: str | None = None) -> Labels:
        return labels_of_table(self.table, label_column)


class Subset(ImageSource):
    """Some of the images of another source."""

    def __init__(self, source: ImageSource, chosen: list[int]):
        self.source = source
        self.chosen = chosen
        self.num_images = len(chosen)
        self.image_column = source.image_column
        self.background = source.background

    def fetch(self, indices: Sequence[int]) -> list[Tensor | Exception]:
        return self.source.fetch([self.chosen[index] for index in indices])

    def name(self, index: int) -> str:
        return self.source.name(self.chosen[index])

    def _told_by(self) -> Iterable[bytes]:
        yield f"{self.source.fingerprint()} {self.chosen}".encode()

    def labels(self, label_column: str | None = None) -> Labels:
        names, of_images = self.source.labels(label_column)
        return Labels(names, [of_images[index] for index in self.chosen])


def subset(source: ImageSource, num_images: int, seed: int) -> ImageSource:
    """`num_images` images of `source` (all, if it has fewer), chosen at random by `seed`."""
    return Subset(source, order_for(source.num_images, seed, SAMPLES)[:num_images])


# --- By name ---


def open_source(
    dataset_name: str | None = "digits",
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str | None = None,
    cache_dir: str | None = None,
    background: str | Sequence[int] | None = None,
) -> ImageSource:
    """Open the training images, as named by the options of the same names.

    Raises:
        ValueError: if there are no such data, no such column or no such background.
    """
    folder, option = train_data_dir, "--train_data_dir"
    if folder is None and dataset_name == "digits":
        return TensorImages(split_digits()[0], split_digit_labels()[0])
    # A downloaded set of image files; others are left to `datasets`, which reads more kinds.
    if folder is None and dataset_config_name is None and dataset_name and list_folder(Path(dataset_name)).images:
        folder, option = dataset_name, "--dataset_name"
    if folder is not None:
        try:
            return open_folder(Path(folder), image_column, cache_dir, background)
        except ValueError as error:
            raise ValueError(f"{option} {folder!r}: {error}") from error
    failing = (
        f"--dataset_name {dataset_name!r} has no training images that can be loaded; give 'digits', a data set of the "
        "Hub, or --train_data_dir for a folder of images or parquet files"
    )
    dataset = load_table(failing, dataset_name, dataset_config_name, cache_dir=cache_dir)
    return TableImages(dataset, image_column, colour(background), str(dataset_name))


def tables_of_images(folder: Path, listing: Listing, image_column: str | None) -> list[str]:
    """The parquet files that have a column of images; others are counted as left out, beside data of another kind also
    those that cannot be read."""
    tables = []
    for path in listing.tables:
        try:
            if holds_images(folder / path, image_column):
                tables.append(path)
                continue
            why = "parquet files without a column of images"
        except ValueError:
            if not (listing.images or listing.tars):
                raise
            why = "parquet files that cannot be read"
        listing.left_out[why] += 1
    return tables


def check_one_kind(found: dict[str, list[str]]) -> None:
    """Raise a ValueError if there are files of more than one kind."""
    there = [f"{len(paths)} {kind}, such as {paths[0]}" for kind, paths in found.items() if paths]
    if len(there) > 1:
        raise ValueError(f"it holds {', and '.join(there)}: which are meant? Give a folder of one kind")


def open_folder(
    folder: Path,
    image_column: str | None = None,
    cache_dir: str | None = None,
    background: str | Sequence[int] | None = None,
) -> ImageSource:
    """The images under a folder: image files, or parquet files with a column of images.

    Names do not decide, see `list_folder`, with one exception: where all is in splits, of which one is `train`, the
    others are left out. Whatever is left out is counted and logged.

    Args:
        image_column: of parquet files; None: 'image' or 'img'.
        cache_dir: where `datasets` keeps what it makes of parquet files.
        background: what is seen through transparent pixels, a name or three numbers; None: white.

    Raises:
        ValueError: if it is no folder, holds no images, or both kinds, or parquet files without such a column.
    """
    rgb = colour(background)
    if not folder.is_dir():
        raise ValueError("this is not a folder")
    listing = list_folder(folder)
    left_out, tables = listing.left_out, tables_of_images(folder, listing, image_column)
    check_one_kind({"image files": listing.images, "parquet files of images": tables})
    if listing.images and image_column not in (None, "image"):
        raise ValueError(f"--image_column {image_column!r} is not in the data: the files of a folder have no columns")
    chosen = training_part(
        listing.images or tables or listing.tables, split_of_image if listing.images else split_of_table, left_out
    )
    found = ", ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
    if not chosen:
        raise ValueError(f"it holds no images, but {found or 'nothing at all'}")
    if left_out:
        logger.warning(f"{folder}: {len(chosen)} files are used, not used are {found}")
    if listing.images:
        return FolderImages(folder, chosen, rgb)
    files = [glob.escape(str((folder / path).absolute())) for path in chosen]
    dataset = load_table("its parquet files cannot be read", "parquet", data_files=files, cache_dir=cache_dir)
    return TableImages(dataset, image_column, rgb, str(folder))
