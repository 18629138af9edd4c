"""How `.sampler_benchmark` scores samples: many times against one reference."""

import ot
import torch
from torch import Tensor

from ..evaluation.distances import frechet_distance, num_not_finite, sliced_wasserstein
from ..evaluation.scoring import SLICED_WASSERSTEIN

FRECHET = "FD of pixels"

# Samples to a pixel from which on FD is measured: with fewer it is mostly bias.
ENOUGH = 8

NUM_PROJECTIONS = 512


class Scores:
    """Sliced W2 of samples to a reference, and the Frechet distance of their pixels where they are enough.

    Sliced W2 is that of `evaluation`, on the same directions; where the reference is a multiple of the samples in
    number, its sorted projections are worked out once, which is thirty times faster.
    """

    def __init__(self, reference: Tensor):
        self.reference = reference
        size = reference[0].numel()
        self.directions = torch.from_numpy(ot.sliced.get_random_projections(size, NUM_PROJECTIONS, seed=0))
        self.sorted = self._projected(reference)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """`num_nan`, the number of samples that are not finite, alone where there are any, and the distances."""
        scores: dict[str, float] = {"num_nan": num_not_finite(samples)}
        if scores["num_nan"]:
            return scores
        samples = samples.clamp(-1, 1)
        scores[SLICED_WASSERSTEIN] = self._sliced(samples)
        if min(len(samples), len(self.reference)) >= ENOUGH * samples[0].numel():
            scores[FRECHET] = frechet_distance(samples.flatten(1), self.reference.flatten(1))
        return scores

    def _sliced(self, samples: Tensor) -> float:
        n = len(samples)
        if len(self.reference) % n:
            return sliced_wasserstein(samples, self.reference, NUM_PROJECTIONS)
        # Every sample is matched with as many of the reference, the ones of its rank.
        matched = self.sorted.view(NUM_PROJECTIONS, n, -1)
        return float((self._projected(samples)[..., None] - matched).square().mean().sqrt())

    def _projected(self, images: Tensor) -> Tensor:
        """`(projections, n)`, sorted."""
        return (images.flatten(1).double() @ self.directions).T.contiguous().sort(1).values
