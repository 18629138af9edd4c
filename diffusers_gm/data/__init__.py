"""Training images: where they come from, how they become `(C, H, W)` tensors in [-1, 1], in which order.

Everything random is a pure function of the seed and of where in the endless stream of images we are, so a
training that is resumed sees exactly what it would have seen without the interruption, whatever the number of
workers.
"""

from .digits import load_digits_images as load_digits_images
from .digits import split_digit_labels as split_digit_labels
from .digits import split_digits as split_digits
from .examination import Examination as Examination
from .examination import examine as examine
from .folders import list_folder as list_folder
from .labels import LabelledImages as LabelledImages
from .labels import Labels as Labels
from .latents import LatentCache as LatentCache
from .latents import TrainingLatents as TrainingLatents
from .pixels import Resolution as Resolution
from .pixels import as_channels as as_channels
from .pixels import check_levels as check_levels
from .pixels import dequantized as dequantized
from .pixels import fit as fit
from .pixels import resolution_of as resolution_of
from .pixels import scaled as scaled
from .pixels import sides as sides
from .seeds import EXAMINATION as EXAMINATION
from .seeds import LEVELS as LEVELS
from .seeds import SAMPLES as SAMPLES
from .seeds import STEP as STEP
from .seeds import generator_for as generator_for
from .seeds import seed_for as seed_for
from .sources import ImageSource as ImageSource
from .sources import TensorImages as TensorImages
from .sources import open_folder as open_folder
from .sources import open_source as open_source
from .sources import subset as subset
from .stream import ImageStream as ImageStream
from .stream import TrainingImages as TrainingImages
from .streaming import Place as Place
from .streaming import StreamedBatches as StreamedBatches
from .streaming import open_stream as open_stream
