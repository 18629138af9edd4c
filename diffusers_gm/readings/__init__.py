"""How a network sees noise: the only room that knows conventions.

A network is a *reading* of the noisy image `y = x0 + sigma * n`. Whatever it was trained on, its reading turns the
sample that a pipeline carries into `y`, the network's output into the denoised image `D(y; sigma) = E[x0 | y]`, and
back. Samplers never see anything but `y`, `sigma` and `D`.
"""

from .image import ImageReading as ImageReading
from .noise_space import NoiseSpace as NoiseSpace
from .reading import Reading as Reading
from .reading import level_range as level_range
from .velocity import CompanionReading as CompanionReading
from .velocity import VelocityReading as VelocityReading
