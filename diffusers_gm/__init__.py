"""diffusers_gm: score-based generative models as first-class citizens of diffusers.

NCSNv2 (annealed Langevin dynamics), critically-damped Langevin diffusion and Gaussian-mixture score-based models:
schedulers that swap into existing pipelines, pipelines that load and save, processes and losses as plain functions.
"""

# diffusers looks base classes up in the library that a saved pipeline names.
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from .calibrate import calibrate as calibrate
from .pipelines import CLDPipeline as CLDPipeline
from .pipelines import GMSGMPipeline as GMSGMPipeline
from .pipelines import NCSNv2Pipeline as NCSNv2Pipeline
from .pipelines import UnconditionalPipeline as UnconditionalPipeline
from .processes.mixture import GaussianMixtureNoise as GaussianMixtureNoise
from .schedulers import AnnealedLangevinScheduler as AnnealedLangevinScheduler
from .schedulers import CalibratedMultistepScheduler as CalibratedMultistepScheduler
from .schedulers import CLDSSCSScheduler as CLDSSCSScheduler
from .schedulers import GMLangevinScheduler as GMLangevinScheduler
from .version import __version__ as __version__
