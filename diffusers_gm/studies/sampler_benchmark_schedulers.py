"""Every scheduler that `.sampler_benchmark` compares, on every grid that it can be given."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..readings.grids import even_levels
from ..schedulers import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)
from .demo import SAMPLERS
from .sampler_benchmark_calibration import GITS, VARIANTS, WITH_IMAGES, Calibrations

SOURCE = DDPMScheduler(clip_sample=False)

STOCHASTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM": ("DDPMScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "SDE-DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "SA-Solver": ("SASolverScheduler", {}),
}
# Deterministic given the start.
DETERMINISTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++(3M)": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM-Solver++ singlestep": ("DPMSolverSinglestepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
# Of networks that are preconditioned as in EDM, which the others would take for something else.
EDM: dict[str, tuple[str, dict[str, Any]]] = {
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM-Solver++(2M)": ("EDMDPMSolverMultistepScheduler", {}),
    "EDM DPM-Solver++(3M)": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    "EDM SDE-DPM-Solver++(2M)": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
PEERS = STOCHASTIC | DETERMINISTIC | EDM
# A sampler and its grid.
Setting = tuple[str, str]

MULTISTEP = "calibrated multistep"
CALIBRATED: Setting = (MULTISTEP, "calibrated")
CHOSEN: Setting = (MULTISTEP, WITH_IMAGES)
OWN = "as it comes"  # the scheduler that a network of ours was saved with
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLD, sscs": (CLDSSCSScheduler, {}),
    "CLD, sscs, order 1": (CLDSSCSScheduler, {"splitting_order": 1}),
    "CLD, probability flow": (CLDSSCSScheduler, {"algorithm_type": "probability_flow"}),
    "annealed Langevin": (AnnealedLangevinScheduler, {}),
    "annealed, order 1": (AnnealedLangevinScheduler, {"step_order": 1}),
    "annealed, ladder": (AnnealedLangevinScheduler, {"network_level": "ladder"}),
    "annealed, consistent": (AnnealedLangevinScheduler, {"algorithm_type": "consistent"}),
    "GM, ancestral": (GMLangevinScheduler, {}),
    "GM, ancestral, order 1": (GMLangevinScheduler, {"step_order": 1}),
    "GM, ode": (GMLangevinScheduler, {"algorithm_type": "ode"}),
    MULTISTEP: (CalibratedMultistepScheduler, {}),
}
GRIDS: dict[str, dict[str, Any]] = {
    "default": {},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "lu lambdas": {"use_lu_lambdas": True},
}
OWN_GRIDS: dict[type, tuple[str, ...]] = {
    AnnealedLangevinScheduler: ("log_snr", "karras"),
    GMLangevinScheduler: ("log_snr", "karras"),
    CLDSSCSScheduler: ("quadratic", "log_snr"),
}


def name_of(setting: Setting) -> str:
    return ", ".join(setting)


def theirs(setting: Setting) -> bool:
    """Whether people have it without us."""
    return setting[0] in PEERS and setting[1] not in OUR_GRIDS


# Schedulers by sampler, then by grid; or functions that make one, where that takes long.
Samplers = dict[str, dict[str, Any]]
# From the network's highest and lowest level, and a number of calls, to their levels, descending.
Levels = Callable[[float, float, int], Tensor]

# --- Levels for schedulers of diffusers ------------------------------------------------------------------------------

# Align Your Steps (arXiv 2404.14507) for Stable Diffusion 1.5, ten steps and the end.
AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def kl_optimal(high: float, low: float, num_levels: int) -> Tensor:
    """`sigma = tan` of equal steps between the arc tangents of the ends (arXiv 2404.14507, eq. 17)."""
    ends = math.atan(high), math.atan(low)
    return torch.linspace(*ends, num_levels, dtype=torch.float64).tan()


def ays(high: float, low: float, num_levels: int) -> Tensor:
    """The published levels, interpolated in log sigma as their authors do; squeezed below `high`, where they go beyond
    it. They leave out the last of one level more, from which they go to 0."""
    logs = np.log(AYS)
    if high < AYS[0]:
        logs = logs[-1] + (logs - logs[-1]) * (np.log(high) - logs[-1]) / (logs[0] - logs[-1])
    places = np.linspace(0, 1, num_levels + 1)[:-1]
    return torch.from_numpy(np.exp(np.interp(places, np.linspace(0, 1, len(logs)), logs)))


def quadratic(config: Any) -> Levels:
    """Those of `CLDSSCSScheduler(timestep_spacing="quadratic")`."""

    def levels(high: float, low: float, num_levels: int) -> Tensor:
        cld = CLDSSCSScheduler.from_config(config, timestep_spacing="quadratic")
        cld.set_timesteps(num_levels)
        return cld.reading.sigma(cld.timesteps.double())

    return levels


FORMULAS: dict[str, Levels] = {"KL optimal": kl_optimal, "AYS": ays, "even levels": even_levels}
# Grids that nobody has without us.
OUR_GRIDS = ("even levels", "calibrated", "quadratic")


def snapped(alphas_cumprod: Tensor, levels: Levels, num_levels: int) -> tuple[list[int], np.ndarray]:
    """Whole timesteps next to levels, each once, and their levels, descending: schedulers of diffusers round timesteps
    and not levels, and the network is better told what it is given.

    Raises:
        ValueError: if there are not so many.
    """
    trained = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt().numpy()
    wanted = levels(float(trained[-1]), float(trained[0]), num_levels).log().numpy()
    labels = np.interp(wanted, np.log(trained), np.arange(len(trained))).round().astype(int)
    for i in reversed(range(num_levels - 1)):
        labels[i] = max(labels[i], labels[i + 1] + 1)
    if labels[0] >= len(trained):
        raise ValueError(f"{num_levels} levels of this grid need more than the {len(trained)} timesteps")
    return labels.tolist(), trained[labels]


def on_levels(cls: Any, levels: Levels) -> Any:
    """The scheduler of diffusers on given levels, in place of Karras's where it has them, else as its `timesteps=`;
    None where it takes neither. Few take levels as an argument: they get more than they offer."""

    def _compute_karras_sigmas(self: Any, ramp: Tensor) -> Tensor:
        return levels(self.config.sigma_max, self.config.sigma_min, len(ramp)).to(ramp)

    def _convert_to_karras(self: Any, in_sigmas: Any, num_inference_steps: int | None = None) -> np.ndarray:
        return snapped(self.alphas_cumprod, levels, num_inference_steps or self.num_inference_steps)[1]

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        labels, _ = snapped(self.alphas_cumprod, levels, num_inference_steps)
        cls.set_timesteps(self, timesteps=labels, device=device)

    for changed in (_compute_karras_sigmas, _convert_to_karras):
        if hasattr(cls, changed.__name__):
            return type(cls.__name__, (cls,), {changed.__name__: changed})
    if "timesteps" in inspect.signature(cls.set_timesteps).parameters:
        return type(cls.__name__, (cls,), {"set_timesteps": set_timesteps})
    return None


# --- Schedulers ------------------------------------------------------------------------------------------------------


def grids(cls: Any, arguments: dict[str, Any], config: Any) -> dict[str, Any]:
    """The scheduler on each grid that it offers, for the network that `config` describes."""
    offered = inspect.signature(cls.__init__).parameters
    flags = GRIDS | ({"quadratic": {"timestep_spacing": "quadratic"}} if cls is CLDSSCSScheduler else {})
    return {
        name: cls.from_config(config, **arguments, **changes)
        for name, changes in flags.items()
        if changes.keys() <= offered.keys()
    }


def peers(config: Any, made: Calibrations, described: Any) -> Samplers:
    """Every scheduler of diffusers that samples an ordinary `vp` network, on all levels that it can be given.

    Args:
        config: of the network, as diffusers reads it.
        made: calibrations of the network.
        described: the network's config as ours read it.
    """
    given = FORMULAS | {"quadratic": quadratic(described)} | calibrated(made)
    samplers: Samplers = {}
    for name, (cls, arguments) in (STOCHASTIC | DETERMINISTIC).items():
        scheduler = getattr(diffusers, cls)
        samplers[name] = grids(scheduler, arguments, config)
        for grid, levels in given.items():
            changed = on_levels(scheduler, levels)
            if changed is not None:
                samplers[name][grid] = on_grid = changed.from_config(config, **arguments)
                if hasattr(scheduler, "_convert_to_karras"):  # not before: some ask for levels when they are made
                    on_grid.register_to_config(use_karras_sigmas=True)
    return samplers


def edm_peers(config: Any, made: Calibrations) -> Samplers:
    """The schedulers of diffusers for a network that is preconditioned as in EDM, on their own levels and on others."""
    given = {"KL optimal": kl_optimal, "AYS": ays} | calibrated(made)
    samplers: Samplers = {}
    for name, (cls, arguments) in EDM.items():
        scheduler = getattr(diffusers, cls)
        samplers[name] = {
            "default": scheduler.from_config(config, **arguments),
            "exponential": scheduler.from_config(config, sigma_schedule="exponential", **arguments),
        }
        for grid, levels in given.items():  # they ask for levels when they are made
            samplers[name][grid] = partial(on_levels(scheduler, levels).from_config, config, **arguments)
    return samplers


def calibrated(made: Calibrations) -> dict[str, Levels]:
    """The levels that schedulers of diffusers are given too."""
    return {name: made.levels(name) for name in ("calibrated", GITS)}


def multistep(config: Any, made: Calibrations) -> dict[str, Any]:
    """Our multistep sampler: on its fixed grid, and calibrated."""
    taus = {"default": 0.0, "tau 0.4": 0.4, "tau 1": 1.0}
    return {
        **{name: CalibratedMultistepScheduler.from_config(config, stochasticity=tau) for name, tau in taus.items()},
        **{name: partial(made.scheduler, name) for name in VARIANTS},
        **{f"calibrated tau {tau:g}": partial(made.scheduler, "calibrated", tau) for tau in taus.values()},
    }


def on_our_levels(cls: Any, arguments: dict[str, Any], made: Calibrations) -> Any:
    """Another scheduler of ours on the calibrated levels."""
    return cls.from_config(made.scheduler("calibrated").config, grid="calibrated", **arguments)


def compatible(config: Any, made: Calibrations) -> Samplers:
    """Everything that samples an ordinary `vp` network: ours, and theirs."""
    ours = {
        name: grids(cls, arguments, config) | {"calibrated": partial(on_our_levels, cls, arguments, made)}
        for name, (cls, arguments) in OURS.items()
    }
    return ours | {MULTISTEP: multistep(config, made)} | peers(config, made, config)


def own_samplers(described: Any, made: Calibrations) -> Samplers:
    """Everything that samples a network that we trained: the samplers of its own scheduler, `CLD, sscs` and all of
    diffusers where they can read it."""
    cls = type(described)
    samplers: Samplers = {
        name: {grid: cls.from_config(described.config, timestep_spacing=grid, **changes) for grid in OWN_GRIDS[cls]}
        for name, changes in SAMPLERS[cls].items()
    }
    samplers |= {OWN: {"default": described}, MULTISTEP: multistep(described.config, made)}
    try:
        theirs = described.diffusers_config()
    except ValueError:
        return samplers
    if described.config.noise_space == "edm":
        return samplers | edm_peers(theirs, made)
    samplers["CLD, sscs"] = {
        grid: CLDSSCSScheduler.from_config(described.config, algorithm_type="sscs", timestep_spacing=grid)
        for grid in ("log_snr", "karras", "quadratic")
    }
    return samplers | peers(theirs, made, described.config)
