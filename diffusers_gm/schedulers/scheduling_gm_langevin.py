"""Samplers of Gaussian-mixture score-based models: large jumps and small roaming."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..processes.annealed import fixed_step_size, langevin_step, level_ratios, optimal_step_size
from ..processes.mixture import GaussianMixtureNoise
from ..processes.mixture_dynamics import ancestral_step, exponential_step, exponential_step_size, ode_step
from ..random import Generators, randn
from .calls import Call, check_network_level, langevin_levels
from .common import LangevinSchedulerMixin, LangevinSchedulerOutput
from .config import check_algorithm

GAUSSIAN = GaussianMixtureNoise([1.0], [1.0])


class GMLangevinScheduler(LangevinSchedulerMixin, SchedulerMixin, ConfigMixin):
    """Sampling with Gaussian-mixture noise, for models trained on it and for ordinary models.

    `algorithm_type`:

    | | increments | order |
    |---|---|---|
    | `langevin` | annealed Langevin dynamics with Gaussian increments | weak 1 on a level |
    | `jump` | Langevin steps whose noise is the mixture, `c_k` drawn anew for every step; same target | weak 1 |
    | `exponential` | as `jump`, integrated exactly for a frozen denoiser: stable for any jump | weak 1 |
    | `ancestral` | reverse mixture diffusion; the jump size is drawn from its posterior given the image | 1 |
    | `ode` | probability flow, deterministic, two-step | 2 |

    The first three spend `num_langevin_steps` calls a level, the last two one. All end with the denoiser.
    With one component they are NCSNv2 (`langevin`, `jump`), the ancestral sampler and the ODE of ordinary models.

    Under mixture noise an image in component k is at the local noise level `c_k sigma`, and the first three measure
    their steps in it, as NCSNv2 measures its own in sigma: the network's `w = E[c^-2 | y]` makes it `sigma / sqrt(w)`.
    Langevin dynamics with a diffusion proportional to `1 / w(y)` and no correction for its gradient target `w p`
    instead of p: exactly the noisy data again, with the components' weights divided by `c_k^2`. A network that
    learned the score is itself misled about the component while a run lags behind the ladder: at small budgets,
    prefer one that learned the denoiser, or `ancestral` and `ode`.

    Args:
        mixture_weights, mixture_scales: the mixture, K numbers each; None: one component of scale 1. With
            `model_noise="mixture"` exactly the noise that the network was trained with.
        mixture_per_element: whether components are drawn per element rather than per image.
        model_noise: what the network was trained with. `gaussian`: any ordinary network; the mixture then only
            shapes the increments of `jump` and `exponential`, and leaves the target unchanged. `mixture`: the
            denoiser and the score are no longer the same function, and each sampler gets the one it needs.
        prediction_type: as in `AnnealedLangevinScheduler`. With mixture noise, `epsilon`, `sample` and `v_prediction`
            describe a denoiser, `score` and `scaled_score` a score; the other one is derived from it.
        step_size: `eps` as in `AnnealedLangevinScheduler` for `langevin` and `jump` (Technique 4 generalised to jumps
            if None), and for `exponential`, where any positive value is stable.

    All other arguments: see `AnnealedLangevinScheduler`.

    Raises:
        ValueError: for a mixture that is not one; from `set_timesteps` for an unstable step (`a * c_max^2 >= 1` for
            jumps, `a >= 1` without), for a budget at which no stable step follows the ladder, and
            for too few calls.
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
        mixture_weights: list[float] | None = None,
        mixture_scales: list[float] | None = None,
        mixture_per_element: bool = False,
        model_noise: Literal["gaussian", "mixture"] = "gaussian",
        num_langevin_steps: int = 1,
        step_size: float | None = None,
        step_size_criterion: Literal["prop3", "fixed_point"] = "fixed_point",
        algorithm_type: Literal["langevin", "jump", "exponential", "ancestral", "ode"] = "ancestral",
        denoise: bool = True,
        network_level: Literal["ladder", "chain"] = "ladder",
    ):
        check_algorithm("GMLangevinScheduler", algorithm_type)
        check_network_level(network_level)
        if model_noise not in ("gaussian", "mixture"):
            raise ValueError(f"unknown model_noise {model_noise!r}: use 'gaussian' or 'mixture'")
        if (mixture_weights is None) != (mixture_scales is None):
            raise ValueError("mixture_weights and mixture_scales go together: give both or none")
        self._setup()
        self.mixture = GaussianMixtureNoise(mixture_weights or [1.0], mixture_scales or [1.0], mixture_per_element)
        # The law of the noise that the network was trained with.
        self.model_mixture = self.mixture if model_noise == "mixture" else GAUSSIAN
        self._previous: tuple[Tensor, float] | None = None
        # The noise level, in units of c_k, at which a Langevin run really is; None: at that of the call.
        self._level: float | None = None

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
        self._previous = None
        self._level = None
        one_call = config.algorithm_type in ("ancestral", "ode")
        labels = self._call_labels(
            num_inference_steps, timesteps, sigmas, mu, None if one_call else config.num_langevin_steps, config.denoise
        )
        levels = self.noise_space.sigma(labels)
        if one_call:
            sizes = torch.zeros_like(levels)
        else:
            distinct, counts, index = langevin_levels(levels[:-1] if config.denoise else levels)
            sizes = torch.nn.functional.pad(self._step_sizes(distinct, counts)[index], (0, int(config.denoise)))
        kept, fresh = self._carried(sizes)
        self._variances = list(zip(kept.tolist(), fresh.tolist(), strict=True))
        if config.network_level == "chain" and not one_call:
            labels = self._chain_labels(labels, kept, fresh)
        self._set_calls(labels, sizes.tolist(), config.denoise, device, levels)

    def _step_sizes(self, levels: Tensor, counts: Tensor) -> Tensor:
        """The dimensionless step of each level `(L,)`, before jumps multiply it by `c_k^2`."""
        config = self.config
        jumps = GAUSSIAN if config.algorithm_type == "langevin" else self.mixture
        max_step = math.inf if config.algorithm_type == "exponential" else 1 / float(jumps.scales.max()) ** 2
        if config.step_size is not None:
            size = fixed_step_size(config.step_size, float(levels[-1]), max_step)
            return torch.full_like(levels, size)
        ratios = level_ratios(levels)
        if config.algorithm_type == "exponential":
            return exponential_step_size(ratios, counts, jumps.weights, jumps.scales)
        variance = jumps.moment(2)
        fourth_moment = jumps.moment(4) / variance**2
        sizes = optimal_step_size(ratios, counts, config.step_size_criterion, fourth_moment, max_step * variance)
        return sizes / variance

    def diffusers_config(self) -> dict[str, Any]:
        """See `LangevinSchedulerMixin.diffusers_config`."""
        if not self.model_mixture.is_standard_gaussian:
            raise ValueError("no scheduler of diffusers reads a network that was trained with mixture noise")
        return super().diffusers_config()

    def initial_sample(self, shape, generator, device, dtype) -> Tensor:
        """The sample a run starts from: noise of the law that the network was trained with."""
        return self.model_mixture.sample(shape, generator, device, dtype, sigma=self.init_noise_sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LangevinSchedulerOutput | tuple[Tensor, Tensor]:
        """One update with the network's output at `timestep`.

        Args and returns as in `AnnealedLangevinScheduler.step`. A step draws first the jump sizes (if there are
        several), then the normal noise.
        """
        model_output = self._prediction(model_output, sample)
        self._check(model_output, sample, generator)
        call = self._next_call(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        y = sample.to(dtype) / call.alpha
        denoised, precision = self._denoise(model_output.to(dtype), y, call.sigma, self._level or call.sigma)
        self._advance_level(call)
        y = denoised if call.last else self._update(y, denoised, precision, call, generator)
        prev_sample = (y * call.alpha_next).to(sample.dtype)
        pred_original_sample = denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return LangevinSchedulerOutput(prev_sample, pred_original_sample)

    def _carried(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """What a Langevin step of size a keeps of the variance of the noise, and adds in units of its level's."""
        jumps = GAUSSIAN if self.config.algorithm_type == "langevin" else self.mixture
        if self.config.algorithm_type == "exponential":
            kept = torch.exp(-2 * a[:, None] * jumps.scales**2) @ jumps.weights
            return kept, 1 - kept
        fresh = 2 * a * jumps.moment(2)
        return 1 - fresh + a**2 * jumps.moment(4), fresh

    def _advance_level(self, call: Call) -> None:
        """Langevin runs lag behind the ladder by a known factor (Proposition 3). The component of an image is told by
        the level where the image is: at the call's own, images would seem to be in wider components than they are."""
        if self.config.algorithm_type in ("ancestral", "ode"):
            return
        assert self._step_index is not None
        kept, fresh = self._variances[self._step_index - 1]
        self._level = math.sqrt(kept * (self._level or call.sigma) ** 2 + fresh * call.target**2)

    def _denoise(self, output: Tensor, y: Tensor, sigma: float, level: float) -> tuple[Tensor, Tensor | float]:
        """The denoiser D and the factor w of the score `w (D - y) / sigma^2`, for an image at `level`."""
        prediction_type = self.config.prediction_type
        denoised = self.noise_space.denoised(output, y, sigma, prediction_type)
        mixture = self.model_mixture
        if mixture.is_standard_gaussian:
            return self._clip(denoised), 1.0
        if prediction_type in ("score", "scaled_score"):
            displacement = denoised - y  # of Tweedie's formula, which holds for the score alone here
            precision = mixture.displacement_precision(displacement, level)
            return self._clip(y + displacement / precision), precision
        denoised = self._clip(denoised)
        return denoised, mixture.residual_precision(y - denoised, level)

    def _update(self, y: Tensor, denoised: Tensor, precision, call, generator: Generators) -> Tensor:
        algorithm = self.config.algorithm_type
        if algorithm == "ode":
            previous, self._previous = self._previous, (denoised, call.sigma)
            if previous is None or previous[0].shape != denoised.shape or previous[1] == call.sigma:
                return ode_step(y, denoised, call.sigma, call.sigma_next)
            return ode_step(y, denoised, call.sigma, call.sigma_next, *previous)
        draw = (y.shape, generator, y.device, y.dtype)
        if algorithm == "ancestral":
            responsibilities = self.model_mixture.responsibilities(y - denoised, call.sigma)
            scales = self.model_mixture.sample_scales(*draw, probabilities=responsibilities)
            return ancestral_step(y, denoised, call.sigma, call.sigma_next, scales, randn(*draw))
        a: Tensor | float = call.step_size
        if algorithm in ("jump", "exponential"):
            a = a * (self.mixture.sample_scales(*draw) ** 2 if len(self.mixture) > 1 else self.mixture.moment(2))
        update = exponential_step if algorithm == "exponential" else langevin_step
        return update(y, denoised, call.target / precision**0.5, a, randn(*draw))
