"""What users hand to a pipeline, as tensors: labels of classes, images, masks. Errors come before any work."""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from ..data.pixels import decode, unmapped

logger = logging.getLogger(__name__)

# One class for all images or one for each: indices, or names.
ClassLabels = int | str | Sequence[int | str] | Tensor


def by_index(values: Sequence[Any] | Mapping[Any, Any] | None) -> list[Any] | None:
    """A list of what belongs to each class; pipelines save it as a mapping from indices."""
    if isinstance(values, Mapping):
        return [value for _, value in sorted(values.items(), key=lambda item: int(item[0]))]
    return None if values is None else list(values)


def check_classes(names: list[str] | None, shares: list[float] | None, num_embeds: int | None) -> None:
    """Raise a ValueError unless names and shares suit a network of `num_embeds` classes, with or without a null one."""
    for argument, values in (("class_names", names), ("class_shares", shares)):
        if values is None:
            continue
        if num_embeds is None:
            raise ValueError(f"{argument} for a network without classes: its config has no num_class_embeds")
        if len(values) not in (num_embeds - 1, num_embeds):
            raise ValueError(
                f"{argument} has {len(values)} entries, but the network {num_embeds} classes: give {num_embeds - 1}, "
                "without the last class, which stands for no class, or one for each"
            )
    if names is not None and shares is not None and len(names) != len(shares):
        raise ValueError(f"class_shares must be one for each of the {len(names)} class_names, got {len(shares)}")
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"class_names must differ, {sorted({n for n in names if names.count(n) > 1})} do not")
    if shares is not None and not (min(shares) >= 0 and sum(shares) > 0):
        raise ValueError(f"class_shares must be non-negative, and not all 0: got {shares}")


def class_indices(labels: ClassLabels, num_embeds: int, names: list[str] | None) -> list[int]:
    """Labels as indices, also of a single one; a ValueError for an index out of range, or a name that is none of
    `names`."""
    given: Any = labels.tolist() if hasattr(labels, "tolist") else labels  # a tensor, or numpy's
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found = [_index(label, names) for label in (given if several else [given])]
    wrong = [label for label in found if not 0 <= label < num_embeds]
    if wrong:
        raise ValueError(f"class_labels {wrong} are out of range: this network has the classes 0 to {num_embeds - 1}")
    return found


def _index(label: Any, names: list[str] | None) -> int:
    if isinstance(label, str):
        if names is None:
            raise ValueError(f"class_labels {label!r}: this model has no class_names, give the indices of classes")
        if label not in names:
            near = get_close_matches(label, names, 3, 0.0)
            raise ValueError(f"class_labels {label!r} is no class of this model; the nearest are {near}")
        return names.index(label)
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise ValueError(f"class_labels must be indices or names of classes, got {label!r}")
    return int(label)


def as_images(image: Any, argument: str, shape: Sequence[int | None], noisy: bool = False) -> Tensor:
    """Images of a user's, `(1 or B, C, H, W)` float32 in [0, 1].

    Args:
        image: PIL images, turned upright by their EXIF tag, on white where they are transparent, masks on black; arrays
            `(..., H, W, C)` or tensors `(..., C, H, W)` in [0, 1]; one or a list.
        argument: its name.
        shape: `(B, C, H, W)` of the run; None where anything will do.
        noisy: whether values may lie outside [0, 1].

    Raises:
        ValueError: for another shape, values out of [0, 1], or whole numbers or a mode of PIL of which it is not said
            what is white.
    """
    channels = shape[1]
    given = list(image) if isinstance(image, list | tuple) else [image]
    if all(isinstance(one, Image.Image) for one in given):
        image = [_as_read(one, argument) for one in given]
    elif any(isinstance(one, Image.Image) for one in given):
        raise ValueError(f"{argument} must be PIL images, or arrays or tensors, not some of each")
    elif noisy and any("int" in str(getattr(one, "dtype", "")) for one in given):
        raise ValueError(
            f"{argument} holds whole numbers: give PIL images, or floating-point numbers of which 0 is black and 1 is "
            "white"
        )
    processor = VaeImageProcessor(
        do_resize=False, do_normalize=False, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1
    )
    try:
        images = processor.preprocess(list(image) if isinstance(image, tuple) else image).float()
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    fits = [wanted in (None, size) for wanted, size in zip(shape, images.shape, strict=True)]
    if not all(fits[1:]) or not (fits[0] or len(images) == 1):
        wanted = " x ".join(str(size or "any") for size in shape[1:])
        raise ValueError(
            f"{argument} must be one image or {shape[0] or 'several'}, of {wanted} (channels, height, width), got "
            f"{tuple(images.shape)}: convert or resize it, or give height and width"
        )
    low, high = images.min().item(), images.max().item()
    if not noisy and not (low >= 0 and high <= 1):
        raise ValueError(f"{argument} must be in [0, 1], as pipelines return images; it goes from {low:g} to {high:g}")
    return images


def _as_read(image: Image.Image, argument: str) -> Image.Image:
    """A PIL image as a training reads it."""
    if image.mode[0] in "IF":
        raise ValueError(
            f"{argument} is of mode {image.mode}, which does not say what is white: give an array or a tensor in "
            "[0, 1], scaled as the training images were"
        )
    turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turned != 1 and not isinstance(image, ImageFile.ImageFile):
        logger.warning(
            f"{argument} has the EXIF orientation {turned} and is turned upright by it, which is right unless that was "
            "done before, as by rotate, which leaves the tag: then use PIL.ImageOps.exif_transpose in its place"
        )
    with unmapped(image):
        image = image.copy()
    return Image.fromarray(decode(image, (0, 0, 0) if argument == "mask_image" else (255, 255, 255)))
