"""What a scheduler's `step` costs in CPU time, beside those of diffusers.

    python -m diffusers_gm.studies.step_cost [--compiled | --device cuda]

Every scheduler of this package, swapped onto a DDPM network's config, over `EulerAncestralDiscreteScheduler` and
`UniPCMultistepScheduler` on the same tensors. The runs take turns, so that a busy machine slows all alike, and CPU time
of the process counts, not wall time; medians. On a GPU that is what it takes to ask for the work: a step that waited
for the device would cost that, too. With --compiled also what `torch.compile` makes of the samplers' steps,
without a break, over fused read-and-writes: of three tensors into one, as the simplest of them does, and of the very
tensors that each has to move (CLD's step has two images and two noises in it); noise is drawn before.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ..cli import Parser, at_least
from ..evaluation.table import Table
from ..processes.random import Draw
from ..samplers import Memory
from ..schedulers import CalibratedMultistepScheduler, GMLangevinScheduler
from .demo import SAMPLERS
from .report import Report

SHAPES = ((1, 4, 64, 64), (1, 4, 128, 128), (64, 3, 32, 32), (256, 3, 32, 32))
# What suits a DDPM network; the mixture is for the samplers that jump.
SWAPPED = {
    GMLangevinScheduler: {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62], "timestep_spacing": "log_snr"}
}
PEERS = {"Euler ancestral": EulerAncestralDiscreteScheduler, "UniPC": UniPCMultistepScheduler}
# Algorithms that draw two noises a step, or components besides.
DRAW_MORE = ("sscs", "euler_maruyama", "jump", "exponential")
# Of a tensor of each shape, by scheduler.
Shape = tuple[int, int, int, int]
Costs = dict[Shape, dict[str, float]]
WARM_UP = 3
# Of a run: the samplers with jumps have no stable step in much fewer. Not all are taken.
FEWEST_STEPS = 100


def all_schedulers() -> dict[str, Any]:
    """Every scheduler that is compared, made of the config of a DDPM network."""
    config = DDPMScheduler(clip_sample=False).config
    ours = {
        f"{cls.__name__}, {name}": cls.from_config(config, **changes, **SWAPPED.get(cls, {}))
        for cls, named in SAMPLERS.items()
        for name, changes in named.items()
    }
    for tau in (0.0, 0.4):
        name = f"CalibratedMultistepScheduler, stochasticity {tau:g}"
        ours[name] = CalibratedMultistepScheduler.from_config(config, stochasticity=tau)
    return ours | {name: cls.from_config(config) for name, cls in PEERS.items()}


def milliseconds(function: Callable[..., Any], *arguments: Any, **named: Any) -> float:
    """CPU time of a call."""
    start = time.process_time()
    function(*arguments, **named)
    return 1e3 * (time.process_time() - start)


@torch.no_grad()
def costs(shape: Shape, num_steps: int, device: str) -> dict[str, float]:
    """Median CPU milliseconds of a step, by scheduler; all take their steps in turn, on the same numbers."""
    schedulers, tensors, generators = all_schedulers(), {}, {}
    found: dict[str, list[float]] = {name: [] for name in schedulers}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(max(num_steps + WARM_UP + 1, FEWEST_STEPS), device=device)
        generators[name] = torch.Generator(device).manual_seed(0)
        tensors[name] = torch.randn((2, *shape), generator=generators[name], device=device)
    for i in range(num_steps + WARM_UP):  # not the last step, which adds no noise
        for name, scheduler in schedulers.items():
            t, (sample, output) = scheduler.timesteps[i], tensors[name]
            draws = {} if isinstance(scheduler, UniPCMultistepScheduler) else {"generator": generators[name]}
            scheduler.scale_model_input(sample, t)
            found[name].append(milliseconds(scheduler.step, output, t, sample, **draws))
    return {name: statistics.median(each[WARM_UP:]) for name, each in found.items()}


@dataclass(frozen=True)
class Drawn(Draw):
    """Noise that is there already."""

    noise: Tensor = field(default_factory=lambda: torch.zeros(0))

    def normal(self, shape: Sequence[int]) -> Tensor:
        # What is drawn is the sampler's own, to write to; compiled, no copy is made.
        return self.noise[: math.prod(shape)].view(tuple(shape)).clone()


def read_and_write(*images: Tensor, written: int = 1) -> tuple[Tensor, ...]:
    """So many different sums of all these."""
    return tuple(sum(((k + i) * image for i, image in enumerate(images, 1)), images[0]) for k in range(written))


@torch.no_grad()
def compiled_costs(shape: Shape, num_steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """CPU time of the compiled step of each sampler that draws no components: over a fused read-and-write of three
    tensors into one, as the simplest of them does, and over one of the tensors that the step itself has to move. All
    three take turns."""
    generator = torch.Generator().manual_seed(0)
    y, denoised, other = torch.randn((3, *shape), generator=generator)
    noise = torch.randn(2 * y.numel(), generator=generator)
    over_least, over_same = {}, {}
    for name, scheduler in all_schedulers().items():
        if name in PEERS or "jump" in name or "exponential" in name:
            continue
        torch._dynamo.reset()
        scheduler.set_timesteps(FEWEST_STEPS)
        sampler, memory = scheduler.sampler, Memory()
        plan = sampler.plan(scheduler.sigmas[:-1].double())
        for i in range(WARM_UP):
            _, memory = sampler.step(plan, i, y, denoised, memory, Drawn(noise=noise))

        def step(y: Tensor, denoised: Tensor, noise: Tensor, memory: Any = memory, plan: Any = plan) -> Any:
            return sampler.step(plan, WARM_UP, y, denoised, memory, Drawn(noise=noise))  # noqa: B023

        read, written = moved(step, y, denoised, noise, memory)
        functions = [
            partial(torch.compile(step, fullgraph=True), y, denoised, noise),
            partial(torch.compile(read_and_write, fullgraph=True), y, denoised, other),
            partial(torch.compile(partial(read_and_write, written=written), fullgraph=True), *read),
        ]
        times = [[milliseconds(function) for function in functions] for _ in range(num_steps + WARM_UP)][WARM_UP:]
        of_step, least, same = (statistics.median(of) for of in zip(*times, strict=True))
        over_least[name], over_same[name] = of_step / least, of_step / same
    return over_least, over_same


def moved(
    step: Callable[..., Any], y: Tensor, denoised: Tensor, noise: Tensor, memory: Memory
) -> tuple[list[Tensor], int]:
    """The tensors that a sampler's step reads, of the two noises in `noise` those that it really needs, and how many it
    writes."""
    read, noises = [y, denoised, *tensors_in(memory)], noise.view(2, *y.shape)
    for k in (0, 1):
        broken = noises.index_fill(0, torch.tensor(k), math.nan).flatten()
        if any(bool(image.isnan().any()) for image in tensors_in(step(y, denoised, broken))):
            read.append(noises[k])
    known = {image.data_ptr() for image in read}
    return read, sum(image.data_ptr() not in known for image in tensors_in(step(y, denoised, noise)))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


def table_of(caption: str, found: Costs, places: int = 2, peer: str | None = None) -> Table:
    """What each scheduler costs on each shape; in units of what a peer does, if there is one."""
    rows = [
        [name, *(f"{of[name] / (of[peer] if peer else 1):.{places}f}" for of in found.values())]
        for name in found[SHAPES[0]]
    ]
    return Table(caption, ["scheduler", *map(str, SHAPES)], rows)


def report(
    found: Costs, compiled: dict[Shape, tuple[dict[str, float], dict[str, float]]] | None, num_steps: int, device: str
) -> Report:
    names = list(found[SHAPES[0]])
    caption = "CPU time of `step` over that of {}, medians of {}."
    tables = [table_of(caption.format(peer, num_steps), found, peer=peer) for peer in PEERS]
    tables.append(table_of("CPU milliseconds.", found, 3))
    if compiled:
        captions = (
            "Compiled, over one fused read-and-write of three tensors into one.",
            "Compiled, over one fused read-and-write of all tensors that the step itself reads and writes.",
        )
        for k, caption in enumerate(captions):
            tables.append(table_of(caption, {shape: both[k] for shape, both in compiled.items()}))

    def dearest(peer: str, counts: Callable[[str], bool]) -> str:
        ratio, name = max((of[name] / of[peer], name) for of in found.values() for name in names if counts(name))
        return f"at most {ratio:.2f} times {peer} ({name})"

    def draws_more(name: str) -> bool:
        return any(algorithm in name for algorithm in DRAW_MORE)

    alone = dearest("Euler ancestral", lambda name: name not in PEERS and not draws_more(name))
    more = dearest("Euler ancestral", draws_more)
    multistep = dearest("UniPC", lambda name: name.startswith(CalibratedMultistepScheduler.__name__))
    verdict = f"Schedulers that draw one noise or none: {alone}; those that draw more: {more}. Multistep: {multistep}."
    if compiled:
        least, same = (
            max((ratio, name) for both in compiled.values() for name, ratio in both[k].items()) for k in (0, 1)
        )
        verdict += (
            f" Compiled: at most {least[0]:.2f} times a fused read-and-write of three tensors into one ({least[1]}), "
            f"{same[0]:.2f} times one of the same tensors ({same[1]})."
        )
    of_gpu = (
        ""
        if device == "cpu"
        else f", one {torch.cuda.get_device_name()}, whose other work a step waits for if it waits"
    )
    return Report(
        f"step_cost{'' if device == 'cpu' else '_gpu'}",
        f"What a step costs{'' if device == 'cpu' else ' on a GPU'}",
        "How much CPU time does a scheduler's `step` take, beside those of diffusers on the same tensors?",
        verdict,
        tables,
        conditions=f"{torch.get_num_threads()} thread(s){of_gpu}; all take their steps in turn.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.step_cost", __doc__)
    parser.add_argument("--steps", type=at_least(1), default=60, help="steps of each scheduler on each shape")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of torch")
    parser.add_argument("--compiled", action="store_true", help="the compiled steps too; needs a C++ compiler")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"), help="folder of the report")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and (args.compiled or not torch.cuda.is_available()):
        parser.error("--device cuda: needs a GPU, and is not for --compiled")
    torch.set_num_threads(args.threads)
    found = {shape: costs(shape, args.steps, args.device) for shape in SHAPES}
    compiled = {shape: compiled_costs(shape, args.steps) for shape in SHAPES} if args.compiled else None
    report(found, compiled, args.steps, args.device).write(args.output)


if __name__ == "__main__":
    main()
