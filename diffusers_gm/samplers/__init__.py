"""Samplers: a plan once a run, and a step on `(y, D)`. No diffusers, no config, no state that is not handed around."""

from .cld import CriticallyDamped as CriticallyDamped
from .langevin import Explore as Explore
from .langevin import Langevin as Langevin
from .mixture import Ancestral as Ancestral
from .mixture import TwoStep as TwoStep
from .multistep import Multistep as Multistep
from .sampler import Memory as Memory
from .sampler import Sampler as Sampler
from .sampler import sample as sample
