"""What the studies share: short trainings, plain sampling, measurements that are kept, tables."""

import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from .. import training as tr
from ..data import Examination, ImageStream, split_digits
from ..evaluation import sliced_wasserstein

# A network or an exact answer: `(scaled sample, timestep) -> output`.
Network = Callable[[Tensor, Tensor], Tensor]


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


def plan_for_digits(args: tr.TrainingArguments) -> tr.Plan:
    """The plan that `train_gm_sgm.py` makes for the digits."""
    train, _ = split_digits()
    return tr.make_plan(args, Examination(train, 0), len(train), None, num_processes=1)


def train_on_digits(args: tr.TrainingArguments, loss: tr.TrainingLoss, name: str) -> Any:
    """A network trained with the recipe of `train_gm_sgm.py` (optimizer, schedule, average) on the training digits.

    The global random state is the caller's again afterwards.
    """
    images, _ = split_digits()
    plan, start = plan_for_digits(args), time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        unet = tr.fit_unet(tr.new_unet(args, plan.resolution, 1), args, plan.resolution)
        optimizer = tr.build_optimizer(args, plan, unet)
        schedule = tr.build_lr_scheduler(args, plan, optimizer)
        average = tr.build_ema(args, unet, torch.device("cpu"))
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


def ddpm_loss(scheduler: DDPMScheduler) -> tr.TrainingLoss:
    """The objective of diffusers' own training example: the squared error of the predicted noise."""

    def loss(network: Callable[..., Any], images: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (len(images),))
        noisy = scheduler.add_noise(images, noise, timesteps)
        return (network(noisy, timesteps).sample - noise).square().flatten(1).mean(1)

    return loss


def kept_unet(folder: Path, train: Callable[[], Any]) -> Any:
    """The network in `folder`, trained and put there (safetensors, whole or not at all) by the first who asks."""
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        train().save_pretrained(unfinished)
        unfinished.rename(folder)
    return _read(folder)


@lru_cache(maxsize=8)
def _read(folder: Path) -> Any:
    return UNet2DModel.from_pretrained(folder).eval().requires_grad_(False)


def trained(args: tr.TrainingArguments, parts: Path) -> tuple[Any, Any]:
    """The digits network that `train_gm_sgm.py` would train with these options, and its scheduler.

    It is kept in a folder of `parts` named after the options.
    """
    plan = plan_for_digits(args)
    scheduler = tr.build_scheduler(args, plan)
    name = name_of(args)
    objective = tr.build_objective(args, plan, scheduler)
    return kept_unet(parts / name, lambda: train_on_digits(args, objective, name)), scheduler


def trained_ddpm(steps: int, seed: int, parts: Path) -> tuple[Any, DDPMScheduler]:
    """An ordinary DDPM network of the digits, of the same size and budget as ours, and the scheduler it was trained
    with: linear betas, 1000 steps, the noise predicted."""
    scheduler = DDPMScheduler()
    args = tr.TrainingArguments(method="ncsnv2", max_train_steps=steps, seed=seed)
    name = f"ddpm max_train_steps={steps} seed={seed}"
    return kept_unet(parts / name, lambda: train_on_digits(args, ddpm_loss(scheduler), name)), scheduler


def name_of(args: tr.TrainingArguments) -> str:
    """The method and the options that are not the default, in words that make a file name."""
    given = {f.name: getattr(args, f.name) for f in fields(args)}
    words = [f"{f.name}={given[f.name]}" for f in fields(args) if given[f.name] != f.default and f.name != "method"]
    return " ".join([args.method, *(word for word in words if word != "dataset_name=digits")])


class Cells:
    """Measurements by name, in a JSON file that every new one is added to: a second run takes up where one ended.

    Names say everything that decides the value.
    """

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value called `name`, measured (and printed) if there is none."""
        if name not in self.values:
            self.values[name] = measure()
            unfinished = self.path.with_suffix(".json.part")
            unfinished.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(self.path)
            print(f"  {name}: {self.values[name]}", flush=True)
        return self.values[name]


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
    """Sliced W2 of as many held-out digits to the training digits: what real images have."""
    train, held_out = split_digits()
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


def all_or_none(values: Sequence[float | None]) -> list[float] | None:
    """The values of all seeds, or None if one of them has none."""
    present = [value for value in values if value is not None]
    return present if present and len(present) == len(values) else None


def in_words(values: Sequence[float] | None) -> str:
    """Seeds as `mean ± half of the range`; `-` where there is no value."""
    if values is None:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f} ± {spread:.2f}" if len(values) > 1 else f"{mean:.2f}"


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
