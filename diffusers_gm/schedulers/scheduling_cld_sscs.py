"""Samplers of critically-damped Langevin diffusion, for velocity networks and, through the lift, for any network."""

from typing import Literal

import torch

# A pipeline of diffusers that is saved with this scheduler names this module, and looks the base class up in it.
from diffusers import SchedulerMixin  # noqa: F401
from torch import Tensor

from ..processes.cld import CLD
from ..readings import VelocityReading
from ..readings.grids import TIME_SPACINGS, time_grid
from ..readings.velocity import LAST_TIME, VELOCITY_PREDICTION_TYPES
from ..samplers import CriticallyDamped
from .base import SamplerScheduler
from .options import with_common_options


class CLDSSCSScheduler(SamplerScheduler):
    """Critically-damped Langevin diffusion (arXiv 2112.07068) and its symmetric splitting sampler, SSCS.

    Two modes, told apart by `prediction_type`:

    - **native** (`velocity_score`, `scaled_velocity_score`, `cld_mixed`, `cld_edm`): the network was trained on CLD.
      The sample and `prev_sample` are `cat([x, v], 1)`, `(B, 2C, ...)`; the network is fed `cat([x, v / sqrt(M)], 1)`,
      that of `cld_edm` `cat([y / sqrt(sigma^2 + sigma_data^2), c], 1)` of the lift, and labels `t *
      num_train_timesteps` (floats), and answers `(B, C, ...)`; `pred_original_sample` is the denoised x alone.
    - **lifted** (any ordinary type): any pretrained denoiser. The sample is the ordinary noisy image; the other half
      of the CLD state is unit noise, which the scheduler draws at the first step and keeps (`Lift`). A run starts at
      the clock whose `sigma_eff` is the network's first noise level.

    `set_timesteps(n)` spends n network calls, the last on the final denoising: a noiseless step from t = 1e-3 to 0
    for networks that answer a score of the velocity, D itself for all others, `cld_edm` among them, and where a run
    ends earlier.

    | `algorithm_type` | | order |
    |---|---|---|
    | `sscs` | exact half-steps around a step along the score, stochastic | weak 1 or 2: `splitting_order` |
    | `euler_maruyama` | on the reverse diffusion | weak 1 |
    | `probability_flow` | exponential two-step method, deterministic given the start | 2 |

    Args:
        num_train_timesteps: native: the unit of the labels.
        sigma_data, sigma_min, sigma_max: of `cld_edm` as in `edm` space: of the levels of y that it was trained at.
        prediction_type: native `velocity_score` (`grad_v log p`), `scaled_velocity_score` (`-ell` times the output),
            `cld_mixed` (eq. 9), see `score_coefficients`, or `cld_edm`, the F of EDM, see `CompanionReading`; lifted as
            in `AnnealedLangevinScheduler`.
        timestep_spacing: `uniform` or, as published, `quadratic` in t, which know of no shift; `even`, `log_snr` (equal
            ratios) or `karras` of `sigma_eff`; lifted also `beta`, `linspace`, `leading`, `trailing`: the levels that
            other schedulers use.
        beta_0, beta_1: `beta(t) = beta_0 + beta_1 * t`.
        mass, gamma: M, and the variance of the initial velocity in units of M. In lifted mode no network was trained
            on them: they are the sampler's own.
        algorithm_type: see above.
        splitting_order: of `sscs`. 1 is the published one, with an explicit step along the score at its start. 2 solves
            that step exactly in the middle of its interval, with D extrapolated there from two calls. None: 1 for
            networks that answer a score of the velocity, 2 for others, but 1 where `network_at` is given.
        network_at: of `sscs` with `splitting_order=1`: whether the network sees the state at the start of a step, a
            marginal of the process (`step_start`), or between the half-steps (`half_step`, the published order, and
            what None is for networks that answer a score of the velocity). In both it is labelled with the start, and
            both are of first order; `step_start` may begin midway (image-to-image) without an error of half a step.

    All other arguments: see `AnnealedLangevinScheduler`. Those of a noise space and its grid are for lifted networks.

    Raises:
        ValueError: for arguments out of range; from `set_timesteps` for a spacing that the mode does not offer or
            too few calls; from `step` for a network whose channels do not suit the mode.
    """

    algorithms = ("sscs", "euler_maruyama", "probability_flow")

    @with_common_options
    def __init__(
        self,
        timestep_spacing: str = "even",
        algorithm_type: Literal["sscs", "euler_maruyama", "probability_flow"] = "sscs",
        splitting_order: int | None = None,
        network_at: Literal["step_start", "half_step"] | None = None,
    ):
        if splitting_order not in (1, 2, None):
            raise ValueError(f"splitting_order must be 1, 2 or None, got {splitting_order!r}")
        if network_at not in ("step_start", "half_step", None):
            raise ValueError(f"unknown network_at {network_at!r}: use 'step_start', 'half_step' or None")
        if splitting_order == 2 and network_at == "half_step":
            raise ValueError("network_at='half_step' is of splitting_order=1: leave one of them out")
        config = self.config
        self.process = CLD(config.beta_0, config.beta_1, config.mass, config.gamma)
        published = config.prediction_type in VELOCITY_PREDICTION_TYPES
        sampler = CriticallyDamped(
            self.process,
            algorithm_type,
            splitting_order or (1 if published or network_at else 2),
            half_step=network_at == "half_step" or (network_at is None and published),
            published_end=self.process.clock(torch.tensor(LAST_TIME, dtype=torch.float64)).item() if published else 0.0,
        )
        self._setup(sampler)

    def labels_of(self, num_levels: int, mu: float | None = None) -> Tensor:
        """The spacings in time are those of the sampler's own diffusion, where the network has none."""
        # As ever, the flags of other spacings leave those in time alone.
        spacing = self.config.grid or self.config.timestep_spacing
        if spacing not in TIME_SPACINGS or isinstance(self.reading, VelocityReading):
            return super().labels_of(num_levels, mu)
        ends = torch.tensor(self.reading.timestep_range[::-1], dtype=torch.float64)
        high, low = self.process.time(self.process.clock_of_sigma(self.reading.sigma(ends))).tolist()
        times = time_grid(high, low, num_levels, spacing)
        return self.reading.timestep(self.process.sigma(self.process.clock(times)))
