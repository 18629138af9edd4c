"""Swaps: what schedulers of diffusers and ours may read of the other's configs."""

import inspect
import logging
from difflib import get_close_matches
from typing import Any, ClassVar

import diffusers
from diffusers import EulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ..readings import NoiseSpace
from .options import SIGMA_MAX, SIGMA_MIN, SPACING_FLAGS

logger = logging.getLogger(__name__)

# Values of `algorithm_type` of diffusers' schedulers, whose configs may come from ours and go back to them.
SOLVERS = {"dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"}
SOLVERS |= {"data_prediction", "noise_prediction"}  # SASolver's

# Words of diffusers' solvers that serve both DDPM and flow networks, as users pass them to `from_config`.
SAID_OF_FLOW = ("use_flow_sigmas", "flow_shift")

# Where a saved config keeps what diffusers would misread under its own name.
OWN = "diffusers_gm"

# What has a `step_order`, and had none in version 0.1.0: all was of order 1.
OF_STEP_ORDER = ("AnnealedLangevinScheduler", "GMLangevinScheduler")


# --- From other schedulers to ours ---


def from_own_config(config: dict[str, Any], algorithms: tuple[str, ...], others: set[str]) -> dict[str, Any]:
    """A config of ours, for a class with these `algorithms`: what was kept from diffusers is back in its place, and a
    sampler that belongs to another class (`others`: those of all) is left out. Configs of others are left alone."""
    of_solver = {"shift": config["flow_shift"]} if shifts_as_solver(config) else {}
    if isinstance(config, SwapConfig):
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
    if OWN in config:
        added = {OWN, *config[OWN].get("added", ())}
        config = {key: value for key, value in {**config, **config[OWN]["values"]}.items() if key not in added}
    config = {**config, **of_solver}
    if config.get("_class_name") in OF_STEP_ORDER and "step_order" not in config:  # of version 0.1.0
        config = {**config, "step_order": 1}
    algorithm = config.get("algorithm_type")
    if "noise_space" in config and algorithm not in algorithms and algorithm in others | SOLVERS:
        config = {key: value for key, value in config.items() if key != "algorithm_type"}
        if config["noise_space"] is None and config.get("grid") is None:  # levels in time, of a run with velocities
            config["grid"] = "even"
    return config


def shifts_as_solver(config: dict[str, Any]) -> bool:
    """Whether a config that came from ours is that of a solver, as UniPC, which shifts levels by its own `flow_shift`;
    the `shift` beside it is what ours had. That of a file says its class; in memory a scheduler's own options stand
    before what it has no use for."""
    if isinstance(config, SwapConfig) or config.get("noise_space") != "flow" or "flow_shift" not in config:
        return False
    if not config.get("use_flow_sigmas") and config["flow_shift"] == 1.0:  # its default, of which nobody said anything
        return False
    source = getattr(diffusers, str(config.get("_class_name")), None)
    if source is not None:
        return "flow_shift" in inspect.signature(source.__init__).parameters
    options = list(config)
    return "_class_name" not in config and options.index("flow_shift") < [*options, "shift"].index("shift")


def from_source_config(config: dict[str, Any], noise_space: str | None = None) -> dict[str, Any]:
    """A config of a scheduler of diffusers, with what that scheduler leaves unsaid added in our words.

    - Values that the source left at its defaults count as given: they describe the network. diffusers drops them from
      configs in memory, and keeps them in the same configs read from disk; files of older versions leave out what was
      new later.
    - The grid belongs to the sampler. `leading` and `linspace`, the defaults of diffusers' schedulers, and `karras`,
      that of EDM's, serve ours badly at few calls: `grid="even"` takes their place, and they stay in the config for the
      way back. Flags that are set, `trailing` and EDM's `exponential` are somebody's choice.
    - `algorithm_type` is the source's own, and left out.
    - Flow schedulers name no prediction type and no spacing: `trailing` is s = 1, 1 - 1/n, ..., as their pipelines
      pass it. `ScoreSdeVeScheduler` names neither prediction type nor noise space; its network is told sigma itself.
    - EDM schedulers (`sigma_data`) and Stable Video Diffusion (`timestep_type="continuous"`) tell the network
      `log(sigma) / 4`: the noise space `edm`.

    Args:
        config: of another scheduler.
        noise_space: as its user gives it; None: it is inferred.

    Raises:
        ValueError: if the config describes no noise space of ours.
    """
    unsaid = config.get("_use_default_values")
    config = with_defaults(config)
    if unsaid is not None and config.keys() == {"shift"}:
        config["_class_name"] = "MiniMaxH3Scheduler"  # in memory a config does not say it, but no other has this alone
    refuse_unreadable(config, noise_space)
    if config.get("sigma_data") is not None:
        config |= {"noise_space": "edm"}
    elif config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        if config.get("sigma_min") is None or config.get("sigma_max") is None:  # then the ends of its betas
            levels = EulerDiscreteScheduler.from_config(config).sigmas
            config |= {"sigma_min": float(levels[-2]), "sigma_max": float(levels[0])}
        config |= {"noise_space": "edm"}
    if grid := sampler_grid(config):
        config["grid"] = grid
    if config.get("noise_space") == "edm":
        return config
    if config.get("use_flow_sigmas"):
        config |= {"noise_space": "flow", "shift": config.get("flow_shift", 1.0)}
        # Their default, which means a velocity here; a file does not tell whether somebody said it.
        said = unsaid is not None and "prediction_type" not in unsaid
        if config.get("prediction_type", "epsilon") == "epsilon" and not said:
            config["prediction_type"] = "flow_prediction"
    elif config.get("beta_schedule") is None and config.get("trained_betas") is None:
        if config.get("shift") is not None:
            config = {"prediction_type": "flow_prediction", "timestep_spacing": "trailing", **config}
        elif "correct_steps" in config:
            of_network = {"noise_space": "ve", "prediction_type": "score", "scale_input": False, "sigma_labels": True}
            config = of_network | config
        elif noise_space is None and not config.keys() & {"sigma_min", "sigma_max"}:
            raise ValueError(
                "no noise space can be inferred from this config: pass noise_space='vp' with beta_schedule, "
                "noise_space='flow' with shift, or noise_space='ve' with sigma_min and sigma_max"
            )
    return config


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the class of a config makes of it, without what belongs to its sampler, and ends of levels that are None."""
    source = getattr(diffusers, str(config.get("_class_name")), None)
    if source is not None and "_use_default_values" not in config:  # a file
        options = inspect.signature(source.__init__).parameters.values()
        config = {option.name: option.default for option in options if option.default is not option.empty} | config
    left_out = {"_use_default_values", "algorithm_type"}
    left_out |= {end for end in ("sigma_min", "sigma_max") if config.get(end) is None}
    return {key: value for key, value in config.items() if key not in left_out}


def refuse_unreadable(config: dict[str, Any], noise_space: str | None = None) -> None:
    """Raise a ValueError for a network that no noise space or no sampler of ours can read. A `noise_space` that is
    given says that the network is an ordinary one, whatever scheduler it has been sampled by."""
    if config.get("invert_sigmas"):
        raise ValueError("networks that count flow time backwards (invert_sigmas=True) are not supported")
    if config.get("_class_name") == "MiniMaxH3Scheduler":
        raise ValueError(
            "MiniMaxH3Scheduler counts flow time backwards, and its velocity is the negative: not supported"
        )
    if config.get("_class_name") == "FlowMapEulerDiscreteScheduler" and noise_space is None:
        raise ValueError(
            "a flow map (FlowMapEulerDiscreteScheduler) answers the mean velocity between two levels, not a denoised "
            "image: no sampler of ours can read it; if the network is an ordinary one, give its noise_space"
        )
    if config.get("sigma_data") is not None and config.get("shift") is not None:
        raise ValueError(
            "a flow scheduler with sigma_data is that of Cosmos 2, whose pipelines precondition the network themselves "
            "and hand the scheduler noise at levels of their own: not supported"
        )
    distilled = () if noise_space else ("original_inference_steps", "scale_factors", "num_policy_substeps")
    # EDM's and others that have the size of the data have ends of levels or a solver beside it.
    decoder = "sigma_data" in config and not config.keys() & {"sigma_max", "solver_order", "solver_type"}
    if any(name in config for name in ("s_tmin", "stages", *distilled)) or decoder or "clip_denoised" in config:
        raise ValueError(
            "a consistency model answers the end of the probability flow, not a denoised image, and so does a network "
            "that was distilled as one (LCM, TCD): no sampler of ours can read it; if the network is an ordinary one, "
            "give its noise_space"
        )
    if config.get("sigma_data") is not None and "solver_order" in config and "thresholding" not in config:
        raise ValueError(
            "CosineDPMSolverMultistepScheduler tells its network the arc tangent of sigma: no noise space of ours"
        )


def sampler_grid(config: dict[str, Any]) -> str | None:
    """The grid that a network of diffusers gets with a sampler of ours, see `from_source_config`; None: that which the
    config names."""
    if any(config.get(flag) for flag in SPACING_FLAGS):
        return None
    spacing = config.get("timestep_spacing")
    if config.get("noise_space") == "edm" and spacing in (None, "log_snr", *THEIR_SPACINGS):
        return "log_snr" if config.get("sigma_schedule") == "exponential" else "even"
    of_flow = config.get("shift") is not None and config.get("beta_schedule") is None
    return "even" if spacing in ("leading", "linspace") or (spacing is None and not of_flow) else None


def of_one_grid(config: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, of which a spacing takes the place of that of a config, whatever that calls it."""
    if "timestep_spacing" in asked or any(asked.get(name) for name in ("grid", *SPACING_FLAGS)):
        return {"grid": None, **{flag: False for flag in SPACING_FLAGS if config.get(flag)}, **asked}
    return asked


# --- From ours to others ---


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

# The spacings that diffusers' schedulers know.
THEIR_SPACINGS = ("linspace", "leading", "trailing")


def saved_config(config: Any, space: NoiseSpace | None) -> dict[str, Any]:
    """The config as it goes to disk. Keys that mean something else to schedulers of diffusers have a value that these
    understand, or are left out; our own values stand under `OWN`. A `ve` network gets the betas of the DDPM network
    that it is, a `flow` network the words of solvers that serve both."""
    theirs = {key: value for key, value in config.items() if key != "_use_default_values"}
    changed: dict[str, Any] = {"algorithm_type": None}
    if config["timestep_spacing"] not in THEIR_SPACINGS:
        changed["timestep_spacing"] = "trailing"
    changed |= dict.fromkeys(ends_of_no_ladder(config))
    if space is not None and space.kind == "flow":
        changed |= {"use_flow_sigmas": True, "flow_shift": 1.0 if config.shift is None else config.shift}
    if space is not None and space.kind == "ve" and space.is_of_betas:
        changed["trained_betas"] = space.betas().tolist()
    # None stands for "not given" in ours; to others it would be a value.
    changed |= {key: None for key, value in theirs.items() if value is None and key not in changed}
    values = {key: theirs[key] for key in changed if key in theirs}
    saved = {key: value for key, value in (theirs | changed).items() if value is not None}
    return saved | {OWN: {"values": values, "added": sorted(changed.keys() - values.keys())}}


def ends_of_no_ladder(config: Any) -> list[str]:
    """The names of the ends of our `ve` ladder where the network has none and nothing was said of them: schedulers of
    diffusers would cut their grids there."""
    ends = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}
    unsaid = all(config[name] == end for name, end in ends.items())
    return list(ends) if unsaid and config["noise_space"] in ("vp", "flow") else []


class SwapConfig(FrozenDict):
    """A config of ours, of which schedulers of diffusers take what they understand.

    They leave out the fields named under `_use_default_values`, for which they have defaults of their own. Here these
    are the ones that stand for "not given", our algorithms, our spacings and the ends of our ladder where a network has
    none; everything else means the same to both.
    """

    def get(self, key: str, default: Any = None) -> Any:
        if key != "_use_default_values":
            return super().get(key, default)
        own = {"algorithm_type", *(["timestep_spacing"] if self["timestep_spacing"] not in THEIR_SPACINGS else [])}
        own |= set(ends_of_no_ladder(self))
        return sorted(own | {name for name, value in self.items() if value is None})


class Swappable(SchedulerMixin, ConfigMixin):
    """A scheduler of ours that others can be swapped for, and that can be swapped for others.

    Attributes:
        algorithms: the values of `algorithm_type`, the default first.
        reads_mixtures: whether networks of mixture noise are read for what they are, rather than refused.
        calibrates: whether `grid="calibrated"` is what a config of another scheduler becomes.
        noise_space: the `NoiseSpace` of a network that sees a noisy image; None for one that sees a velocity.
    """

    algorithms: ClassVar[tuple[str, ...]] = ()
    reads_mixtures: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]

    _internal_dict: Any
    noise_space: NoiseSpace | None

    @property
    def config(self) -> Any:
        """Pipelines of Stable Diffusion put a plain dictionary in the place of ours where `steps_offset` is not 1."""
        if not isinstance(self._internal_dict, SwapConfig):
            self._internal_dict = SwapConfig(self._internal_dict)
        return self._internal_dict

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; what a scheduler that is not ours leaves unsaid is read by `from_source_config`."""
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if config is not None and not isinstance(config, dict):  # a folder, as diffusers still allows
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        if isinstance(config, dict):
            others = {algorithm for c in _ours() for algorithm in c.algorithms}
            config = from_own_config(config, cls.algorithms, others)
            if "noise_space" not in config:
                said = {name: kwargs.pop(name) for name in SAID_OF_FLOW if name in kwargs}
                config = from_source_config({**config, **said}, kwargs.get("noise_space"))
            elif config["noise_space"] == "flow" and "flow_shift" in kwargs:
                kwargs["shift"] = kwargs.pop("flow_shift")
            if _of_mixture_noise(config) and not cls.reads_mixtures:
                raise ValueError(
                    f"the network was trained with mixture noise, which {cls.__name__} would take for Gaussian: use "
                    "GMLangevinScheduler or CalibratedMultistepScheduler"
                )
            # The grid belongs to the sampler.
            if cls.calibrates and "corrector" not in config:
                config = {**config, "grid": "calibrated"}
            elif not cls.calibrates and config.get("grid") == "calibrated":
                own = ("corrector", "multistep_order", "stochasticity")
                config = {key: value for key, value in config.items() if key not in own}
                config["grid"] = sampler_grid(config)
        kwargs = of_one_grid(config if isinstance(config, dict) else {}, kwargs)
        options = cls._get_init_keys(cls)
        for name in kwargs.keys() - options - {*SAID_OF_FLOW}:
            near = get_close_matches(name, options, 3, 0.0)
            logger.warning(f"{cls.__name__} has no option {name!r}, which does nothing; the nearest are {near}")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Ours too, so that what is left of one's config in another's is kept without a warning."""
        return [*super()._get_compatibles(), *_ours()]

    def register_to_config(self, **kwargs: Any) -> None:
        super().register_to_config(**kwargs)
        config = self.config
        if config.get("use_flow_sigmas"):  # what solvers of diffusers go by, on the way back
            shift = 1.0 if config["shift"] is None else config["shift"]
            self._internal_dict = SwapConfig({**config, "flow_shift": shift})

    def to_json_string(self) -> str:
        """The config as it is saved: schedulers of diffusers can read it wherever they can read the network, and ours
        come back complete."""
        kept = self._internal_dict
        self._internal_dict = saved = saved_config(self.config, self.noise_space)
        try:
            text = super().to_json_string()
        finally:
            self._internal_dict = kept
        # As in diffusers, a config that was saved knows by which class and version.
        self.register_to_config(**{name: saved[name] for name in ("_class_name", "_diffusers_version")})
        return text

    def diffusers_config(self) -> dict[str, Any]:
        """The config by which schedulers of diffusers sample the network of this scheduler:
        `UniPCMultistepScheduler.from_config(pipe.scheduler.diffusers_config())`.

        In `vp` space our own config serves, and in `flow` space with the words of solvers that serve both. A `ve`
        network that is fed `y / sqrt(1 + sigma^2)` is a DDPM network, whose betas (`NoiseSpace.betas`) are worked out,
        with `trailing` timesteps. `edm` networks are those of diffusers' `EDM...` schedulers, or of Stable Video
        Diffusion.

        Flow schedulers (`FlowMatch...`) take `config` instead: the words of solvers, which saved configs have, too,
        tell the pipelines of Flux and others to leave the levels to the scheduler.

        Raises:
            ValueError: for a network that no scheduler of diffusers can read: one of mixture noise or of velocities,
                one that answers a score, a `ve` network without input scaling, or one that is told sigma.
        """
        config, space = self.config, self.noise_space
        if space is None:
            raise ValueError("no scheduler of diffusers reads a network that sees a velocity: use one of ours")
        kind = config.prediction_type
        if kind in ("score", "scaled_score", "edm") and not (space.kind == "edm" and config.sigma_data):
            raise ValueError(f"no scheduler of diffusers reads a network that answers a {kind}")
        if space.kind == "edm" and not config.sigma_data:
            if kind != "v_prediction":
                raise ValueError(f"no scheduler of diffusers reads a network of edm space that answers {kind!r} alone")
            return SwapConfig(config | {"sigma_data": 1.0})  # theirs is 0.5 unless told
        if _of_mixture_noise(config):
            raise ValueError("no scheduler of diffusers reads a network that was trained with mixture noise")
        if space.kind == "flow":
            shift = 1.0 if config.shift is None else config.shift
            return SwapConfig(config | {"use_flow_sigmas": True, "flow_shift": shift})
        if space.kind != "ve":
            return config
        shared = {name: config[name] for name in SHARED if config[name] is not None}
        return shared | {"trained_betas": space.betas().tolist(), "timestep_spacing": "trailing"}


def _of_mixture_noise(config: dict[str, Any]) -> bool:
    """Whether the network of a config was trained with noise that is more than Gaussian of unit variance."""
    return config.get("model_noise") == "mixture" and (config.get("mixture_scales") or [1.0]) != [1.0]


def _ours() -> list[type[Swappable]]:
    """The schedulers of this package."""
    return [cls for base in Swappable.__subclasses__() for cls in base.__subclasses__()]
