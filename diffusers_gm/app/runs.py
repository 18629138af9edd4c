"""Runs of a sampler on a model, call by call."""

import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..evaluation.sampling import counted_calls, num_steps_for
from ..schedulers import CalibratedMultistepScheduler
from ..schedulers.base import SamplerScheduler
from .models import Model, Sampler

MAX_IMAGES, MAX_CALLS = 256, 1000


@dataclass(frozen=True)
class Settings:
    """What the runs of a comparison share.

    Attributes:
        seed: image i is drawn by a generator with seed `seed + i`.
        num_images: in the batch.
        class_label: of all images; None: all classes, in the proportions of the training data.
        guidance_scale: for networks with classes.

    Raises:
        ValueError: for values out of range.
    """

    seed: int = 0
    num_images: int = 16
    class_label: str | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"the seed must be a whole number from 0 on, got {self.seed}")
        if not 1 <= self.num_images <= MAX_IMAGES:
            raise ValueError(f"the number of images must be from 1 to {MAX_IMAGES}, got {self.num_images}")

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.seed + i) for i in range(self.num_images)]

    def of_classes(self, model: Model) -> dict[str, Any]:
        """What only pipelines with classes take: guidance, and the class if it is a single one."""
        found: dict[str, Any] = {}
        if model.classes and self.class_label is not None:
            found["class_labels"] = self.class_label if model.pipe.class_names else int(self.class_label)
        if model.classes and self.guidance_scale != 1:
            found["guidance_scale"] = self.guidance_scale
        return found


def parse_calls(text: str) -> list[int]:
    """Numbers of network calls, `5 10, 20`.

    Raises:
        ValueError: for anything else.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 1 <= int(word) <= MAX_CALLS for word in words):
        raise ValueError(f"network calls must be whole numbers from 1 to {MAX_CALLS}, such as 5 10 20, got {text!r}")
    return sorted({int(word) for word in words})


@dataclass(frozen=True)
class Look:
    """One network call of a run: what the network saw, and the denoised image, of the first of the batch,
    `(1, C, H, W)`. What was seen is scaled as the network sees it, without velocities, and not decoded."""

    seen: Tensor
    denoised: Tensor


@dataclass
class Run:
    """A sampler at a number of network calls, as far as it has come.

    Attributes:
        sampler, calls: what is run; `calls` is the most that it may make.
        steps: its `num_inference_steps`, fewer where a step makes several calls.
        looks: of the calls that have been made.
        images: `(n, C, H, W)` in [-1, 1]: denoised images of the last call (of latents, the first ones), at the end
            the samples; None before.
        finished: whether `images` are the samples.
        seconds: until the samples were there.
        network_calls: made.
        distance: to real images over that of other real images, and the spread of the latter, None of a single draw of
            them; None where not measured.
        error: why there are no samples.
    """

    sampler: Sampler
    calls: int
    steps: int = 0
    looks: list[Look] = field(default_factory=list)
    images: Tensor | None = None
    finished: bool = False
    seconds: float = 0.0
    network_calls: int = 0
    distance: tuple[float, float | None] | None = None
    error: str = ""


def advance(model: Model, run: Run, settings: Settings) -> Iterator[Run]:
    """Do a run; it is given out after every network call, and with its samples. Its own errors are in `run.error`."""
    scheduler = copy.deepcopy(run.sampler.scheduler)
    try:
        run.steps = num_steps_for(scheduler, run.calls)
        began = time.perf_counter()
        for look, images, made in _watched(model, scheduler, run.steps, settings):
            run.images, run.network_calls = images, made
            if look is None:
                run.finished, run.seconds = True, time.perf_counter() - began
            else:
                run.looks.append(look)
            yield run
    except ValueError as error:
        run.error = str(error)
        yield run


def _watched(model: Model, scheduler: Any, steps: int, settings: Settings) -> Iterator[tuple[Look | None, Tensor, int]]:
    """What happens in a run: of every step the `Look`, all denoised images and the number of network calls; then None,
    the samples and that number. The pipeline runs in a thread of its own, stopped when nobody asks any more."""
    pipe = copy.copy(model.pipe)  # shares the network; the scheduler of the model is left alone
    pipe.scheduler = scheduler
    news: queue.Queue[Any] = queue.Queue()
    stopped = threading.Event()
    denoise, take, space = _denoiser(scheduler), scheduler.step, pipe.latent_space

    @wraps(take)
    def step(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if stopped.is_set():
            raise SystemExit  # of this thread
        seen = scheduler.scale_model_input(sample, timestep)
        result = take(output, timestep, sample, *args, **kwargs)
        denoised = denoise(output, timestep, seen, result)
        # Latents take long to decode.
        pictures = (denoised if space is None else space.decode(denoised[:1])).float().cpu()
        look = Look(seen[:1, : denoised.shape[1]].float().cpu(), pictures[:1])
        news.put((look, pictures, len(calls)))
        return result

    def work() -> None:
        arguments = {"generator": settings.generators(), **settings.of_classes(model)}
        try:
            images = pipe(settings.num_images, steps, output_type="pt", **arguments).images
            news.put((None, images.float().cpu() * 2 - 1, len(calls)))
        except BaseException as error:
            news.put(error)

    scheduler.step = step
    thread = threading.Thread(target=work, daemon=True)
    with counted_calls(pipe) as calls:
        thread.start()
        try:
            while True:
                got = news.get()
                if isinstance(got, BaseException):
                    raise got
                yield got
                if got[0] is None:
                    return
        finally:
            stopped.set()
            thread.join()


def _denoiser(scheduler: Any) -> Callable[[Tensor, Any, Tensor, Any], Tensor]:
    """D of a step, of the network's output, the timestep, what the network saw and the result. Ours say it; those of
    diffusers not all, so their network is read as ours would."""
    if isinstance(scheduler, SamplerScheduler):
        return lambda output, timestep, seen, result: result.pred_original_sample
    ours = CalibratedMultistepScheduler.from_config(scheduler.config)

    def denoised(output: Tensor, timestep: Any, seen: Tensor, result: Any) -> Tensor:
        call = ours.reading.calls(torch.as_tensor(timestep, dtype=torch.float64).reshape(1).cpu())[0]
        return ours.clip(ours.reading.denoised(ours.without_variance(output, seen), seen / call.c_in, call), call.sigma)

    return denoised
