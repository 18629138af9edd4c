"""diffusers' scheduler contract around a noise space. The samplers themselves are in `scheduling_*.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from ..processes.noise_space import PREDICTION_TYPES, NoiseSpace, level_grid
from ..random import Generators, check_generators, randn


@dataclass
class LangevinSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: the sample of the next network call, same shape and dtype as the sample passed in.
        pred_original_sample: the denoised image `D` at this call, after clipping; same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclass(frozen=True)
class Call:
    """One network call of a sampler: coefficients as Python floats, so that `step` never waits for the device.

    Attributes:
        timestep: the label fed to the network.
        sigma, alpha: noise level and input factor at this call; the visible sample is `alpha * y`.
        sigma_next, alpha_next: those of the next call; of the returned image (0, 1) after the last.
        step_size: dimensionless step of the update, where the sampler has one.
        last: whether this call ends the run by returning `D`.
    """

    timestep: float
    sigma: float
    alpha: float
    sigma_next: float
    alpha_next: float
    step_size: float
    last: bool


def noise_space_from_config(config: Any) -> NoiseSpace:
    """The noise space that a scheduler config describes.

    `noise_space=None` is inferred: a beta schedule means `vp`, a flow config (`shift` or `flow_prediction`) means
    `flow`, anything else `ve`.
    """
    kind = config.noise_space
    if kind is None:
        if config.trained_betas is not None or config.beta_schedule is not None:
            kind = "vp"
        elif config.shift is not None or config.prediction_type == "flow_prediction":
            kind = "flow"
        else:
            kind = "ve"
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"unknown noise_space {kind!r}: use 'vp', 've', 'flow' or None")
    if config.prediction_type not in PREDICTION_TYPES[kind]:
        raise ValueError(
            f"prediction_type {config.prediction_type!r} is not offered in noise space {kind!r}: use one of "
            f"{PREDICTION_TYPES[kind]}"
        )
    if config.num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps must be at least 2, got {config.num_train_timesteps}")
    if kind == "ve":
        return NoiseSpace.ve(config.sigma_min, config.sigma_max, config.num_train_timesteps, config.scale_input)
    if kind == "flow":
        return NoiseSpace.flow(config.num_train_timesteps)
    # diffusers knows its own beta schedules best.
    return NoiseSpace.vp(
        DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=0.0001 if config.beta_start is None else config.beta_start,
            beta_end=0.02 if config.beta_end is None else config.beta_end,
            beta_schedule=config.beta_schedule or "linear",
            trained_betas=config.trained_betas,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        ).alphas_cumprod
    )


class LangevinSchedulerMixin:
    """What our schedulers share: the noise space, the visible sample, the denoiser, counting the calls.

    The tensor in a pipeline is `alpha * y` in `vp` and `flow` space, where `scale_model_input` is the identity and
    `init_noise_sigma` is 1, and `y` in `ve` space, where `scale_model_input` scales and `init_noise_sigma` is the
    first level. A scheduler adds `set_timesteps`, which fills `_calls`, and `step`.
    """

    order = 1
    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]

    config: Any
    noise_space: NoiseSpace
    timesteps: Tensor

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers, except that values the source scheduler left at *its* defaults count as given.

        diffusers drops those for configs in memory and keeps them for the same configs read from disk.
        """
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]

    def _setup(self) -> None:
        """Called at the end of `__init__`, when the config is registered."""
        self.noise_space = noise_space_from_config(self.config)
        first, last = self.noise_space.timestep_range
        self._setup_run(torch.arange(int(last), int(first) - 1, -1))

    def _setup_run(self, timesteps: Tensor) -> None:
        """The part of `_setup` that needs no noise space; `timesteps` before any `set_timesteps`."""
        if self.config.thresholding and not 0 < self.config.dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio must be in (0, 1], got {self.config.dynamic_thresholding_ratio}"
            )
        self.num_inference_steps: int | None = None
        self.timesteps = timesteps
        self._calls: list[Call] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- The grid of calls ---

    def _levels(self, num_levels: int) -> tuple[Tensor, Tensor]:
        """Descending labels and noise levels of `num_levels` levels, each `(num_levels,)` float64."""
        config = self.config
        shift = config.shift if config.shift is not None else 1.0
        grid = level_grid(self.noise_space, num_levels, config.timestep_spacing, config.steps_offset, shift)
        return grid, self.noise_space.sigma(grid)

    def _set_calls(
        self,
        labels: Sequence[float],
        sigmas: Sequence[float],
        step_sizes: Sequence[float],
        denoise: bool,
        device: Any,
    ) -> None:
        """Fill the table of calls; every argument has one entry per network call."""
        alphas = self.noise_space.alpha(torch.tensor(sigmas, dtype=torch.float64)).tolist()
        visible = [1.0] * len(alphas) if self.noise_space.kind == "ve" else alphas
        # A run without the final denoising ends one more level down, at alpha 1.
        ratio = sigmas[-1] / sigmas[-2] if len(sigmas) > 1 else 1.0
        next_sigmas = [*sigmas[1:], 0.0 if denoise else sigmas[-1] * ratio]
        next_visible = [*visible[1:], 1.0]
        last = [False] * (len(sigmas) - 1) + [denoise]
        columns = (labels, sigmas, visible, next_sigmas, next_visible, step_sizes, last)
        timesteps = torch.tensor(labels, dtype=torch.float64)
        integral = bool((timesteps == timesteps.round()).all())
        timesteps = timesteps.to(device=device, dtype=torch.int64 if integral else torch.float32)
        self._begin_run([Call(*row) for row in zip(*columns, strict=True)], timesteps)

    def _begin_run(self, calls: list[Call], timesteps: Tensor) -> None:
        """Replace the table of calls; `timesteps` are their labels on the device of the run."""
        self._calls = calls
        self.num_inference_steps = len(calls)
        self.timesteps = timesteps
        self._begin_index = None
        self._step_index = None

    @property
    def step_index(self) -> int | None:
        """The index of the call that `step` expects next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first call, as set by `set_begin_index`; None = found from the first timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at call `begin_index` (image-to-image)."""
        self._begin_index = begin_index

    def _next_call(self, timestep: Tensor | float) -> Call:
        if not self._calls:
            raise ValueError("set_timesteps must be called before step")
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self._calls):
            raise ValueError(
                f"all {len(self._calls)} steps of this run have been taken: call set_timesteps before the next run"
            )
        call = self._calls[self._step_index]
        self._step_index += 1
        return call

    def _index_of(self, timestep: Tensor | float) -> int:
        """The call that `timestep` belongs to; of repeated labels the first, unless `timestep` is an element of
        `self.timesteps` itself (as in any pipeline's loop), whose position tells, without waiting for the device."""
        if isinstance(timestep, Tensor) and timestep.ndim == 0:
            storages = (timestep.untyped_storage().data_ptr(), self.timesteps.untyped_storage().data_ptr())
            if storages[0] == storages[1]:
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep {timestep} is not one of scheduler.timesteps: call set_timesteps first")
        return int(matches[0])

    # --- The visible sample ---

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run starts from."""
        if self.noise_space.kind != "ve":
            return 1.0
        return self._calls[0].sigma if self._calls else float(self.config.sigma_max)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network's input for the sample in the pipeline: the identity but in `ve` space, where it is
        `sample / sqrt(1 + sigma^2)` (or `sample`, if the network was trained without input scaling)."""
        if self.noise_space.kind != "ve" or not self.config.scale_input:
            return sample
        if timestep is None:
            raise ValueError("scale_model_input needs the timestep in 've' noise space")
        label = torch.as_tensor(timestep, dtype=torch.float64)
        alpha = self.noise_space.alpha(self.noise_space.sigma(label)).to(sample.device, sample.dtype)
        return alpha * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The visible sample at `timesteps`: `alpha * (x0 + sigma * noise)`.

        Args:
            original_samples: clean images `(B, ...)`.
            noise: unit noise, same shape.
            timesteps: labels `(B,)` or scalar; fractional ones are interpolated in log sigma.
        """
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        sigma = self.noise_space.sigma(timesteps.to(original_samples.device)).reshape(shape)
        alpha = torch.ones_like(sigma) if self.noise_space.kind == "ve" else self.noise_space.alpha(sigma)
        dtype = original_samples.dtype
        compute = torch.promote_types(dtype, torch.float32)
        noisy = alpha.to(compute) * original_samples.to(compute) + (alpha * sigma).to(compute) * noise.to(compute)
        return noisy.to(dtype)

    def initial_sample(
        self, shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The sample a run starts from, `init_noise_sigma` times unit noise; call `set_timesteps` first."""
        return self.init_noise_sigma * randn(shape, generator, device, dtype)

    # --- The denoiser ---

    def _check(self, model_output: Tensor, sample: Tensor, generator: Generators) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network's output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: they "
                "must agree (networks that also predict a variance are not supported)"
            )
        check_generators(generator, sample.shape[0])

    def _clip(self, denoised: Tensor) -> Tensor:
        """`thresholding` and `clip_sample` act on D."""
        if self.config.thresholding:
            # arXiv 2205.11487, section 2.3
            bound = torch.quantile(denoised.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
            bound = bound.clamp(min=1, max=self.config.sample_max_value)[(...,) + (None,) * (denoised.ndim - 1)]
            return denoised.clamp(-bound, bound) / bound
        if self.config.clip_sample:
            return denoised.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return denoised


def check_num_calls(num_calls: int, at_least: int) -> None:
    """Raise a ValueError unless `num_calls` network calls are enough."""
    if int(num_calls) != num_calls or num_calls < at_least:
        raise ValueError(f"num_inference_steps must be an integer of at least {at_least}, got {num_calls!r}")


def spread_steps(num_calls: int, num_langevin_steps: int, denoise: bool) -> list[int]:
    """Langevin steps of each level for a budget of network calls, which is met exactly.

    There are `(num_calls - denoise) // num_langevin_steps` levels; the first ones take one step more where the
    budget does not divide.
    """
    if num_langevin_steps < 1:
        raise ValueError(f"num_langevin_steps must be at least 1, got {num_langevin_steps}")
    check_num_calls(num_calls, 2 * num_langevin_steps + denoise)
    budget = num_calls - denoise
    num_levels = budget // num_langevin_steps
    steps, rest = divmod(budget, num_levels)
    return [steps + (i < rest) for i in range(num_levels)]
