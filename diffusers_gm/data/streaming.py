"""Images that are read as they come, through `datasets`' streaming: data larger than the disk, or never counted."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .examination import MAX_UNREADABLE
from .folders import list_folder, split_of_shard, split_of_table, training_part
from .pixels import Colour, colour, scaled
from .seeds import ORDER, order_for, seed_for
from .sources import EncodedImages, TableImages, check_one_kind, tables_of_images
from .stream import TrainingImages
from .tables import images_of, load_table

logger = logging.getLogger(__name__)

# What needs all images of a set looks at so many, the first.
NUM_FIRST = 1000
# Some are read before their share of unreadable ones is judged.
FEWEST_READ = 100


class StreamedImages(TableImages):
    """A stream of rows with images. As a source it is the first `NUM_FIRST` of them, for whatever asks for some.

    Attributes:
        dataset: the `datasets.IterableDataset`, its column of images alone, not decoded.

    Raises:
        ValueError: if there is no such column, or the stream is empty or breaks off.
    """

    def __init__(self, dataset: Any, image_column: str | None, background: Colour, name: str):
        self.dataset, self.image_column = images_of(dataset, image_column)
        self.dataset_name = name
        try:
            self._first = [row[self.image_column] for row in self.dataset.take(NUM_FIRST)]
        except Exception as error:  # every loader and file system has its own
            raise ValueError(f"the stream of {name} cannot be read: {error}") from error
        if not self._first:
            raise ValueError(f"the stream of {name} holds no images")
        EncodedImages.__init__(self, len(self._first), background)

    def _rows(self, indices: list[int]) -> list[Any]:
        return [self._first[index] for index in indices]


def open_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    image_column: str | None = None,
    background: str | None = None,
) -> StreamedImages:
    """Open a stream, of the Hub or of a folder of parquet files or of tar files as of webdataset; a ValueError if there
    is none."""
    option, name = ("--dataset_name", dataset_name) if train_data_dir is None else ("--train_data_dir", train_data_dir)
    folder = Path(str(name))
    if folder.is_dir():
        listing = list_folder(folder)
        tars, left_out = listing.tars, listing.left_out
        try:
            tables = tables_of_images(folder, listing, image_column) or (
                [] if tars or listing.images else listing.tables
            )
            if tars or tables:
                check_one_kind({"tar files": tars, "parquet files of images": tables, "image files": listing.images})
        except ValueError as error:
            raise ValueError(f"{option} {str(name)!r}: {error}") from error
        del left_out[".tar files"]
        found = training_part(tars or tables, split_of_shard if tars else split_of_table, left_out)
        if left_out:
            words = ", ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
            logger.warning(f"{option} {str(name)!r}: {len(found)} files are used, not used are {words}")
        kind, paths = "webdataset" if tars else "parquet", [str(folder / path) for path in found]
        if not paths:
            files = ", of which image files are read one by one anyway: leave out --streaming" if listing.images else ""
            raise ValueError(f"{option} {str(name)!r} holds no parquet or tar files to be streamed{files}")
        given: dict[str, Any] = {"path": kind, "data_files": paths}
    elif train_data_dir is not None or name in (None, "digits"):
        raise ValueError(
            f"{option} {str(name)!r} cannot be streamed: give a data set of the Hub, or a folder of parquet or tar "
            "files"
        )
    else:
        given = {"path": name, "name": dataset_config_name}
    dataset = load_table(f"{option} {str(name)!r} cannot be streamed", **given, streaming=True)
    return StreamedImages(dataset, image_column, colour(background), str(name))


@dataclass(frozen=True)
class Place:
    """Where a part of the stream is. All that `StreamedBatches` needs to go on.

    Attributes:
        epoch: passes over the part so far.
        rows: that were read in this epoch before the present block.
        taken: images of the block that have been seen.
        state: of `datasets`, at the beginning of the block; None at that of the epoch.
    """

    epoch: int = 0
    rows: int = 0
    taken: int = 0
    state: dict[str, Any] | None = None


@dataclass(eq=False)
class StreamedBatches(IterableDataset):
    """Endless batches of a stream with the place after each, for a `DataLoader` without batches of its own.

    A process, and each worker of its loader, reads the shards of its own part, in another order each epoch; blocks of
    `shuffle_buffer_size` rows are shuffled in memory. The order follows from the seed; from a place it goes on to the
    bit, and reads no more than a block again.

    Attributes:
        images: crops and flips them; its source is a `StreamedImages`.
        batch_size: of the process.
        shuffle_buffer_size: rows of a block.
        num_images: that an epoch is said to have, over all processes.
        num_processes, process_index: which part.
        places: of the workers.
        turn: of the workers, whose batch comes next; those before it first yield None.
    """

    images: TrainingImages
    batch_size: int
    shuffle_buffer_size: int
    num_images: int
    num_processes: int
    process_index: int
    places: list[Place]
    turn: int = 0

    def __post_init__(self) -> None:
        assert isinstance(self.images.source, StreamedImages)
        self.source, workers = self.images.source, len(self.places)
        shards = self.source.dataset.num_shards
        if shards % self.num_processes == 0:  # else each process reads all of them, and takes its share of the rows
            shards //= self.num_processes
        if workers > shards:
            raise ValueError(
                f"--dataloader_num_workers {workers}: a process reads {shards} shards (files) of the stream, and a "
                f"worker needs one: use at most {shards}"
            )
        self.num_parts = self.num_processes * workers

    def __iter__(self) -> Iterator[tuple[Tensor, Place] | None]:
        worker = get_worker_info()
        index = 0 if worker is None else worker.id
        if index < self.turn:
            yield None
        batch = []
        for image, place in self._images(self.process_index * len(self.places) + index, self.places[index]):
            batch.append(scaled(image))
            if len(batch) == self.batch_size:
                yield torch.stack(batch), place
                batch = []

    def _images(self, part: int, place: Place) -> Iterator[tuple[Tensor, Place]]:
        """The images of a part for ever, from a place on, each with the place after it."""
        seen = unreadable = 0
        while True:
            dataset = self._epoch(place.epoch)
            if place.state is not None:
                # It warns of a lost buffer, which for one of a single row is not so.
                logging.getLogger("datasets.iterable_dataset").addFilter(_not_of_buffers)
                dataset.load_state_dict(place.state)
            rows = self._rows(dataset, place)
            while block := list(islice(rows, self.shuffle_buffer_size)):
                order = order_for(len(block), self.images.seed, ORDER, place.epoch, part, place.rows)
                for taken in range(place.taken, len(block)):
                    image = self.source.decoded(block[order[taken]][self.source.image_column])
                    seen += 1
                    if isinstance(image, Exception):
                        unreadable += 1
                        words = f"{unreadable} of {seen} images of the stream cannot be read"
                        logger.warning(f"{words} and are skipped, this one last: {image}")
                        if seen >= FEWEST_READ and unreadable > MAX_UNREADABLE * seen:
                            raise ValueError(words) from image
                        continue
                    key = place.epoch, part, place.rows + order[taken]
                    yield self.images.augmented(image, key), replace(place, taken=taken + 1)
                place = Place(place.epoch, place.rows + len(block), 0, dataset.state_dict())
            self._check_length(place)
            place = Place(place.epoch + 1)

    def _epoch(self, epoch: int) -> Any:
        """The shards of this process, in the order of the epoch."""
        from datasets.distributed import split_dataset_by_node

        # A buffer of one row shuffles nothing but the shards, and loses nothing when the training is resumed.
        dataset = self.source.dataset.shuffle(
            seed_for(self.images.seed, ORDER, epoch) % 2**32, buffer_size=1, max_buffer_input_shards=1
        )
        return split_dataset_by_node(dataset, self.process_index, self.num_processes)

    def _rows(self, dataset: Any, place: Place) -> Iterator[Any]:
        try:
            yield from dataset
        except Exception as error:  # every loader and file system has its own
            raise RuntimeError(
                f"the stream of {self.source.dataset_name} broke off after {place.rows} rows or more: {error}; "
                "--resume_from_checkpoint latest goes on"
            ) from error

    def _check_length(self, place: Place) -> None:
        """Raise a ValueError at the end of an epoch that was too short; parts may be of unequal lengths."""
        expected = self.num_images / self.num_parts
        if place.rows < (expected if self.num_parts == 1 else expected / 2):
            part = "" if self.num_parts == 1 else f"part of {self.num_parts} parts of the "
            raise ValueError(
                f"the {part}stream of {self.source.dataset_name} ended after {place.rows} images, and "
                f"--num_train_samples {self.num_images} says {expected:.0f}: set it to what the stream holds, "
                "and go on with --resume_from_checkpoint latest, of a length in epochs with the --max_train_steps that "
                "it came to"
            )


def _not_of_buffers(record: logging.LogRecord) -> bool:
    return "shuffle buffer" not in record.getMessage()
