"""Who samples a given network best, at equal network calls: `python -m diffusers_gm.benchmark_samplers`.

Every scheduler of diffusers that fits, and ours, each at the best of its grids, on

- `exact`: the exact denoiser of the 8 x 8 digits (each a Gaussian of width 0.1), a perfectly trained DDPM network;
- `ddpm`: a DDPM network of the digits, trained with diffusers' own objective at the budget of `make demo`;
- `ncsnv2`, `gm-sgm`, `cld`: our own digits networks of the same budget, under the samplers made for each.

Quality is sliced W2 over the floor, what as many real images have; medians over seeds, and wall time beside them. Every
finished cell is kept in `OUTPUT/.parts`: an interrupted benchmark goes on where it was.
"""

import argparse
import inspect
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import matplotlib
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_gm import AnnealedLangevinScheduler, CLDPipeline, CLDSSCSScheduler, GMLangevinScheduler, GMSGMPipeline
from diffusers_gm import training as tr
from diffusers_gm.data import split_digits
from diffusers_gm.demo import SAMPLERS
from diffusers_gm.evaluation import sliced_wasserstein
from diffusers_gm.evaluation.sampling import num_steps_for
from diffusers_gm.exact import ExactDenoiser
from diffusers_gm.processes.noise_space import NoiseSpace
from diffusers_gm.studies.common import Cells, floor_of_digits, parts_of, save_picture, trained, trained_ddpm
from diffusers_gm.studies.report import Report, Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH = 0.1
SOURCE = DDPMScheduler(clip_sample=False)
# Above this number of calls only the grid that was best at the number below is run.
ALL_GRIDS_UP_TO = 20

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

Samplers = dict[str, dict[str, Any]]  # schedulers by sampler, then by grid


@dataclass(frozen=True)
class Model:
    """What is sampled.

    Attributes:
        title: in words.
        samplers: schedulers by sampler and grid.
        sample: `(scheduler, number of calls, seed)` to samples `(n, 1, 8, 8)`, or None where the scheduler has no run
            of that many calls.
        ratio: quality of samples.
        conditions: in words.
    """

    title: str
    samplers: Samplers
    sample: Callable[[Any, int, int], Tensor | None]
    ratio: Callable[[Tensor], float]
    conditions: str


def grids(cls: Any, arguments: dict[str, Any], source: Any = SOURCE) -> dict[str, Any]:
    """The scheduler on each grid that it offers, for the network that `source` describes."""
    offered = inspect.signature(cls.__init__).parameters
    flags = dict(GRIDS)
    if cls is CLDSSCSScheduler:
        flags["quadratic"] = {"timestep_spacing": "quadratic"}
    return {
        name: cls.from_config(source.config, **arguments, **changes)
        for name, changes in flags.items()
        if changes.keys() <= offered.keys()
    }


def compatible(source: Any) -> Samplers:
    """Everything that samples an ordinary `vp` network."""
    ours = {name: grids(cls, arguments, source) for name, (cls, arguments) in OURS.items()}
    return ours | {name: grids(getattr(diffusers, cls), arguments, source) for name, (cls, arguments) in PEERS.items()}


def budget(scheduler: Any, num_calls: int) -> bool:
    """Set as many steps as `num_calls` network calls pay for; whether they use all of them, or all but one."""
    try:
        scheduler.set_timesteps(num_steps_for(scheduler, num_calls))
    except ValueError:
        return False  # no stable step, say
    return len(scheduler.timesteps) >= num_calls - 1


@torch.no_grad()
def sample(network: Callable[[Tensor, Tensor], Tensor], scheduler: Any, shape: Sequence[int], seed: int) -> Tensor:
    """Samples in DDPMPipeline's loop, and the scaling that other schedulers need besides."""
    generator = torch.Generator().manual_seed(seed)
    x = scheduler.init_noise_sigma * torch.randn(*shape, generator=generator)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **draws).prev_sample
    return x


# --- The models ---


def exact_model(num_samples: int) -> Model:
    train, _ = split_digits()
    denoiser, space = ExactDenoiser(train, WIDTH), NoiseSpace.vp(SOURCE.alphas_cumprod)
    generator = torch.Generator().manual_seed(1)

    def data(n: int) -> Tensor:
        chosen = train[torch.randint(len(train), (n,), generator=generator)]
        return chosen + WIDTH * torch.randn(chosen.shape, generator=generator)

    reference = data(5_000)

    def distance(samples: Tensor) -> float:
        return sliced_wasserstein(samples, reference, num_projections=256)

    floor = statistics.mean(distance(data(num_samples)) for _ in range(8))

    def draw(scheduler: Any, calls: int, seed: int) -> Tensor | None:
        def network(x: Tensor, t: Tensor) -> Tensor:
            return denoiser.network_output(x, t, space, "epsilon")

        return sample(network, scheduler, (num_samples, 1, 8, 8), seed) if budget(scheduler, calls) else None

    return Model(
        "the exact denoiser of the digits",
        compatible(SOURCE),
        draw,
        lambda samples: distance(samples) / floor,
        f"Each of the 1437 training digits is a Gaussian of width {WIDTH}; reference 5000 draws, floor {floor:.4f} of "
        f"{num_samples} draws.",
    )


def ddpm_model(num_samples: int, steps: int, parts: Path) -> Model:
    unet, source = trained_ddpm(steps, 0, parts)

    def draw(scheduler: Any, calls: int, seed: int) -> Tensor | None:
        def network(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, t).sample

        return sample(network, scheduler, (num_samples, 1, 8, 8), seed) if budget(scheduler, calls) else None

    return Model(
        "a DDPM network of the digits",
        compatible(DDPMScheduler.from_config(source.config, clip_sample=False)),
        draw,
        partial(over_floor, num_samples=num_samples),
        f"Trained with diffusers' objective for {steps} steps.",
    )


def own_model(method: Literal["gm-sgm", "ncsnv2", "cld"], num_samples: int, steps: int, parts: Path) -> Model:
    unet, described = trained(tr.TrainingArguments(method=method, max_train_steps=steps), parts)
    pipeline: Any = (CLDPipeline if method == "cld" else GMSGMPipeline)(unet, described)
    pipeline.set_progress_bar_config(disable=True)
    cls = type(described)
    samplers: Samplers = {
        name: {grid: cls.from_config(described.config, timestep_spacing=grid, **changes) for grid in OWN_GRIDS[cls]}
        for name, changes in SAMPLERS[cls].items()
    }
    if method == "ncsnv2":
        samplers["CLD, sscs"] = {
            grid: CLDSSCSScheduler.from_config(described.config, algorithm_type="sscs", timestep_spacing=grid)
            for grid in ("log_snr", "karras", "quadratic")
        }

    def draw(scheduler: Any, calls: int, seed: int) -> Tensor | None:
        if not budget(scheduler, calls):
            return None
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        return pipeline(num_samples, calls, generator, output_type="pt").images * 2 - 1

    return Model(
        f"our {method} network of the digits",
        samplers,
        draw,
        partial(over_floor, num_samples=num_samples),
        f"`train_gm_sgm.py --method {method} --dataset_name digits --max_train_steps {steps}`.",
    )


def over_floor(samples: Tensor, num_samples: int) -> float:
    """Sliced W2 to the training digits, over that of as many held-out digits."""
    return sliced_wasserstein(samples.clamp(-1, 1), split_digits()[0]) / floor_of_digits(num_samples)


# --- The benchmark ---


def measure(model: Model, scheduler: Any, calls: int, seed: int) -> dict[str, float] | None:
    """Quality and seconds of one run; None where there is none, or it diverges."""
    start = time.perf_counter()
    samples = model.sample(scheduler, calls, seed)
    seconds = time.perf_counter() - start
    if samples is None or not torch.isfinite(samples).all():
        return None
    return {"ratio": model.ratio(samples), "seconds": seconds}


@dataclass(frozen=True)
class Best:
    """A sampler at a number of calls, on the grid with the best median."""

    grid: str
    ratios: list[float]
    seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        spread = f" ± {(max(self.ratios) - min(self.ratios)) / 2:.2f}" if len(self.ratios) > 1 else ""
        return f"{self.median:.2f}{spread} {self.grid}"


def best_of(model: Model, sampler: str, calls: int, seeds: int, cells: Cells, only: str | None) -> Best | None:
    """The best grid of a sampler; `only` this grid, if given."""
    found = []
    for grid, scheduler in model.samplers[sampler].items():
        if only in (grid, None):
            runs = [cells(f"{sampler}, {grid}, {calls} calls, seed {seed}",
                          partial(measure, model, scheduler, calls, seed)) for seed in range(seeds)]  # fmt: skip
            if all(runs):
                ratios = [run["ratio"] for run in runs]
                found.append(Best(grid, ratios, statistics.median(run["seconds"] for run in runs)))
    return min(found, key=lambda best: best.median, default=None)


def benchmark(name: str, model: Model, args: argparse.Namespace, cells: Cells) -> Report:
    results: dict[tuple[str, int], Best | None] = {}
    for i, calls in enumerate(args.calls):
        for sampler in model.samplers:
            below = results.get((sampler, args.calls[i - 1])) if i else None
            only = below.grid if below and calls > ALL_GRIDS_UP_TO else None
            results[sampler, calls] = best_of(model, sampler, calls, args.seeds, cells, only)
    ours = [s for s in model.samplers if s not in PEERS]
    peers = [s for s in model.samplers if s in PEERS]

    def row(sampler: str, show: Callable[[Best], str]) -> list[str]:
        bests = [results[sampler, calls] for calls in args.calls]
        return [f"**{sampler}**" if sampler in ours and peers else sampler, *(show(b) if b else "-" for b in bests)]

    header = ["sampler", *(f"{calls} calls" for calls in args.calls)]
    spread = f"median of {args.seeds} seeds ± half of their range, " if args.seeds > 1 else ""
    tables = [
        Table(f"Sliced W2 over the floor, {spread}and the best grid; ours in bold; `-`: no run of that many calls.",
              header, [row(s, str) for s in model.samplers]),
        Table(f"Seconds for {args.num_samples} samples (median, on a machine that may have been busy).",
              header, [row(s, lambda b: f"{b.seconds:.2f}") for s in model.samplers]),
    ]  # fmt: skip

    def winner(samplers: Sequence[str], calls: int) -> tuple[float, str]:
        return min((b.median, s) for s in samplers if (b := results[s, calls]))

    answers = [f"{calls} calls: {winner(list(model.samplers), calls)[1]}" for calls in args.calls]
    verdict = f"Best of all: {', '.join(answers)}."
    if "CLD, sscs" in ours and {"DDPM", "Euler ancestral"} <= set(peers):
        verdict += " " + " ".join(against_peers(results, calls, ours, winner) for calls in args.calls)
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for sampler in model.samplers:
        points = [(calls, b.median) for calls in args.calls if (b := results[sampler, calls]) and b.median < 30]
        if points:
            axis.loglog(*zip(*points, strict=True), "-o" if sampler in ours else ":", label=sampler, markersize=4)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set(xlabel="network calls", ylabel="sliced W2 over the floor", title=model.title)
    axis.set_xticks(args.calls, [str(calls) for calls in args.calls])
    axis.xaxis.minorticks_off()
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    stem = f"samplers_{name}_n{args.num_samples}"
    return Report(
        stem,
        f"Samplers at equal network calls: {model.title}",
        "Which scheduler gives the best samples of one and the same network at a number of network calls, each at the "
        "best of its grids?",
        verdict,
        tables,
        [save_picture(figure, args.output / f"{stem}.png")],
        f"{model.conditions} n = {args.num_samples}, {args.seeds} seed(s), the same for all. The best grid is picked "
        f"on the same samples; above {ALL_GRIDS_UP_TO} calls only the grid that was best before is run.",
    )


def against_peers(
    results: dict[tuple[str, int], Best | None],
    calls: int,
    ours: Sequence[str],
    winner: Callable[[Sequence[str], int], tuple[float, str]],
) -> str:
    """The SSCS sampler against what people use, at one number of calls, in a sentence."""
    sscs, mine = results["CLD, sscs", calls], winner(ours, calls)
    if sscs is None:
        return f"At {calls} calls SSCS has no run."
    classic, stochastic, any_peer = (
        winner([s for s in peers if (s, calls) in results], calls)
        for peers in (("DDPM", "Euler ancestral"), list(STOCHASTIC), list(PEERS))
    )
    return (
        f"At {calls} calls SSCS has {sscs.median / classic[0]:.2f} times the error of {classic[1]}, "
        f"{sscs.median / stochastic[0]:.2f} times that of the best stochastic peer ({stochastic[1]}), and our best "
        f"({mine[1]}) {mine[0] / any_peer[0]:.2f} times that of the best peer ({any_peer[1]})."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0], prog="python -m diffusers_gm.benchmark_samplers"
    )
    models = ("exact", "ddpm", "ncsnv2", "gm-sgm", "cld")
    parser.add_argument("--models", nargs="+", choices=models, default=["exact"])
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 50, 200], help="numbers of network calls")
    parser.add_argument("--num_samples", type=int, default=1000, help="images per cell; trained networks: at most 360")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of the trained networks")
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="only these, as named in the table; default all")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"), help="folder of the reports")
    args = parser.parse_args(arguments)
    held_out = len(split_digits()[1])
    for name in ("num_samples", "seeds", "steps"):
        if getattr(args, name) < (2 if name == "num_samples" else 1):
            parser.error(f"--{name} {getattr(args, name)} is too small")
    if min(args.calls) < 3:
        parser.error(f"--calls must be at least 3, got {min(args.calls)}")
    if args.models != ["exact"] and args.num_samples > held_out:
        parser.error(f"--num_samples {args.num_samples}: there are {held_out} held-out digits for the floor")
    args.calls.sort()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parts = parts_of(args.output)
    for name in args.models:
        if name == "exact":
            model = exact_model(args.num_samples)
        elif name == "ddpm":
            model = ddpm_model(args.num_samples, args.steps, parts)
        else:
            model = own_model(name, args.num_samples, args.steps, parts)
        if args.samplers:
            unknown = [sampler for sampler in args.samplers if sampler not in model.samplers]
            if unknown:
                parser.error(f"--samplers {unknown}: {name} has {', '.join(model.samplers)}")
            model = replace(model, samplers={sampler: model.samplers[sampler] for sampler in args.samplers})
        cells = Cells(parts / f"samplers {name} n={args.num_samples} steps={args.steps}.json")
        benchmark(name, model, args, cells).write(args.output)


if __name__ == "__main__":
    main()
