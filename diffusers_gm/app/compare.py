"""What the app does with runs that are finished: distances to real images, calibration, the code of a run."""

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from ..calibration import calibrate_in_full
from ..calibration.picture import plot as plot_calibration
from ..data import open_source
from ..evaluation import sliced_wasserstein
from ..evaluation.options import build_parser
from ..evaluation.sampling import image_shape
from ..evaluation.sources import real_images
from ..pipelines.unconditional import UnconditionalPipeline
from .models import CALIBRATED, Model, Sampler, as_python
from .runs import Run, Settings

# --- Real images ---


def distance(model: Model, images: Tensor) -> tuple[float, float | None] | None:
    """Sliced W2 of samples to the training images over its mean for as many other real images, and the standard
    deviation of the latter, None of a single draw: both by `diffusers_gm.evaluation`. None where the data are not at
    hand, too few or all the same, or images not finite or fewer than two.

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
    if not unit:  # all of them are one image
        return None
    return sliced_wasserstein(images, reference) / unit, (stdev(floor) / unit if len(floor) > 1 else None)


def _real_images(model: Model, n: int) -> tuple[Tensor, Tensor] | None:
    """Those that the model was trained on, and draws of n others, where they need no download."""
    path = Path(model.name, "training_args.json")
    trained = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    folder = trained.get("train_data_dir")
    if trained.get("dataset_name") == "digits":
        words = ["--dataset_name", "digits"]
    elif folder and Path(folder).is_dir() and _holds(folder, trained):
        words = ["--train_data_dir", folder]
    else:
        return None
    for option in ("image_column", "background", "resolution"):
        given = trained.get(option)
        words += [] if given is None else [f"--{option}", *map(str, given if isinstance(given, list) else [given])]
    args = build_parser("").parse_args([model.name, *words, "--seeds", *map(str, range(8))])
    try:
        reference, others, _ = real_images(args, image_shape(model.pipe), n)
    except ValueError:  # too few
        return None
    return reference, others


def _holds(folder: str, trained: dict[str, Any]) -> bool:
    """Whether a folder, which is known by its bare name, has as many images as a model was trained on; or, of a part of
    it or a stream, enough."""
    try:
        source = open_source(None, train_data_dir=folder, image_column=trained.get("image_column"))
    except ValueError:
        return False
    if trained.get("streaming"):
        return True
    number = trained.get("num_images", 0)
    return source.num_images >= number if trained.get("max_train_samples") else source.num_images == number


# --- Calibration ---


def calibrate(model: Model, calls: Sequence[int], effort: str, settings: Settings) -> tuple[Image.Image, str]:
    """Add `calibrated` to the samplers of a model; the picture of its levels, and what it took, in words.

    Raises:
        ValueError: for numbers of calls that cannot be calibrated.
        ImportError: without the `evaluation` extra.
    """
    pipe, arguments = copy.copy(model.pipe), settings.of_classes(model)
    found = calibrate_in_full(pipe, calls, effort=effort, **arguments)  # type: ignore[arg-type]
    given = "".join(f", {name}={as_python(value)}" for name, value in arguments.items())
    code = f"calibrate(pipe, calls={tuple(calls)!r}, effort={as_python(effort)}{given})"
    model.samplers[CALIBRATED] = Sampler(CALIBRATED, found.scheduler, code)
    picture = io.BytesIO()
    plot_calibration(found, picture)
    words = [f"{found.network_calls} network calls of a whole batch, {sum(found.seconds):.1f} s."]
    words += [f"{n} calls: {', '.join(f'{sigma:.3g}' for sigma in levels)}" for n, levels in found.levels.items()]
    return Image.open(picture), "\n".join(words)


# --- Code ---


def code_of(model: Model, run: Run, settings: Settings) -> str:
    """Python that gives the images of a finished run."""
    own, source = run.sampler.code, type(model.pipe).__name__
    imports, load = {"diffusers_gm": [source]}, "{}"
    if source == UnconditionalPipeline.__name__:
        saved = diffusers.DiffusionPipeline.load_config(model.name)["_class_name"]
        # What stands in for pipelines of diffusers, whose loop suits few samplers.
        if isinstance(saved, str) and hasattr(diffusers, saved):
            source, load = saved, "GMSGMPipeline(**{}.components)"
            imports = {"diffusers": [source], "diffusers_gm": ["GMSGMPipeline"]}
    if own:
        name = own.partition("(")[0].partition(".")[0]
        imports.setdefault("diffusers" if hasattr(diffusers, name) else "diffusers_gm", []).append(name)
    lines = [f"from {module} import {', '.join(names)}" for module, names in sorted(imports.items())]
    lines += ["", f"pipe = {load.format(f'{source}.from_pretrained({as_python(model.name)})')}"]
    lines += [f"pipe.scheduler = {own}"] if own else []
    arguments = "".join(f", {name}={as_python(value)}" for name, value in settings.of_classes(model).items())
    lines += [
        f"seeds = range({settings.seed}, {settings.seed + settings.num_images})",
        "generators = [torch.Generator().manual_seed(seed) for seed in seeds]",
        f"images = pipe(len(seeds), num_inference_steps={run.steps}, generator=generators{arguments}).images",
    ]
    return "\n".join(["import torch", *lines])
