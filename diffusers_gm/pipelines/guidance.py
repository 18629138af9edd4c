"""Classifier-free guidance (arXiv 2207.12598), in an interval of noise levels (arXiv 2404.07724).

    output = without + scale (with - without)

of the network with the label and with the label of no class. D is an affine function of the output, and the two weights
sum to one, so that the same holds for D: every sampler sees a denoised image that is guided, and knows of nothing else.
A variance that the network answers besides stays that of the class.

What that means: under Gaussian noise `D - y` is sigma^2 times the score, so that the guided score is that of
`p(y) p(class | y)^scale`. Under mixture noise it depends on what the network learned. A *score* is guided as a score,
with the same meaning; D follows, not linearly. A *denoiser* is guided as a denoiser: D goes `scale` times as far from
the mean of all clean images that y may be to that of its class. That is no power of a likelihood, as the score is then
the displacement times a precision that depends on it; where one component explains the noise, it is the same again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# `(model input, timestep, labels or None) -> output`
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Guidance:
    """What a run asks of a network besides the denoised image: a class, and how much of it.

    Attributes:
        labels: classes, `(B,)` int64; None: the network knows of none.
        null: the class that stands for none.
        scale: 1 is the network as it is, 0 is without classes.
        acts_at: whether there is guidance at a timestep; None: everywhere.
    """

    labels: Tensor | None = None
    null: int = 0
    scale: float = 1.0
    acts_at: Callable[[Tensor], bool] | None = None

    def copied(self, times: int) -> "Guidance":
        """The same for so many copies of the batch, one after the other."""
        return self if self.labels is None else replace(self, labels=self.labels.repeat(times))

    def output(self, network: Network, model_input: Tensor, timestep: Tensor) -> Tensor:
        """The network's output `(B, ...)`; where guidance acts, in one call of twice the batch."""
        if self.labels is None or self.scale == 1 or not (self.acts_at is None or self.acts_at(timestep)):
            return network(model_input, timestep, self.labels)
        labels = torch.cat([torch.full_like(self.labels, self.null), self.labels])
        without, of_class = network(torch.cat([model_input] * 2), timestep, labels).chunk(2)
        guided = without + self.scale * (of_class - without)
        variance = of_class[:, model_input.shape[1] :]  # of networks that answer one, in as many channels again
        return torch.cat([guided[:, : model_input.shape[1]], variance], 1)


def check_guidance(scale: Any, interval: Any, null: int | None, is_conditional: bool) -> None:
    """Raise a ValueError for guidance that makes no sense, or that a network cannot have.

    `null`: the class that stands for none, None where there is no such class.
    """
    if not (isinstance(scale, int | float) and 0 <= scale < math.inf):
        raise ValueError(f"guidance_scale must be a number of at least 0, got {scale!r}")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(f"guidance_interval must be two noise levels (low, high), 0 <= low < high, got {interval!r}")
    if scale == 1 and interval is None:
        return
    if not is_conditional:
        raise ValueError(
            f"{'guidance_interval' if scale == 1 else f'guidance_scale={scale:g}'} needs a class-conditional network, "
            "and this one has no num_class_embeds: leave it out"
        )
    if null is None:
        raise ValueError(
            f"guidance_scale={scale:g} needs a class that stands for none, and all classes of this network have "
            "names or shares: it was trained without dropping labels"
        )
