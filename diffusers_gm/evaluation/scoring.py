"""All metrics of a set of samples at once."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .distances import (
    frechet_distance,
    kernel_distance,
    num_not_finite,
    precision_recall_density_coverage,
    sliced_wasserstein,
)
from .features import Extractor, cached_features_of, features_of

METRICS = ("fd", "kid", "sw", "prdc")
OF_FEATURES = ("fd", "kid", "prdc")
SLICED_WASSERSTEIN = "sliced W2"


class Reference:
    """Real images that samples are measured against, and their features.

    Args:
        images: `(m, 1 or 3, H, W)` in [-1, 1], in random order.
        extractor: of the features; None for sliced W2 alone.
        cache_dir: where features are looked for and kept; None: they are computed.
    """

    def __init__(self, images: Tensor, extractor: Extractor | None = None, cache_dir: Path | None = None):
        self.images = images
        self.extractor = extractor
        self.features: Tensor | None = None
        if extractor and cache_dir:
            self.features = cached_features_of(images, extractor, cache_dir)
        elif extractor:
            self.features = features_of(images, extractor)


def check_metrics(metrics: Sequence[str], num_samples: int, num_reference: int, extractor: Extractor | None) -> None:
    """Raise a ValueError if a metric is unknown or the images are too few for it."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics {unknown} must be among {list(METRICS)}, at least one")
    fewest = min(num_samples, num_reference)
    for name in metrics:
        if name in OF_FEATURES and extractor is None:
            raise ValueError(f"metric {name!r} needs features: give the reference an extractor, or measure 'sw' only")
    if "fd" in metrics and extractor and fewest <= extractor.frechet_dimension:
        raise ValueError(
            f"{extractor.frechet_name} needs more than {extractor.frechet_dimension} images, samples and reference "
            f"each, got {num_samples} and {num_reference}: take more, or leave 'fd' out of the metrics"
        )
    needed = 6 if "prdc" in metrics else 2
    if fewest < needed:
        raise ValueError(
            f"the metrics {list(metrics)} need at least {needed} samples and reference images, got {num_samples} "
            f"and {num_reference}"
        )


def score(
    samples: Tensor, reference: Reference, metrics: Sequence[str] = METRICS, features: Tensor | None = None
) -> dict[str, float]:
    """Everything that is asked for, by name: `FD-Lite0`, `KID-Lite0`, `sliced W2`, `precision`, `recall`, ...

    Frechet distance and sliced W2 use the whole reference; kernel distance and nearest neighbours, whose cost grows
    with the square, as many of its images as there are samples, the first.

    Args:
        samples: `(n, 1 or 3, H, W)` in [-1, 1]; beyond that they are clipped, as in a picture.
        reference: real images.
        metrics: among `fd`, `kid`, `sw` and `prdc` (precision, recall, density, coverage).
        features: of the samples, by the extractor of the reference, where they are there already.

    Returns:
        The values, and under `num_nan` the number of samples that hold a value that is not finite: where there are
        any, nothing else is returned, as no metric of the others would tell of them.

    Raises:
        ValueError: for other shapes than those of the reference, too few images, or an unknown metric.
    """
    if samples.shape[1:] != reference.images.shape[1:]:
        raise ValueError(
            f"samples are (n, {', '.join(map(str, samples.shape[1:]))}), the reference is "
            f"(m, {', '.join(map(str, reference.images.shape[1:]))}): resize or convert one of them"
        )
    extractor, n = reference.extractor, len(samples)
    check_metrics(metrics, n, len(reference.images), extractor)
    values: dict[str, float] = {"num_nan": num_not_finite(samples)}
    if values["num_nan"]:
        return values
    if extractor and reference.features is not None and set(metrics) != {"sw"}:
        own = features_of(samples, extractor) if features is None else features
        if "fd" in metrics:
            values[extractor.frechet_name] = frechet_distance(
                own[:, extractor.frechet], reference.features[:, extractor.frechet]
            )
        near, of_reference = own[:, extractor.kernel], reference.features[:n, extractor.kernel]
        if "kid" in metrics:
            values[extractor.kernel_name] = kernel_distance(near, of_reference)
        if "prdc" in metrics:
            values |= precision_recall_density_coverage(near, of_reference)
    if "sw" in metrics:
        values[SLICED_WASSERSTEIN] = sliced_wasserstein(samples.clamp(-1, 1), reference.images)
    return values
