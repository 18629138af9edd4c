"""Annealed Langevin dynamics, the sampler of NCSN and NCSNv2."""

from dataclasses import replace
from typing import Literal

import torch

# A pipeline of diffusers that is saved with this scheduler names this module, and looks the base class up in it.
from diffusers import SchedulerMixin  # noqa: F401
from torch import Tensor

from ..processes.annealed import check_criterion
from ..samplers import Ancestral, Explore, Langevin, Sampler
from ..samplers.langevin import DESCENT
from .base import SamplerScheduler
from .options import with_common_options
from .run import Run


class AnnealedLangevinScheduler(SamplerScheduler):
    """Annealed Langevin dynamics with theory-chosen step sizes (NCSNv2, arXiv 2006.09011).

    `set_timesteps(n)` spends n network calls: L noise levels with T Langevin steps each, and one call for the final
    denoising. If n - 1 is no multiple of T, the first levels get one step more. `n = 1` is D at the first level. Where
    the network is told where the chain is (`network_level`), the run begins at a level above these L.

    Accuracy: a Langevin step is Euler-Maruyama, its stationary law off by O(a), weak order 1. In the log ratio of the
    levels, with `step_size=None`, `consistent` and chains that the network is told are of `step_order`, but by
    `fixed_point` of half an order less, and ladders of order 1/2. `consistent` leaves exactly the noise of every level.

    Args:
        num_train_timesteps: number of labels N of the network. In `ve` space, the length of its geometric ladder.
        noise_space: how the network sees the noisy image: `vp`, `ve`, `flow`, `edm`, or None to infer it: a beta
            schedule means `vp`, a flow config (`shift`, `flow_prediction`) `flow`, `sigma_data` `edm`, else `ve`.
        sigma_min, sigma_max: ends of the `ve` ladder, or of the range trained on in `edm` space, in the image's units.
        scale_input: `ve`: whether the network is fed `y / sqrt(1 + sigma^2)` rather than `y`.
        sigma_labels: `ve`: whether the network is told the noise level itself (NCSN++) rather than its place.
        sigma_data: `edm`: standard deviation of the data that the network was preconditioned for; its `epsilon` is then
            the output of that preconditioning, as in diffusers. None: 1, and `epsilon` is the noise.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, snr_shift_scale: `vp`: as in
            diffusers (the last one is CogVideoX's).
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: `flow`: resolution shift of the grid of calls, as
            in diffusers.
        prediction_type: `epsilon`, `sample`, `v_prediction` (not in `flow`), `flow_prediction` (in `flow`), `edm` (in
            `edm`), `score` (of the density of y), `scaled_score` (`-sigma * score`); or, for a network that was trained
            on CLD, one of `CLDSSCSScheduler`'s. None: `flow_prediction` in `flow` space, `epsilon` in the others.
        beta_0, beta_1, mass, gamma: of a network that was trained on CLD, see `CLDSSCSScheduler`.
        variance_type: `learned` or `learned_range` if the network also answers a variance, which is left out.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: act on the
            denoised image, as in diffusers.
        timestep_spacing: `log_snr` (equal ratios of sigma), `even` (`even_levels`: fewer calls end at a higher level),
            `karras`, `beta`, or diffusers' `linspace`, `leading`, `trailing`. Noise levels are between the ends of the
            trained range.
        steps_offset: as in diffusers.
        grid: a spacing that takes the place of `timestep_spacing`, or `calibrated`: the levels of `calibration`, see
            `CalibratedMultistepScheduler`. `from_config` sets `even` where the config of a scheduler of diffusers
            has `leading` or `linspace`, unless it is given a `timestep_spacing`.
        use_karras_sigmas, use_exponential_sigmas, use_lu_lambdas, use_beta_sigmas: as in diffusers; short for
            `karras`, `log_snr`, `log_snr` and `beta`, and taking precedence. `flow`: of s; but all but the last of
            sigma in configs of diffusers' solvers (`use_flow_sigmas`), where UniPC's Karras levels are.
        num_langevin_steps: T, Langevin steps per level.
        step_size: the paper's `eps`: level i takes steps of `eps * (sigma_i / sigma_L)^2`, L the last level of the
            run. None: Technique 4 for the levels of the run.
        step_size_criterion: Technique 4 for one level (`prop3`, the paper's) or the whole chain (`fixed_point`). None:
            `prop3` where the network is told where the chain is, which need not be near the ladder; but `fixed_point`
            for others, for jumps, and without `denoise`.
        algorithm_type: `langevin`, or `consistent` annealed sampling (arXiv 2009.05475): one step per level, so more
            levels for the same calls; `num_langevin_steps` is not used, and `step_size=None` is the ancestral step.
            `explore`: all calls but a dozen are Langevin steps at the first level, `step_size=None` ones of a quarter
            of its variance; the rest is the probability flow, and all there is up to a dozen calls. For rare and far
            modes, and for image-to-image that is to change its subject: a run that begins midway explores there, and so
            would the second of two parts (SDXL's refiner), which it is not for.
        denoise: end with `D(y; sigma_L)`, one network call (arXiv 2006.09011, section 4.3).
        network_level: of Langevin samplers: the network is told the level of the `ladder`, as published, or the one
            where the `chain` really is, which lags behind by a known factor (`chain_levels`): at few calls the
            difference between images and noise, and what new trainings take. It takes no steps on the first level, at
            which its noise is drawn. None: the ladder's in a `ve` space without
            a `grid`, as published, and of given timesteps or sigmas; else the chain's.
        step_order: 1: D is held over a step, as published. 2: it is extrapolated from two calls to the middle of the
            step, where the network is told where the chain is, and for `consistent`. What version 0.1.0 saved, which
            says nothing of it, is of 1.

    Raises:
        ValueError: for arguments out of range, with what would be right; from `set_timesteps` if there are too few
            calls, the step is unstable (`a >= 1`) or Technique 4 has no solution; from `step` for a run of `explore`
            that begins midway without `set_begin_index`.
    """

    algorithms = ("langevin", "consistent", "explore")

    @with_common_options
    def __init__(
        self,
        num_langevin_steps: int = 1,
        step_size: float | None = None,
        step_size_criterion: Literal["prop3", "fixed_point"] | None = None,
        algorithm_type: Literal["langevin", "consistent", "explore"] = "langevin",
        denoise: bool = True,
        network_level: Literal["ladder", "chain"] | None = None,
        step_order: int = 2,
    ):
        check_langevin(network_level, step_size_criterion, step_order)
        if algorithm_type == "consistent":
            self._setup(Ancestral(denoise=denoise, step_size=step_size, order=step_order))
        elif algorithm_type == "explore":
            self._setup(Explore(step_size, denoise))
        else:
            chain = network_level == "chain"
            self._setup(Langevin(num_langevin_steps, step_size, step_size_criterion, denoise, chain, order=step_order))

    def _made_for(self, num_calls: int, own_levels: bool) -> Sampler:
        return following(self, own_levels)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at call `begin_index` (image-to-image).

        `explore`: at the level that a run which explores nothing has there. The timesteps from there on change, in
        place: pipelines have taken theirs out of them already.
        """
        super().set_begin_index(begin_index)
        run = self._run
        if not isinstance(self.sampler, Explore) or run is None or not 0 < begin_index < len(run):
            return
        num_calls, mu = self._given
        if num_calls is None:  # levels of the user's own
            return
        labels = self.labels_of(num_calls, mu)
        labels = labels if run.timesteps.is_floating_point() else labels.round()
        rest = labels[begin_index:]
        down = torch.linspace(0, len(rest) - 1, min(len(rest), DESCENT)).round().long()
        labels = torch.cat([labels[:begin_index], rest[:1].expand(len(rest) - len(down)), rest[down]])
        levels = self.reading.sigma(labels)
        run.calls, run.plan = self.reading.calls(labels, levels), self.sampler.plan(levels)
        run.timesteps.copy_(labels.to(run.timesteps.dtype))
        self.sigmas = self.visible_sigmas(levels)

    def _claim(self, timestep: Tensor | float, shape: torch.Size) -> tuple[int, Run]:
        """A run that explores where it begins has to know that before noise is added to an image."""
        before = self._run
        i, run = super()._claim(timestep, shape)
        begins_midway = before is not None and before.index is None and i > 0 and self._begin_index is None
        if begins_midway and isinstance(self.sampler, Explore) and self._given[0]:
            self._run = before
            raise ValueError(
                f"this run begins at step {i}, which set_begin_index({i}) was to say before noise was added to the "
                "image: algorithm_type='explore' has its levels by that, and this pipeline, or loop, did not call it; "
                "call it, or use another algorithm_type"
            )
        return i, run


def check_langevin(network_level: str | None, step_size_criterion: str | None, step_order: int) -> None:
    """Raise a ValueError for an option of Langevin samplers that there is not."""
    if network_level not in ("ladder", "chain", None):
        raise ValueError(f"unknown network_level {network_level!r}: use 'ladder' or 'chain'")
    if step_size_criterion is not None:
        check_criterion(step_size_criterion)
    if step_order not in (1, 2):
        raise ValueError(f"step_order must be 1 or 2, got {step_order!r}")


def following(scheduler: SamplerScheduler, own_levels: bool) -> Sampler:
    """The sampler, which tells the network the level that `network_level` of the config says."""
    sampler, config = scheduler.sampler, scheduler.config
    if not isinstance(sampler, Langevin):
        return sampler
    published = config.noise_space == "ve" and config.grid is None
    follows = {"chain": True, "ladder": False, None: own_levels and not published}[config.network_level]
    max_levels = config.num_train_timesteps if scheduler.reading.counts_levels else None
    return replace(sampler, follow_chain=follows, max_levels=max_levels)
