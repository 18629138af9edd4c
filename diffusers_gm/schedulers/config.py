"""What a scheduler's config says: the noise space, the grid, and what schedulers of diffusers may read of ours."""

from typing import Any

from diffusers import CogVideoXDDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from ..processes.noise_space import PREDICTION_TYPES, NoiseSpace

# The samplers of every scheduler; the first is its default.
ALGORITHMS = {
    "AnnealedLangevinScheduler": ("langevin", "consistent"),
    "GMLangevinScheduler": ("ancestral", "langevin", "jump", "exponential", "ode"),
    "CLDSSCSScheduler": ("sscs", "euler_maruyama", "probability_flow"),
}

# Those of diffusers' schedulers with such an option, whose configs may come from ours and go back to them.
SOLVERS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis")


def check_algorithm(scheduler: str, algorithm_type: str) -> None:
    """Raise a ValueError if the class called `scheduler` has no such sampler."""
    if algorithm_type not in ALGORITHMS[scheduler]:
        raise ValueError(
            f"unknown algorithm_type {algorithm_type!r}: {scheduler} has {', '.join(ALGORITHMS[scheduler])}"
        )


def from_own_config(config: dict[str, Any], scheduler: str) -> dict[str, Any]:
    """A config of one of our schedulers for the class called `scheduler`: a sampler of another class is left out.

    Raises:
        ValueError: if the network was trained with mixture noise and the class reads it as one of Gaussian noise.
    """
    algorithm = config.get("algorithm_type")
    if algorithm not in ALGORITHMS[scheduler] and any(algorithm in names for names in (*ALGORITHMS.values(), SOLVERS)):
        config = {key: value for key, value in config.items() if key != "algorithm_type"}
    unit = (config.get("mixture_scales") or [1.0]) == [1.0]
    if scheduler != "GMLangevinScheduler" and config.get("model_noise") == "mixture" and not unit:
        raise ValueError(f"the network was trained with mixture noise, which {scheduler} would take for Gaussian: use GMLangevinScheduler")  # fmt: skip # noqa: E501
    return config


def betas_from_config(config: Any) -> tuple[Tensor, Tensor]:
    """`betas` and their `alphas_cumprod` of a `vp` config, `(N,)` float32 each: diffusers knows its own schedules."""
    arguments = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule or "linear",
        "trained_betas": config.trained_betas,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
    }
    source: Any
    if config.snr_shift_scale is None:
        source = DDPMScheduler(**arguments)
    else:
        source = CogVideoXDDIMScheduler(**arguments, snr_shift_scale=config.snr_shift_scale)
    return source.betas, source.alphas_cumprod


def noise_space_from_config(config: Any) -> NoiseSpace:
    """The noise space that a scheduler config describes.

    `noise_space=None` is inferred: a beta schedule means `vp`, a flow config (`shift` or `flow_prediction`) means
    `flow`, anything else `ve`.
    """
    kind = config.noise_space
    if kind is None:
        if config.trained_betas is not None or config.beta_schedule is not None:
            kind = "vp"
        elif config.shift is not None or config.prediction_type == "flow_prediction":
            kind = "flow"
        else:
            kind = "ve"
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"unknown noise_space {kind!r}: use 'vp', 've', 'flow' or None")
    if config.prediction_type not in PREDICTION_TYPES[kind]:
        raise ValueError(
            f"prediction_type {config.prediction_type!r} is not offered in noise space {kind!r}: use one of "
            f"{PREDICTION_TYPES[kind]}"
        )
    if config.num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps must be at least 2, got {config.num_train_timesteps}")
    if kind == "ve":
        return NoiseSpace.ve(config.sigma_min, config.sigma_max, config.num_train_timesteps, config.scale_input)
    if kind == "flow":
        return NoiseSpace.flow(config.num_train_timesteps)
    return NoiseSpace.vp(betas_from_config(config)[1])


def from_source_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config of a scheduler of diffusers, with what that scheduler leaves unsaid added in our words.

    - Values that the source left at its defaults count as given: they describe the network. diffusers drops them from
      configs in memory, and keeps them in the same configs read from disk.
    - The grid belongs to the sampler. `leading` and `linspace`, the defaults of diffusers' schedulers, serve ours badly
      at few calls: `grid="trailing"` takes their place, and they stay in the config for the way back.
    - `algorithm_type` is the source's own, and left out.
    - Flow schedulers name no prediction type and no spacing: `trailing` is s = 1, 1 - 1/n, ..., as their pipelines
      pass it. `ScoreSdeVeScheduler` names neither prediction type nor noise space.

    Raises:
        ValueError: if the config describes no noise space of ours.
    """
    config = {key: value for key, value in config.items() if key not in ("_use_default_values", "algorithm_type")}
    if config.get("sigma_data") is not None:
        raise ValueError(
            "the EDM preconditioning (a config with sigma_data) is no noise space of ours: wrap the network as a "
            "denoiser and use noise_space='ve' with prediction_type='sample'"
        )
    if config.get("invert_sigmas"):
        raise ValueError("networks that count flow time backwards (invert_sigmas=True) are not supported")
    if config.get("timestep_spacing") in ("leading", "linspace") and not any(
        config.get(flag) for flag in SPACING_FLAGS
    ):
        config["grid"] = "trailing"
    if config.get("use_flow_sigmas"):
        config |= {"noise_space": "flow", "shift": config.get("flow_shift", 1.0), "prediction_type": "flow_prediction"}
    elif config.get("beta_schedule") is None and config.get("trained_betas") is None:
        if config.get("shift") is not None:
            config = {"prediction_type": "flow_prediction", "timestep_spacing": "trailing", **config}
        elif "correct_steps" in config:
            config = {"noise_space": "ve", "prediction_type": "score", "scale_input": False, **config}
        elif not config.keys() & {"sigma_min", "sigma_max"}:
            raise ValueError(
                "no noise space can be inferred from this config: pass noise_space='vp' with beta_schedule, "
                "noise_space='flow' with shift, or noise_space='ve' with sigma_min and sigma_max"
            )
    return config


# What our configs and those of diffusers' schedulers call the same.
SHARED = (
    "num_train_timesteps",
    "prediction_type",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)


def config_for_diffusers(config: Any, space: NoiseSpace | None) -> dict[str, Any]:
    """See `LangevinSchedulerMixin.diffusers_config`; `space` is None where the network sees a velocity."""
    if space is None:
        raise ValueError("no scheduler of diffusers reads a network that sees a velocity: use CLDSSCSScheduler")
    if config.prediction_type in ("score", "scaled_score"):
        raise ValueError(f"no scheduler of diffusers reads a network that answers a {config.prediction_type}")
    if space.kind != "ve":
        return config
    shared = {name: config[name] for name in SHARED if config[name] is not None}
    return shared | {"trained_betas": space.betas().tolist(), "timestep_spacing": "trailing"}


# Flags of diffusers' schedulers that replace their timestep_spacing, and the spacing that we call it.
SPACING_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "log_snr",
    "use_lu_lambdas": "log_snr",
    "use_beta_sigmas": "beta",
}


class SwapConfig(FrozenDict):
    """A config of ours, of which schedulers of diffusers take what they understand.

    They leave out the fields named under `_use_default_values`, for which they have defaults of their own. Here these
    are the ones that stand for "not given", our algorithms, and our spacings; everything else means the same to both.
    """

    def get(self, key: str, default: Any = None) -> Any:
        if key != "_use_default_values":
            return super().get(key, default)
        shared = self["timestep_spacing"] in ("linspace", "leading", "trailing")
        own = {"algorithm_type"} if shared else {"algorithm_type", "timestep_spacing"}
        return sorted(own | {name for name, value in self.items() if value is None})
