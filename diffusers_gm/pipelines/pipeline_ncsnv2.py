"""Generation with annealed Langevin dynamics."""

from .unconditional import UnconditionalPipeline


class NCSNv2Pipeline(UnconditionalPipeline):
    """Generation with a noise-conditional score network (NCSNv2, arXiv 2006.09011).

    Args:
        unet: network from `(B, C, H, W)` noisy images and a timestep to an output of the same shape.
        scheduler: an `AnnealedLangevinScheduler` that describes the network (noise space, prediction type), or any
            other scheduler whose noise space suits it.
    """

    default_num_inference_steps = 200
