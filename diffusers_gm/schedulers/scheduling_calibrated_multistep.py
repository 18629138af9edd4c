"""A predictor-corrector multistep sampler on noise levels that were calibrated on the network itself."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

# A pipeline of diffusers that is saved with this scheduler names this module, and looks the base class up in it.
from diffusers import SchedulerMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..readings.grids import calibrated_value
from ..samplers import Multistep
from .base import SamplerScheduler
from .swap import network_noise


class CalibratedMultistepScheduler(SamplerScheduler):
    """Predictor-corrector exponential multistep sampling (`samplers.Multistep`) on a calibrated grid.

    `diffusers_gm.calibrate(pipe)` returns one, with the noise levels that suit the network at each number of calls. Its
    config holds them, so that whoever loads the model has them. Budgets between those that were calibrated are
    interpolated. Without a calibration the levels are `even_levels`, whose last one depends on the number of calls.

    Order of convergence: `multistep_order + 1` with the corrector, `multistep_order` without, for the probability flow
    (`stochasticity` 0) and smooth denoisers.

    Args:
        stochasticity: tau, from 0 (probability flow) to 1 (reverse diffusion) and beyond. None: what the calibration
            says for the number of calls, 0 without one.
        corrector: redo every step once the denoiser at its end is known, at no extra call.
        multistep_order: 1 to 3, how many denoisers a step is predicted from.
        calibration: JSON: from the number of calls, as a string, to its noise levels (descending), the last one that of
            the call that ends the run; and, optional, `"stochasticity"`: likewise to tau. None: not calibrated.
        grid: `calibrated`; another spacing (or None, then `timestep_spacing` and its flags) in place of these levels.

    All other arguments: see `AnnealedLangevinScheduler` and, for networks of mixture noise, `GMLangevinScheduler`.

    Raises:
        ValueError: for a calibration that is none, or whose levels the network was not trained at; for arguments out of
            range.
    """

    algorithms = ("multistep",)
    reads_mixtures = True
    calibrates = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        noise_space: Literal["vp", "ve", "flow", "edm"] | None = None,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        scale_input: bool = True,
        sigma_data: float | None = None,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        shift: float | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        shift_terminal: float | None = None,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "log_snr",
        steps_offset: int = 0,
        grid: str | None = "calibrated",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        calibration: dict[str, Any] | None = None,
        stochasticity: float | None = None,
        corrector: bool = True,
        multistep_order: int = 2,
        algorithm_type: Literal["multistep"] = "multistep",
        mixture_weights: list[float] | None = None,
        mixture_scales: list[float] | None = None,
        mixture_per_element: bool = False,
        model_noise: Literal["gaussian", "mixture"] = "gaussian",
        beta_0: float = 4.0,
        beta_1: float = 0.0,
        mass: float = 0.25,
        gamma: float = 0.04,
    ):
        self.check_algorithm(algorithm_type)
        self.mixture, self.model_mixture = network_noise(self.config)
        self._setup(self._sampler_for(None))

    def _sampler_for(self, num_calls: int | None) -> Multistep:
        config = self.config
        tau = config.stochasticity
        if tau is None:
            tau = calibrated_value(config.calibration, "stochasticity", num_calls) or 0.0
        return Multistep(config.multistep_order, config.corrector, tau)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """As in the other schedulers; the calibration may say how stochastic a run of this length is."""
        custom = timesteps if timesteps is not None else sigmas
        num_calls = num_inference_steps if custom is None else len(custom)
        if timesteps is None and sigmas is not None and len(sigmas) and float(sigmas[-1]) == 0:
            num_calls = len(sigmas) - 1  # the end of the run, at which no network is called
        self.sampler = self._sampler_for(num_calls)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, mu)
