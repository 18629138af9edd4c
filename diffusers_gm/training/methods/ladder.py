"""Denoising on a geometric ladder of noise levels: what NCSNv2 and Gaussian-mixture noise share."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...losses import denoising_loss
from ...processes.annealed import ladder_length
from ...processes.mixture import GaussianMixtureNoise
from ...readings import NoiseSpace
from ..option import number_or_auto, sampler, trained
from . import levels
from .levels import LevelOptions
from .method import Batch, LargestDistance, Noise


@dataclass
class LadderOptions(LevelOptions):
    prediction_type: Literal["edm", "epsilon", "v_prediction", "sample"] | None = trained(
        None,
        "What the denoiser answers: the image and the noise in the proportion that suits the level, preconditioned as "
        "in EDM, the noise, the velocity, whose errors no noise level magnifies either, or the image. [edm]",
    )
    conditioning: Literal["sigma", "none"] = trained(
        "sigma", "Whether the network is told the noise level; 'none' is Technique 3 of NCSNv2."
    )
    scale_input: bool = trained(
        True,
        "Feed the network y / sqrt(1 + sigma^2) rather than the noisy image y; edm: y / sqrt(sigma_data^2 + sigma^2).",
    )
    num_langevin_steps: int = sampler(1, "Langevin steps per noise level.", at_least=1)
    step_size: float | None = sampler(
        None, "Langevin step size (the paper's eps). [by Technique 4 of NCSNv2]", positive=True
    )
    step_size_criterion: Literal["fixed_point", "prop3"] | None = sampler(
        None, "What Technique 4 looks at: the whole Langevin run, or one level as in the paper. [by the scheduler]"
    )


# Version 0.1.0 trained on a ladder of levels, all as often.
FORMERLY = {"timestep_sampling": "uniform", "uncertainty_weighting": False}


def choose(args: LadderOptions) -> dict[str, Any]:
    objective = args.objective or "denoiser"
    natural = "edm" if objective == "denoiser" and args.scale_input else "epsilon"
    prediction_type = args.prediction_type or natural
    return {
        "objective": objective,
        "prediction_type": prediction_type,
        **levels.choose(args, preconditioned=prediction_type == "edm"),
    }


def check(args: LadderOptions) -> None:
    if args.objective == "score" and args.prediction_type != "epsilon":
        raise ValueError(f"--objective score answers a score: leave out --prediction_type {args.prediction_type}")
    if args.prediction_type == "edm" and not args.scale_input:
        raise ValueError("--prediction_type edm scales the input of the network: leave out --no_scale_input")
    if args.prediction_type != "edm" and args.sigma_data is not None:
        raise ValueError(f"--sigma_data is for --prediction_type edm, not {args.prediction_type}")
    levels.check(args)


def noise(
    args: LadderOptions, images: Tensor, largest_distance: LargestDistance, mixture: GaussianMixtureNoise | None = None
) -> Noise:
    """The noise levels for these images, and the law of the noise on them."""
    sigma_max = levels.largest(args, images, largest_distance)
    given = number_or_auto("num_train_timesteps", args.num_train_timesteps, int)
    return Noise(
        num_train_timesteps=given or ladder_length(sigma_max, args.sigma_min, images[0].numel()),
        sigma_min=args.sigma_min,
        sigma_max=sigma_max,
        sigma_data=levels.size_of_data(args, images) if args.prediction_type == "edm" else None,
        mixture_weights=None if mixture is None else mixture.weights.tolist(),
        mixture_scales=None if mixture is None else mixture.scales.tolist(),
    )


def network_config(prediction_type: str | None, noise: Noise) -> dict[str, Any]:
    """What a config says of a network of this noise. A preconditioned one is told as diffusers' EDM schedulers tell
    it: its `sigma_data`, and `epsilon` for what it answers."""
    own = {"noise_space": "ve", "prediction_type": prediction_type}
    edm = {"noise_space": "edm", "prediction_type": "epsilon", "sigma_data": noise.sigma_data}
    return {
        "num_train_timesteps": noise.num_train_timesteps,
        "sigma_min": noise.sigma_min,
        "sigma_max": noise.sigma_max,
        **(edm if prediction_type == "edm" else own),
    }


def config(args: LadderOptions, noise: Noise, sampler: dict[str, Any]) -> dict[str, Any]:
    """The config of a scheduler of the ladder."""
    return {
        "timestep_spacing": "even",
        "network_level": "chain",
        **sampler,
        **network_config(args.prediction_type, noise),
        "scale_input": args.scale_input,
        "num_langevin_steps": args.num_langevin_steps,
        "step_size": args.step_size,
        "step_size_criterion": args.step_size_criterion,
    }


def labels(args: LadderOptions, noise: Any, uniform: Tensor) -> Tensor:
    """Labels of the levels that the options describe; of a ladder's own levels integers."""
    if args.timestep_sampling == "uniform" and args.prediction_type != "edm":
        return (uniform * noise.num_train_timesteps).long()
    ends = noise.sigma_min, noise.sigma_max, noise.num_train_timesteps
    space = NoiseSpace.edm(*ends) if args.prediction_type == "edm" else NoiseSpace.ve(*ends)
    return space.timestep(levels.drawn(args, noise, uniform))


def loss(args: LevelOptions, mixture: GaussianMixtureNoise, scheduler: Any, batch: Batch) -> Tensor:
    """The denoising loss, `(B,)`."""
    labels, draw = batch.labels, batch.draw
    return denoising_loss(
        lambda x, t: batch.network(x, t).sample,
        batch.images,
        (labels if labels.dtype == torch.int64 else labels.float()).to(batch.images.device),
        mixture.sample(batch.images.shape, draw.generator, draw.device, draw.dtype),
        scheduler.noise_space,
        mixture,
        scheduler.reading.prediction_type,
        args.snr_gamma,
    )


# What the network answers, by prediction type.
LEARNS = {
    "edm": "the image, in the preconditioned form of EDM (the denoiser)",
    "epsilon": "the noise (the denoiser)",
    "v_prediction": "the velocity (the denoiser)",
    "sample": "the image (the denoiser)",
}


def on_card(record: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the levels and of what the network learned."""
    told = {"sigma": "is told the noise level", "none": "is not told the noise level (Technique 3)"}
    score = record["objective"] == "score"
    return {
        "levels": levels.in_words(record),
        "told": told[record["conditioning"]],
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
