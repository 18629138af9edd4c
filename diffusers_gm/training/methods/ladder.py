"""Denoising on a geometric ladder of noise levels: what NCSNv2 and Gaussian-mixture noise share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...losses import denoising_loss
from ...processes.annealed import ladder_length
from ...processes.mixture import GaussianMixtureNoise
from ..option import noise, number_or_auto, sampler, trained
from .method import LargestDistance, Noise, NoiseOptions


@dataclass
class LadderOptions(NoiseOptions):
    objective: Literal["denoiser", "score"] = trained(
        "denoiser", "What the network learns under mixture noise; for ncsnv2 the two are the same."
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = trained(
        "epsilon",
        "What the denoiser answers: the noise; the velocity, whose errors no noise level magnifies; or the image.",
    )
    conditioning: Literal["sigma", "none"] = trained(
        "sigma", "Whether the network is told the noise level; 'none' is Technique 3 of NCSNv2."
    )
    scale_input: bool = trained(True, "Feed the network y / sqrt(1 + sigma^2) rather than the noisy image y.")
    sigma_min: float = noise(0.01, "Smallest noise level, for images in [-1, 1].", positive=True)
    sigma_max: str = noise("auto", "Largest noise level; 'auto' measures the data (Technique 1 of NCSNv2).")
    num_langevin_steps: int = sampler(1, "Langevin steps per noise level.", at_least=1, free_on_resume=True)
    step_size: float | None = sampler(
        None, "Langevin step size (the paper's eps); default Technique 4 of NCSNv2.", free_on_resume=True
    )
    step_size_criterion: Literal["fixed_point", "prop3"] = sampler(
        "fixed_point",
        "What Technique 4 looks at: the whole chain, or one level as in the paper.",
        free_on_resume=True,
    )


def check_ladder(args: LadderOptions) -> None:
    if args.objective == "score" and args.prediction_type != "epsilon":
        raise ValueError(f"--objective score answers a score: leave out --prediction_type {args.prediction_type}")
    number_or_auto("sigma_max", args.sigma_max, float)
    number_or_auto("num_train_timesteps", args.num_train_timesteps, int)


def ladder_noise(
    args: LadderOptions, images: Tensor, largest_distance: LargestDistance, mixture: GaussianMixtureNoise | None = None
) -> Noise:
    """The ladder for these images, and the law of the noise on it."""
    sigma_max = number_or_auto("sigma_max", args.sigma_max, float)
    if sigma_max is None:
        sigma_max = round(largest_distance(images), 4)
    if not args.sigma_min < sigma_max:
        raise ValueError(
            f"--sigma_min {args.sigma_min} must be smaller than --sigma_max {sigma_max}"
            + (" (measured: are all images the same?)" if args.sigma_max == "auto" else "")
        )
    num_levels = number_or_auto("num_train_timesteps", args.num_train_timesteps, int)
    if num_levels is None:
        num_levels = ladder_length(sigma_max, args.sigma_min, images[0].numel())
    return Noise(
        num_train_timesteps=num_levels,
        sigma_max=sigma_max,
        mixture_weights=None if mixture is None else mixture.weights.tolist(),
        mixture_scales=None if mixture is None else mixture.scales.tolist(),
    )


def ladder_config(args: LadderOptions, noise: Noise, sampler: dict[str, Any]) -> dict[str, Any]:
    """The config of a scheduler of the ladder."""
    return sampler | {
        "num_train_timesteps": noise.num_train_timesteps,
        "noise_space": "ve",
        "sigma_min": args.sigma_min,
        "sigma_max": noise.sigma_max,
        "scale_input": args.scale_input,
        "num_langevin_steps": args.num_langevin_steps,
        "step_size": args.step_size,
        "step_size_criterion": args.step_size_criterion,
    }


def ladder_loss(mixture: GaussianMixtureNoise, scheduler: Any, network: Callable[..., Any], images: Tensor) -> Tensor:
    """The denoising loss on levels drawn uniformly, `(B,)`."""
    levels = scheduler.config["num_train_timesteps"]
    timesteps = torch.randint(0, levels, (len(images),), device=images.device)
    noise = mixture.sample(images.shape, device=images.device)
    space, kind = scheduler.noise_space, scheduler.config["prediction_type"]
    return denoising_loss(lambda x, t: network(x, t).sample, images, timesteps, noise, space, mixture, kind)


def ladder_in_words(args: LadderOptions, noise: Noise) -> str:
    return f"{noise.num_train_timesteps} levels from {args.sigma_min:g} to {noise.sigma_max:g}"


# What the network answers, by prediction type.
LEARNS = {
    "epsilon": "the noise (the denoiser)",
    "v_prediction": "the velocity (the denoiser)",
    "sample": "the image (the denoiser)",
}


def ladder_on_card(record: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the ladder and of what the network learned."""
    unconditional = record["conditioning"] == "none"
    score = record["objective"] == "score"
    return {
        "levels": record["num_train_timesteps"],
        "sigma_min": f"{record['sigma_min']:g}",
        "sigma_max": f"{record['sigma_max']:g}",
        "told": "is not told the noise level (Technique 3)" if unconditional else "is told the noise level",
        "learns": "the score of the noisy images" if score else LEARNS[record["prediction_type"]],
    }


CITATION = """```bibtex
@inproceedings{song2020improved,
  title = {Improved Techniques for Training Score-Based Generative Models},
  author = {Song, Yang and Ermon, Stefano},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020},
  url = {https://arxiv.org/abs/2006.09011}
}
```"""
