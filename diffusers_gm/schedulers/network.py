"""What a config of ours says of its network."""

from functools import partial
from typing import Any

from diffusers import CogVideoXDDIMScheduler, DDPMScheduler
from torch import Tensor

from ..processes.cld import CLD
from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..readings import CompanionReading, ImageReading, NoiseSpace, Reading, VelocityReading
from ..readings.noise_space import PREDICTION_TYPES
from ..readings.velocity import COMPANION_PREDICTION_TYPE, VELOCITY_PREDICTION_TYPES


def reading_from_config(config: Any) -> Reading:
    """How the network that a config of ours describes sees noise.

    A velocity prediction type, or `cld_edm`, means a network of CLD. Else `noise_space=None` is inferred: a beta
    schedule means `vp`, a flow config (`shift` or `flow_prediction`) means `flow`, `sigma_data` means `edm`, anything
    else `ve`.

    Raises:
        ValueError: for an unknown noise space or prediction type.
    """
    n, prediction_type = config.num_train_timesteps, config.prediction_type
    if prediction_type in (*VELOCITY_PREDICTION_TYPES, COMPANION_PREDICTION_TYPE):
        process = CLD(config.beta_0, config.beta_1, config.mass, config.gamma)
        if prediction_type in VELOCITY_PREDICTION_TYPES:
            return VelocityReading(process, prediction_type, n)
        space = NoiseSpace.edm(config.sigma_min, config.sigma_max, n, config.sigma_data or 1.0)
        return CompanionReading(process, prediction_type, n, space)
    kind = config.noise_space
    if kind is None:
        if config.trained_betas is not None or config.beta_schedule is not None:
            kind = "vp"
        elif config.shift is not None or config.prediction_type == "flow_prediction":
            kind = "flow"
        else:
            kind = "ve" if config.sigma_data is None else "edm"
    prediction_type = prediction_type_of(config, kind)
    if kind == "vp":
        space = NoiseSpace.vp(betas_from_config(config)[1])
    elif kind == "ve":
        space = NoiseSpace.ve(config.sigma_min, config.sigma_max, n, config.scale_input, config.sigma_labels)
    elif kind == "flow":
        space = NoiseSpace.flow(n)
    elif kind == "edm":
        space = NoiseSpace.edm(config.sigma_min, config.sigma_max, n, config.sigma_data or 1.0)
        if config.sigma_data is not None and prediction_type == "epsilon":
            prediction_type = "edm"  # as diffusers' EDM schedulers call it
    else:
        raise ValueError(f"unknown noise_space {kind!r}: use {', '.join(map(repr, PREDICTION_TYPES))} or None")
    return ImageReading(space, prediction_type)


def prediction_type_of(config: Any, kind: str) -> str:
    """What the network of a config answers: where nothing is said, what most networks of its noise space do."""
    return config.prediction_type or ("flow_prediction" if kind == "flow" else "epsilon")


def betas_from_config(config: Any) -> tuple[Tensor, Tensor]:
    """`betas` and their `alphas_cumprod` of a `vp` config, `(N,)` float32 each: diffusers knows its own schedules."""
    shared = ("num_train_timesteps", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    arguments = {name: config[name] for name in shared} | {"beta_schedule": config.beta_schedule or "linear"}
    source: Any = DDPMScheduler
    if config.snr_shift_scale is not None:
        source = partial(CogVideoXDDIMScheduler, snr_shift_scale=config.snr_shift_scale)
    scheduler = source(**arguments)
    return scheduler.betas, scheduler.alphas_cumprod


def network_noise(config: Any) -> tuple[GaussianMixtureNoise, GaussianMixtureNoise]:
    """The mixture that a config describes, and the law of the noise that its network was trained with.

    Raises:
        ValueError: for a mixture that is none.
    """
    if config.model_noise not in ("gaussian", "mixture"):
        raise ValueError(f"unknown model_noise {config.model_noise!r}: use 'gaussian' or 'mixture'")
    if (config.mixture_weights is None) != (config.mixture_scales is None):
        raise ValueError("mixture_weights and mixture_scales go together: give both or none")
    mixture = GaussianMixtureNoise(
        config.mixture_weights or [1.0], config.mixture_scales or [1.0], config.mixture_per_element
    )
    return mixture, mixture if config.model_noise == "mixture" else GAUSSIAN
