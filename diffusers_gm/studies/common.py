"""What the studies share: a short training, plain sampling, tables."""

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from .. import training as tr
from ..data import Examination, ImageStream, split_digits

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
        unet = tr.new_unet(args, plan.resolution, 1)
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


@torch.no_grad()
def draw(network: Network, scheduler: Any, shape: Sequence[int], num_calls: int, seed: int = 0) -> Tensor:
    """Native CLD samples: x, `(B, C, H, W)`, of states of `shape`, `(B, 2C, H, W)`."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(num_calls)
    sample = scheduler.initial_sample(shape, generator, torch.device("cpu"), torch.float32)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample.chunk(2, 1)[0]
