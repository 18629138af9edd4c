"""Samples of any unconditional pipeline, with any scheduler, at a given number of network calls."""

import ast
import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DModel
from torch import Tensor

from .. import pipelines, schedulers
from ..data import SAMPLES, generator_for
from ..launch import over_processes
from ..pipelines.unconditional import UnconditionalPipeline
from ..schedulers.base import SamplerScheduler


def load_pipeline(name_or_path: str, device: torch.device) -> Any:
    """The pipeline in a folder or on the Hub, of the class that its `model_index.json` names.

    A network and a scheduler alone are put into our sampling loop, which follows the whole contract of schedulers:
    that of `DDPMPipeline` fits few.

    Raises:
        OSError: if there is no such pipeline.
        ValueError: if neither diffusers nor this package knows its class.
    """
    try:
        name = DiffusionPipeline.load_config(name_or_path)["_class_name"]
    except OSError as error:
        if Path(name_or_path).exists():
            raise
        raise OSError(f"{name_or_path} is neither a folder nor a pipeline on the Hub: {error}") from error
    name = name if isinstance(name, str) else name[-1]
    cls = getattr(pipelines, name, None) or getattr(diffusers, name, None)
    if cls is None:
        raise ValueError(f"{name_or_path} is a {name}, which neither diffusers nor diffusers_gm knows")
    pipeline = cls.from_pretrained(name_or_path)
    components = pipeline.components
    if not isinstance(pipeline, UnconditionalPipeline) and set(components) == {"unet", "scheduler"}:
        if not isinstance(pipeline.unet, UNet2DModel) or not hasattr(pipeline.scheduler, "step"):
            raise ValueError(f"{name_or_path} is a {name}: only unconditional pipelines of images can be measured")
        pipeline = UnconditionalPipeline(pipeline.unet, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@contextmanager
def counted_calls(pipeline: Any) -> Iterator[list]:
    """Inside, a list that is as long as the network was called often."""
    network = pipeline.components.get("unet") or pipeline.components.get("transformer")
    if network is None:
        raise ValueError(f"{type(pipeline).__name__} has neither a unet nor a transformer whose calls could be counted")
    calls: list[Any] = []
    hook = network.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def image_shape(pipeline: Any) -> tuple[int, int, int]:
    """`(C, H, W)` of the images that it makes."""
    if isinstance(pipeline, UnconditionalPipeline):
        _, height, width = pipeline._sample_shape()
        return pipeline._image_shape(height, width)
    try:
        images = _images(pipeline, 1, 2, [generator_for(0, SAMPLES)])
    except TypeError as error:
        raise ValueError(f"only unconditional pipelines of images can be measured: {error}") from error
    return tuple(images.shape[1:])  # type: ignore[return-value]


# Of a pipeline's own config: what it draws by, see `pipelines`.
DECIDING = ("class_shares", "latents_mean", "latents_std")


def describe_model(pipeline: Any) -> str:
    """A hash of all weights, of the scheduler's config, and of what else decides the pipeline's samples."""
    config = dict(pipeline.scheduler.config)
    config |= {name: value for name in DECIDING if (value := pipeline.config.get(name)) is not None}
    if "_use_default_values" in config:  # of a set, in an order that each process has its own of
        config["_use_default_values"] = sorted(config["_use_default_values"])
    content = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            for key, value in sorted(component.state_dict().items()):
                content.update(f"{name}.{key}{tuple(value.shape)}".encode())
                content.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


def describe_configs(pipeline: Any) -> str:
    """A hash of the configs of all networks, which say what is made of the weights, and of latents."""
    configs = {
        name: {key: value for key, value in component.config.items() if not key.startswith("_")}
        for name, component in pipeline.components.items()
        if isinstance(component, ModelMixin)
    }
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()


def scheduler_by_name(own: Any, words: Sequence[str]) -> tuple[str, Any]:
    """A scheduler in place of a pipeline's own, made of its config, and what to call it.

    Args:
        own: the pipeline's scheduler.
        words: the name of a class of diffusers or of this package, and `option=value` for what is to differ from the
            config; values are JSON or else strings.

    Raises:
        ValueError: for a class or an option that does not exist, a value that it refuses, or a class that reads the
            network as something else than its own scheduler does.
    """
    name, *changes = words
    cls: Any = getattr(schedulers, name, None) or getattr(diffusers, name, None)
    is_scheduler = inspect.isclass(cls) and all(hasattr(cls, m) for m in ("from_config", "set_timesteps", "step"))
    if not is_scheduler:
        raise ValueError(f"--scheduler {name!r} is no scheduler of diffusers or diffusers_gm")
    offered = inspect.signature(cls.__init__).parameters
    for change in changes:
        option, separator, _ = change.partition("=")
        if not separator or option not in offered:
            raise ValueError(
                f"--scheduler {name}: {change!r} must be option=value, the option one of {list(offered)[1:]}"
            )
    config, options = own.config, options_in(changes)
    if isinstance(own, SamplerScheduler) and not issubclass(cls, SamplerScheduler):
        try:
            config = own.diffusers_config()
        except ValueError as error:
            raise ValueError(f"--scheduler {name} does not suit this network: {error}") from error
    try:
        scheduler = cls.from_config(config, **options)
    except (TypeError, NotImplementedError, AssertionError) as error:  # as schedulers of diffusers refuse values
        raise ValueError(f"--scheduler {' '.join(words)} cannot be made of this config: {error}") from error
    # Schedulers of diffusers take any config, and make noise of a network that was trained with other noise.
    trained, taken = _noise_of(own), _noise_of(scheduler)
    if trained != taken and (trained, taken) != ("ve", "vp"):  # which `diffusers_config` makes of it
        raise ValueError(
            f"--scheduler {name} does not suit this network: it reads those of {taken} noise, and this one was trained "
            f"with {trained} noise. Use {SUITABLE.get(trained, type(own).__name__)}"
        )
    if hasattr(scheduler, "noise_sampler"):
        raise ValueError(
            f"--scheduler {name} draws noise that --seeds does not decide: its figures could not be repeated"
        )
    return " ".join(words), scheduler


def options_in(changes: Sequence[str]) -> dict[str, Any]:
    """The options that words `option=value` give; values are those of JSON or of Python, or else strings."""
    options: dict[str, Any] = {}
    for option, _, value in (change.partition("=") for change in changes):
        options[option] = value
        for read in (ast.literal_eval, json.loads):
            with contextlib.suppress(ValueError, SyntaxError):
                options[option] = read(value)
    return options


# What samples a network that was trained with this noise.
SUITABLE = {
    "vp": "one that goes by a beta schedule, as DDIMScheduler does, or one of diffusers_gm",
    "ve": "AnnealedLangevinScheduler, GMLangevinScheduler, CLDSSCSScheduler, or one that goes by a beta schedule",
    "flow": "FlowMatchEulerDiscreteScheduler, or one of diffusers_gm",
    "edm": "EDMEulerScheduler, or one of diffusers_gm",
    "velocity": "one of diffusers_gm",
}


def _noise_of(scheduler: Any) -> str:
    """The noise that it takes the network to be trained with: a noise space of ours, or else the scheduler's own."""
    if isinstance(scheduler, SamplerScheduler):
        return scheduler.noise_space.kind if scheduler.noise_space else "velocity"
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
        return "flow"
    if name.startswith("EDM") or scheduler.config.get("timestep_type") == "continuous":
        return "edm"
    return "vp" if hasattr(scheduler, "alphas_cumprod") else name


class NoGridError(ValueError):
    """A scheduler cannot do with so many network calls."""


def in_short(reason: str) -> str:
    """The first clause of a message: what is wrong, without the figures and what to do about it."""
    return re.split(r"[:;.] ", reason, maxsplit=1)[0]


def num_steps_for(scheduler: Any, num_calls: int) -> int:
    """The largest `num_inference_steps` that costs at most `num_calls` network calls.

    Second-order schedulers of diffusers (Heun, KDPM2) call the network twice a step but for the last.

    Raises:
        NoGridError: if there is none; with the scheduler's own reason, where it has one.
    """
    trained_at = scheduler.config["num_train_timesteps"]
    for num_steps in range(num_calls, 0, -1):
        if num_steps > trained_at and not isinstance(scheduler, SamplerScheduler):
            # Schedulers of diffusers do not say so, and break down in `step`.
            raise NoGridError(f"the network was trained at {trained_at} noise levels, and {num_calls} calls need more")
        try:
            scheduler.set_timesteps(num_steps)
        except ValueError as error:
            raise NoGridError(str(error)) from error
        timesteps = scheduler.timesteps
        if len(timesteps) > 1 and timesteps[0] == timesteps[1] and not isinstance(scheduler, SamplerScheduler):
            # As `leading` of DPM-Solver++ has where there are as many steps as levels: `step` cannot find its place.
            raise NoGridError(f"its grid of {num_steps} steps has the first timestep twice")
        if len(timesteps) <= num_calls:
            return num_steps
    raise NoGridError(f"{type(scheduler).__name__} has no grid of {num_calls} network calls or fewer")


def _images(
    pipeline: Any,
    num_images: int,
    num_steps: int,
    generators: list[torch.Generator],
    among: Sequence[int] | None = None,
    **arguments: Any,
) -> Tensor:
    """`(n, C, H, W)` float32 in [-1, 1] on the CPU; of all classes, or those `among`, in the proportions of the
    training data."""
    labels = {} if among is None else {"class_labels": pipeline.draw_labels(num_images, generators, among)}
    images = pipeline(
        batch_size=num_images,
        num_inference_steps=num_steps,
        generator=generators,
        output_type="np",
        **arguments,
        **labels,
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() * 2 - 1


def sample(
    pipeline: Any,
    scheduler: Any,
    num_steps: int,
    num_images: int,
    seed: int,
    batch_size: int,
    among: Sequence[int] | None = None,
    **arguments: Any,
) -> tuple[Tensor, int]:
    """Images `(n, C, H, W)` in [-1, 1] and the number of network calls that each batch of them took.

    Of a class-conditional network they are of all classes, or of those `among`, in the proportions of the training
    data; `arguments` go to the pipeline. A call with guidance counts once, and is of twice the batch.

    Image i is drawn by a generator of its own, seeded by `(seed, i)`: neither the batch size nor the number of
    processes change it, but for rounding. The scheduler of the pipeline is put back at the end.
    """

    def draw(indices: Tensor) -> tuple[Tensor, int]:
        generators = [generator_for(seed, SAMPLES, i) for i in indices.tolist()]
        with counted_calls(pipeline) as calls:
            images = _images(pipeline, len(generators), num_steps, generators, among, **arguments)
        return images, len(calls)

    own, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        batches = over_processes(draw, torch.arange(num_images), batch_size, f"{num_steps} steps, seed {seed}")
    finally:
        pipeline.scheduler = own
    return torch.cat([images for images, _ in batches]), max(n for _, n in batches)
