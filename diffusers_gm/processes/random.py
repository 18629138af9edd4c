"""Random draws decided by a generator, or by one generator per sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | None


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise a ValueError unless `generator` is None, one generator, or `batch_size` of them."""
    each = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, Generator) for one in each):
        raise ValueError(f"generator must be a torch.Generator, or a list of them, got {generator!r}")
    if isinstance(generator, list | tuple) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but the batch has {batch_size} samples: pass one generator, "
            f"or a list of {batch_size}"
        )


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of a run come from: what samplers are handed in place of a generator.

    Numbers are drawn on the generator's own device and moved, so a CPU generator gives the same sample everywhere.

    Attributes:
        generator: None: the global one; of a list, generator i alone draws sample i.
        device, dtype: of the numbers.
    """

    generator: Generators = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    @staticmethod
    def like(sample: Tensor, generator: Generators = None) -> "Draw":
        """Numbers on the device and in the dtype of `sample`."""
        return Draw(generator, sample.device, sample.dtype)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of `shape` `(B, ...)`, a tensor of the caller's own."""
        return self._numbers(torch.randn, shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) of `shape` `(B, ...)`."""
        return self._numbers(torch.rand, shape)

    def _numbers(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        """A ValueError if a list's length is not the batch size (diffusers' `randn_tensor` accepts a list of one)."""
        shape = tuple(shape)
        check_generators(self.generator, shape[0])
        if isinstance(self.generator, list | tuple):
            first = self.generator[0].device  # moved at once: one by one, each would wait for the device
            alone = [Draw(generator, first, self.dtype) for generator in self.generator]
            return torch.cat([one._numbers(function, (1, *shape[1:])) for one in alone]).to(self.device)
        source = self.generator.device if isinstance(self.generator, Generator) else self.device
        return function(shape, generator=self.generator, device=source, dtype=self.dtype).to(self.device)
