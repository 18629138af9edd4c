"""A predictor-corrector multistep sampler on noise levels that were calibrated on the network itself."""

from typing import Literal

# A pipeline of diffusers that is saved with this scheduler names this module, and looks the base class up in it.
from diffusers import SchedulerMixin  # noqa: F401
from torch import Tensor

from ..readings.grids import calibrated_value
from ..samplers import Multistep
from ..samplers.multistep import Stochasticity
from ..samplers.sampler import Memory, Stepped
from .base import SamplerScheduler
from .network import network_noise
from .options import with_common_options


class CalibratedMultistepScheduler(SamplerScheduler):
    """Predictor-corrector exponential multistep sampling (`samplers.Multistep`) on a calibrated grid.

    `diffusers_gm.calibrate(pipe)` returns one, with the noise levels that suit the network at each number of calls. Its
    config holds them, so that whoever loads the model has them. Budgets between those that were calibrated are
    interpolated. Without a calibration the levels are `even_levels`, whose last one depends on the number of calls, or
    those that a pipeline of flow passes unasked.

    Order of convergence: `multistep_order + 1` with the corrector, `multistep_order` without, for the probability flow
    (`stochasticity` 0) and smooth denoisers.

    Args:
        stochasticity: tau, from 0 (probability flow) to 1 (reverse diffusion) and beyond; or two, of the steps from
            noise levels above 1 and of the others. None: what the calibration says for the number of calls, 0 without
            one. The noise is Gaussian: for networks of mixture noise only 0 keeps the law of the images, however many
            the calls; more makes those of few dimensions wider, the more so the more the components differ.
        corrector: redo every step once the denoiser at its end is known, at no extra call.
        multistep_order: 1 to 3, how many denoisers a step is predicted from.
        calibration: JSON: from the number of calls, as a string, to its noise levels (descending), the last one that of
            the call that ends the run; and, optional, `"stochasticity"`: likewise to tau. The first may be below the
            highest of the network: a run of so few calls begins there. Levels beyond those that the network was trained
            at become these. None: not calibrated.
        grid: `calibrated`; another spacing (or None, then `timestep_spacing` and its flags) in place of these levels.

    All other arguments: see `AnnealedLangevinScheduler` and, for networks of mixture noise, `GMLangevinScheduler`. But
    `clip_sample` acts above noise level 4 only: there it mends a network's errors, below it makes a bias of them, which
    the steps of a stochastic run add up. What it takes from D it takes from y, too, in long steps wholly, as DDIM
    (arXiv 2010.02502) does, see `samplers.multistep.FOLLOWS`.

    Raises:
        ValueError: for a calibration that is none; for arguments out of range.
    """

    algorithms = ("multistep",)
    reads_mixtures = True
    calibrates = True
    clips_above = 4.0  # where noise hides the image; below, errors of both signs are the image's own

    @with_common_options
    def __init__(
        self,
        grid: str | None = "calibrated",
        stochasticity: Stochasticity | None = None,
        corrector: bool = True,
        multistep_order: int = 2,
        algorithm_type: Literal["multistep"] = "multistep",
        mixture_weights: list[float] | None = None,
        mixture_scales: list[float] | None = None,
        mixture_per_element: bool = False,
        model_noise: Literal["gaussian", "mixture"] = "gaussian",
    ):
        self.mixture, self.model_mixture = network_noise(self.config)
        self._setup(self._made_for(None, True))

    def _made_for(self, num_calls: int | None, own_levels: bool) -> Multistep:
        """The calibration may say how stochastic a run of this length is."""
        config = self.config
        tau = config.stochasticity
        if tau is None:
            tau = calibrated_value(config.calibration, "stochasticity", num_calls) or 0.0
        return Multistep(config.multistep_order, config.corrector, tau)

    def clipped(self, denoised: Tensor, sigma: float, memory: Memory) -> Stepped:
        """y follows D where `clip_sample` acts; not where `thresholding` does, which is of all levels."""
        clipped = self.clip(denoised, sigma)
        still = clipped is denoised or self.config.thresholding
        return clipped, memory._replace(clipped=None if still else clipped - denoised)
