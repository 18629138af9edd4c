"""What `.sampler_benchmark` samples: networks, exact or trained, and every scheduler that fits each of them."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..data import split_digits
from ..evaluation.features import fingerprint
from ..evaluation.sampling import describe_model
from ..schedulers import AnnealedLangevinScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .demo import SAMPLERS
from .digits import pipeline_of, trained, trained_ddpm
from .exact import ExactDenoiser, NetworkOf, exact_network

WIDTH = 0.1
SOURCE = DDPMScheduler(clip_sample=False)

STOCHASTIC: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM": ("DDPMScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "SDE-DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
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
    "DPM-Solver++ singlestep": ("DPMSolverSinglestepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
PEERS = STOCHASTIC | DETERMINISTIC
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLD, sscs": (CLDSSCSScheduler, {}),
    "CLD, sscs, order 1": (CLDSSCSScheduler, {"splitting_order": 1}),
    "CLD, probability flow": (CLDSSCSScheduler, {"algorithm_type": "probability_flow"}),
    "annealed Langevin": (AnnealedLangevinScheduler, {}),
    "annealed, chain": (AnnealedLangevinScheduler, {"network_level": "chain"}),
    "annealed, consistent": (AnnealedLangevinScheduler, {"algorithm_type": "consistent"}),
    "GM, ancestral": (GMLangevinScheduler, {}),
    "GM, ode": (GMLangevinScheduler, {"algorithm_type": "ode"}),
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

# Schedulers of diffusers that take any timesteps.
TAKE_TIMESTEPS = ("DDPM", "SDE-DPM-Solver++(2M)", "Euler", "DPM-Solver++(2M)")

Samplers = dict[str, dict[str, Any]]  # schedulers by sampler, then by grid


@dataclass(frozen=True)
class Model:
    """What is sampled.

    Attributes:
        title: in words.
        pipeline: runs the network with any of the schedulers.
        samplers: schedulers by sampler and grid.
        reference: images that samples are compared with, `(m, C, H, W)`.
        floor: draws of as many real images as there are samples, one after another.
        conditions: in words.
        content: a hash of the network.
    """

    title: str
    pipeline: Any
    samplers: Samplers
    reference: Tensor
    floor: Tensor
    conditions: str
    content: str


# --- Schedulers ---


def grids(cls: Any, arguments: dict[str, Any], config: Any = SOURCE.config) -> dict[str, Any]:
    """The scheduler on each grid that it offers, for the network that `config` describes."""
    offered = inspect.signature(cls.__init__).parameters
    flags = dict(GRIDS)
    if cls is CLDSSCSScheduler:
        flags["quadratic"] = {"timestep_spacing": "quadratic"}
    return {
        name: cls.from_config(config, **arguments, **changes)
        for name, changes in flags.items()
        if changes.keys() <= offered.keys()
    }


def peers(config: Any) -> Samplers:
    """Every scheduler of diffusers that samples an ordinary `vp` network, on CLD's grid too where it takes any."""
    samplers = {}
    for name, (cls, arguments) in PEERS.items():
        scheduler = getattr(diffusers, cls)
        samplers[name] = grids(scheduler, arguments, config)
        if name in TAKE_TIMESTEPS:
            samplers[name]["quadratic"] = on_quadratic_grid(scheduler).from_config(config, **arguments)
    return samplers


def on_quadratic_grid(cls: Any) -> Any:
    """The scheduler, on the timesteps that `CLDSSCSScheduler(timestep_spacing="quadratic")` has, rounded."""

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        cld = CLDSSCSScheduler.from_config(SOURCE.config | dict(self.config), timestep_spacing="quadratic")
        cld.set_timesteps(num_inference_steps)
        labels = cld.timesteps.round().int().unique().flip(0).tolist()
        cls.set_timesteps(self, timesteps=labels, device=device)

    return type(cls.__name__, (cls,), {"set_timesteps": set_timesteps})


def compatible(config: Any) -> Samplers:
    """Everything that samples an ordinary `vp` network: ours, and theirs."""
    return {name: grids(cls, arguments, config) for name, (cls, arguments) in OURS.items()} | peers(config)


def own_samplers(described: Any) -> Samplers:
    """Everything that samples a network that we trained: the samplers of its own scheduler, `CLD, sscs` and all of
    diffusers where they can read it."""
    cls = type(described)
    samplers: Samplers = {
        name: {grid: cls.from_config(described.config, timestep_spacing=grid, **changes) for grid in OWN_GRIDS[cls]}
        for name, changes in SAMPLERS[cls].items()
    }
    try:
        theirs = described.diffusers_config()
    except ValueError:
        return samplers
    samplers["CLD, sscs"] = {
        grid: CLDSSCSScheduler.from_config(described.config, algorithm_type="sscs", timestep_spacing=grid)
        for grid in ("log_snr", "karras", "quadratic")
    }
    return samplers | peers(theirs)


# --- Networks ---


def exact_model(points: Tensor, name: str, num_samples: int) -> Model:
    """The exact denoiser of Gaussians of width `WIDTH` around images `(m, C, H, W)`, as a DDPM network would be."""
    described = CLDSSCSScheduler.from_config(SOURCE.config)
    network = NetworkOf(exact_network(ExactDenoiser(points, WIDTH), described), points.shape[1:])
    generator = torch.Generator().manual_seed(1)

    def data(n: int) -> Tensor:
        chosen = points[torch.randint(len(points), (n,), generator=generator)]
        return chosen + WIDTH * torch.randn(chosen.shape, generator=generator)

    return Model(
        f"the exact denoiser of {name}",
        pipeline_of(network, SOURCE),
        compatible(SOURCE.config),
        data(5_000),
        data(8 * num_samples),
        f"Each of the {len(points)} images is a Gaussian of width {WIDTH}; reference 5000 draws, floor of 8 times "
        f"{num_samples} others.",
        fingerprint(points),
    )


def ddpm_model(num_samples: int, steps: int, output: Path) -> Model:
    """A network that diffusers' own recipe trained on the digits."""
    pipeline = pipeline_of(*trained_ddpm(output, steps, 0))
    unclipped = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    conditions = f"Trained with diffusers' objective for {steps} steps."
    return _of_digits("a DDPM network of the digits", pipeline, compatible(unclipped.config), num_samples, conditions)


def own_model(method: str, num_samples: int, steps: int, output: Path) -> Model:
    """A network of the digits that we trained, in the pipeline of its method."""
    pipeline = pipeline_of(*trained(output, method=method, max_train_steps=steps))
    conditions = f"`train_gm_sgm.py --method {method} --dataset_name digits --max_train_steps {steps}`."
    samplers = own_samplers(pipeline.scheduler)
    return _of_digits(f"our {method} network of the digits", pipeline, samplers, num_samples, conditions)


def _of_digits(title: str, pipeline: Any, samplers: Samplers, num_samples: int, conditions: str) -> Model:
    train, held_out = split_digits()
    content = describe_model(pipeline)
    return Model(title, pipeline, samplers, train, held_out[:num_samples], conditions, content)
