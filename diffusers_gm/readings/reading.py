"""What a reading is."""

import torch

from .image import ImageReading
from .velocity import VelocityReading

# A network, as samplers and schedulers see it. `sample` is the tensor that the pipeline carries, `(B, ...)`.
Reading = ImageReading | VelocityReading


def level_range(reading: Reading) -> tuple[float, float]:
    """The smallest and the largest noise level that the network was trained at."""
    low, high = reading.sigma(torch.tensor(reading.timestep_range, dtype=torch.float64)).tolist()
    return low, high
