"""What a scheduler's `step` costs beside the network: `python -m diffusers_gm.benchmark`.

One run, side by side: the forward pass of the demo's network on a batch of digits, and `step` of every sampler on the
same batch; then `step` of a swapped scheduler over that of `EulerAncestralDiscreteScheduler`, on latents of Stable
Diffusion XL and a batch of CIFAR-10. Prints medians and ratios, with machine and versions.
"""

import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

from diffusers_gm import AnnealedLangevinScheduler, GaussianMixtureNoise, GMLangevinScheduler
from diffusers_gm.schedulers.scheduling_cld_sscs import CLDSSCSScheduler
from diffusers_gm.training.network import new_unet
from diffusers_gm.training.options import TrainingArguments

BATCH = 256
REPEATS = 40


def median_ms(function: Callable[[], object]) -> float:
    """Median wall time of a call in milliseconds, after a warm-up."""
    times = []
    for i in range(REPEATS + 3):
        start = time.perf_counter()
        function()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def step_ms(scheduler, shape: tuple[int, ...]) -> float:
    """Median time of one `step` of a run, in milliseconds."""
    scheduler.set_timesteps(REPEATS + 5)
    sample, generator = torch.zeros(shape), torch.Generator().manual_seed(0)
    timesteps = iter(scheduler.timesteps)
    return median_ms(lambda: scheduler.step(sample, next(timesteps), sample, generator=generator))


def main() -> None:
    mixture = GaussianMixtureNoise.from_power_law(1.5, 2)
    config = {"mixture_weights": mixture.weights.tolist(), "mixture_scales": mixture.scales.tolist()}
    schedulers = {f"GM {name}": GMLangevinScheduler(algorithm_type=name, model_noise="mixture", **config)
                  for name in ("langevin", "jump", "exponential", "ancestral", "ode")}  # fmt: skip
    schedulers["annealed Langevin"] = AnnealedLangevinScheduler()
    schedulers["annealed, consistent"] = AnnealedLangevinScheduler(algorithm_type="consistent")
    euler = EulerAncestralDiscreteScheduler()
    euler.is_scale_input_called = True

    unet = new_unet(TrainingArguments(), resolution=8, channels=1).eval()
    shape = (BATCH, 1, 8, 8)
    with torch.no_grad():
        forward = median_ms(lambda: unet(torch.zeros(shape), torch.tensor(0)))
        print(
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"diffusers {diffusers.__version__}; medians of {REPEATS}, batch {shape}"
        )
        print(f"\n| | ms | share of the forward pass |\n|---|---|---|\n| network, forward | {forward:.2f} | 1 |")
        for name, scheduler in {**schedulers, "diffusers Euler ancestral": euler}.items():
            cost = step_ms(scheduler, shape)
            print(f"| {name} | {cost:.3f} | {cost / forward:.3f} |")

        shapes = [(1, 4, 128, 128), (64, 3, 32, 32)]
        print("\n| step over that of Euler ancestral | " + " | ".join(map(str, shapes)) + " |\n|---|---|---|")
        base = [step_ms(euler, shape) for shape in shapes]
        for cls in (AnnealedLangevinScheduler, GMLangevinScheduler, CLDSSCSScheduler):
            swapped = cls.from_config(DDPMScheduler(clip_sample=False).config)
            ratios = [step_ms(swapped, shape) / cost for shape, cost in zip(shapes, base, strict=True)]
            print(f"| {cls.__name__} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
