"""diffusers' scheduler contract around a reading of the network and a sampler.

A scheduler says how its network sees noise (`readings`) and which sampler it runs (`samplers`): this module does the
rest, and everything that changes during a run is in a `Run`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ..networks import without_variance
from ..processes.broadcast import per_image
from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..processes.random import Draw, Generators, check_generators
from ..readings import ImageReading, level_range
from ..readings.grids import check_calibration
from ..samplers import Memory, Sampler
from ..samplers.sampler import Stepped
from .calls import Calls, Levels
from .network import betas_from_config, prediction_type_of, reading_from_config
from .options import check_options
from .run import TURN, Run, living, this_thread
from .swap import Swappable, of_one_grid

logger = logging.getLogger(__name__)


class SamplerScheduler(Calls, Swappable):
    """What our schedulers share. One adds options, a `sampler` made of them, and what its algorithms are called.

    The tensor in a pipeline is `alpha * y` in `vp` and `flow` space, where `scale_model_input` is the identity and
    `init_noise_sigma` is 1, and `y` in `ve` and `edm` space, where `scale_model_input` scales and `init_noise_sigma` is
    the first level; `cat([x, v], 1)` for networks that were trained on CLD.

    Attributes:
        reading: how the network sees noise.
        sampler: what a run does.
        model_mixture: the law of the noise that the network was trained with.
        clips_above: noise level below which `clip_sample` leaves D alone.
    """

    order = 1
    clips_above: float = 0.0
    model_mixture: GaussianMixtureNoise = GAUSSIAN
    sampler: Sampler
    sigmas: Tensor

    def _setup(self, sampler: Sampler) -> None:
        """Called at the end of `__init__`, when the config is registered."""
        config = self.config
        if config.algorithm_type not in self.algorithms:
            raise ValueError(
                f"unknown algorithm_type {config.algorithm_type!r}: {type(self).__name__} has "
                f"{', '.join(self.algorithms)}"
            )
        check_options(config)
        check_calibration(config.calibration)
        self.reading = reading_from_config(config)
        self.noise_space = self.reading.space if isinstance(self.reading, ImageReading) else None
        self.sampler = self._made = sampler
        if self.noise_space is not None:
            if self.noise_space.kind == "vp":
                self.betas, self.alphas_cumprod = betas_from_config(config)
                self.alphas = 1 - self.betas
            kind, n = self.noise_space.kind, self.noise_space.num_train_timesteps  # which trained_betas say themselves
            said = {"noise_space": kind, "prediction_type": prediction_type_of(config, kind)}
            self.register_to_config(**said | ({} if n == config.num_train_timesteps else {"num_train_timesteps": n}))
        if "_use_default_values" in self.config:
            unsaid = set(self.config._use_default_values) & set(self.config.get("_use_default_values"))
            self.register_to_config(_use_default_values=sorted(unsaid))
        labels = self.trained_labels()
        self._timesteps = self.as_timesteps(labels)
        self.sigmas = self.visible_sigmas(self.reading.sigma(labels))
        self.num_inference_steps: int | None = None
        self._run: Run | None = None
        self._prepared: dict[int, Run] = {}  # by thread: its last run, until it begins
        self._begin_index: int | None = None
        self.is_scale_input_called = False  # as schedulers of diffusers name it

    def register_to_config(self, **kwargs: Any) -> None:
        """As in diffusers. Options that change after `__init__` act as if they had been given there, and end a run."""
        options = self._get_init_keys(type(self)) - {"self"}
        if "_run" in vars(self) and options & kwargs.keys():
            cls: Any = type(self)
            kwargs = of_one_grid(self.config, kwargs)
            made = cls(**{name: kwargs.get(name, self.config[name]) for name in options})
            kwargs |= {name: made.config[name] for name in options}
            self.__dict__.update({**vars(made), "_internal_dict": self._internal_dict})
        super().register_to_config(**kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def sampler_for(self, num_calls: int, own_levels: bool = True) -> Sampler:
        """What a run of so many calls does, on levels of the config's own or on given ones: the sampler that somebody
        has put in, or that of the config."""
        return self._made_for(num_calls, own_levels) if self.sampler is self._made else self.sampler

    def _made_for(self, num_calls: int, own_levels: bool) -> Sampler:
        return self.sampler

    # --- The calls of a run ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Levels | None = None,
        sigmas: Levels | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepare a run of `num_inference_steps` network calls; `timesteps` then lives on `device`.

        Args:
            num_inference_steps: network calls, all included; levels are those of the config's grid. A single call is D
                at the first level.
            device: where `timesteps` is to be.
            timesteps, sigmas: labels or noise levels of the calls, one each, in place of a number, or beside theirs.
                Calls with equal labels are Langevin steps on one level; the last call is the final denoising
                (`denoise`), so repeat the last label for Langevin steps there (with `network_level="chain"` steps lead
                to the level of the call after). With both, the network is told
                `timesteps` at the levels `sigmas`.
                `flow`: `sigmas` are s, before the shift; a final 0 is left out; those that pipelines pass unasked, 1,
                1 - 1/n, ..., stand for a number, which a sampler spends and a config lays out as they will.
            mu: `flow` with `use_dynamic_shifting`: the shift, as pipelines compute it from the image's size.

        Raises:
            ValueError: see the class.
        """
        custom = timesteps if sigmas is None else sigmas
        if num_inference_steps is None and custom is None:
            raise ValueError("give num_inference_steps, or custom timesteps or sigmas")
        if custom is not None:
            if num_inference_steps not in (None, len(custom)):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} beside {len(custom)} custom timesteps or sigmas: leave "
                    "it out"
                )
            num_inference_steps = None
        if sigmas is not None and timesteps is None and self.passed_by_pipelines(sigmas):
            num_inference_steps, sigmas = len(sigmas), None
        if num_inference_steps is None:
            labels, levels = self.labels_and_levels(timesteps, sigmas, mu)
        else:
            counts = self.sampler_for(num_inference_steps).calls_per_level(num_inference_steps)
            labels = self.labels_of(len(counts), mu).repeat_interleave(torch.tensor(counts))
            levels = self.reading.sigma(labels)
        self._given = (num_inference_steps, mu)
        self._prepare(labels, levels, device, num_inference_steps is not None)

    def _prepare(self, labels: Tensor, levels: Tensor, device: str | torch.device | None, own_levels: bool) -> None:
        """A run with these labels and noise levels, `(n,)` float64 each, of the config's own or given ones."""
        given_both = not torch.equal(levels, self.reading.sigma(labels))
        sampler = self.sampler_for(len(labels), own_levels)
        made = sampler if self.sampler is self._made else self._made
        plan = sampler.plan(levels)
        moved = plan.sigmas != levels
        if moved.any():  # a sampler that tells the network other levels than those of the grid
            if given_both:  # labels of levels between are between those that are given
                told = torch.from_numpy(np.interp(plan.sigmas.log(), levels.log().flip(0), labels.flip(0)))
            else:
                told = self.reading.timestep(plan.sigmas)
                if self._counts_whole(labels):
                    told = told.round()
                    plan = replace(plan, sigmas=torch.where(moved, self.reading.sigma(told), levels))
            labels = torch.where(moved, told, labels)
        calls = self.reading.calls(labels, plan.sigmas)
        own_labels = self.reading.timestep(plan.sigmas).to(torch.float32) if given_both else None
        run = Run(calls, plan, self.as_timesteps(labels).to(device), own_labels)
        visible_sigmas = self.visible_sigmas(plan.sigmas)
        with TURN:
            self._prepared = {**living(self._prepared), this_thread(): run}
            self._run = run.after(self._run)
            self.sampler, self._made = sampler, made
            self._timesteps, self.num_inference_steps, self.sigmas = run.timesteps, len(labels), visible_sigmas
            self._begin_index = None

    def _counts_whole(self, labels: Tensor) -> bool:
        """Whether labels are whole numbers, which networks of `vp` space may take alone."""
        vp = self.noise_space is not None and self.noise_space.kind == "vp"
        return vp and torch.equal(labels, labels.round())

    @property
    def timesteps(self) -> Tensor:
        """The labels of the network calls of a run `(n,)`; before any, those that the network was trained at.

        A thread that has prepared a run sees that one until it begins, so that it is told if another has ended it.
        """
        mine = self._prepared.get(this_thread())
        return self._timesteps if mine is None else mine.timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        self._prepared.pop(this_thread(), None)
        self._timesteps = timesteps

    # --- Where a run is ---

    @property
    def step_index(self) -> int | None:
        """The index of the call that `step` expects next; None before the first."""
        return None if self._run is None else self._run.index

    @property
    def begin_index(self) -> int | None:
        """The index of the first call, as set by `set_begin_index`; None = found from the first timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at call `begin_index` (image-to-image).

        Raises:
            ValueError: if it is negative.
        """
        if begin_index < 0:
            raise ValueError(f"begin_index must be at least 0, got {begin_index}")
        self._begin_index = begin_index

    # --- The visible sample ---

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run starts from; with velocities that of x, see `initial_sample`."""
        return self.reading.initial_scale(self._first_sigma)

    @property
    def _first_sigma(self) -> float:
        if self._run is not None:
            return self._run.calls[0].sigma
        return level_range(self.reading)[1]

    def initial_sample(
        self, shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The sample a run starts from, of `shape`: `init_noise_sigma` times unit noise, of the law that the network
        was trained with; with velocities `(B, 2C, ...)` from the prior. Call `set_timesteps` first."""
        noise = self.model_mixture.sample(shape, generator, device, dtype)
        return self.reading.initial_sample(noise, self._first_sigma)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network's input for the sample in the pipeline: the identity in `vp` and `flow` space; `alpha * sample`
        in `ve` (unless the network was trained without input scaling) and `edm` space; `cat([x, v / sqrt(M)], 1)` for
        networks that see a velocity."""
        self.is_scale_input_called = True
        call = None if self._run is None else self._run.call_at(timestep)
        if call is None and timestep is not None:
            timestep = self._own_labels(torch.as_tensor(timestep))
        return self.reading.model_input(sample, timestep, call)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The visible sample at `timesteps`: `alpha * (x0 + sigma * noise)`.

        Args:
            original_samples: clean images `(B, C, ...)`.
            noise: unit noise, same shape; `(B, 2C, ...)` for networks that see a velocity, whose sample is `cat([x,
                v], 1)`.
            timesteps: labels `(B,)` or scalar; fractional ones are interpolated in log sigma. Those of a run that was
                given `timesteps` and `sigmas` are at its levels.
        """
        return self.reading.add_noise(original_samples, noise, self._own_labels(torch.as_tensor(timesteps)))

    def _own_labels(self, timesteps: Tensor) -> Tensor:
        """The labels of the levels of calls, any shape, where the network is told others in this run."""
        if self._run is None or self._run.own_labels is None:
            return timesteps
        told, own = (labels.to(timesteps.device) for labels in (self._run.timesteps, self._run.own_labels))
        same = timesteps[..., None] == told
        return torch.where(same.any(-1), own[same.int().argmax(-1)], timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a velocity network is trained to answer for clean `sample` and unit `noise`, both `(B, ...)`.

        In `flow` space `noise - sample`; in the others `alpha * noise - alpha * sigma * sample`, alpha as in `vp`.

        Raises:
            ValueError: for networks of CLD, which answer a velocity score.
        """
        return self.reading.velocity(sample, noise, timesteps)

    # --- The step ---

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One update with the network's output at `timestep`.

        Args:
            model_output: the network's output `(B, ...)`, any floating dtype.
            timestep: the call's element of `timesteps`, or its value.
            sample: the visible sample `(B, ...)`; not modified.
            generator: decides the noise; a list decides it per sample.
            return_dict: whether to return a `DDPMSchedulerOutput` or a plain tuple of the same two.
            per_token_timesteps: `flow`: labels of each token, `(B, tokens)`, none above that of the call, as
                `LTXConditionPipeline` passes them. Tokens below the call's level wait for it, unchanged. As there,
                `model_output` is then the negative of the network's output.

        Returns:
            `prev_sample`, that of the next network call, of the shape of `sample`, and `pred_original_sample`, the
            denoised image `D` at this call, after clipping, `(B, C, ...)`; computed in float32 or better, returned in
            the dtype of `sample`.

        Raises:
            ValueError: if shapes do not go together, or the step cannot be the next of the run.
        """
        if self._run is None:
            raise ValueError("set_timesteps must be called before step")
        model_output = self.without_variance(model_output, sample)
        self.reading.check(model_output, sample)
        check_generators(generator, sample.shape[0])
        if not self.is_scale_input_called and not torch.compiler.is_compiling():
            self._warn_of_input()
        i, run = self._claim(timestep, sample.shape)
        call, after = run.calls[i], run.calls[i + 1]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        output, state = model_output.to(dtype), sample.to(dtype)
        if per_token_timesteps is not None:
            output = -output
        y, companion = self.reading.coordinates(state, call)
        memory = run.memory if companion is None else run.memory._replace(companion=companion)
        denoised, memory = self._denoised(output, state, y, call, memory)
        denoised, memory = self.clipped(denoised, call.sigma, memory)
        if per_token_timesteps is not None:
            waiting, own = self._waiting(per_token_timesteps.to(dtype)[..., None], output, state, call)
            denoised = torch.where(waiting, own, denoised)
        y, run.memory = self.sampler.step(run.plan, i, y, denoised, memory, Draw.like(state, generator))
        prev_sample = self.reading.visible(y, run.memory.companion, after)
        if per_token_timesteps is not None:
            prev_sample = torch.where(waiting, state, prev_sample)
        # A copy: the run goes on with its own, whatever is done to this one.
        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype, copy=True)
        return DDPMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)

    def _warn_of_input(self) -> None:
        if self.noise_space is not None and self.noise_space.carries_y:
            logger.warning(
                f"scale_model_input was not called before step: a network of {self.noise_space.kind} space is fed "
                "alpha * sample, and a run starts from init_noise_sigma times unit noise"
            )
        self.is_scale_input_called = True  # said once

    def _claim(self, timestep: Tensor | float, shape: torch.Size) -> tuple[int, Run]:
        """The index of the call that a step makes, and the run, which is past it now."""
        if torch.compiler.is_compiling():  # a compiler knows no locks
            i, self._run = cast(Run, self._run).claim_compiled(timestep, self._begin_index, shape)
            return i, self._run
        with TURN:
            before = cast(Run, self._run)
            i, run = before.claim(timestep, self._begin_index, shape)
            self._prepared = {thread: other for thread, other in self._prepared.items() if other is not before}
            self._run = run
        return i, run

    def denoise(
        self, network: Callable[[Tensor, Tensor], Tensor], y: Tensor, companion: Tensor | None, sigma: Tensor
    ) -> Tensor:
        """`D(y; sigma)` of a network `(input, label) -> output`, whatever it sees, at any noise level.

        Args:
            network: as a pipeline calls it.
            y: noisy images `(B, ...)`.
            companion: unit noise like y, for networks of CLD; others have no use for it.
            sigma: noise level, a scalar on the CPU.
        """
        reading, level = self.reading, sigma.double().reshape(1)
        call = reading.calls(reading.timestep(level), level)[0]
        sample = reading.visible(y, companion, call)
        label = torch.tensor(call.label, device=y.device, dtype=torch.float32)
        return self.denoised(network(reading.model_input(sample, label, call), label).to(y), sample, y, call)

    def denoised(self, model_output: Tensor, sample: Tensor, y: Tensor, call: Any) -> Tensor:
        """D, clipped, of a network's output for `sample`, both `(B, ...)`, at a call of the reading; y is in it."""
        model_output = self.without_variance(model_output, sample)
        return self.clip(self._denoised(model_output, sample, y, call, Memory())[0], call.sigma)

    def _denoised(self, output: Tensor, state: Tensor, y: Tensor, call: Any, memory: Memory) -> Stepped:
        """D at a call, not clipped, and what the sampler is to know of it besides.

        A score is not a denoiser under mixture noise: its displacement from y, `sigma^2 score`, is w times that to D.
        Samplers that need the score are told w, which D alone would give them less exactly.
        """
        denoised = self.reading.denoised(output, state, call)
        if self.model_mixture.is_standard_gaussian or self.config.prediction_type not in ("score", "scaled_score"):
            return denoised, memory
        displacement = denoised - y
        w = self.model_mixture.displacement_precision(displacement, memory.level or call.sigma)
        return y + displacement / w, memory._replace(precision=w)

    def _waiting(self, labels: Tensor, output: Tensor, state: Tensor, call: Any) -> tuple[Tensor, Tensor]:
        """Which tokens are below the level of the call, and D of all tokens, each at its own level."""
        if not self.is_flow:
            raise ValueError("per_token_timesteps is for networks of flow space")
        return labels < call.label - 1e-3, self.clip(state - labels / len(self) * output, call.sigma)

    def without_variance(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The network's output without the variance that `variance_type="learned*"` networks add in the second half."""
        learned = (self.config.variance_type or "").startswith("learned")
        have_channels = model_output.ndim > 1 and sample.ndim > 1
        return without_variance(model_output, sample.shape[1]) if learned and have_channels else model_output

    def clipped(self, denoised: Tensor, sigma: float, memory: Memory) -> Stepped:
        """D, clipped, and what the sampler is to know of that."""
        return self.clip(denoised, sigma), memory

    def clip(self, denoised: Tensor, sigma: float) -> Tensor:
        """`thresholding` and, above a noise level, `clip_sample` act on D."""
        if self.config.thresholding:
            # arXiv 2205.11487, section 2.3
            bound = torch.quantile(denoised.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
            bound = per_image(bound.clamp(min=1, max=self.config.sample_max_value), denoised)
            return denoised.clamp(-bound, bound) / bound
        if self.config.clip_sample and sigma > self.clips_above:
            return denoised.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return denoised
