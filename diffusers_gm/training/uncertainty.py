"""Weights of the noise levels that are learned: the worse a loss can be at a level, the less it counts there."""

import math

import torch
from torch import Tensor, nn

NUM_FREQUENCIES = 64


class Uncertainty(nn.Module):
    """The learned loss weights of EDM2 (arXiv 2312.02696, eq. 14; of tasks arXiv 1705.07115): `L / exp(u) + u`.

    Where that is least, `exp(u(sigma))` is the mean loss at the level, and all levels have the same say in what the
    network learns. u is one linear layer on Fourier features of `ln(sigma) / 4`, zero at the start. Their frequencies
    are quantiles of a normal law where EDM2 draws from it. It is needed in training alone.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        positive = (1 + (torch.arange(NUM_FREQUENCIES) + 0.5) / NUM_FREQUENCIES) / 2
        self.register_buffer("frequencies", 2 * math.pi * torch.special.ndtri(positive))
        self.weight = nn.Parameter(torch.zeros(2 * NUM_FREQUENCIES))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, losses: Tensor, sigma: Tensor) -> Tensor:
        """What to minimise in place of `losses` `(B,)` at the levels `sigma` `(B,)`, same shape."""
        u = self.log_loss(sigma)
        return losses * torch.exp(-u) + u

    def log_loss(self, sigma: Tensor) -> Tensor:
        """u, same shape: what the logarithm of the mean loss at these levels is thought to be."""
        phases = (sigma.log() / 4).to(self.frequencies, non_blocking=True)[..., None] * self.frequencies
        # Not as a matrix product, which mixed precision would round.
        return (torch.cat([phases.cos(), phases.sin()], -1) * self.weight).sum(-1) + self.bias
