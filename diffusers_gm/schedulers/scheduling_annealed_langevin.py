"""Annealed Langevin dynamics, the sampler of NCSN and NCSNv2."""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..processes.annealed import (
    check_consistent_step,
    consistent_step,
    fixed_step_size,
    langevin_step,
    level_ratios,
    optimal_step_size,
)
from ..random import Generators, randn
from .calls import check_network_level, langevin_levels
from .common import LangevinSchedulerMixin, LangevinSchedulerOutput
from .config import check_algorithm


class AnnealedLangevinScheduler(LangevinSchedulerMixin, SchedulerMixin, ConfigMixin):
    """Annealed Langevin dynamics with theory-chosen step sizes (NCSNv2, arXiv 2006.09011).

    `set_timesteps(n)` spends n network calls: L noise levels with T Langevin steps each, and one call for the final
    denoising. If n - 1 is no multiple of T, the first levels get one step more.

    Accuracy: a Langevin step is Euler-Maruyama, its stationary law off by O(a), weak order 1; `consistent` is first
    order in the log ratio of the levels and leaves exactly the variance of every level.

    Args:
        num_train_timesteps: number of labels N of the network. In `ve` space, the length of its geometric ladder.
        noise_space: how the network sees the noisy image: `vp`, `ve`, `flow`, or None to infer it: a beta schedule
            means `vp`, a flow config (`shift`, `flow_prediction`) `flow`, else `ve`.
        sigma_min, sigma_max: ends of the `ve` ladder, in the units of the image.
        scale_input: `ve`: whether the network is fed `y / sqrt(1 + sigma^2)` rather than `y`.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, snr_shift_scale: `vp`: as in
            diffusers (the last one is CogVideoX's).
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: `flow`: resolution shift of the grid of calls, as
            in diffusers.
        prediction_type: `epsilon`, `sample`, `v_prediction` (not in `flow`), `flow_prediction` (in `flow`), `score`
            (of the density of y), `scaled_score` (`-sigma * score`).
        variance_type: `learned` or `learned_range` if the network also answers a variance, which is left out.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: act on the
            denoised image, as in diffusers.
        timestep_spacing: `log_snr` (equal ratios of sigma), `karras`, `beta`, or diffusers' `linspace`, `leading`,
            `trailing`. Noise levels are between the ends of the trained range.
        steps_offset: as in diffusers.
        grid: a spacing that takes the place of `timestep_spacing`. `from_config` sets `trailing` where the config of a
            scheduler of diffusers has `leading` or `linspace`, unless it is given a `timestep_spacing`.
        use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas, use_beta_sigmas: as in diffusers; short for
            `karras`, `log_snr`, `log_snr` and `beta`, and taking precedence.
        num_langevin_steps: T, Langevin steps per level.
        step_size: the paper's `eps`: level i takes steps of `eps * (sigma_i / sigma_L)^2`, L the last level of the
            run. None: Technique 4 for the levels of the run.
        step_size_criterion: Technique 4 for one level (`prop3`, the paper's) or the whole chain (`fixed_point`).
        algorithm_type: `langevin`, or `consistent` annealed sampling (arXiv 2009.05475): one step per level, so more
            levels for the same calls; `num_langevin_steps` is not used, and `step_size=None` is the ancestral step.
        denoise: end with `D(y; sigma_L)`, one network call (arXiv 2006.09011, section 4.3).
        network_level: of Langevin samplers: the network is told the level of the `ladder`, as published, or the one
            where the `chain` really is, which lags behind by a known factor (`chain_levels`): better at few calls.

    Raises:
        ValueError: for arguments out of range, with what would be right; from `set_timesteps` if there are too few
            calls, the step is unstable (`a >= 1`) or Technique 4 has no solution.
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
        num_langevin_steps: int = 1,
        step_size: float | None = None,
        step_size_criterion: Literal["prop3", "fixed_point"] = "fixed_point",
        algorithm_type: Literal["langevin", "consistent"] = "langevin",
        denoise: bool = True,
        network_level: Literal["ladder", "chain"] = "ladder",
    ):
        check_algorithm("AnnealedLangevinScheduler", algorithm_type)
        check_network_level(network_level)
        self._setup()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run of `num_inference_steps` network calls; `timesteps` then lives on `device`.

        Args:
            num_inference_steps: network calls, all included; levels are those of the config's grid.
            device: where `timesteps` is to be.
            timesteps, sigmas: labels or noise levels of the calls, one each, in place of a number. Calls with equal
                labels are Langevin steps on one level; the last call is the final denoising (`denoise`), so repeat the
                last label for Langevin steps there. `flow`: `sigmas` are s, before the shift; a final 0 is left out.
            mu: `flow` with `use_dynamic_shifting`: the shift, as pipelines compute it from the image's size.

        Raises:
            ValueError: see the class.
        """
        config = self.config
        consistent = config.algorithm_type == "consistent"
        labels = self._call_labels(
            num_inference_steps,
            timesteps,
            sigmas,
            mu,
            None if consistent else config.num_langevin_steps,
            config.denoise,
        )
        levels = self.noise_space.sigma(labels)
        sizes = self._consistent_sizes(levels) if consistent else self._langevin_sizes(levels)
        if config.network_level == "chain" and not consistent:
            a = torch.tensor(sizes, dtype=torch.float64)
            labels = self._chain_labels(labels, (1 - a) ** 2, 2 * a)
        self._set_calls(labels, sizes, config.denoise, device, levels)
        for call in self._calls:
            if consistent and not call.last:
                check_consistent_step(call.step_size, call.sigma, call.sigma_next)

    def _langevin_sizes(self, levels: Tensor) -> list[float]:
        """The dimensionless step of every call, 0 for the one that denoises."""
        config = self.config
        distinct, counts, index = langevin_levels(levels[:-1] if config.denoise else levels)
        if config.step_size is None:
            sizes = optimal_step_size(level_ratios(distinct), counts, config.step_size_criterion)[index].tolist()
        else:
            sizes = [fixed_step_size(config.step_size, float(distinct[-1]))] * len(index)
        return sizes + [0.0] * config.denoise

    def _consistent_sizes(self, levels: Tensor) -> list[float]:
        if self.config.step_size is not None:
            return [self.config.step_size / float(levels[-1]) ** 2] * len(levels)
        ratios = levels[1:] / levels[:-1]
        return (1 - torch.cat([ratios, ratios[-1:]]) ** 2).tolist()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LangevinSchedulerOutput | tuple[Tensor, Tensor]:
        """One update with the network's output at `timestep`.

        Args:
            model_output: the network's output `(B, ...)`, any floating dtype.
            timestep: the call's element of `timesteps`.
            sample: the visible sample `(B, ...)`; not modified.
            generator: decides the noise; a list decides it per sample.
            return_dict: whether to return a `LangevinSchedulerOutput` or a plain tuple.

        Computed in float32 or better, returned in the dtype of `sample`.
        """
        model_output = self._prediction(model_output, sample)
        self._check(model_output, sample, generator)
        call = self._next_call(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        y = sample.to(dtype) / call.alpha
        denoised = self.noise_space.denoised(model_output.to(dtype), y, call.sigma, self.config.prediction_type)
        denoised = self._clip(denoised)
        if call.last:
            y = denoised
        else:
            noise = randn(sample.shape, generator, sample.device, dtype)
            if self.config.algorithm_type == "consistent":
                y = consistent_step(y, denoised, call.sigma, call.sigma_next, call.step_size, noise)
            else:
                y = langevin_step(y, denoised, call.target, call.step_size, noise)
        prev_sample = (y * call.alpha_next).to(sample.dtype)
        pred_original_sample = denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return LangevinSchedulerOutput(prev_sample, pred_original_sample)
