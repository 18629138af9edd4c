"""Errors of samples of a law that is known exactly. No reference sample, so no noise but that of the samples."""

import torch
from torch import Tensor

from .distances import num_not_finite


def moment_errors(samples: Tensor, mean: Tensor, covariance: Tensor) -> dict[str, float]:
    """Errors of the first two moments.

    Args:
        samples: `(n, ...)`, d elements each, n at least 2.
        mean: exact, `(d,)`.
        covariance: exact, `(d, d)`.

    Returns:
        `mean`: Euclidean norm of the error of the mean; `variance`: of the total variance, relative and with its
        sign (negative: samples too close together); `covariance`: Frobenius norm of the error over that of the exact
        one.

    Raises:
        ValueError: for fewer than two samples, shapes that do not fit, or values that are not finite.
    """
    x = _checked(samples, 2)
    if mean.shape != (x.shape[1],) or covariance.shape != (x.shape[1], x.shape[1]):
        raise ValueError(
            f"samples of {x.shape[1]} elements need a mean ({x.shape[1]},) and a covariance "
            f"({x.shape[1]}, {x.shape[1]}), got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    exact = covariance.double()
    error = torch.cov(x.T).reshape(exact.shape) - exact
    return {
        "mean": float((x.mean(0) - mean.double()).norm()),
        "variance": float(error.trace() / exact.trace()),
        "covariance": float(error.norm() / exact.norm()),
    }


def mode_weights_error(samples: Tensor, centres: Tensor, weights: Tensor) -> float:
    """Total variation between the weights of modes and the shares of samples nearest to each centre, in [0, 1].

    Args:
        samples: `(n, ...)`, d elements each.
        centres: `(k, ...)`, d elements each.
        weights: exact, `(k,)`, of sum 1.

    Raises:
        ValueError: for no samples, shapes that do not fit, values that are not finite, or weights of another sum.
    """
    x, modes = _checked(samples, 1), centres.flatten(1).double()
    if modes.shape[1] != x.shape[1] or weights.shape != (len(modes),):
        raise ValueError(
            f"samples of {x.shape[1]} elements do not fit centres {tuple(centres.shape)} and weights "
            f"{tuple(weights.shape)}"
        )
    if not (weights >= 0).all() or abs(float(weights.double().sum()) - 1) > 1e-5:
        raise ValueError(f"weights must be non-negative with sum 1, got {weights.tolist()}")
    shares = torch.bincount(torch.cdist(x, modes).argmin(1), minlength=len(modes)) / len(x)
    return float((shares - weights).abs().sum() / 2)


def _checked(samples: Tensor, fewest: int) -> Tensor:
    if len(samples) < fewest:
        raise ValueError(f"need at least {fewest} samples, got {len(samples)}")
    if bad := num_not_finite(samples):
        raise ValueError(f"{bad} of {len(samples)} samples hold values that are not finite")
    return samples.flatten(1).double()
