"""Critically-damped Langevin diffusion (arXiv 2112.07068): images move with velocities, the noise acts on these."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...losses import cld_loss, denoising_loss
from ...pipelines import CLDPipeline
from ...processes.cld import CLD
from ...processes.mixture import GAUSSIAN
from ...readings import CompanionReading
from ...readings.velocity import COMPANION_PREDICTION_TYPE
from ...schedulers import CLDSSCSScheduler
from ..option import given, sampler, trained
from ..option import noise as option
from . import ladder, levels
from .levels import LevelOptions
from .method import Advice, Batch, LargestDistance, Method, Noise, number_of_times

# The published training is on times from here to 1.
FIRST_TIME = 1e-5


@dataclass
class CLDOptions(LevelOptions):
    cld_feed_companion: bool = trained(
        False,
        "Feed the network the whole state: beside the noisy image y the independent noise c that makes it one of image "
        "and velocity. Without, it is an ordinary denoiser, which learns faster, and CLD is how it is sampled.",
    )
    cld_loss: Literal["hsm", "dsm"] = trained(
        "hsm", "--objective score: hybrid score matching, or denoising score matching with the initial velocity drawn."
    )
    cld_mixed_score: bool = trained(
        True, "--objective score: the network corrects the score of a velocity that knows no image."
    )
    cld_weighting: Literal["ell", "likelihood"] = trained(
        "ell", "--objective score: weights of the times, for quality or likelihood."
    )
    beta_0: float = option(4.0, "Noise rate: beta(t) = beta_0 + beta_1 t on [0, 1].")
    beta_1: float = option(0.0, "See --beta_0.")
    mass: float = option(0.25, "Mass M; the damping is critical, Gamma = 2 sqrt(M).")
    gamma: float = option(0.04, "Variance of the initial velocity in units of M.")
    splitting_order: int | None = sampler(
        None, "2 for the second-order splitting, 1 for the published one. [that of the class]"
    )


# Options that describe the published loss, and those that it has no use for.
PUBLISHED = ("cld_loss", "cld_mixed_score", "cld_weighting")
OF_LEVELS = ("cld_feed_companion", "sigma_min", "sigma_max", "sigma_data", "snr_gamma")
DIFFUSION = ("beta_0", "beta_1", "mass", "gamma")


def diffusion(args: CLDOptions) -> CLD:
    return CLD(args.beta_0, args.beta_1, args.mass, args.gamma)


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a network that was trained on states (x, v): its diffusion, and what it answers."""
    config = dict(CLDSSCSScheduler.from_config(config).config)  # with what it leaves out
    known = {name: config[name] for name in DIFFUSION} | {"num_train_timesteps": str(config["num_train_timesteps"])}
    if config["prediction_type"] != COMPANION_PREDICTION_TYPE:
        return known | {"objective": "score", "cld_mixed_score": config["prediction_type"] == "cld_mixed"}
    of_levels = {"sigma_min": config["sigma_min"], **{n: f"{config[n]:g}" for n in ("sigma_max", "sigma_data")}}
    return known | {"objective": "denoiser", "cld_feed_companion": True} | of_levels


def choose(args: CLDOptions) -> dict[str, Any]:
    objective = args.objective or ("score" if given(args, PUBLISHED) else "denoiser")
    return {"objective": objective, **levels.choose(args, preconditioned=objective == "denoiser")}


def check(args: CLDOptions) -> None:
    diffusion(args)
    levels.check(args)
    number_of_times(args)
    if args.objective == "denoiser" and (published := given(args, PUBLISHED)):
        raise ValueError(f"{published} describe the published loss: set --objective score, or --config cld-paper")
    if args.objective == "score" and (of_levels := given(args, OF_LEVELS)):
        raise ValueError(f"{of_levels} mean nothing for --objective score of cld, which has times: leave them out")
    if args.uncertainty_weighting and args.cld_weighting != "ell":
        raise ValueError(
            "--uncertainty_weighting learns weights that undo those of --cld_weighting: leave out one of them"
        )
    if args.objective == "score" and args.timestep_sampling != "uniform":
        raise ValueError(
            f"--objective score of cld has uniform times, not --timestep_sampling {args.timestep_sampling}"
        )


def noise(args: CLDOptions, images: Tensor, largest_distance: LargestDistance) -> Noise:
    times = number_of_times(args)
    if args.objective == "score":
        return Noise(times)
    sigma_max = levels.largest(args, images, largest_distance)
    return Noise(times, args.sigma_min, sigma_max, levels.size_of_data(args, images))


def scheduler(args: CLDOptions, noise: Noise, sampler: dict[str, Any]) -> CLDSSCSScheduler:
    if args.objective == "score":
        sampler = {"timestep_spacing": "quadratic"} | sampler  # as published
        prediction_type = "cld_mixed" if args.cld_mixed_score else "scaled_velocity_score"
        network = {"prediction_type": prediction_type, "num_train_timesteps": noise.num_train_timesteps}
    else:
        sampler = {"timestep_spacing": "even"} | sampler
        network = ladder.network_config("edm", noise)
        if args.cld_feed_companion:
            network |= {"noise_space": None, "prediction_type": "cld_edm"}
    return CLDSSCSScheduler(
        **sampler,
        **network,
        beta_0=args.beta_0,
        beta_1=args.beta_1,
        mass=args.mass,
        gamma=args.gamma,
        splitting_order=args.splitting_order,
    )


def labels(args: CLDOptions, noise: Noise, uniform: Tensor) -> Tensor:
    """Times that are uniform on the interval, or those of the levels that the options describe; without a companion
    these levels, as those of EDM are told."""
    if args.objective == "score":
        return (FIRST_TIME + (1 - FIRST_TIME) * uniform) * noise.num_train_timesteps
    sigma = levels.drawn(args, noise, uniform)
    if not args.cld_feed_companion:
        return sigma.log() / 4
    process = diffusion(args)
    return process.time(process.clock_of_sigma(sigma)) * noise.num_train_timesteps


def loss(args: CLDOptions, scheduler: Any, batch: Batch) -> Tensor:
    if args.objective == "score":
        return published_loss(args, scheduler, batch)
    if not args.cld_feed_companion:
        return ladder.loss(args, GAUSSIAN, scheduler, batch)
    # Ordinary denoising of y, beside a companion that says nothing of it.
    reading: CompanionReading = scheduler.reading
    images = batch.images
    noise_of_y, companion = batch.draw.normal((len(images), 2, *images.shape[1:])).unbind(1)
    times = batch.labels.float().to(images.device)
    return denoising_loss(
        lambda y, _: batch.network(torch.cat([y, companion], 1), times).sample,
        images,
        reading.space.timestep(reading.sigma(batch.labels)).float().to(images.device),
        noise_of_y,
        reading.space,
        GAUSSIAN,
        "edm",
        args.snr_gamma,
    )


def published_loss(args: CLDOptions, scheduler: Any, batch: Batch) -> Tensor:
    process: CLD = scheduler.process
    unit = scheduler.config["num_train_timesteps"]
    images, draw = batch.images, batch.draw
    both = draw.normal((len(images), 2 * images.shape[1], *images.shape[2:]))
    initial = draw.normal(images.shape) * (process.gamma * process.mass) ** 0.5 if args.cld_loss == "dsm" else None
    return cld_loss(
        lambda u, t: batch.network(u, t).sample,
        images,
        batch.labels / unit,
        both,
        process,
        scheduler.config["prediction_type"],
        initial,
        args.cld_weighting,
        unit,
    )


def in_words(args: CLDOptions, noise: Noise) -> str:
    diffusion = f"CLD, beta(t) = {args.beta_0:g} + {args.beta_1:g} t, mass {args.mass:g}, gamma {args.gamma:g}"
    return diffusion if args.objective == "score" else f"{diffusion}, {levels.in_words(vars(args) | vars(noise))}"


def on_card(record: dict[str, Any]) -> dict[str, Any]:
    mass, gamma = record["mass"], record["gamma"]
    if record["objective"] in (None, "score"):  # None: of version 0.1.0
        network = SEES_VELOCITY
    else:
        network = (SEES_COMPANION if record["cld_feed_companion"] else SEES_IMAGE) + IN_LEVELS
        network = network.replace("$levels", levels.in_words(record))
    return {"mass": f"{mass:g}", "gamma": f"{gamma:g}", "initial": f"{gamma * mass:g}", "network": network}


SEES_VELOCITY = """\
Sampling starts from that prior and goes back. The sample, `latents` and callbacks included, is `cat([x, v], 1)`, of
twice the channels of an image; the network is fed `cat([x, v / sqrt(M)], 1)` and answers for v alone."""

SEES_COMPANION = """\
A state (x, v) amounts to a noisy image y and an independent unit noise c, which says nothing about the image. The
sample, `latents` and callbacks included, is `cat([x, v], 1)`, of twice the channels of an image; the network is fed
`cat([y / sqrt(sigma^2 + sigma_data^2), c], 1)`, and answers for the image in the preconditioned form of EDM."""

SEES_IMAGE = """\
A state (x, v) amounts to a noisy image y and an independent unit noise c, which says nothing about the image. The
network is fed y alone, and answers for the image in the preconditioned form of EDM; the sample is y, and the scheduler
holds c. It is the very network that `--method ncsnv2` trains by the same options and seed: the two methods differ in
their samplers, and a calibrated scheduler draws the same images from both."""

IN_LEVELS = """ It was
trained at $levels of y, and sampling starts from the largest of them."""


METHOD = Method(
    name="cld",
    short_title="CLD",
    title="critically-damped Langevin diffusion (CLD)",
    pipeline=CLDPipeline,
    options=CLDOptions,
    choose=choose,
    check=check,
    noise=noise,
    scheduler=scheduler,
    labels=labels,
    loss=loss,
    noise_in_words=in_words,
    card="""\
A network of $parameters parameters was trained for critically-damped Langevin diffusion: images move with velocities,
and noise acts on the velocities alone. The data are images in [-1, 1]; the hyper-parameters of
the diffusion are in the scheduler's config and in the table of options below.

The velocity v of a pixel is drawn at time 0 from `N(0, gamma M)`, and has the prior `N(0, M)` at time 1, beside
`N(0, 1)` of the pixel x itself; here the mass M is $mass and gamma $gamma, so variances $initial and $mass. $network
At the end x is the image, and v, which is noise, is dropped.

Samplers, values of the `algorithm_type` of `CLDSSCSScheduler`:

- `sscs`: symmetric splitting, exact half-steps of the diffusion around a step along the score; of order 1
  (`splitting_order=1`), as published, or 2 (`sscs, order 2`).
- `euler_maruyama`: plain steps of the reverse diffusion.
- `probability_flow`: its ODE, without noise after the start.""",
    card_values=on_card,
    advice=Advice(
        "CLDSSCSScheduler",
        'algorithm_type="sscs", splitting_order=1',
        '`algorithm_type="probability_flow"` serves up to 20 calls.',
    ),
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
    formerly={"objective": "score", **ladder.FORMERLY},
    input_factor=lambda args: 2 if args.objective == "score" or args.cld_feed_companion else 1,
)
