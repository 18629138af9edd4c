"""Critically-damped Langevin diffusion (arXiv 2112.07068): images move with velocities, the noise acts on these."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...losses import cld_loss
from ...pipelines import CLDPipeline
from ...processes.cld import CLD
from ...schedulers import CLDSSCSScheduler
from ..option import noise as option
from ..option import number_or_auto, sampler, trained
from .method import LargestDistance, Method, Noise, NoiseOptions

# Training is on times from here to 1.
FIRST_TIME = 1e-5


@dataclass
class CLDOptions(NoiseOptions):
    cld_loss: Literal["hsm", "dsm"] = trained(
        "hsm", "Hybrid score matching, or denoising score matching with the initial velocity drawn."
    )
    cld_mixed_score: bool = trained(True, "The network corrects the score of a velocity that knows no image.")
    cld_weighting: Literal["ell", "likelihood"] = trained("ell", "Weights of the times, for quality or likelihood.")
    beta_0: float = option(4.0, "Noise rate: beta(t) = beta_0 + beta_1 t on [0, 1].")
    beta_1: float = option(0.0, "See --beta_0.")
    mass: float = option(0.25, "Mass M; the damping is critical, Gamma = 2 sqrt(M).")
    gamma: float = option(0.04, "Variance of the initial velocity in units of M.")
    splitting_order: int = sampler(1, "2 for the second-order splitting.", free_on_resume=True)


def check(args: CLDOptions) -> None:
    if number_or_auto("num_train_timesteps", args.num_train_timesteps, int) is None:
        raise ValueError("--num_train_timesteps auto is for ladders of noise levels: cld needs a number")
    CLD(args.beta_0, args.beta_1, args.mass, args.gamma)


def noise(args: CLDOptions, images: Tensor, largest_distance: LargestDistance) -> Noise:
    return Noise(int(args.num_train_timesteps), sigma_max=None, mixture_weights=None, mixture_scales=None)


def scheduler(args: CLDOptions, noise: Noise, sampler: dict[str, Any]) -> CLDSSCSScheduler:
    # At few calls a trained network is served better by the quadratic grid than by log_snr.
    return CLDSSCSScheduler(
        **{"timestep_spacing": "quadratic"} | sampler,
        num_train_timesteps=noise.num_train_timesteps,
        prediction_type="cld_mixed" if args.cld_mixed_score else "scaled_velocity_score",
        beta_0=args.beta_0,
        beta_1=args.beta_1,
        mass=args.mass,
        gamma=args.gamma,
        splitting_order=args.splitting_order,
    )


def loss(args: CLDOptions, noise: Noise, scheduler: Any, network: Callable[..., Any], images: Tensor) -> Tensor:
    process: CLD = scheduler.process
    # Drawn on the CPU, where the coefficients are worked out in float64: not all devices have it.
    uniform = torch.rand(len(images), dtype=torch.float64)
    x, v = torch.randn((2, *images.shape), device=images.device)
    initial = torch.randn_like(images) * (process.gamma * process.mass) ** 0.5 if args.cld_loss == "dsm" else None
    return cld_loss(
        lambda u, t: network(u, t).sample,
        images,
        FIRST_TIME + (1 - FIRST_TIME) * uniform,
        torch.cat([x, v], 1),
        process,
        scheduler.config["prediction_type"],
        initial,
        args.cld_weighting,
        noise.num_train_timesteps,
    )


def in_words(args: CLDOptions, noise: Noise) -> str:
    return f"CLD, beta(t) = {args.beta_0:g} + {args.beta_1:g} t, mass {args.mass:g}, gamma {args.gamma:g}"


def on_card(record: dict[str, Any]) -> dict[str, Any]:
    mass, gamma = record["mass"], record["gamma"]
    return {"mass": f"{mass:g}", "gamma": f"{gamma:g}", "initial": f"{gamma * mass:g}"}


METHOD = Method(
    name="cld",
    title="critically-damped Langevin diffusion (CLD)",
    pipeline=CLDPipeline,
    options=(CLDOptions,),
    check=check,
    noise=noise,
    scheduler=scheduler,
    loss=loss,
    noise_in_words=in_words,
    card="""\
A UNet of $parameters parameters was trained for critically-damped Langevin diffusion: images move with velocities,
noise acts on the velocities alone, and the network sees both. The data are images in [-1, 1]; the hyper-parameters of
the diffusion are in the scheduler's config and in the table of options below.

The velocity v of a pixel is drawn at time 0 from `N(0, gamma M)`, and has the prior `N(0, M)` at time 1, beside
`N(0, 1)` of the pixel x itself; here the mass M is $mass and gamma $gamma, so variances $initial and $mass. Sampling
starts from that prior and goes back. The sample, `latents` and callbacks included, is `cat([x, v], 1)`, of twice the
channels of an image; the network is fed `cat([x, v / sqrt(M)], 1)` and answers for v alone. At the end x is the image,
and v, which is noise, is dropped.

Samplers are values of the scheduler's `algorithm_type`: `sscs`, `euler_maruyama` and `probability_flow`.""",
    card_values=on_card,
    citation="""\
```bibtex
@inproceedings{dockhorn2022score,
  title = {Score-Based Generative Modeling with Critically-Damped Langevin Diffusion},
  author = {Dockhorn, Tim and Vahdat, Arash and Kreis, Karsten},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  url = {https://arxiv.org/abs/2112.07068}
}
```""",
    input_factor=2,
)
