"""Sample quality, always beside the floor that real data set. Needs the `evaluation` extra.

Functions of tensors, to be called from anywhere; `python -m diffusers_gm.evaluation --help` measures a pipeline, or
images that someone else made, against real data.
"""

from .distances import frechet_distance as frechet_distance
from .distances import kernel_distance as kernel_distance
from .distances import precision_recall_density_coverage as precision_recall_density_coverage
from .distances import sliced_wasserstein as sliced_wasserstein
from .features import Extractor as Extractor
from .features import features_of as features_of
from .features import inception as inception
from .features import lite0 as lite0
from .sampling import num_steps_for as num_steps_for
from .scoring import Reference as Reference
from .scoring import score as score
