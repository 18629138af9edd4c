"""Who samples a given network best, at equal network calls: `python -m diffusers_gm.benchmark_samplers`.

The exact denoiser of the 8 x 8 digits (each a Gaussian of width 0.1) stands in for a perfectly trained DDPM network.
Every scheduler of diffusers that fits, and ours, each at the best of its grids. Printed is
sliced W2 to the law of the data over the floor, the distance of as many draws from that law itself.
"""

import argparse
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_gm import AnnealedLangevinScheduler, GMLangevinScheduler
from diffusers_gm.data import split_digits
from diffusers_gm.evaluation import sliced_wasserstein
from diffusers_gm.exact import ExactDenoiser
from diffusers_gm.processes.noise_space import NoiseSpace
from diffusers_gm.schedulers.scheduling_cld_sscs import CLDSSCSScheduler

WIDTH = 0.1
SOURCE = DDPMScheduler(clip_sample=False)
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    # stochastic
    "DDPM": ("DDPMScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "SDE-DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    # deterministic given the start
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
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLD, SSCS": (CLDSSCSScheduler, {}),
    "CLD, probability flow": (CLDSSCSScheduler, {"algorithm_type": "probability_flow"}),
    "annealed Langevin": (AnnealedLangevinScheduler, {}),
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


def budget(scheduler: Any, num_calls: int) -> bool:
    """Set as many steps as `num_calls` network calls allow; whether there is such a number.

    Heun and KDPM2 call the network twice a step but for the last.
    """
    scheduler.set_timesteps((num_calls + 1) // 2 if scheduler.order == 2 else num_calls)
    return num_calls - 1 <= len(scheduler.timesteps) <= num_calls


def sample(scheduler: Any, denoiser: ExactDenoiser, space: NoiseSpace, num_samples: int, seed: int) -> Tensor:
    """Samples `(n, 1, 8, 8)` in DDPMPipeline's loop, and the scaling that other schedulers need besides."""
    generator = torch.Generator().manual_seed(seed)
    x = scheduler.init_noise_sigma * torch.randn(num_samples, 1, 8, 8, generator=generator)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        output = denoiser.network_output(scheduler.scale_model_input(x, t), t, space, "epsilon")
        x = scheduler.step(output, t, x, **draws).prev_sample
    return x


def grids(cls: Any, arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The scheduler on each grid that it offers."""
    offered = inspect.signature(cls.__init__).parameters
    for name, flags in GRIDS.items():
        if flags.keys() <= offered.keys():
            yield name, cls.from_config(SOURCE.config, **arguments, **flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--num_samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2, help="runs that are averaged")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    train, _ = split_digits()
    denoiser, space = ExactDenoiser(train, WIDTH), NoiseSpace.vp(SOURCE.alphas_cumprod)
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> Tensor:
        chosen = train[torch.randint(len(train), (n,), generator=generator)]
        return chosen + WIDTH * torch.randn(chosen.shape, generator=generator)

    reference = draw(20 * args.num_samples)
    floor = sum(sliced_wasserstein(draw(args.num_samples), reference) for _ in range(8)) / 8
    print(f"sliced W2 over the floor {floor:.4f}, n = {args.num_samples}, mean of {args.seeds} seeds, "
          f"diffusers {diffusers.__version__}\n")  # fmt: skip
    print("| scheduler | " + " | ".join(f"{n} calls" for n in args.calls) + " |")
    print("|---" * (len(args.calls) + 1) + "|")
    rows = [(f"**{name}**", cls, arguments) for name, (cls, arguments) in OURS.items()]
    rows += [(name, getattr(diffusers, cls), arguments) for name, (cls, arguments) in PEERS.items()]
    for name, cls, arguments in rows:
        cells = []
        for calls in args.calls:
            best = (float("inf"), "-")
            for grid, scheduler in grids(cls, arguments):
                ratios = []
                for seed in range(args.seeds):
                    if not budget(scheduler, calls):
                        break
                    samples = sample(scheduler, denoiser, space, args.num_samples, seed)
                    if not torch.isfinite(samples).all():
                        break
                    ratios.append(sliced_wasserstein(samples, reference) / floor)
                else:
                    best = min(best, (sum(ratios) / len(ratios), grid))
            cells.append(f"{best[0]:.2f} {best[1]}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
