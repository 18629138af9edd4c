"""diffusers' own DDPM (arXiv 2006.11239), trained by the same script: the baseline that the others stand beside."""

from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DDPMScheduler
from torch import Tensor

from ...pipelines import UnconditionalPipeline
from ..option import noise as option
from .method import Advice, Batch, Method, Noise, TimeOptions, number_of_times


@dataclass
class DDPMOptions(TimeOptions):
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = option(
        "linear", "Schedule of the variances of the steps, as DDPMScheduler has it."
    )


def check(args: Any) -> None:
    number_of_times(args)
    if args.algorithm_type is not None:
        raise ValueError(f"--algorithm_type {args.algorithm_type} means nothing for --method ddpm: leave it out")


def loss(args: DDPMOptions, scheduler: Any, batch: Batch) -> Tensor:
    """That of diffusers' example: the squared error of the predicted noise."""
    eps, timesteps = batch.draw.normal(batch.images.shape), batch.labels.to(batch.images.device)
    output = batch.network(scheduler.add_noise(batch.images, eps, timesteps), timesteps).sample
    return (output.to(eps.dtype) - eps).square().flatten(1).mean(1)


METHOD = Method(
    name="ddpm",
    short_title="DDPM",
    title="a denoising diffusion probabilistic model (DDPM)",
    pipeline=UnconditionalPipeline,
    options=DDPMOptions,
    check=check,
    choose=lambda args: {"uncertainty_weighting": False},
    noise=lambda args, images, largest_distance: Noise(number_of_times(args)),
    scheduler=lambda args, noise, sampler: DDPMScheduler(
        num_train_timesteps=noise.num_train_timesteps,  # by name, or its config takes it for a default
        beta_schedule=args.ddpm_beta_schedule,
        clip_sample=args.vae is None,  # to [-1, 1], where pixels are and latents are not
        **sampler,
    ),
    labels=lambda args, noise, uniform: (uniform * noise.num_train_timesteps).long(),
    loss=loss,
    noise_in_words=lambda args, noise: (
        f"{noise.num_train_timesteps} steps of a Gaussian diffusion, {args.ddpm_beta_schedule} betas"
    ),
    card="""\
A network of $parameters parameters was trained to predict the noise of $steps steps of a Gaussian diffusion with
$betas betas, for images in [-1, 1]: diffusers' own DDPM. Its network and scheduler are plain ones of diffusers, in the
folders `unet` and `scheduler`; every scheduler of diffusers or of diffusers_gm samples it.""",
    card_values=lambda record: {"steps": record["num_train_timesteps"], "betas": record["ddpm_beta_schedule"]},
    advice=Advice(
        "CalibratedMultistepScheduler",
        "calibration=None, stochasticity=1.0",
        "It serves few calls, too, and so do schedulers of diffusers: of `pipeline.scheduler.config`.",
    ),
    citation="""\
```bibtex
@inproceedings{ho2020denoising,
  title = {Denoising Diffusion Probabilistic Models},
  author = {Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020},
  note = {arXiv:2006.11239}
}
```""",
)
