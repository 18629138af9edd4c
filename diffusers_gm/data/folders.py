"""Which files of a folder are data: every image and every table, whatever they and the folders above are called."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

# Formats that PIL knows by name and does not decode.
UNDECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}

# A folder that holds one of the first, or all of the second, was written by a training or by a measurement.
OF_TRAINING = ("model_index.json", "training_args.json", "training_log.jsonl", "training_state.json")
OF_MEASUREMENT = ("results.json", "results.md")
# The pictures that these leave, for data that lie in the very folder that was written to.
OUTPUT_PICTURE = re.compile(r"samples\.png|(results|calibration)(-before(-\d+)?)?\.png|samples/step-\d+\.png")

TRAIN = {"train", "training"}
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Listing:
    """What is under a folder.

    Attributes:
        images, tables, tars: image, parquet and tar files, relative to the folder, in the order of their names.
        left_out: how many of whatever else there is, by what it is; tar files too, which are for streams alone.
    """

    images: list[str]
    tables: list[str]
    tars: list[str]
    left_out: Counter[str]


def list_folder(folder: Path) -> Listing:
    """Everything under a folder; links are followed, to each folder once.

    Hidden files and folders are left out, and whatever a training or a measurement of this package wrote.
    """
    left_out: Counter[str] = Counter()
    images, tables, tars = [], [], []
    written_to = is_output(folder)
    # Nor does a link to a folder above lead to data.
    seen = {folder.resolve(), *folder.resolve().parents}
    for path in sorted(path.relative_to(folder).as_posix() for path in _walk(folder, seen, left_out)):
        suffix = PurePosixPath(path).suffix.lower()
        if written_to and OUTPUT_PICTURE.fullmatch(path):
            left_out["pictures of samples and results"] += 1
        elif suffix in image_suffixes():
            images.append(path)
        elif suffix == ".parquet":
            tables.append(path)
        else:
            left_out[f"{suffix} files" if suffix else "files without a suffix"] += 1
            if suffix == ".tar":
                tars.append(path)
    return Listing(images, tables, tars, left_out)


def _walk(folder: Path, seen: set[Path], left_out: Counter[str]) -> Iterator[Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        left_out["folders that cannot be opened"] += 1
        return
    for path in paths:
        if path.name.startswith("."):
            left_out["hidden files or folders"] += 1
        elif path.is_dir():
            if is_output(path):
                left_out["folders written by a training or a measurement"] += 1
            elif (real := path.resolve()) in seen:
                left_out["links to folders that are above or used already"] += 1
            else:
                seen.add(real)
                yield from _walk(path, seen, left_out)
        elif path.is_file():
            yield path
        else:
            left_out["links that lead nowhere, or files of no contents"] += 1


def is_output(folder: Path) -> bool:
    """Whether a training or a measurement wrote to this folder."""
    return any((folder / name).is_file() for name in OF_TRAINING) or all(
        (folder / name).is_file() for name in OF_MEASUREMENT
    )


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that PIL opens, in lower case."""
    extensions = Image.registered_extensions()
    return frozenset(s for s, name in extensions.items() if name in Image.OPEN and name not in UNDECODED)


# --- Splits ---


def split_of_image(path: str) -> str | None:
    """The name of the topmost folder, if an image is in one and that is a split; no name of a file is."""
    top, *below = PurePosixPath(path).parts
    return top.lower() if below and top.lower() in TRAIN | HELD_OUT else None


def split_of_table(path: str) -> str | None:
    """As the Hub names them: `train-00000-of-00002.parquet`, or a folder `train`."""
    names = [SHARD.sub("", PurePosixPath(path).stem), *reversed(PurePosixPath(path).parts[:-1])]
    return next((name.lower() for name in names if name.lower() in TRAIN | HELD_OUT), None)


def split_of_shard(path: str) -> str | None:
    """As files of webdataset are named: `train-0000.tar`, or a folder `train`."""
    numbered = PurePosixPath(path)
    return split_of_table(str(numbered.with_name(re.sub(r"[-_.]?[0-9]+$", "", numbered.stem) or "0")))


def training_part(paths: list[str], split_of: Callable[[str], str | None], left_out: Counter[str]) -> list[str]:
    """Those that are for training, where *all* are in splits of which one is; else all."""
    splits = [split_of(path) for path in paths]
    if None in splits or not TRAIN & set(splits):
        return paths
    left_out.update(f"files of the split {split!r}" for split in splits if split not in TRAIN)
    return [path for path, split in zip(paths, splits, strict=True) if split in TRAIN]
