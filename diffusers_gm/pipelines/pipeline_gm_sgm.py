"""Generation with a Gaussian-mixture score-based model."""

from .unconditional import UnconditionalPipeline


class GMSGMPipeline(UnconditionalPipeline):
    """Generation with a network trained on Gaussian-mixture noise.

    Args:
        unet: network from `(B, C, H, W)` noisy images and a timestep to an output of the same shape.
        scheduler: a `GMLangevinScheduler` that describes the network (noise space, mixture, prediction type), or any
            other scheduler whose noise space suits it.
    """
