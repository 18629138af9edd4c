"""Fine-tuning a network of DDPM into each method: `python -m diffusers_gm.studies.fine_tuning`.

Denoising error on held-out digits, over optimizer steps, of `train_gm_sgm.py --model_name_or_path` on the network of a
`DDPMPipeline`, at its own noise levels and with `--no_keep_noise_levels`, and of the same training from scratch.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMPipeline

from ..data import ImageStream, split_digits
from ..evaluation.report import plain_log
from ..evaluation.table import Table, machine
from ..networks import as_unet_call
from ..processes.random import Draw
from ..training.network import fit_unet, given_unet, new_unet
from ..training.objective import Objective, build_scheduler, levels_of_network
from ..training.optimizer import build_optimizer
from ..training.options import TrainingArguments
from .cld_training import as_network
from .command import parse, study_parser
from .digits import Loss, parts_of, plan_for_digits, trained
from .pictures import save_picture
from .report import Report

# CLD that is fed the image alone starts and learns as ncsnv2 with new levels does.
METHODS: dict[str, dict[str, Any]] = {"gm-sgm": {}, "ncsnv2": {}, "cld": {"cld_feed_companion": True}}
STARTS = {
    "from scratch": {},
    "fine-tuned, new levels": {"keep_noise_levels": False},
    "fine-tuned": {"keep_noise_levels": True},
}
SIGMAS = (0.1, 0.3, 1.0, 3.0)
BATCH = 64


@torch.no_grad()
def error(scheduler: Any, unet: Any) -> float:
    """Mean over `SIGMAS` of the squared error of D on held-out digits, over that of the best linear denoiser."""
    images = split_digits()[1]
    generator, ratios, network = torch.Generator().manual_seed(0), [], as_network(as_unet_call(unet))
    for sigma in SIGMAS:
        noise = scheduler.model_mixture.sample(images.shape, generator, images.device, images.dtype)
        companion = Draw.like(images, generator).normal(images.shape)
        found = scheduler.denoise(network, images + sigma * noise, companion, torch.tensor(sigma))
        variance = float(images.var(0).mean())
        ratios.append(float((found - images).square().mean()) * (variance + sigma**2) / (variance * sigma**2))
    return sum(ratios) / len(ratios)


def curve(args: TrainingArguments, at: Sequence[int]) -> list[float]:
    """The error after these numbers of steps, of the weights themselves, at a constant learning rate."""
    images, _ = split_digits()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        unet = given_unet(args)
        args, of_network = levels_of_network(args, unet)
        plan = plan_for_digits(args)
        unet = fit_unet(unet or new_unet(args, plan.resolution, 1), args, plan.resolution)
        scheduler = build_scheduler(args, plan, of_network)
        loss = Loss.of(Objective(args, plan, scheduler, unet))
        optimizer = build_optimizer(args, plan, unet, loss.uncertainty)
        stream, errors = iter(ImageStream(len(images), args.train_batch_size, args.seed)), {}
        for step in range(max(at) + 1):
            if step in at:
                errors[step] = error(scheduler, unet.eval())
                unet.train()
            loss(unet, images[[index for _, index in next(stream)]]).mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return [errors[step] for step in at]


def fine_tuning(args: argparse.Namespace) -> Report:
    """Steps that the same error takes from either start."""
    at = sorted({0, *(max(1, round(args.steps * share)) for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)), args.steps})
    shape: dict[str, Any] = {"block_out_channels": [16, 32], "train_batch_size": BATCH}
    before, ddpm = trained(args.output, method="ddpm", max_train_steps=3 * args.steps, **shape)
    folder = parts_of(args.output) / f"ddpm pipeline {args.steps}"
    DDPMPipeline(before, ddpm).save_pretrained(folder)
    common = {"max_train_steps": args.steps, "train_batch_size": BATCH, "learning_rate": 5e-4}
    curves: dict[str, dict[str, list[float]]] = {}
    for method, own in METHODS.items():
        for start, options in STARTS.items():
            if method == "cld" and options.get("keep_noise_levels"):
                continue  # it has levels of its own
            given = {"model_name_or_path": str(folder), **options} if options else {"block_out_channels": [16, 32]}
            found = curve(TrainingArguments(method=method, **own, **common, **given), at)
            curves.setdefault(method, {})[start] = found
            print(f"{method}, {start}: {', '.join(f'{value:.3f}' for value in found)}", flush=True)

    rows = [[method, start, *values] for method, found in curves.items() for start, values in found.items()]
    return Report(
        name="fine_tuning",
        title="Fine-tuning a DDPM network",
        question="How many steps does a network of DDPM save, beside training from scratch?",
        verdict=" ".join(verdict(method, found, at) for method, found in curves.items()),
        tables=[Table("Denoising error after so many steps.", ["method", "start", *map(str, at)], rows)],
        pictures=[plot(curves, at, args.output / "fine_tuning.png")],
        conditions=f"Digits, a network of {before.num_parameters():,} parameters; DDPM of {3 * args.steps} steps of "
        f"{BATCH} images; a constant learning rate of 5e-4, seed 0, weights not averaged; held-out digits at noise "
        f"levels {', '.join(map(str, SIGMAS))}, under the noise of the method. cld is fed its whole state: it starts "
        "from inputs for the companion noise whose weights are zero, and at levels of its own.",
    )


def plot(curves: Mapping[str, Mapping[str, Sequence[float]]], at: Sequence[int], path: Path) -> str:
    """The errors after so many steps, a panel for each method."""
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (method, of_method) in zip(axes, curves.items(), strict=True):
        for (start, values), style in zip(of_method.items(), (":o", "--s", "-^"), strict=False):
            axis.plot(values, style, label=start)
        axis.set(title=method, xlabel="steps")
        plain_log(axis, "y")
        axis.set_xticks(range(len(at)), map(str, at))
    axes[0].set_ylabel("denoising error, linear denoiser = 1")
    axes[0].legend(fontsize=8)
    return save_picture(figure, path)


def verdict(method: str, found: dict[str, list[float]], at: Sequence[int]) -> str:
    """One sentence: steps to the error that training from scratch ends with."""
    goal = found["from scratch"][-1]
    words = []
    for start in list(found)[:0:-1]:
        steps = next((step for step, value in zip(at, found[start], strict=True) if value <= goal), None)
        words.append(f"{start} {'not within' if steps is None else 'after'} {at[-1] if steps is None else steps} steps")
    return f"{method}: the error {goal:.3f} of {at[-1]} steps from scratch is reached {', '.join(words)}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("fine_tuning", __doc__, ["fine_tuning"], steps=400, seeds=False)
    args = parse(parser, arguments)
    print(f"{args.study}: {machine()}", flush=True)
    fine_tuning(args).write(args.output)


if __name__ == "__main__":
    main()
