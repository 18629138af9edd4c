"""Distances between two sets of images or of their features: pure functions of tensors on the CPU."""

import torch
from torch import Tensor

from ..extra import extra


def sliced_wasserstein(samples: Tensor, reference: Tensor, num_projections: int = 512, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance between two sets of images, in the units of one pixel.

    The root mean square, over random directions, of the 1-D W2 distance. It depends on the numbers of images:
    compare at equal numbers only.

    Args:
        samples, reference: `(n, ...)` and `(m, ...)` with equal image shapes.
        num_projections: random directions.
        seed: decides the directions; equal seeds make values comparable.

    Raises:
        ValueError: if image shapes differ, there are fewer than two images, or values are not finite.
    """
    with extra("evaluation"):
        import ot

    _check_pair(samples, reference, "images")
    a, b = (x.flatten(1).double().numpy() for x in (samples, reference))
    return float(ot.sliced_wasserstein_distance(a, b, n_projections=num_projections, seed=seed))


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Squared 2-Wasserstein distance between Gaussians fitted to two sets of features (FID, arXiv 1706.08500).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, by torchmetrics in float64. Biased upwards by an amount that falls
    with the numbers of images: compare at equal numbers only.

    Args:
        samples, reference: features `(n, d)` and `(m, d)`.

    Raises:
        ValueError: if there are not more than d features each, the shapes do not fit, or values are not finite.
    """
    with extra("evaluation"):
        from torchmetrics.image.fid import FrechetInceptionDistance

    _check_pair(samples, reference, "features")
    num_features, fewest = samples.shape[1], min(len(samples), len(reference))
    if fewest <= num_features:
        raise ValueError(
            f"the Frechet distance of {num_features}-dimensional features needs more than {num_features} images each, "
            f"got {len(samples)} and {len(reference)}: with fewer the covariance is singular"
        )
    network = torch.nn.Identity()  # the features are there already
    network.num_features = num_features  # type: ignore[assignment]
    # Left to itself, torchmetrics adds up what the processes of a distributed run have seen.
    metric = FrechetInceptionDistance(feature=network, sync_on_compute=False)
    metric.update(samples.double(), real=False)
    metric.update(reference.double(), real=True)
    return float(metric.compute())


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel `(x.y / d + 1)^3`, unbiased (KID, arXiv 1801.01401).

    All pairs rather than random subsets: the same value every time, at the cost of `(n + m)^2` kernel values. Around 0
    for two sets of one law, and then as often negative as positive. Not by torchmetrics, which is equal where n = m:
    it draws its subsets from the global generator, and its `poly_mmd` takes n for m without a word.

    Args:
        samples, reference: features `(n, d)` and `(m, d)`.

    Raises:
        ValueError: if there are fewer than two each, the shapes do not fit, or values are not finite.
    """
    _check_pair(samples, reference, "features")
    x, y = samples.double(), reference.double()
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(float((rows @ y.T / x.shape[1] + 1).pow(3).sum()) for rows in x.split(1000))


def _mean_of_pairs(x: Tensor) -> float:
    """Mean kernel of two different points of one set."""
    of_itself = float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())
    return (_kernel_sum(x, x) - of_itself) / (len(x) * (len(x) - 1))


def precision_recall_density_coverage(samples: Tensor, reference: Tensor, num_neighbors: int = 5) -> dict[str, float]:
    """How far each set lies within the other (arXiv 1904.06991 and 2002.09797).

    The ball of a point reaches to its `num_neighbors`-th nearest neighbour in its own set.

    - precision: share of samples in the ball of some reference point.
    - recall: share of reference points in the ball of some sample.
    - density: mean number of reference balls around a sample, over `num_neighbors`; may exceed 1.
    - coverage: share of reference balls that hold a sample.

    All four depend on the numbers of images. Compare at equal numbers only.

    Args:
        samples, reference: features `(n, d)` and `(m, d)`.
        num_neighbors: k.

    Raises:
        ValueError: if there are not more than `num_neighbors` features each, the shapes do not fit, or values are
            not finite.
    """
    with extra("evaluation"):
        from sklearn.metrics import pairwise_distances
        from sklearn.neighbors import NearestNeighbors

    _check_pair(samples, reference, "features")
    if not 1 <= num_neighbors < min(len(samples), len(reference)):
        raise ValueError(
            f"num_neighbors must be at least 1 and less than the numbers of images, {len(samples)} and "
            f"{len(reference)}, got {num_neighbors}"
        )
    x, y = samples.double().numpy(), reference.double().numpy()
    # Without an argument, kneighbors leaves a point itself out.
    of_x, of_y = (NearestNeighbors(n_neighbors=num_neighbors).fit(z).kneighbors()[0][:, -1] for z in (x, y))
    distances = pairwise_distances(y, x)
    in_reference_ball = distances <= of_y[:, None]
    return {
        "precision": float(in_reference_ball.any(0).mean()),
        "recall": float((distances <= of_x).any(1).mean()),
        "density": float(in_reference_ball.sum(0).mean()) / num_neighbors,
        "coverage": float(in_reference_ball.any(1).mean()),
    }


def num_not_finite(images: Tensor) -> int:
    """How many of `(n, ...)` hold a value that is not finite."""
    return int((~torch.isfinite(images.flatten(1)).all(1)).sum())


def _check_pair(samples: Tensor, reference: Tensor, what: str) -> None:
    if samples.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"{what} of different shapes: samples {tuple(samples.shape[1:])}, reference {tuple(reference.shape[1:])}"
        )
    if what == "features" and samples.dim() != 2:
        raise ValueError(f"features must be (n, d), got {tuple(samples.shape)}")
    if min(len(samples), len(reference)) < 2:
        raise ValueError(f"need at least two {what} each, got {len(samples)} and {len(reference)}")
    for name, values in (("samples", samples), ("reference images", reference)):
        if bad := num_not_finite(values):
            raise ValueError(f"{bad} of {len(values)} {name} hold values that are not finite")
