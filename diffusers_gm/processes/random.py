"""Random draws decided by a generator, or by one generator per sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | None


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise a ValueError unless `generator` is None, one generator, or `batch_size` of them."""
    if isinstance(generator, list | tuple) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but the batch has {batch_size} samples: pass one generator, "
            f"or a list of {batch_size}"
        )


def randn(shape: Sequence[int], generator: Generators, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of `shape`; with a list of generators, sample i is drawn by generator i alone.

    Numbers are drawn on the generator's own device and moved, so a CPU generator gives the same sample everywhere.
    Raises a ValueError if the list's length is not the batch size (diffusers' `randn_tensor` accepts a list of one).
    """
    return _draw(torch.randn, shape, generator, device, dtype)


def rand(shape: Sequence[int], generator: Generators, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1) of `shape`, drawn as in `randn`."""
    return _draw(torch.rand, shape, generator, device, dtype)


def _draw(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    shape = tuple(shape)
    check_generators(generator, shape[0])
    if isinstance(generator, list | tuple):
        return torch.cat([_draw(draw, (1, *shape[1:]), one, device, dtype) for one in generator])
    source = generator.device if isinstance(generator, Generator) else device
    return draw(shape, generator=generator, device=source, dtype=dtype).to(device)


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of a run come from: what samplers are handed in place of a generator.

    Attributes:
        generator: as in `randn`; None: the global one.
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
        """Standard normal numbers of `shape` `(B, ...)`, see `randn`."""
        return randn(shape, self.generator, self.device, self.dtype)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) of `shape` `(B, ...)`, see `rand`."""
        return rand(shape, self.generator, self.device, self.dtype)
