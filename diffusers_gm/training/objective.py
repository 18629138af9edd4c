"""What is minimised: the loss of the network at noise levels, which a scheduler describes."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..data import dequantized
from ..networks import answers_variance, as_unet_call, without_variance
from ..readings import NoiseSpace, Reading
from ..schedulers import AnnealedLangevinScheduler, GMLangevinScheduler
from ..schedulers.base import SamplerScheduler
from .classes import with_labels
from .draws import Draws
from .methods import METHODS, cld, gm_sgm, levels
from .methods.method import Batch
from .network import config_of, is_unconditional
from .option import given
from .options import TrainingArguments
from .plan import Plan

logger = logging.getLogger(__name__)

# What a schedule of betas is described by.
BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale")
# And what a DDPM sampler does beside.
OF_SAMPLER = ("thresholding", "dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value", "variance_type")
# What critically-damped Langevin diffusion is described by.
OF_CLD = (*cld.DIFFUSION, "prediction_type", "num_train_timesteps")
# How often each level is seen, and its weight, are chosen anew for what a network answers.
CHOSEN_ANEW = {"timestep_sampling", "p_mean", "p_std", "uncertainty_weighting"}


def levels_of_network(
    args: TrainingArguments, unet: Any, resumed: bool = False
) -> tuple[TrainingArguments, dict[str, Any]]:
    """The options with the noise levels that a pretrained network knows, and what the scheduler's config needs of them.

    A network that was trained at the levels and labels of a beta schedule (DDPM) or of a ladder goes on with them: the
    input and the answer at a noise level are then what it has learned, and only the law of the noise may be new, where
    options name one. A network that ignores the timestep goes on doing so. One of CLD goes on with its diffusion.

    Raises:
        ValueError: if options say other levels.
    """
    answers = {"variance_type": "learned_range"} if unet is not None and answers_variance(unet) else {}
    if args.model_name_or_path is None or not args.keep_noise_levels:
        return args, answers
    name, own = args.model_name_or_path, METHODS[args.method].option_names
    told = f"--model_name_or_path {name}"
    if not resumed and "conditioning" in own and is_unconditional(unet) and not given(args, ("conditioning",)):
        logger.warning(f"{told} ignores the noise level, and goes on so: --conditioning none")
        before, args = args, replace(args, conditioning="none")
        args.left_open, args.named_options = before.left_open, before.named_options
    config = scheduler_config(name, args)
    source = None if config is None else source_of(config, told)
    if config is None or source is None:
        return args, answers
    if source.noise_space is None:
        return of_cld(args, config, resumed)
    space, kind = source.noise_space, source.reading.prediction_type
    if betas := known_betas(args, source):
        return replace(args, **betas), ddpm_config(config, args) | answers
    if not goes_on(args, space, kind):
        logger.warning(
            f"{told}: what its scheduler says of noise levels and answers "
            f"({space.kind}, {kind}) is not kept by --method {args.method}: the network learns others from here on"
        )
        return args, answers
    known = known_levels(args, space, kind)
    if others := given(args, known):
        raise ValueError(
            f"{others}: the network of {args.model_name_or_path} has the noise levels, labels and prediction type of "
            "its scheduler; leave these out, or give --no_keep_noise_levels to learn others"
        )
    if not resumed and "mixture_weights" in own and (law := gm_sgm.mixture_of(args, config)):
        logger.warning(f"{told} goes on with its noise: {', '.join(f'--{name} {law[name]}' for name in law)}")
        known |= law
    if not resumed and cld.DIFFUSION[0] in own:  # of the sampler alone, which an image network does not know of
        known |= {name: config[name] for name in cld.DIFFUSION if name in config and not given(args, (name,))}
    anew: dict[str, Any] = {} if resumed else dict.fromkeys(args.left_open & CHOSEN_ANEW)
    of_betas = {name: config[name] for name in BETAS if config.get(name) is not None} | {"noise_space": "vp"}
    return replace(args, **known, **anew), answers | (of_betas if space.kind == "vp" else {})


def source_of(config: dict[str, Any], told: str) -> GMLangevinScheduler | None:
    """What a network has learned; None, with a warning, where its scheduler cannot be read."""
    try:
        return GMLangevinScheduler.from_config(config)
    except ValueError as error:
        logger.warning(f"{told}: what it has learned is not kept, as its scheduler cannot be read: {error}")
        return None


def of_cld(args: TrainingArguments, config: dict[str, Any], resumed: bool) -> tuple[TrainingArguments, dict[str, Any]]:
    """`levels_of_network` of a network that sees velocities.

    Raises:
        ValueError: if options say another diffusion or answer.
    """
    described = ", ".join(f"{name} {config[name]}" for name in OF_CLD if config.get(name) is not None)
    if cld.DIFFUSION[0] not in METHODS[args.method].option_names:
        logger.warning(
            f"--model_name_or_path {args.model_name_or_path}: its diffusion ({described}) and what it answers are not "
            f"kept by --method {args.method}"
        )
        return args, {}
    known = cld.options_of(config)
    if others := given(args, [name for name in known if getattr(args, name) != known[name]]):
        raise ValueError(
            f"{others}: the network of {args.model_name_or_path} was trained on another diffusion or for another "
            f"answer ({described}); leave these out, or give --no_keep_noise_levels to learn others"
        )
    chosen = args.left_open & (CHOSEN_ANEW | {"sigma_data"})
    anew: dict[str, Any] = {} if resumed else dict.fromkeys(chosen - {*known})
    return replace(args, **known, **anew), {"prediction_type": config["prediction_type"]}


def scheduler_config(name: str, args: TrainingArguments) -> dict[str, Any] | None:
    """The config of the scheduler beside a pretrained network; None, with a warning, where there is none.

    Raises:
        ValueError: if it cannot be fetched, which says nothing of what the network has learned.
    """
    for subfolder in ("scheduler", None):
        if (config := config_of(GMLangevinScheduler, args, subfolder=subfolder)) is not None:
            return config
    logger.warning(f"--model_name_or_path {name} has no scheduler that says what it has learned: it learns anew")
    return None


def known_betas(args: TrainingArguments, source: Any) -> dict[str, Any]:
    """The options of a DDPM that stays one, from its scheduler; empty for others, and where options say other betas."""
    if "ddpm_beta_schedule" not in METHODS[args.method].option_names:
        return {}
    if (source.noise_space.kind, source.reading.prediction_type) != ("vp", "epsilon"):
        return {}
    number, betas = str(source.noise_space.num_train_timesteps), source.config["beta_schedule"] or "linear"
    known = {"num_train_timesteps": number, "ddpm_beta_schedule": betas}
    return {} if given(args, [name for name, value in known.items() if getattr(args, name) != value]) else known


def goes_on(args: TrainingArguments, space: NoiseSpace, kind: str) -> bool:
    """Whether the method goes on with a network of this space and prediction type as it is."""
    method = METHODS[args.method]
    if "prediction_type" in method.option_names:
        return kind == "edm" or (space.kind in ("vp", "ve") and kind != "score")
    # Whoever has levels and no prediction type learns a preconditioned denoiser.
    return kind == "edm" and "sigma_data" in method.option_names and method.input_factor(args) == 1


def known_levels(args: TrainingArguments, space: NoiseSpace, kind: str) -> dict[str, Any]:
    """The levels, labels and prediction type of a network, as options of the method."""
    own = METHODS[args.method].option_names
    low, high = space.sigma(torch.tensor(space.timestep_range)).tolist()
    score = kind == "scaled_score"
    known: dict[str, Any] = {
        "num_train_timesteps": str(space.num_train_timesteps),
        "scale_input": space.scale_input,
        "sigma_min": float(f"{low:.6g}"),
        "sigma_max": f"{high:.6g}",
        "sigma_data": space.sigma_data if kind == "edm" else None,
        "prediction_type": "epsilon" if score else kind,
        # Under Gaussian noise the two are the same.
        "objective": "score" if score and "mixture_weights" in own else "denoiser",
    }
    return {name: value for name, value in known.items() if name in own}


def ddpm_config(config: dict[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """What a scheduler's config says of a DDPM network that goes on as one."""
    kept = {name: config[name] for name in (*BETAS, *OF_SAMPLER) if config.get(name) is not None}
    if kept.get("variance_type") in ("learned", "learned_range"):  # which the network says
        del kept["variance_type"]
    return kept | {"clip_sample": config.get("clip_sample", True) and args.vae is None}


def build_scheduler(args: TrainingArguments, plan: Plan, network: dict[str, Any] | None = None) -> Any:
    """The scheduler that describes the network and its noise, with the sampler's options and what a pretrained
    `network` asks for in its config.

    Raises:
        ValueError: if the sampler cannot run with `plan.validation_inference_steps` network calls.
    """
    sampler = {name: getattr(args, name) for name in ("algorithm_type", "timestep_spacing")}
    sampler = {name: value for name, value in sampler.items() if value is not None}
    scheduler = METHODS[args.method].scheduler(args, plan, sampler)
    if network:
        scheduler = type(scheduler).from_config(scheduler.config, **network)
    scheduler.set_timesteps(plan.validation_inference_steps)
    return scheduler


@dataclass(frozen=True)
class Objective:
    """What is minimised: `objective(network, images)` of `(B, C, H, W)` is one loss per image, `(B,)`.

    Levels and noise, that of `--dequantize` included, come from the third argument, by default from the global
    generators; the classes of a conditional network from the fourth, by default `null_class`. `unet` is the network
    itself, for those that are not called as a `UNet2DModel` is.
    """

    args: TrainingArguments
    plan: Plan
    scheduler: Any
    unet: Any = None
    null_class: int | None = None

    def __call__(
        self, network: Callable[..., Any], images: Tensor, draws: Draws | None = None, classes: Tensor | None = None
    ) -> Tensor:
        draws = draws or Draws.of(images)
        if classes is None and self.null_class is not None:
            classes = torch.full((len(images),), self.null_class, device=images.device)
        if self.args.dequantize is not None:
            images = dequantized(images, self.args.dequantize, draws.noise.generator)
        network = with_labels(self._as_denoiser(network, images.shape[1]), classes)
        batch = Batch(network, images, self.labels(draws.levels), draws.noise)
        return METHODS[self.args.method].loss(self.args, self.scheduler, batch)

    def _as_denoiser(self, network: Callable[..., Any], channels: int) -> Callable[..., Any]:
        """The network as the losses call it, and without a variance that it answers besides."""
        if self.unet is None or (isinstance(self.unet, UNet2DModel) and not answers_variance(self.unet)):
            return network
        call = as_unet_call(network, self.unet)
        return lambda *inputs, **named: SimpleNamespace(
            sample=without_variance(call(*inputs, **named).sample, channels)
        )

    def labels(self, uniform: Tensor) -> Tensor:
        """Labels of noise levels, see `Method`."""
        labels = METHODS[self.args.method].labels(self.args, self.plan, uniform)
        space = getattr(self.scheduler, "noise_space", None)
        if space is not None and space.kind == "vp" and labels.is_floating_point():
            # A network of a beta schedule counts other levels than a ladder does.
            return space.timestep(levels.drawn(self.args, self.plan, uniform))
        return labels

    def sigma(self, uniform: Tensor) -> Tensor:
        """The noise levels themselves, same shape, on the CPU; for cld those of the image in `(x, v)`."""
        return self.reading.sigma(self.labels(uniform))

    @cached_property
    def reading(self) -> Reading:
        """How the network sees noise."""
        ours = isinstance(self.scheduler, SamplerScheduler)
        return (self.scheduler if ours else AnnealedLangevinScheduler.from_config(self.scheduler.config)).reading
