"""What the app does, without a page: load a model, run samplers call by call, measure, calibrate, write the code."""

import copy
import io
import json
import queue
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from ..calibration import calibrate_in_full
from ..calibration.picture import plot as plot_calibration
from ..evaluation import sliced_wasserstein
from ..evaluation.options import build_parser
from ..evaluation.sampling import (
    OUR_SCHEDULERS,
    NoGridError,
    build_scheduler,
    image_shape,
    load_pipeline,
    network_of,
    num_steps_for,
)
from ..evaluation.sources import real_images
from ..pipelines.unconditional import UnconditionalPipeline
from ..schedulers import CalibratedMultistepScheduler

# Classes of schedulers, and what is to differ from the config of the network, by name. Those that do not suit a network
# are left out of its menu.
MENU: dict[str, tuple[str, dict[str, Any]]] = {
    "multistep, fixed levels": ("CalibratedMultistepScheduler", {"calibration": None, "stochasticity": None}),
    "GM, ode": ("GMLangevinScheduler", {"algorithm_type": "ode"}),
    "GM, ancestral": ("GMLangevinScheduler", {"algorithm_type": "ancestral"}),
    "GM, jump": ("GMLangevinScheduler", {"algorithm_type": "jump", "step_size": None}),
    "annealed Langevin": ("AnnealedLangevinScheduler", {"algorithm_type": "langevin", "step_size": None}),
    "annealed Langevin, chain": (
        "AnnealedLangevinScheduler",
        {"algorithm_type": "langevin", "network_level": "chain", "step_size": None},
    ),
    "annealed, consistent": ("AnnealedLangevinScheduler", {"algorithm_type": "consistent", "step_size": None}),
    "annealed, explore": ("AnnealedLangevinScheduler", {"algorithm_type": "explore", "step_size": None}),
    "CLD, sscs": ("CLDSSCSScheduler", {"algorithm_type": "sscs"}),
    "CLD, probability flow": ("CLDSSCSScheduler", {"algorithm_type": "probability_flow"}),
    "DDPM": ("DDPMScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Euler, flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "Euler, EDM": ("EDMEulerScheduler", {}),
}
SAVED, CALIBRATED = "as saved", "calibrated"
FIRST = (SAVED, CALIBRATED, "GM, ode", "UniPC")  # what is compared unless told

MAX_IMAGES, MAX_CALLS = 256, 1000
# Images whose way is kept.
NUM_WATCHED = 1


@dataclass(frozen=True)
class Sampler:
    """A scheduler for the network of a model.

    Attributes:
        name: what it is called.
        scheduler: the scheduler.
        code: the expression that makes it of `pipe`; empty for the model's own.
    """

    name: str
    scheduler: Any
    code: str = ""


@dataclass
class Model:
    """A pipeline with what can be done with it.

    Attributes:
        name: its folder, or its name on the Hub.
        pipe: the pipeline; never changed.
        samplers: those that suit its network, by name.
        left_out: why the others do not, by name.
        classes: names of its classes; none for an unconditional one.
        floors: distances of real images to others, by number of images; filled by `distance`.
    """

    name: str
    pipe: Any
    samplers: dict[str, Sampler]
    left_out: dict[str, str]
    classes: list[str] = field(default_factory=list)
    floors: dict[int, tuple[Tensor, list[float]]] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str) -> "Model":
        """The model in a folder or on the Hub.

        Raises:
            ValueError, OSError: where there is no pipeline, or it is not one of images alone.
        """
        name = name.strip()
        if not name:
            raise ValueError("give the folder of a model, or its name on the Hub")
        if Path(name).is_dir() and not Path(name, "model_index.json").is_file():
            raise ValueError(f"{name} holds no trained pipeline: it has no model_index.json")
        pipe = load_pipeline(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(pipe, UnconditionalPipeline):
            raise ValueError(f"{name} is a {type(pipe).__name__}: only pipelines of images without a prompt are shown")
        return cls.of(name, pipe)

    @classmethod
    def of(cls, name: str, pipe: Any) -> "Model":
        """A pipeline that was loaded from `name`."""
        model = cls(name, pipe, {SAVED: Sampler(SAVED, pipe.scheduler)}, {})
        model.classes = pipe.class_names or [str(i) for i in range(pipe.num_classes or 0)]
        for entry, (of_class, options) in MENU.items():
            try:
                model.samplers[entry] = _sampler(pipe.scheduler, entry, of_class, options)
            except ValueError as error:
                model.left_out[entry] = str(error)
        return model

    def sampler(self, name: str) -> Sampler:
        """A sampler of the menu, or one that is described as `CLASS option=value ...`.

        Raises:
            ValueError: if it is none, or does not suit the network.
        """
        if name in self.samplers:
            return self.samplers[name]
        if name in self.left_out:
            raise ValueError(self.left_out[name])
        of_class, *changes = shlex.split(name) or [""]
        options = {}
        for option, _, value in (change.partition("=") for change in changes):
            try:
                options[option] = json.loads(value)
            except json.JSONDecodeError:
                options[option] = value
        return _sampler(self.pipe.scheduler, name, of_class, options)


def _sampler(own: Any, name: str, of_class: str, options: dict[str, Any]) -> Sampler:
    words = [f"{option}={json.dumps(value)}" for option, value in options.items()]
    offered = getattr(diffusers, of_class, None)
    try:
        _, scheduler = build_scheduler(own, [of_class, *words])
    except ValueError as error:
        raise ValueError(str(error).removeprefix("--scheduler ")) from error
    theirs = offered is not None and isinstance(own, OUR_SCHEDULERS)
    config = "pipe.scheduler.diffusers_config()" if theirs else "pipe.scheduler.config"
    arguments = "".join(f", {option}={_python(value)}" for option, value in options.items())
    return Sampler(name, scheduler, f"{of_class}.from_config({config}{arguments})")


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
        if self.seed != int(self.seed) or self.seed < 0:
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

    def arguments(self, model: Model) -> dict[str, Any]:
        """Of the pipeline, all that decides the images but for the number of steps."""
        generators = self.generators()
        labels = {"class_labels": model.pipe.draw_labels(generators)} if model.classes else {}
        return {"generator": generators, **labels, **self.of_classes(model)}


def parse_calls(text: str) -> list[int]:
    """Numbers of network calls, `5 10, 20`.

    Raises:
        ValueError: for anything else.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 1 <= int(word) <= MAX_CALLS for word in words):
        raise ValueError(f"network calls must be whole numbers from 1 to {MAX_CALLS}, such as 5 10 20, got {text!r}")
    return sorted({int(word) for word in words})


# --- Runs ---


@dataclass(frozen=True)
class Look:
    """One network call of a run: what the network saw, and the denoised image, of the first `NUM_WATCHED` images of the
    batch, `(n, C, H, W)`. What was seen is scaled as the network sees it, without velocities, and not decoded."""

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
        distance: to real images over that of other real images, and the spread of the latter; None where not measured.
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
    distance: tuple[float, float] | None = None
    error: str = ""


def advance(model: Model, run: Run, settings: Settings) -> Iterator[Run]:
    """Do a run; it is given out after every network call, and with its samples. Its own errors are in `run.error`."""
    scheduler = copy.deepcopy(run.sampler.scheduler)
    try:
        run.steps = num_steps_for(scheduler, run.calls)
        began = time.perf_counter()
        for got in _watched(model, scheduler, run.steps, settings):
            if isinstance(got, Tensor):
                run.images, run.finished = got, True
                run.seconds = time.perf_counter() - began
            else:
                look, run.images, run.network_calls = got
                run.looks.append(look)
            yield run
    except (NoGridError, ValueError) as error:
        run.error = str(error)
        yield run


def _watched(model: Model, scheduler: Any, steps: int, settings: Settings) -> Iterator[Any]:
    """What happens in a run: of every step the `Look`, all denoised images and the number of network calls; then the
    samples. The pipeline runs in a thread of its own, which is stopped when nobody asks any more."""
    pipe = copy.copy(model.pipe)  # shares the network; the scheduler of the model is left alone
    pipe.scheduler = scheduler
    news: queue.Queue[Any] = queue.Queue()
    stopped, made = threading.Event(), 0
    denoise, take, space = _denoiser(scheduler), scheduler.step, pipe.latent_space

    def count(*_: Any) -> None:
        nonlocal made
        made += 1

    @wraps(take)
    def step(output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if stopped.is_set():
            raise _Stopped
        seen = scheduler.scale_model_input(sample, timestep)
        result = take(output, timestep, sample, *args, **kwargs)
        denoised = denoise(output, timestep, seen, result)
        # Latents take long to decode.
        pictures = (denoised if space is None else space.decode(denoised[:NUM_WATCHED])).float().cpu()
        look = Look(seen[:NUM_WATCHED, : denoised.shape[1]].float().cpu(), pictures[:NUM_WATCHED])
        news.put((look, pictures, made))
        return result

    def work() -> None:
        hook = network_of(pipe).register_forward_pre_hook(count)
        try:
            output = pipe(
                batch_size=settings.num_images,
                num_inference_steps=steps,
                output_type="pt",
                **settings.arguments(model),
            )
            news.put(output.images.float().cpu() * 2 - 1)
        except BaseException as error:
            news.put(error)
        finally:
            hook.remove()

    scheduler.step = step
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        got: Any = None
        while not isinstance(got, Tensor):
            got = news.get()
            if isinstance(got, BaseException):
                raise got
            yield got
    finally:
        stopped.set()
        thread.join()


class _Stopped(Exception):
    """Ends a run that nobody watches."""


def _denoiser(scheduler: Any) -> Callable[[Tensor, Any, Tensor, Any], Tensor]:
    """D of a step, of the network's output, the timestep, what the network saw and the result. Ours say it; those of
    diffusers not all, so their network is read as ours would."""
    if isinstance(scheduler, OUR_SCHEDULERS):
        return lambda output, timestep, seen, result: result.pred_original_sample
    ours = CalibratedMultistepScheduler.from_config(scheduler.config)

    def denoised(output: Tensor, timestep: Any, seen: Tensor, result: Any) -> Tensor:
        call = ours.reading.calls(torch.as_tensor(timestep, dtype=torch.float64).reshape(1).cpu())[0]
        return ours.clip(ours.reading.denoised(ours.without_variance(output, seen), seen / call.fed, call))

    return denoised


# --- Real images ---


def distance(model: Model, images: Tensor) -> tuple[float, float] | None:
    """Sliced W2 of samples to the training images over its mean for as many other real images, and the standard
    deviation of the latter: both by `diffusers_gm.evaluation`. None where the data are not at hand, or images not
    finite or fewer than two.

    Raises:
        ImportError: without the `evaluation` extra.
    """
    n = len(images)
    if n < 2 or not torch.isfinite(images).all():
        return None
    if n not in model.floors:
        real = _real_images(model, n)
        if real is None:
            return None
        reference, others = real
        floor = [sliced_wasserstein(draw, reference) for draw in others.split(n)]
        model.floors[n] = reference, floor
    reference, floor = model.floors[n]
    unit = mean(floor)
    return sliced_wasserstein(images, reference) / unit, (stdev(floor) / unit if len(floor) > 1 else 0.0)


def _real_images(model: Model, n: int) -> tuple[Tensor, Tensor] | None:
    """Those that the model was trained on, and draws of n others, where they need no download."""
    path = Path(model.name, "training_args.json")
    trained = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    folder = trained.get("train_data_dir")
    if trained.get("dataset_name") == "digits":
        words = ["--dataset_name", "digits"]
    elif folder and Path(folder).is_dir():
        words = ["--train_data_dir", folder]
    else:
        return None
    for option in ("image_column", "background", "resolution"):
        given = trained.get(option)
        words += [] if given is None else [f"--{option}", *map(str, given if isinstance(given, list) else [given])]
    args = build_parser("").parse_args([model.name, *words, "--seeds", *map(str, range(8))])
    reference, others, _ = real_images(args, image_shape(model.pipe), n)
    return reference, others


# --- Calibration ---


def calibrate(model: Model, calls: Sequence[int], effort: str, settings: Settings) -> tuple[Image.Image, str]:
    """Add `calibrated` to the samplers of a model; the picture of its levels, and what it took, in words.

    Raises:
        ValueError: for numbers of calls that cannot be calibrated.
        ImportError: without the `evaluation` extra.
    """
    pipe, arguments = copy.copy(model.pipe), settings.of_classes(model)
    found = calibrate_in_full(pipe, calls, effort=effort, **arguments)  # type: ignore[arg-type]
    given = "".join(f", {name}={_python(value)}" for name, value in arguments.items())
    code = f"calibrate(pipe, calls={tuple(calls)!r}, effort={_python(effort)}{given})"
    model.samplers[CALIBRATED] = Sampler(CALIBRATED, found.scheduler, code)
    picture = io.BytesIO()
    plot_calibration(found, picture)
    words = [f"{found.network_calls} network calls of a whole batch, {sum(found.seconds):.1f} s."]
    words += [f"{n} calls: {', '.join(f'{sigma:.3g}' for sigma in levels)}" for n, levels in found.levels.items()]
    return Image.open(picture), "\n".join(words)


# --- Code ---


def code_of(model: Model, run: Run, settings: Settings) -> str:
    """Python that gives the images of a finished run."""
    own, cls = run.sampler.code, type(model.pipe).__name__
    if (
        cls == UnconditionalPipeline.__name__
    ):  # what stands in for pipelines of diffusers, whose loop suits few samplers
        source = diffusers.DiffusionPipeline.load_config(model.name)["_class_name"]
        imports, load = {"diffusers": [source], "diffusers_gm": ["GMSGMPipeline"]}, "GMSGMPipeline(**{}.components)"
    else:
        source, imports, load = cls, {"diffusers_gm": [cls]}, "{}"
    if own:
        name = own.partition("(")[0].partition(".")[0]
        imports.setdefault("diffusers" if hasattr(diffusers, name) else "diffusers_gm", []).append(name)
    lines = [f"from {module} import {', '.join(names)}" for module, names in sorted(imports.items())]
    lines += ["", f"pipe = {load.format(f'{source}.from_pretrained({_python(model.name)})')}"]
    lines += [f"pipe.scheduler = {own}"] if own else []
    given = {name: _python(value) for name, value in settings.of_classes(model).items()}
    labels = {"class_labels": "pipe.draw_labels(generators)"} if model.classes else {}
    arguments = "".join(f", {name}={value}" for name, value in (labels | given).items())
    lines += [
        f"seeds = range({settings.seed}, {settings.seed + settings.num_images})",
        "generators = [torch.Generator().manual_seed(seed) for seed in seeds]",
        f"images = pipe(len(seeds), num_inference_steps={run.steps}, generator=generators{arguments}).images",
    ]
    return "\n".join(["import torch", *lines])


def _python(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def config_of(run: Run) -> str:
    """The config of its scheduler, as `save_pretrained` writes it."""
    return run.sampler.scheduler.to_json_string()
