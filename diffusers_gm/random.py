"""Random draws decided by a generator, or by one generator per sample."""

from collections.abc import Callable, Sequence

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


def randn(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of `shape`; with a list of generators, sample i is drawn by generator i alone.

    Numbers are drawn on the generator's own device and moved, so a CPU generator gives the same sample everywhere.
    Raises a ValueError if the list's length is not the batch size (diffusers' `randn_tensor` accepts a list of one).
    """
    return _draw(torch.randn, shape, generator, device, dtype)


def rand(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1) of `shape`, drawn as in `randn`."""
    return _draw(torch.rand, shape, generator, device, dtype)


def _draw(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    shape = tuple(shape)
    check_generators(generator, shape[0])
    if isinstance(generator, list | tuple):
        return torch.cat([_draw(draw, (1, *shape[1:]), one, device, dtype) for one in generator])
    source = generator.device if isinstance(generator, Generator) else device
    return draw(shape, generator=generator, device=source, dtype=dtype).to(device)
