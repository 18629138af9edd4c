"""What `.benchmark_samplers` samples: networks, exact or trained, and every scheduler that fits each of them."""

import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from . import AnnealedLangevinScheduler, CLDPipeline, CLDSSCSScheduler, GMLangevinScheduler, GMSGMPipeline
from .demo import SAMPLERS
from .evaluation import sliced_wasserstein
from .evaluation.sampling import NoGridError, num_steps_for
from .exact import ExactDenoiser
from .readings import NoiseSpace
from .studies.common import over_floor, trained, trained_ddpm
from .training.options import TrainingArguments

WIDTH = 0.1
SOURCE = DDPMScheduler(clip_sample=False)
NUM_PROJECTIONS = 256

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
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """What is sampled.

    Attributes:
        title: in words.
        samplers: schedulers by sampler and grid.
        sample: `(scheduler, number of calls, seed)` to samples `(n, C, H, W)`, or None where the scheduler has no run
            of that many calls.
        ratio: quality of samples.
        conditions: in words.
        points: the images of an exact denoiser.
    """

    title: str
    samplers: Samplers
    sample: Callable[[Any, int, int], Tensor | None]
    ratio: Callable[[Tensor], float]
    conditions: str
    points: Tensor | None = None


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


def budget(scheduler: Any, num_calls: int) -> int | None:
    """Set, and return, as many steps as `num_calls` network calls pay for; None if they leave more than one unused."""
    try:
        num_steps = num_steps_for(scheduler, num_calls)
    except NoGridError:  # no stable step, say
        return None
    return num_steps if len(scheduler.timesteps) >= num_calls - 1 else None


@torch.no_grad()
def sample(network: Network, scheduler: Any, shape: Sequence[int], seed: int) -> Tensor:
    """Samples in DDPMPipeline's loop, and the scaling that other schedulers need besides."""
    generator = torch.Generator().manual_seed(seed)
    x = scheduler.init_noise_sigma * torch.randn(*shape, generator=generator)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **draws).prev_sample
    return x


def sampler_of(network: Network, shape: Sequence[int]) -> Callable[[Any, int, int], Tensor | None]:
    """`Model.sample` of a network that is fed what `vp` networks are."""

    def draw(scheduler: Any, calls: int, seed: int) -> Tensor | None:
        return sample(network, scheduler, shape, seed) if budget(scheduler, calls) else None

    return draw


# --- Networks ---


def exact_model(points: Tensor, name: str, num_samples: int) -> Model:
    """The exact denoiser of Gaussians of width `WIDTH` around images `(m, C, H, W)`, as a DDPM network would be."""
    denoiser, space = ExactDenoiser(points, WIDTH), NoiseSpace.vp(SOURCE.alphas_cumprod)
    generator = torch.Generator().manual_seed(1)

    def data(n: int) -> Tensor:
        chosen = points[torch.randint(len(points), (n,), generator=generator)]
        return chosen + WIDTH * torch.randn(chosen.shape, generator=generator)

    reference = data(5_000)

    def distance(samples: Tensor) -> float:
        return sliced_wasserstein(samples, reference, num_projections=NUM_PROJECTIONS)

    floor = statistics.mean(distance(data(num_samples)) for _ in range(8))
    return Model(
        f"the exact denoiser of {name}",
        compatible(SOURCE.config),
        sampler_of(lambda x, t: denoiser.network_output(x, t, space, "epsilon"), (num_samples, *points.shape[1:])),
        lambda samples: distance(samples) / floor,
        f"Each of the {len(points)} images is a Gaussian of width {WIDTH}; reference 5000 draws, floor {floor:.4f} of "
        f"{num_samples} draws.",
        points,
    )


def ddpm_model(num_samples: int, steps: int, parts: Path) -> Model:
    """A network that diffusers' own recipe trained on the digits."""
    unet, source = trained_ddpm(steps, 0, parts)
    return Model(
        "a DDPM network of the digits",
        compatible(DDPMScheduler.from_config(source.config, clip_sample=False).config),
        sampler_of(lambda x, t: unet(x, t).sample, (num_samples, 1, 8, 8)),
        over_floor,
        f"Trained with diffusers' objective for {steps} steps.",
    )


def own_model(method: Literal["gm-sgm", "ncsnv2", "cld"], num_samples: int, steps: int, parts: Path) -> Model:
    """A network of the digits that we trained, in the pipeline of its method."""
    unet, described = trained(TrainingArguments(method=method, max_train_steps=steps), parts)
    pipeline: Any = (CLDPipeline if method == "cld" else GMSGMPipeline)(unet, described)
    pipeline.set_progress_bar_config(disable=True)

    def draw(scheduler: Any, calls: int, seed: int) -> Tensor | None:
        num_steps = budget(scheduler, calls)
        if num_steps is None:
            return None
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        return pipeline(num_samples, num_steps, generator, output_type="pt").images * 2 - 1

    return Model(
        f"our {method} network of the digits",
        own_samplers(described),
        draw,
        over_floor,
        f"`train_gm_sgm.py --method {method} --dataset_name digits --max_train_steps {steps}`.",
    )
