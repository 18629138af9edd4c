"""The options that all our schedulers have."""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

from diffusers.configuration_utils import register_to_config

# Flags of diffusers' schedulers that replace their timestep_spacing, and the spacing that we call it.
SPACING_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "log_snr",
    "use_lu_lambdas": "log_snr",
    "use_beta_sigmas": "beta",
}

# The ends of a ladder of ours that nothing else is said of.
SIGMA_MIN, SIGMA_MAX = 0.01, 50.0


def common(
    num_train_timesteps: int = 1000,
    noise_space: Literal["vp", "ve", "flow", "edm"] | None = None,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    scale_input: bool = True,
    sigma_labels: bool = False,
    sigma_data: float | None = None,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str | None = None,
    trained_betas: list[float] | None = None,
    rescale_betas_zero_snr: bool = False,
    snr_shift_scale: float | None = None,
    shift: float | None = None,
    use_dynamic_shifting: bool = False,
    time_shift_type: Literal["exponential", "linear"] = "exponential",
    shift_terminal: float | None = None,
    prediction_type: str | None = None,
    variance_type: str | None = None,
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
    timestep_spacing: str = "log_snr",
    steps_offset: int = 0,
    grid: str | None = None,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_lu_lambdas: bool = False,
    use_beta_sigmas: bool = False,
    calibration: dict[str, Any] | None = None,
    beta_0: float = 4.0,
    beta_1: float = 0.0,
    mass: float = 0.25,
    gamma: float = 0.04,
) -> None:
    """What they mean is said by `AnnealedLangevinScheduler`, and of the last four by `CLDSSCSScheduler`."""


def with_common_options(init: Callable[..., None]) -> Callable[..., None]:
    """`register_to_config` for an `__init__` that takes the options of its class alone: the scheduler takes those of
    `common` before them, and all are in `self.config` when `init` is called. What `init` has too is left to it."""
    me, *own = inspect.signature(init).parameters.values()
    names = [option.name for option in own]
    shared = [option for option in inspect.signature(common).parameters.values() if option.name not in names]
    signature = inspect.Signature([me, *shared, *own])

    @wraps(init)
    def with_all(*args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{init.__qualname__}() {error}") from None
        given.apply_defaults()
        init(given.arguments[me.name], **{name: given.arguments[name] for name in names})

    with_all.__signature__ = signature  # type: ignore[attr-defined]
    return register_to_config(with_all)


def check_options(config: Any) -> None:
    """Raise a ValueError for an option of a config of ours that is out of its range, whatever the network."""
    if config.num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps must be at least 2, got {config.num_train_timesteps}")
    if config.thresholding and not 0 < config.dynamic_thresholding_ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio must be in (0, 1], got {config.dynamic_thresholding_ratio}")
    if config.clip_sample and not 0 < config.clip_sample_range < math.inf:
        raise ValueError(f"clip_sample_range must be positive, got {config.clip_sample_range}")
    if config.shift is not None and not 0 < config.shift < math.inf:
        raise ValueError(f"shift must be positive, got {config.shift}")
    if config.shift_terminal is not None and not 0 <= config.shift_terminal < 1:
        raise ValueError(f"shift_terminal must be in [0, 1), got {config.shift_terminal}")
    if sum(bool(config[flag]) for flag in SPACING_FLAGS) > 1:
        raise ValueError(f"only one of {', '.join(SPACING_FLAGS)} can be True")
