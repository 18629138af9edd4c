"""Classes of images: what they are called, and which image is of which."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from .folders import split_of_image
from .seeds import CLASSES, seed_for
from .tables import column_called

# What the column of the labels is called, where nothing says so.
USUAL_LABELS = ("label", "labels")


class Labels(NamedTuple):
    """Attributes:
    names: of the classes.
    of_images: the class of each image, its place among `names`.
    """

    names: list[str]
    of_images: list[int]

    def counts(self) -> list[int]:
        """Images of each class."""
        found = Counter(self.of_images)
        return [found[index] for index in range(len(self.names))]


def labels_from(values: Sequence[Any]) -> Labels:
    """Classes of whatever can be sorted, in its order."""
    known = sorted(set(values))
    places = {value: place for place, value in enumerate(known)}
    return Labels([str(value) for value in known], [places[value] for value in values])


def labels_of_files(paths: list[str]) -> Labels:
    """The topmost folder of each image is its class; below `train`, where all images are there; a ValueError for an
    image in no folder."""
    skipped = 1 if all(split_of_image(path) for path in paths) else 0
    folders = [PurePosixPath(path).parts[skipped:-1] for path in paths]
    for path, parts in zip(paths, folders, strict=True):
        if not parts:
            raise ValueError(f"--class_conditional: {path} is in no class folder; put images of a class into a folder")
        if not parts[0].isprintable():  # as a name of another encoding is, which no file of JSON could hold
            raise ValueError(f"--class_conditional: the folder {parts[0]!r} has no readable name, as of an old archive")
    return labels_from([parts[0] for parts in folders])


def labels_of_table(dataset: Any, label_column: str | None) -> Labels:
    """The classes of a column of a `datasets.Dataset`: a `ClassLabel`, integers or words; a ValueError if there is no
    such column, it holds something else, or an image has none of the classes."""
    import datasets

    label_column = column_called("--label_column", label_column, USUAL_LABELS, list(dataset.features))
    feature, values = dataset.features[label_column], list(dataset[label_column])
    missing = [row for row, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise ValueError(f"--label_column {label_column!r}: {len(missing)} rows have no class, row {missing[0]} first")
    if isinstance(feature, datasets.ClassLabel):
        wrong = next((row for row, value in enumerate(values) if not 0 <= value < feature.num_classes), None)
        if wrong is not None:
            raise ValueError(
                f"--label_column {label_column!r}: row {wrong} is of class {values[wrong]}, and there are "
                f"{feature.num_classes}, from 0 on"
            )
        return Labels(list(feature.names), values)
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"--label_column {label_column!r} holds {feature}, not classes")
    return labels_from(values)


@dataclass(eq=False)
class LabelledImages(Dataset):
    """Training images by `(epoch, index)` with their classes: `((C, H, W), class)`.

    Attributes:
        images: a data set by `(epoch, index)`, such as `TrainingImages`.
        labels: the class of each image.
        null: the class that stands for none.
        dropout: how probably it takes the place of a label: decided by `(seed, epoch, index)`.
        seed: of the training.
    """

    images: Any
    labels: list[int]
    null: int
    dropout: float
    seed: int

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """A batch, read in one go."""
        return [(image, self._label(key)) for image, key in zip(self.images.__getitems__(keys), keys, strict=True)]

    def _label(self, key: tuple[int, int]) -> int:
        if self.dropout and seed_for(self.seed, CLASSES, *key) / 2**63 < self.dropout:
            return self.null
        shown = getattr(self.images, "shown_for", None)  # another image, in place of one that cannot be read
        return self.labels[shown(key[1]) if shown else key[1]]
