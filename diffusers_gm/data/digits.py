"""Digits: real handwriting, without a download."""

import torch
from torch import Tensor

from ..extra import extra


def load_digits_images() -> Tensor:
    """The handwritten digits of scikit-learn, of the extra `evaluation`: `(1797, 1, 8, 8)` float32 in [-1, 1]."""
    with extra("evaluation"):
        from sklearn.datasets import load_digits
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def split_digits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The digits in two parts, `(1437, 1, 8, 8)` for training and `(360, 1, 8, 8)` held out.

    Trainings on `digits` always use the split of seed 0, so that its held-out part gives an honest floor.
    """
    return _split(load_digits_images(), seed)


def split_digit_labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the digits of `split_digits` are, `(1437,)` and `(360,)` int64 from 0 to 9."""
    from sklearn.datasets import load_digits

    return _split(torch.from_numpy(load_digits().target).long(), seed)


def _split(rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    cut = len(rows) * 4 // 5
    return rows[order[:cut]], rows[order[cut:]]
