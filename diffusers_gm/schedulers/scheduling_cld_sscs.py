"""Samplers of critically-damped Langevin diffusion, for velocity networks and, through the lift, for any network."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..processes.cld import CLD, VELOCITY_PREDICTION_TYPES, lift, perturb, score_coefficients
from ..processes.cld_dynamics import (
    Step,
    denoising_step,
    euler_maruyama_step,
    look_ahead,
    probability_flow_step,
    sscs_loop_step,
    sscs_second_order_step,
    sscs_step,
)
from ..random import Generators, check_generators, randn
from .calls import Call, check_num_calls
from .common import LangevinSchedulerMixin, LangevinSchedulerOutput
from .config import check_algorithm

# A native run ends at this time and leaves the rest to the denoising call (arXiv 2112.07068, appendix B).
LAST_TIME = 1e-3

# The last step of a lifted run, on (y, c): y' = D.
IMAGE = Step(torch.zeros(1, 2, 2).double(), torch.tensor([[1.0, 0.0]]).double(), torch.zeros(1, 2, 2).double())


class CLDSSCSScheduler(LangevinSchedulerMixin, SchedulerMixin, ConfigMixin):
    """Critically-damped Langevin diffusion (arXiv 2112.07068) and its symmetric splitting sampler, SSCS.

    Two modes, told apart by `prediction_type`:

    - **native** (`velocity_score`, `scaled_velocity_score`, `cld_mixed`): the network was trained on CLD. The sample
      and `prev_sample` are `cat([x, v], 1)`, `(B, 2C, ...)`; the network is fed `cat([x, v / sqrt(M)], 1)` and labels
      `t * num_train_timesteps` (floats), and answers `(B, C, ...)`; `pred_original_sample` is the denoised x alone.
    - **lifted** (any ordinary type): any pretrained denoiser. The sample is the ordinary noisy image; the other half
      of the CLD state is unit noise, which the scheduler draws at the first step and keeps (`Lift`). A run starts at
      the clock whose `sigma_eff` is the network's first noise level.

    `set_timesteps(n)` spends n network calls, the last on the final denoising: a noiseless step from t = 1e-3 to 0
    in native mode, D itself in lifted mode.

    | `algorithm_type` | | order |
    |---|---|---|
    | `sscs` | exact half-steps around a step along the score, stochastic | weak 1 or 2: `splitting_order` |
    | `euler_maruyama` | on the reverse diffusion | weak 1 |
    | `probability_flow` | exponential two-step method, deterministic given the start | 2 |

    Args:
        num_train_timesteps, noise_space, sigma_min, sigma_max, scale_input, beta_start, beta_end, beta_schedule,
            trained_betas, rescale_betas_zero_snr, snr_shift_scale, shift, use_dynamic_shifting, time_shift_type,
            shift_terminal, variance_type: lifted: the network's noise space and its grid, as in
            `AnnealedLangevinScheduler`. Native: only `num_train_timesteps` matters, the unit of the labels.
        prediction_type: native `velocity_score` (`grad_v log p`), `scaled_velocity_score` (`-ell` times the output) or
            `cld_mixed` (eq. 9), see `score_coefficients`; lifted as in `AnnealedLangevinScheduler`.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: act on D.
        timestep_spacing: `uniform` or `quadratic` in t, `log_snr` (equal ratios of `sigma_eff`); lifted also
            `karras`, `beta`, `linspace`, `leading`, `trailing`: the levels that other schedulers use.
        steps_offset, grid, use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas, use_beta_sigmas: lifted, as in
            `AnnealedLangevinScheduler`.
        beta_0, beta_1: `beta(t) = beta_0 + beta_1 * t`.
        mass, gamma: M, and the variance of the initial velocity in units of M. In lifted mode no network was trained
            on them: they are the sampler's own.
        algorithm_type: see above.
        splitting_order: of `sscs`. 1 is the published one, with an explicit step along the score at its start. 2 solves
            that step exactly in the middle of its interval, with D extrapolated there from two calls. None: 1 in
            native mode, 2 in lifted mode, but 1 where `network_at` is given.
        network_at: of `sscs` with `splitting_order=1`: whether the network sees the state at the start of a step, a
            marginal of the process (`step_start`, None in lifted mode), or between the half-steps (`half_step`, the
            published order, None in native mode). In both it is labelled with the start. Sliced W2 of lifted runs
            to the 8 x 8 digits with their exact denoiser, `step_start` against `half_step`, each to 0.001, floor 0.022:
            0.043 / 0.045 at 5 calls, 0.034 / 0.034 at 10, 0.027 / 0.026 at 20, 0.024 / 0.023 at 50 (`log_snr`).
            `step_start` may begin midway (image-to-image) without an error of half a step.

    Raises:
        ValueError: for arguments out of range; from `set_timesteps` for a spacing that the mode does not offer or
            too few calls; from `step` for a network whose channels do not suit the mode.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        noise_space: Literal["vp", "ve", "flow"] | None = None,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        scale_input: bool = True,
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
        grid: str | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_beta_sigmas: bool = False,
        beta_0: float = 4.0,
        beta_1: float = 0.0,
        mass: float = 0.25,
        gamma: float = 0.04,
        algorithm_type: Literal["sscs", "euler_maruyama", "probability_flow"] = "sscs",
        splitting_order: int | None = None,
        network_at: Literal["step_start", "half_step"] | None = None,
    ):
        check_algorithm("CLDSSCSScheduler", algorithm_type)
        if splitting_order not in (1, 2, None):
            raise ValueError(f"splitting_order must be 1, 2 or None, got {splitting_order!r}")
        if network_at not in ("step_start", "half_step", None):
            raise ValueError(f"unknown network_at {network_at!r}: use 'step_start', 'half_step' or None")
        self.process = CLD(beta_0, beta_1, mass, gamma)
        if self.native:
            self._setup_run(torch.linspace(1, LAST_TIME, num_train_timesteps) * num_train_timesteps)
        else:
            self._setup()
        self._companion: Tensor | None = None
        self._previous: Tensor | None = None

    @property
    def native(self) -> bool:
        """Whether the sample is `cat([x, v], 1)`, for a network trained on CLD."""
        return self.config.prediction_type in VELOCITY_PREDICTION_TYPES

    # --- The grid of calls ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run of `num_inference_steps` network calls; arguments as in
        `AnnealedLangevinScheduler.set_timesteps`.

        Raises:
            ValueError: see the class.
        """
        config = self.config
        self._companion = None
        self._previous = None
        if self.native:
            if num_inference_steps is None:
                raise ValueError("velocity networks take no custom timesteps or sigmas: give num_inference_steps")
            check_num_calls(num_inference_steps, 2)
            clocks = self._set_native_calls(num_inference_steps, device)
        else:
            labels = self._call_labels(num_inference_steps, timesteps, sigmas, mu)
            self._set_calls(labels, [0.0] * len(labels), True, device)
            clocks = self.process.clock_of_sigma(self.noise_space.sigma(labels))
        marginal = self.process.marginal(clocks)
        self._lifts = lift(marginal)
        if self.native:
            self._score_coefficients = torch.stack(score_coefficients(marginal, config.prediction_type), -1)
        self._updates = self._in_coordinates(self._steps(clocks), clocks)
        two_step = config.algorithm_type == "probability_flow" or self._order == 2
        ahead = look_ahead(self._lifts.sigma, damped=config.algorithm_type == "sscs")
        self._ahead = ahead.tolist() if two_step else [0.0] * len(ahead)

    def _set_native_calls(self, num_calls: int, device: Any) -> Tensor:
        spacing = self.config.timestep_spacing
        if spacing in ("uniform", "quadratic"):
            times = time_grid(1.0, LAST_TIME, num_calls, spacing)
        elif spacing == "log_snr":
            ends = self.process.clock(torch.tensor([1.0, LAST_TIME], dtype=torch.float64))
            high, low = self.process.sigma(ends).log().tolist()
            between = torch.linspace(high, low, num_calls, dtype=torch.float64)[1:-1].exp()
            clocks = torch.cat([ends[:1], self.process.clock_of_sigma(between), ends[1:]])
            times = self.process.time(clocks)
        else:
            raise ValueError(
                f"timestep_spacing {spacing!r} is not offered for velocity networks: use 'uniform', "
                "'quadratic' or 'log_snr'"
            )
        clocks = self.process.clock(times)
        labels = times * self.config.num_train_timesteps
        levels = [*self.process.sigma(clocks).tolist(), 0.0]
        rows = zip(labels.tolist(), levels[:-1], levels[1:], strict=True)
        calls = [
            Call(label, sigma, 1.0, below, 1.0, 0.0, last=below == 0, target=sigma) for label, sigma, below in rows
        ]
        self._begin_run(calls, labels.to(device=device, dtype=torch.float32))
        return clocks

    def _grid(self, num_levels: int, shift: float) -> Tensor:
        spacing = self.config.grid or self.config.timestep_spacing
        if spacing not in ("uniform", "quadratic"):
            return super()._grid(num_levels, shift)
        ends = torch.tensor(self.noise_space.timestep_range[::-1], dtype=torch.float64)
        high, low = self.process.time(self.process.clock_of_sigma(self.noise_space.sigma(ends))).tolist()
        return self.noise_space.timestep(
            self.process.sigma(self.process.clock(time_grid(high, low, num_levels, spacing)))
        )

    # --- The coefficients ---

    @property
    def _order(self) -> int:
        """The splitting that is used, 0 for other samplers than `sscs`."""
        config = self.config
        if config.algorithm_type != "sscs":
            return 0
        return config.splitting_order or (1 if self.native or config.network_at else 2)

    def _steps(self, clocks: Tensor) -> Step:
        """The steps between neighbouring clocks, on `(x, v)` and D."""
        config, process = self.config, self.process
        start, end = clocks[:-1], clocks[1:]
        length = start - end
        if config.algorithm_type == "euler_maruyama":
            return euler_maruyama_step(process, start, end)
        if config.algorithm_type == "probability_flow":
            flow = probability_flow_step(process, start, end)
            return flow.in_states(lift(process.marginal(start)), lift(process.marginal(end)))
        if self._order == 2:
            return sscs_second_order_step(process, start, end)
        if config.network_at == "half_step" or (config.network_at is None and self.native):
            middles = torch.cat([(start + end) / 2, end[-1:]])
            return sscs_loop_step(process, start, length, middles[:-1] - middles[1:])
        return sscs_step(process, start, end)

    def _in_coordinates(self, step: Step, clocks: Tensor) -> Step:
        """Steps on what the loop carries: `(x, v)` and the velocity score, or `(y, c)` and D."""
        if self.native:
            last = denoising_step(self.process, clocks[-1:])
            return Step.cat(step, last).with_scores(self._lifts)
        return Step.cat(step.in_images(self._lifts[:-1], self._lifts[1:]), IMAGE)

    # --- The visible sample ---

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run starts from; in native mode that of x, see `initial_sample`."""
        return 1.0 if self.native else super().init_noise_sigma

    def initial_sample(
        self, shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The sample a run starts from, of `shape`; in native mode `(B, 2C, ...)` from the prior."""
        if not self.native:
            return super().initial_sample(shape, generator, device, dtype)
        _check_halves(shape)
        x, v = randn(shape, generator, device, dtype).chunk(2, 1)
        return torch.cat([x, self.process.velocity_scale * v], 1)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network's input: native `cat([x, v / sqrt(M)], 1)`; lifted as in `LangevinSchedulerMixin`."""
        if not self.native:
            return super().scale_model_input(sample, timestep)
        _check_halves(sample.shape)
        x, v = sample.chunk(2, 1)
        return torch.cat([x, v / self.process.velocity_scale], 1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The visible sample at `timesteps`; lifted: the ordinary `alpha * (x0 + sigma * noise)`.

        Native: `cat([x, v], 1)`, `(B, 2C, ...)`, of images `(B, C, ...)`, unit noise `(B, 2C, ...)` and labels
        `t * num_train_timesteps`, `(B,)` or scalar, with t in [0, 1].
        """
        if not self.native:
            return super().add_noise(original_samples, noise, timesteps)
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        times = timesteps.to(original_samples.device).double() / self.config.num_train_timesteps
        state = perturb(self.process, original_samples.to(dtype), times.reshape(-1), noise.to(dtype))
        return torch.cat(state, 1).to(original_samples.dtype)

    # --- The step ---

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LangevinSchedulerOutput | tuple[Tensor, Tensor]:
        """One update with the network's output at `timestep`.

        Args and returns as in `AnnealedLangevinScheduler.step`; for the shapes of the native mode see the class. In
        lifted mode the first step of a run draws the companion noise before its own.
        """
        if not self.native:
            model_output = self._prediction(model_output, sample)
        self._check(model_output, sample, generator)
        call = self._next_call(timestep)
        assert self._step_index is not None
        index = self._step_index - 1
        update = self._updates[index]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        output, state = model_output.to(dtype), sample.to(dtype)
        if self.native:
            a, b = state.chunk(2, 1)
            of_velocity, of_output = self._score_coefficients[index]
            score = of_velocity * b + of_output * output
            plain = self._lifts[index].denoised(a, b, score)
            denoised = self._clip(plain)
            answer = score + self._lifts[index].score_gain * (self._extrapolated(denoised, index) - plain)
        else:
            a, b = state / call.alpha, self._companion_noise(sample, generator, dtype)
            denoised = self._clip(self.noise_space.denoised(output, a, call.sigma, self.config.prediction_type))
            answer = self._extrapolated(denoised, index)

        if call.last or self.config.algorithm_type == "probability_flow":
            a, b = update(a, b, answer)
        else:
            noise = randn((a.shape[0], 2, *a.shape[1:]), generator, a.device, dtype)
            a, b = update(a, b, answer, noise)

        if self.native:
            prev_sample = torch.cat([a, b], 1).to(sample.dtype)
        else:
            prev_sample = (a * call.alpha_next).to(sample.dtype)
            self._companion = b
        pred_original_sample = denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return LangevinSchedulerOutput(prev_sample, pred_original_sample)

    def _check(self, model_output: Tensor, sample: Tensor, generator: Generators) -> None:
        if not self.native:
            super()._check(model_output, sample, generator)
            return
        _check_halves(sample.shape)
        expected = (sample.shape[0], sample.shape[1] // 2, *sample.shape[2:])
        if tuple(model_output.shape) != expected:
            raise ValueError(
                f"a velocity network answers {expected} for a sample cat([x, v], 1) of shape {tuple(sample.shape)}, "
                f"but the output has shape {tuple(model_output.shape)}; "
                "for an ordinary network set its own prediction_type"
            )
        check_generators(generator, sample.shape[0])

    def _companion_noise(self, sample: Tensor, generator: Generators, dtype: torch.dtype) -> Tensor:
        """The other half of the lifted state; fresh unit noise at the start, or when the sample is another one."""
        c = self._companion
        if c is None or c.shape != sample.shape or c.device != sample.device:
            return randn(sample.shape, generator, sample.device, dtype)
        return c.to(dtype)

    def _extrapolated(self, denoised: Tensor, index: int) -> Tensor:
        """D in the middle of the step, for samplers that look ahead; D itself at the first call of a run."""
        previous, self._previous = self._previous, denoised
        if not self._ahead[index] or previous is None or previous.shape != denoised.shape:
            return denoised
        return denoised + self._ahead[index] * (denoised - previous.to(denoised))


def time_grid(high: float, low: float, num_points: int, spacing: str) -> Tensor:
    """Times from `high` down to `low`, `(num_points,)` float64: equal steps (`uniform`) or closing in (`quadratic`)."""
    ramp = torch.linspace(1, 0, num_points, dtype=torch.float64)
    return low + (high - low) * (ramp**2 if spacing == "quadratic" else ramp)


def _check_halves(shape: Sequence[int]) -> None:
    if len(shape) < 2 or shape[1] % 2:
        raise ValueError(
            f"the sample of a velocity network is cat([x, v], 1), an even number of channels; got {tuple(shape)}"
        )
