"""Seeds that are made of other numbers."""

import numpy as np
import torch

# What a seed is used for: keys that keep the streams of random numbers apart.
ORDER, AUGMENTATION, STEP, EXAMINATION, SAMPLES, LEVELS, CLASSES, SOME = range(8)


def seed_for(*key: int) -> int:
    """One well-mixed seed for a tuple of non-negative integers, such as `(seed, STEP, position)`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator seeded with `seed_for(*key)`."""
    return torch.Generator().manual_seed(seed_for(*key))


def order_for(n: int, *key: int) -> list[int]:
    """The numbers from 0 to n - 1 in an order that follows from `seed_for(*key)`."""
    return torch.randperm(n, generator=generator_for(*key)).tolist()
