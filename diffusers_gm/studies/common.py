"""What the studies share: short trainings, plain sampling, measurements that are kept, what counts as a difference."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from ..data import Examination, ImageStream, split_digits
from ..evaluation import sliced_wasserstein
from ..exact import ExactDenoiser
from ..training.network import (
    TrainingLoss,
    build_ema,
    build_lr_scheduler,
    build_objective,
    build_optimizer,
    build_scheduler,
    fit_unet,
    new_unet,
)
from ..training.options import TrainingArguments
from ..training.plan import Plan, make_plan

# A network or an exact answer: `(scaled sample, timestep) -> output`.
Network = Callable[[Tensor, Tensor], Tensor]

# Ratios of single seeds closer than this are called equal. One network at four seeds of 256 samples: 1.38 to 1.58 at 10
# calls, 1.14 to 1.27 at 50.
TIE = 0.15


def tie(num_seeds: int) -> float:
    """`TIE` for means over seeds: the spread of a mean falls with the root of their number."""
    return TIE / num_seeds**0.5


def machine() -> str:
    """What the figures were made on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with four significant digits."""
    words = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in words]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def plan_for_digits(args: TrainingArguments) -> Plan:
    """The plan that `train_gm_sgm.py` makes for the digits."""
    train, _ = split_digits()
    return make_plan(args, Examination(train, 0), len(train), None, num_processes=1)


def train_on_digits(args: TrainingArguments, loss: TrainingLoss, name: str) -> Any:
    """A network trained with the recipe of `train_gm_sgm.py` (optimizer, schedule, average) on the training digits.

    The global random state is the caller's again afterwards.
    """
    images, _ = split_digits()
    plan, start = plan_for_digits(args), time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        unet = fit_unet(new_unet(args, plan.resolution, 1), args, plan.resolution)
        optimizer = build_optimizer(args, plan, unet)
        schedule = build_lr_scheduler(args, plan, optimizer)
        average = build_ema(args, unet, torch.device("cpu"))
        stream = iter(ImageStream(len(images), args.train_batch_size, args.seed))
        for _ in range(plan.max_train_steps):
            mean = loss(unet, images[[index for _, index in next(stream)]]).mean()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if average:
                average.step(unet.parameters())
    if average:
        average.copy_to(unet.parameters())
    print(f"trained {name}: {plan.max_train_steps} steps, {time.monotonic() - start:.0f} s", flush=True)
    return unet.eval().requires_grad_(False)


def parts_of(output: Path) -> Path:
    """The folder `.parts` beside the reports: networks and measurements of unfinished studies, ignored by git."""
    parts = output / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    (parts / ".gitignore").write_text("*\n", encoding="utf-8")
    return parts


def ddpm_loss(scheduler: DDPMScheduler) -> TrainingLoss:
    """The objective of diffusers' own training example: the squared error of the predicted noise."""

    def loss(network: Callable[..., Any], images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (len(images),))
        noisy = scheduler.add_noise(images, noise, timesteps)
        return (network(noisy, timesteps).sample - noise).square().flatten(1).mean(1)

    return loss


def check_settings(where: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError if what was kept at `where` was made with other values of the same settings."""
    changed = [f"{name} = {then[name]}, now {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        raise ValueError(
            f"{where} was made with other settings ({'; '.join(changed)}): remove it, or take another name"
        )


def kept_unet(folder: Path, train: Callable[[], Any], options: Mapping[str, Any] | None = None) -> Any:
    """The network in `folder`, trained and put there (safetensors, whole or not at all) by the first who asks.

    Raises:
        ValueError: if it was trained with other `options`; a name says only those that are not the default.
    """
    described, kept = json.loads(json.dumps(options or {}, default=str)), folder / "options.json"
    if not folder.is_dir():
        network, unfinished = train(), folder.with_name(f"{folder.name}.part{os.getpid()}")
        # Another study may have trained the same network meanwhile.
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            network.save_pretrained(unfinished)
            (unfinished / kept.name).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            unfinished.rename(folder)
    if kept.is_file():
        check_settings(folder, json.loads(kept.read_text(encoding="utf-8")), described)
    return _read(folder)


@lru_cache(maxsize=8)
def _read(folder: Path) -> Any:
    return UNet2DModel.from_pretrained(folder).eval().requires_grad_(False)


def trained(args: TrainingArguments, parts: Path) -> tuple[Any, Any]:
    """The digits network that `train_gm_sgm.py` would train with these options, and its scheduler.

    It is kept in a folder of `parts` named after the options.
    """
    plan = plan_for_digits(args)
    scheduler = build_scheduler(args, plan)
    name = name_of(args)
    objective = build_objective(args, plan, scheduler)
    return kept_unet(parts / name, lambda: train_on_digits(args, objective, name), asdict(args)), scheduler


def trained_ddpm(steps: int, seed: int, parts: Path) -> tuple[Any, DDPMScheduler]:
    """An ordinary DDPM network of the digits, of the same size and budget as ours, and the scheduler it was trained
    with: linear betas, 1000 steps, the noise predicted."""
    scheduler = DDPMScheduler()
    args = TrainingArguments(method="ncsnv2", max_train_steps=steps, seed=seed)
    name = f"ddpm max_train_steps={steps} seed={seed}"
    return kept_unet(parts / name, lambda: train_on_digits(args, ddpm_loss(scheduler), name)), scheduler


def name_of(args: TrainingArguments) -> str:
    """The method and the options that are not the default, in words that make a file name."""
    given = {f.name: getattr(args, f.name) for f in fields(args)}
    words = [f"{f.name}={given[f.name]}" for f in fields(args) if given[f.name] != f.default and f.name != "method"]
    return " ".join([args.method, *(word for word in words if word != "dataset_name=digits")])


class Cells:
    """Measurements by name, in a JSON file that every new one is added to: a second run takes up where one ended.

    Names and settings say everything that decides the value, but for the code.

    Args:
        path: of the file.
        settings: what words in the names stand for, where that may change: kept in the file too.

    Raises:
        ValueError: if the file holds measurements under other settings of the same names.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None):
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if settings:
            then, now = self.values.get("settings", {}), json.loads(json.dumps(settings))
            check_settings(path, then, now)
            self.values["settings"] = then | now
            self._save()

    def _save(self) -> None:
        if self.path.is_file():  # another study may have added to it meanwhile
            self.values = json.loads(self.path.read_text(encoding="utf-8")) | self.values
        unfinished = self.path.with_suffix(f".json.part{os.getpid()}")
        unfinished.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value called `name`, measured (and printed) if there is none."""
        if name not in self.values:
            self.values[name] = measure()
            self._save()
            print(f"  {name}: {self.values[name]}", flush=True)
        return self.values[name]

    def of_seeds(self, name: str, measure: Callable[[int], Any], num_seeds: int) -> Any:
        """A list of the values called `name, seed s`, each of `measure(s)`; None if one of them is None."""
        values = [self(f"{name}, seed {seed}", partial(measure, seed)) for seed in range(num_seeds)]
        return None if None in values else values


def exact_network(denoiser: ExactDenoiser, scheduler: Any) -> Network:
    """What a perfect network for these data answers to the scheduler's inputs."""
    space, prediction_type = scheduler.noise_space, scheduler.config["prediction_type"]
    return lambda sample, t: denoiser.network_output(sample, t, space, prediction_type)


@torch.no_grad()
def run(network: Network, scheduler: Any, sample: Tensor, generator: torch.Generator) -> Tensor:
    """The last sample of the run that `scheduler.set_timesteps` has prepared, from a first one."""
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample


def draw(network: Network, scheduler: Any, shape: Sequence[int], num_calls: int, seed: int = 0) -> Tensor:
    """Native CLD samples: x, `(B, C, H, W)`, of states of `shape`, `(B, 2C, H, W)`."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(num_calls)
    sample = scheduler.initial_sample(shape, generator, torch.device("cpu"), torch.float32)
    return run(network, scheduler, sample, generator).chunk(2, 1)[0]


@cache
def floor_of_digits(num_samples: int) -> float:
    """Sliced W2 of as many held-out digits to the training digits: what real images have.

    Raises:
        ValueError: if there are not so many: a floor of fewer would be another one.
    """
    train, held_out = split_digits()
    if num_samples > len(held_out):
        raise ValueError(f"num_samples {num_samples}: there are {len(held_out)} held-out digits for the floor")
    return sliced_wasserstein(held_out[:num_samples], train)


def over_floor(samples: Tensor) -> float:
    """Sliced W2 of digits `(n, 1, 8, 8)`, clipped to [-1, 1], to the training digits, over that of real digits."""
    return sliced_wasserstein(samples.clamp(-1, 1), split_digits()[0]) / floor_of_digits(len(samples))


def images_of(pipeline: Any, num_calls: int, num_samples: int, seed: int = 0) -> Tensor:
    """Samples of an unconditional pipeline, ours or diffusers' own, `(n, C, H, W)` in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(num_samples, num_inference_steps=num_calls, generator=generator, output_type="np").images
    return torch.from_numpy(images).movedim(-1, 1) * 2 - 1


def quality_of(pipeline: Any, num_calls: int, num_samples: int, seed: int = 0) -> float | None:
    """`over_floor` of samples of the pipeline; None where its scheduler has no stable step at this number of calls."""
    try:
        pipeline.scheduler.set_timesteps(num_calls)
    except ValueError:
        return None
    return over_floor(images_of(pipeline, num_calls, num_samples, seed))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the range: with two seeds all that there is to say about their spread."""
    return sum(values) / len(values), (max(values) - min(values)) / 2


def in_words(values: Sequence[float] | None) -> str:
    """Seeds as `mean ± half of the range`; `-` where there is no value."""
    if values is None:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f} ± {spread:.2f}" if len(values) > 1 else f"{mean:.2f}"


def quality_axes(axis: Any, calls: Sequence[int]) -> None:
    """Axes of sliced W2 over the floor against network calls: logarithmic, ticks in plain numbers, a line at 1."""
    from matplotlib.ticker import LogLocator

    axis.set(xlabel="network calls", ylabel="sliced W2 over the floor", xscale="log", yscale="log")
    axis.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axis.set_xticks(calls, [str(n) for n in calls])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def save_picture(figure: Any, path: Path) -> str:
    """Write a matplotlib figure and close it; the name of the file."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path.name


def show_rows(axis: Any, images: dict[str, Tensor], columns: int = 24) -> None:
    """Draw one row of `columns` gray images `(n, 1, H, W)` in [-1, 1] under each name."""
    rows = [F.pad(x[:columns, 0].clamp(-1, 1), (0, 1, 0, 1), value=0.0) for x in images.values()]
    height = rows[0].shape[1]
    axis.imshow(torch.cat([row.movedim(0, 1).flatten(1) for row in rows]), cmap="gray", vmin=-1, vmax=1)
    axis.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(images), fontsize=7)
    axis.set_xticks([])
