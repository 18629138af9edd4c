from .encoding import slerp as slerp
from .pipeline_cld import CLDPipeline as CLDPipeline
from .pipeline_gm_sgm import GMSGMPipeline as GMSGMPipeline
from .pipeline_ncsnv2 import NCSNv2Pipeline as NCSNv2Pipeline
from .unconditional import UnconditionalPipeline as UnconditionalPipeline
