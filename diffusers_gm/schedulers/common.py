"""diffusers' scheduler contract around a noise space. The samplers themselves are in `scheduling_*.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from ..processes.annealed import chain_levels
from ..processes.noise_space import NoiseSpace, level_grid, shift_flow
from ..random import Generators, check_generators, randn
from .calls import Call, check_num_calls, spread_steps
from .config import (
    ALGORITHMS,
    SPACING_FLAGS,
    SwapConfig,
    betas_from_config,
    config_for_diffusers,
    from_own_config,
    from_source_config,
    noise_space_from_config,
)


@dataclass
class LangevinSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: the sample of the next network call, same shape and dtype as the sample passed in.
        pred_original_sample: the denoised image `D` at this call, after clipping; same shape and dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


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
        """As in diffusers; what a scheduler that is not ours leaves unsaid is read by `from_source_config`."""
        if isinstance(config, SwapConfig):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
        if isinstance(config, dict) and "noise_space" in config:
            config = from_own_config(config, next(c.__name__ for c in cls.__mro__ if c.__name__ in ALGORITHMS))
        elif isinstance(config, dict) and "noise_space" not in kwargs:
            config = from_source_config(config)
        if "timestep_spacing" in kwargs:
            kwargs = {"grid": None, **kwargs}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**kwargs)  # type: ignore[misc]
        self._internal_dict = SwapConfig(self.config)

    def _setup(self) -> None:
        """Called at the end of `__init__`, when the config is registered."""
        self.noise_space = noise_space_from_config(self.config)
        if self.noise_space.kind == "vp":
            self.betas, self.alphas_cumprod = betas_from_config(self.config)
            self.alphas = 1 - self.betas
        self.register_to_config(noise_space=self.noise_space.kind)
        first, last = self.noise_space.timestep_range
        self._setup_run(torch.arange(int(last), int(first) - 1, -1))

    def _setup_run(self, timesteps: Tensor) -> None:
        """The part of `_setup` that needs no noise space; `timesteps` before any `set_timesteps`."""
        if self.config.thresholding and not 0 < self.config.dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio must be in (0, 1], got {self.config.dynamic_thresholding_ratio}"
            )
        if sum(bool(self.config[flag]) for flag in SPACING_FLAGS) > 1:
            raise ValueError(f"only one of {', '.join(SPACING_FLAGS)} can be True")
        if "_use_default_values" in self.config:
            unsaid = set(self.config._use_default_values) & set(self.config.get("_use_default_values"))
            self.register_to_config(_use_default_values=sorted(unsaid))
        self.num_inference_steps: int | None = None
        self.timesteps = timesteps
        self.sigmas = torch.zeros(0)
        self._calls: list[Call] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def diffusers_config(self) -> dict[str, Any]:
        """The config by which schedulers of diffusers sample the network of this scheduler:
        `UniPCMultistepScheduler.from_config(pipe.scheduler.diffusers_config())`.

        In `vp` and `flow` space our own config serves. A `ve` network that is fed `y / sqrt(1 + sigma^2)` is a DDPM
        network, whose betas (`NoiseSpace.betas`) are worked out, with `trailing` timesteps.

        Raises:
            ValueError: for a network that no scheduler of diffusers can read: one of mixture noise or of velocities,
                one that answers a score, a `ve` network without input scaling.
        """
        return config_for_diffusers(self.config, getattr(self, "noise_space", None))

    # --- The grid of calls ---

    def _call_labels(
        self,
        num_calls: int | None,
        timesteps: Sequence[float] | Tensor | None,
        sigmas: Sequence[float] | Tensor | None,
        mu: float | None,
        num_langevin_steps: int | None = None,
        denoise: bool = True,
    ) -> Tensor:
        """The label of every network call of a run, `(n,)` float64, descending.

        With a number of calls, the grid of the config: one level a call, or `num_langevin_steps` calls a level and the
        last level once more to denoise. With `timesteps` or `sigmas`, these, one a call.
        """
        if (num_calls is not None) + (timesteps is not None) + (sigmas is not None) != 1:
            raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas")
        shift = self._flow_shift(mu)
        if timesteps is not None:
            labels = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten()
        elif sigmas is not None:
            labels = self._labels_of_sigmas(torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"), shift)
        elif num_langevin_steps is None:
            check_num_calls(num_calls, 2)
            return self._grid(int(num_calls), shift)  # type: ignore[arg-type]
        else:
            steps = spread_steps(num_calls, num_langevin_steps, denoise)
            labels = self._grid(len(steps), shift).repeat_interleave(torch.tensor(steps))
            return torch.cat([labels, labels[-1:]]) if denoise else labels
        first, last = self.noise_space.timestep_range
        if self.noise_space.kind == "flow":
            first = 1e-6
        if len(labels) < 2 or not ((first <= labels) & (labels <= last)).all() or (labels.diff() > 0).any():
            raise ValueError(
                f"custom timesteps (here {labels.tolist()}) must be at least two, none above the one before, in "
                f"[{first:g}, {last:g}]"
            )
        return labels

    def _flow_shift(self, mu: float | None) -> float:
        """The factor on sigma of the resolution shift (`flow`), 1 in the other spaces."""
        config = self.config
        if self.noise_space.kind != "flow":
            return 1.0
        if not config.use_dynamic_shifting:
            return 1.0 if config.shift is None else config.shift
        if mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu in set_timesteps (pipelines compute it from the size)")
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def _grid(self, num_levels: int, shift: float) -> Tensor:
        config = self.config
        flags = [spacing for flag, spacing in SPACING_FLAGS.items() if config[flag]]
        spacing = flags[0] if flags else config.grid or config.timestep_spacing
        return level_grid(self.noise_space, num_levels, spacing, config.steps_offset, shift, config.shift_terminal)

    def _labels_of_sigmas(self, sigmas: Tensor, shift: float) -> Tensor:
        """Labels of custom noise levels, without a final 0; in `flow` space they are s before the shift."""
        sigmas = sigmas[:-1] if len(sigmas) and sigmas[-1] == 0 else sigmas
        if self.noise_space.kind == "flow":
            return self.noise_space.num_train_timesteps * shift_flow(sigmas, shift, self.config.shift_terminal)
        low, high = self.noise_space.sigma(torch.tensor(self.noise_space.timestep_range)).tolist()
        # Published schedules are rounded.
        if not ((0.99 * low <= sigmas) & (sigmas <= 1.01 * high)).all():
            raise ValueError(f"custom sigmas {sigmas.tolist()} must be in [{low:.4g}, {high:.4g}]")
        return self.noise_space.timestep(sigmas)

    def _chain_labels(self, labels: Tensor, kept: Tensor, fresh: Tensor) -> Tensor:
        """Labels of the levels at which a Langevin chain really is, within the ladder's ends; see `chain_levels`."""
        levels = self.noise_space.sigma(labels)
        chain = chain_levels(levels, kept, fresh).clamp(levels[-1], levels[0])
        return torch.cat([labels[:1], self.noise_space.timestep(chain[1:])])

    def _set_calls(
        self, labels: Tensor, step_sizes: Sequence[float], denoise: bool, device: Any, targets: Tensor | None = None
    ) -> None:
        """Fill the table of calls; all arguments have one entry per network call."""
        levels = self.noise_space.sigma(labels)
        sigmas = levels.tolist()
        visible = [1.0] * len(sigmas) if self.noise_space.kind == "ve" else self.noise_space.alpha(levels).tolist()
        # A run without the final denoising ends one more level down, at alpha 1.
        ratio = sigmas[-1] / sigmas[-2] if len(sigmas) > 1 else 1.0
        next_sigmas = [*sigmas[1:], 0.0 if denoise else sigmas[-1] * ratio]
        next_visible = [*visible[1:], 1.0]
        last = [False] * (len(sigmas) - 1) + [denoise]
        aims = sigmas if targets is None else targets.tolist()
        columns = (labels.tolist(), sigmas, visible, next_sigmas, next_visible, step_sizes, last, aims)
        integral = bool((labels == labels.round()).all())
        timesteps = labels.to(device=device, dtype=torch.int64 if integral else torch.float32)
        self._begin_run([Call(*row) for row in zip(*columns, strict=True)], timesteps)
        if self.noise_space.kind == "flow":
            self.sigmas = torch.cat([labels / self.noise_space.num_train_timesteps, torch.zeros(1)]).float()

    def _begin_run(self, calls: list[Call], timesteps: Tensor) -> None:
        """Replace the table of calls; `timesteps` are their labels on the device of the run."""
        self._calls = calls
        self.num_inference_steps = len(calls)
        self.timesteps = timesteps
        # What pipelines read: on the CPU, ending at 0.
        self.sigmas = torch.tensor([call.sigma for call in calls] + [0.0])
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
        """The call that `step` is at, from the table; a ValueError if `timestep` belongs to another one."""
        if not self._calls:
            raise ValueError("set_timesteps must be called before step")
        index = self._step_index
        if index is None:
            index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        if index >= len(self._calls):
            raise ValueError(
                f"all {len(self._calls)} steps of this run have been taken: call set_timesteps before the next run"
            )
        call = self._calls[index]
        given = self._value(timestep)
        if given is not None and not math.isclose(given, call.timestep, rel_tol=0.01, abs_tol=0.01):
            raise ValueError(
                f"step {index} of this run is at timestep {call.timestep:g}, not {given:g}: a scheduler serves one run "
                "at a time; call set_timesteps before another one, or give each its own copy"
            )
        self._step_index = index + 1
        return call

    def _position(self, timestep: Tensor | float) -> int | None:
        """The index of a `timestep` that is an element of `self.timesteps` itself, as in any pipeline's loop. Its place
        in memory tells, without waiting for the device."""
        if isinstance(timestep, Tensor) and timestep.ndim == 0:
            storages = (timestep.untyped_storage().data_ptr(), self.timesteps.untyped_storage().data_ptr())
            if storages[0] == storages[1]:
                return int(timestep.storage_offset() - self.timesteps.storage_offset())
        return None

    def _value(self, timestep: Tensor | float) -> float | None:
        """The value of a `timestep`; None if only waiting for the device would tell, or if there are several."""
        position = self._position(timestep)
        if position is not None and position < len(self._calls):
            return self._calls[position].timestep
        if isinstance(timestep, Tensor) and (timestep.ndim > 0 or timestep.device.type != "cpu"):
            return None
        return float(timestep)

    def _index_of(self, timestep: Tensor | float) -> int:
        """The call that `timestep` belongs to; of repeated labels the first, unless its position tells."""
        position = self._position(timestep)
        if position is not None:
            return position
        first = torch.as_tensor(timestep, device=self.timesteps.device).flatten()[0]
        matches = (self.timesteps == first).nonzero()
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
        value = self._value(timestep)
        label = torch.as_tensor(timestep if value is None else value, dtype=torch.float64).reshape(-1)
        alpha = self.noise_space.alpha(self.noise_space.sigma(label)).to(sample.device, sample.dtype)
        return alpha.reshape(-1, *[1] * (sample.ndim - 1)) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The visible sample at `timesteps`: `alpha * (x0 + sigma * noise)`.

        Args:
            original_samples: clean images `(B, ...)`.
            noise: unit noise, same shape.
            timesteps: labels `(B,)` or scalar; fractional ones are interpolated in log sigma.
        """
        if self.noise_space.kind == "ve":
            noise_factor = self.noise_space.sigma(timesteps)
            alpha = torch.ones_like(noise_factor)
        else:
            alpha, noise_factor = self.noise_space.coefficients(timesteps)
        return _combine(alpha, original_samples, noise_factor, noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a velocity network is trained to answer for clean `sample` and unit `noise`, both `(B, ...)`.

        In `flow` space `noise - sample`; in the others `alpha * noise - alpha * sigma * sample`, alpha as in `vp`.
        """
        if self.noise_space.kind == "flow":
            return noise - sample
        alpha, noise_factor = self.noise_space.coefficients(timesteps)
        if self.noise_space.kind == "ve" and not self.config.scale_input:
            sigma = noise_factor
            alpha, noise_factor = torch.rsqrt(1 + sigma**2), sigma * torch.rsqrt(1 + sigma**2)
        return _combine(-noise_factor, sample, alpha, noise)

    def initial_sample(
        self, shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The sample a run starts from, `init_noise_sigma` times unit noise; call `set_timesteps` first."""
        return self.init_noise_sigma * randn(shape, generator, device, dtype)

    # --- The denoiser ---

    def _prediction(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The network's output without the variance that `variance_type="learned*"` networks add in the second half."""
        channels = sample.shape[1] if sample.ndim > 1 else 0
        learned = (self.config.variance_type or "").startswith("learned")
        if learned and model_output.ndim > 1 and model_output.shape[1] == 2 * channels:
            return model_output[:, :channels]
        return model_output

    def _check(self, model_output: Tensor, sample: Tensor, generator: Generators) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network's output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: they "
                "must agree (for a network that also answers a variance, set variance_type='learned_range')"
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


def _combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """`a * x + b * y` in float32 or better, in the dtype of x; a and b are `(B,)` or scalar."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (-1,) + (1,) * (x.ndim - 1)
    a, b = (c.reshape(shape).to(x.device, dtype) for c in (a, b))
    return (a * x.to(dtype) + b * y.to(x.device, dtype)).to(x.dtype)
