"""A pipeline as a denoiser: whatever it does around its network (prompt, guidance, control) is in its D.

The pipeline runs once, with a scheduler that never ends: at every step it hands D to the one who asks and is told which
noise level, and which y, to call the network at next. The asker works in a thread of its own.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ..processes.random import Generators
from ..samplers import Memory
from ..schedulers import CalibratedMultistepScheduler
from ..schedulers.calls import Levels
from ..schedulers.run import position_in
from .trajectory import Denoised

# Steps that the pipeline is told of; it is stopped before. And of a run as people make them.
MANY, USUAL = 20_000, 20


class _Done(Exception):
    """Ends the pipeline's loop."""


class AskedScheduler(CalibratedMultistepScheduler):
    """A scheduler whose steps go where another thread wants them."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Levels | None = None,
        sigmas: Levels | None = None,
        mu: float | None = None,
    ) -> None:
        self.shift_of_run = self.resolution_shift(mu if self.mu is None else self.mu)
        if timesteps is not None or (sigmas is not None and not (self.is_flow and self.are_unasked(sigmas))):
            raise ValueError(
                "the pipeline gives its scheduler timesteps or sigmas of its own, in place of which no calibrated ones "
                "would be used: it cannot be calibrated"
            )
        count = int(num_inference_steps) if sigmas is None else len(sigmas)  # type: ignore[arg-type]
        top = torch.tensor([self.reading.timestep_range[1]], dtype=torch.float64)
        super().set_timesteps(timesteps=top, device=device)
        # The loop holds views of these tensors: what is written into them is the timestep, and the level, of a step to
        # come.
        self.timesteps = torch.full((count,), float(top), device=device, dtype=torch.float32)
        self.num_inference_steps = count
        self.sigmas = self.sigmas[:1].repeat(count + 1)
        self._taken, self._free = 0, None
        if self.only_prepares:
            self.mu = mu
            raise _Done

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """D of the call that was asked for; the sample of the next one."""
        if per_token_timesteps is not None:
            raise ValueError("the pipeline gives tokens timesteps of their own: it cannot be calibrated")
        call = self.asked
        at = float(torch.as_tensor(timestep).flatten()[0])
        if abs(at - call.label) > 1e-3 * max(1.0, abs(call.label)):
            raise ValueError(
                f"the pipeline called its network at timestep {at:g}, not at {call.label:g}: it takes its timesteps "
                "from elsewhere than the scheduler, and cannot be calibrated"
            )
        state = sample.float()
        y, companion = self.reading.coordinates(state, call)
        denoised, memory = self._denoised(self.without_variance(model_output.float(), state), state, y, call, Memory())
        denoised, memory = self.clipped(denoised, call.sigma, memory)
        if self._taken == 0:
            if self.noise_space is not None and self.noise_space.carries_y and not self.is_scale_input_called:
                raise ValueError(
                    f"the pipeline does not scale its network's input (scheduler.scale_model_input), as networks of "
                    f"{self.noise_space.kind} space need it: run the network by one that does, such as ours"
                )
            self._start = y.clone()  # pipelines may write into theirs, here and below
            self._first = position_in(timestep, self.timesteps) or self.begin_index or 0
            # At another level than the start's, where what is put back is other than what was handed.
            sigma = call.sigma / 2
        else:
            if self._taken == 1:
                y = self._start
                free = (sample == self._handed)[:, : denoised.shape[1]]  # of x, where there is a velocity
                self._free = free if free.any() and not free.all() else None
            # What a pipeline puts back after every step, as those that paint in do, says nothing of its network.
            told = denoised if self._free is None else torch.where(self._free, denoised, 0.0)
            sigma, y = self.exchange(y, (told, memory.clipped))
        self._taken += 1
        label = self.reading.timestep(torch.tensor([sigma], dtype=torch.float64))
        self.ask(label)
        place = self._first + self._taken
        if place < len(self.timesteps):
            self.timesteps[place] = float(label)
            self.sigmas[place] = self.visible_sigmas(self.reading.sigma(label))[0]
        prev_sample = self.reading.visible(y, companion, self.asked).to(sample.dtype, copy=True)
        if self._taken == 1:
            self._handed = prev_sample.clone()
        denoised = denoised.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)

    def ask(self, label: Tensor) -> None:
        """The next call is at `label` `(1,)`."""
        self.asked = self.reading.calls(label)[0]

    @property
    def init_noise_sigma(self) -> float:
        return self.reading.initial_scale(self.asked.sigma)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        self.is_scale_input_called = True
        return self.reading.model_input(sample, timestep, self.asked)

    exchange: Callable[[Tensor, Denoised], tuple[float, Tensor]]
    mu: float | None = None  # the shift of a run as long as others, which may depend on that; None: the pipeline's
    only_prepares: bool = False
    _start: Tensor  # y at the first step
    _first: int  # its place among the timesteps
    _handed: Tensor  # the sample after it
    _free: Tensor | None  # where the pipeline leaves that as it is; None: everywhere, as far as can be told


def with_denoiser(
    pipe: Any, scheduler: CalibratedMultistepScheduler, work: Callable[[Any, Tensor, float], Any], **arguments: Any
) -> Any:
    """Run `work(denoiser, start, shift)` while `pipe(**arguments)` answers: `denoiser(y, sigma)` is D of the
    pipeline's batch and what clipping has added to it, `start` its y at the first level, `shift` the factor by which
    it moves levels for its resolution (`flow`).

    Returns:
        what `work` returns.

    Raises:
        ValueError: for a pipeline that ends before the work is done; whatever the pipeline or the work raises.
    """
    asked = AskedScheduler.from_config(scheduler.config)
    asked.ask(torch.tensor([asked.reading.timestep_range[1]], dtype=torch.float64))
    if asked.config.use_dynamic_shifting:
        asked.mu = _mu_of(pipe, asked, arguments | {"num_inference_steps": USUAL})
    asker = _Asker(lambda denoiser, start: work(denoiser, start, asked.shift_of_run))
    asked.exchange = asker.exchange
    # Pipelines that perturb the attention put it back when their loop ends, which this one does not.
    parts = getattr(pipe, "components", {}).values()
    attention = [(part, part.attn_processors) for part in parts if hasattr(part, "attn_processors")]
    original, pipe.scheduler = pipe.scheduler, asked
    try:
        with torch.no_grad():
            pipe(**arguments)
    except _Done:
        pass
    except BaseException as error:
        asker.answers.put(error)
        raise
    else:
        asker.answers.put(ValueError("the pipeline has ended"))
        raise ValueError(
            f"a {type(pipe).__name__} ended before the calibration did: it makes fewer network calls than its "
            "num_inference_steps, or the calibration needs more than there are: give fewer calls"
        )
    finally:
        pipe.scheduler = original
        for part, processors in attention:
            part.set_attn_processor(processors)
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    return asker.outcome.result()


def _mu_of(pipe: Any, asked: AskedScheduler, arguments: dict[str, Any]) -> float | None:
    """The shift for its resolution that the pipeline tells its scheduler in a run of `num_inference_steps`: that of
    Flux.2 depends on their number, and of `MANY` it would be absurd."""
    original, pipe.scheduler, asked.only_prepares = pipe.scheduler, asked, True
    try:
        pipe(**arguments)
    except _Done:
        pass
    finally:
        pipe.scheduler, asked.only_prepares = original, False
    return asked.mu


class _Asker:
    """The thread that asks a pipeline for denoised images."""

    def __init__(self, work: Callable[[Any, Tensor], Any]):
        self.work = work
        self.outcome: Future[Any] = Future()
        self.answers: queue.Queue[Any] = queue.Queue()
        self.requests: queue.Queue[Any] = queue.Queue()
        self.thread: threading.Thread | None = None

    def __deepcopy__(self, memo: Any) -> None:
        raise ValueError(
            "the pipeline copies its scheduler, for several samples at once (sound, views of a panorama): it cannot be "
            "calibrated"
        )

    def exchange(self, y: Tensor, answer: Denoised) -> tuple[float, Tensor]:
        """Called by the pipeline: y of the call that was asked for, and the answer; the level and y of the next one."""
        if self.thread is None:
            # D of the first call is asked for again: the work need not know of this one.
            self.thread = threading.Thread(target=self._run, args=(y,), daemon=True)
            self.thread.start()
        else:
            self.answers.put(answer)
        request = self.requests.get()
        if request is None:
            raise _Done
        return request

    def denoiser(self, y: Tensor, sigma: float) -> Denoised:
        """Called by the work."""
        self.requests.put((sigma, y))
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _run(self, start: Tensor) -> None:
        try:
            with torch.no_grad():
                self.outcome.set_result(self.work(self.denoiser, start))
        except BaseException as error:
            self.outcome.set_exception(error)
        self.requests.put(None)
