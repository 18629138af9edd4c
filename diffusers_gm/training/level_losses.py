"""The loss by noise level: a mean over all hides the level that fails."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ..readings import level_range
from .objective import Objective

NUM_BANDS = 10


class LevelLosses:
    """Means of the losses since the last look, over all images of all processes: of all levels, and of ten bands of
    them that are equally wide in log sigma.

    Attributes:
        edges: of the bands, eleven levels; what is beyond the ends counts to the first or last band.
    """

    def __init__(self, objective: Objective, accelerator: Accelerator):
        self.objective = objective
        self.accelerator = accelerator
        low, high = sorted(map(math.log, level_range(objective.reading)))
        self._log_edges = torch.linspace(low, high, NUM_BANDS + 1, dtype=torch.float64)
        self.edges = [float(f"{edge:.4g}") for edge in self._log_edges.exp().tolist()]
        self._sums = torch.zeros(2, NUM_BANDS, device=accelerator.device)

    def note(self, losses: Tensor, uniform: Tensor) -> None:
        """Take the losses of a batch, `(B,)`, at the levels that these numbers decided. Does not wait for a GPU."""
        bands = torch.bucketize(self.objective.sigma(uniform).double().log(), self._log_edges[1:-1])
        losses = losses.detach().float()
        both = torch.stack([losses, torch.ones_like(losses)])
        self._sums.index_add_(1, bands.to(self._sums.device, non_blocking=True), both)

    def means(self) -> tuple[float, list[float | None]]:
        """The mean of all, and those of the bands, None for a band without an image, and a new start. Call it on all
        processes."""
        sums, counts = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        bands = [value / count if count else None for value, count in zip(sums, counts, strict=True)]
        return sum(sums) / sum(counts), bands

    def names(self) -> list[str]:
        """What the bands are called in logs and cards."""
        return [f"{low:.3g} to {high:.3g}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
