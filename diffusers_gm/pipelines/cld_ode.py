"""The probability flow of a CLD model by an adaptive solver, which chooses its steps and so its network calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..extra import extra
from ..processes.cld import lift
from ..processes.random import Draw, Generators
from .encoding import check_deviation

# Those of torchdiffeq that adapt their steps, but for fehlberg2, which is far off its tolerance on a Gaussian.
ODE_SOLVERS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")

# `(input, labels) -> output`, and from it `(x, v, clock) -> (velocity score, denoised image)`.
Network = Callable[[Tensor, Tensor], Tensor]
Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def network_model(scheduler: Any, network: Network) -> Model:
    """Score and denoiser of a network, whatever it sees: by its reading and the lift of the scheduler's diffusion."""
    process = scheduler.process

    def model(x: Tensor, v: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
        at = lift(process.marginal(clock))
        denoised = scheduler.denoise(network, *at.image(x, v), at.sigma)
        return at.velocity_score(x, v, denoised), denoised

    return model


def start_and_ends(
    scheduler: Any, shape: tuple[int, ...], latents: Tensor | None, generator: Generators, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The state `(x, v)` that a run starts from, in float64 where the device has it, and the clocks of its ends."""
    wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    process, reading = scheduler.process, scheduler.reading
    ends = torch.tensor(reading.timestep_range[::-1], dtype=torch.float64)
    call, draw = reading.calls(ends)[0], Draw(generator, device)
    if latents is None:
        latents = reading.initial_sample(draw.normal(shape), call.sigma)
    else:
        check_deviation(scheduler, latents, call.sigma)
    y, companion = reading.coordinates(latents.to(device, wide), call)
    if companion is None:
        companion = draw.normal(shape).to(wide)
    clocks = process.clock_of_sigma(reading.sigma(ends))
    return *lift(process.marginal(clocks[0])).state(y, companion), clocks


def solve(
    scheduler: Any, model: Model, x: Tensor, v: Tensor, clocks: Tensor, solver: str, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """The state `(x, v)` at clock `clocks[1]` of the flow that starts from x and v at `clocks[0]`, all `(B, C, H, W)`.

    In `log B`, which has no singular end, and on `(x, v / sqrt(M))`. A step is taken if the error of every image is
    within the tolerances: the root mean square over an image, the largest of them over the batch.

    Raises:
        ImportError: without torchdiffeq.
        RuntimeError: if the solver cannot keep the tolerances, or the network's output is not finite.
    """
    with extra("ode"):
        from torchdiffeq import odeint
    process = scheduler.process
    scale = process.velocity_scale

    def slope(log_clock: Tensor, state: Tensor) -> Tensor:
        clock = log_clock.cpu().exp()
        x, v = state.chunk(2, 1)
        dx, dv = process.probability_flow(x, scale * v, model(x, scale * v, clock)[0])
        result = float(clock) * torch.cat([dx, dv / scale], 1)
        if not result.isfinite().all():
            raise RuntimeError(f"the network's output is not finite at t = {float(process.time(clock)):.4g}")
        return result

    def worst(error: Tensor) -> Tensor:
        return error.flatten(1).square().mean(1).sqrt().max()

    try:
        states = odeint(
            slope,
            torch.cat([x, v / scale], 1),
            clocks.log().to(x.dtype).to(x.device),
            rtol=rtol,
            atol=atol,
            method=solver,
            options={"norm": worst},
        )
    except AssertionError as error:
        raise RuntimeError(
            f"{solver} cannot keep rtol={rtol:g} and atol={atol:g} ({error}): use larger ones"
        ) from error
    x, v = states[-1].chunk(2, 1)
    return x, scale * v
