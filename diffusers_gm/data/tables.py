"""Tables of images: parquet files and data sets of the Hub, through `datasets`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What the column of the images is called, where nothing says so.
USUAL_COLUMNS = ("image", "img")
# And in tar files as of webdataset, where columns are suffixes of files.
SUFFIXES = ("png", "jpg", "jpeg", "webp")


def holds_images(path: Path, image_column: str | None = None) -> bool:
    """Whether a parquet file has a column of images: one of the structure in which `datasets` keeps them, or one of
    bytes called `image_column`, or as usual; a ValueError if the file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error

    def is_images(field: Any) -> bool:
        if pa.types.is_struct(field.type):
            return {"bytes", "path"} <= {inner.name for inner in field.type}
        named = field.name == image_column or field.name in USUAL_COLUMNS
        return named and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))

    return any(map(is_images, schema))


def load_table(failing: str, *args: Any, **options: Any) -> Any:
    """The training split, as `datasets.load_dataset` loads it; a ValueError that begins with `failing` if it cannot."""
    import datasets

    try:
        return datasets.load_dataset(*args, split="train", **options)
    except Exception as error:  # every loader and file system has its own
        raise ValueError(f"{failing}: {error}") from error


def images_of(dataset: Any, image_column: str | None) -> tuple[Any, str]:
    """The column of images alone, not decoded, and its name; a ValueError if there is no such column, or none of
    images."""
    import datasets

    columns = list(dataset.features or next(iter(dataset), {}))  # a stream may not know before it is read
    several = [name for name in SUFFIXES if name in columns]
    if image_column is None and len(several) > 1 and not set(USUAL_COLUMNS) & set(columns):
        raise ValueError(f"there are images in the columns {several}: say which with --image_column")
    image_column = column_called("--image_column", image_column, USUAL_COLUMNS + SUFFIXES, columns)
    try:
        kind: Any = (dataset.features or {}).get(image_column)
        if isinstance(kind, datasets.Value) and kind.dtype.removeprefix("large_") not in ("binary", "string"):
            raise ValueError  # which a stream would only find when it is read
        # Not decoded, so that one unreadable image does not end the training.
        images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        return images, image_column
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"--image_column {image_column!r} holds {dataset.features[image_column]}, not images"
        ) from error


def column_called(option: str, name: str | None, usual: Sequence[str], columns: list[str]) -> str:
    """The column that an option names, or else one of the usual names; a ValueError if there is none."""
    if name is None:
        name = next((name for name in usual if name in columns), None)
        if name is None:
            raise ValueError(f"no column is called {' or '.join(map(repr, usual))}: set {option} to one of {columns}")
    elif name not in columns:
        raise ValueError(f"{option} {name!r} is not in the data: use one of {columns}")
    return name
