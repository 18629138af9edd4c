"""The probability flow of a CLD model by an adaptive solver, which chooses its steps and so its network calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..processes.cld import lift, score_coefficients
from ..random import Generators, randn
from ..schedulers.scheduling_cld_sscs import LAST_TIME

# Those of torchdiffeq that adapt their steps, but for fehlberg2: with a tolerance of 1e-4 it is 0.08 off on a Gaussian.
ODE_SOLVERS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")

# `(input, labels) -> output`, and from it `(x, v, clock) -> (velocity score, denoised image)`.
Network = Callable[[Tensor, Tensor], Tensor]
Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def native_model(scheduler: Any, network: Network) -> Model:
    """Score and denoiser of a velocity network."""
    process, config = scheduler.process, scheduler.config

    def model(x: Tensor, v: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
        marginal = process.marginal(clock)
        at = lift(marginal)
        label = (process.time(clock) * config["num_train_timesteps"]).to(x.device, torch.float32)
        of_velocity, of_output = score_coefficients(marginal, config["prediction_type"])
        score = of_velocity * v + of_output * network(torch.cat([x, v / process.velocity_scale], 1), label).to(x)
        plain = at.denoised(x, v, score)
        denoised = scheduler._clip(plain)
        return score + at.score_gain * (denoised - plain), denoised

    return model


def lifted_model(scheduler: Any, network: Network) -> Model:
    """Score and denoiser of an ordinary network."""
    process, space = scheduler.process, scheduler.noise_space

    def model(x: Tensor, v: Tensor, clock: Tensor) -> tuple[Tensor, Tensor]:
        at = lift(process.marginal(clock))
        y, _ = at.image(x, v)
        label = space.timestep(at.sigma).to(x.device, torch.float32)
        output = scheduler._prediction(network(space.alpha(at.sigma) * y, label).to(x), y)
        denoised = scheduler._clip(space.denoised(output, y, float(at.sigma), scheduler.config["prediction_type"]))
        return at.velocity_score(x, v, denoised), denoised

    return model


def start_and_ends(
    scheduler: Any, shape: tuple[int, ...], latents: Tensor | None, generator: Generators, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The state `(x, v)` that a run starts from, float64 on the device, and the clocks of its ends, `(2,)`."""
    process = scheduler.process
    if scheduler.native:
        sample = scheduler.initial_sample(shape, generator, device, torch.float32) if latents is None else latents
        x, v = sample.to(device, torch.float64).chunk(2, 1)
        return x, v, process.clock(torch.tensor([1.0, LAST_TIME], dtype=torch.float64))
    space = scheduler.noise_space
    sigmas = space.sigma(torch.tensor(space.timestep_range[::-1], dtype=torch.float64))
    alpha = 1.0 if space.kind == "ve" else float(space.alpha(sigmas[0]))
    if latents is None:
        latents = randn(shape, generator, device, torch.float32) * (float(sigmas[0]) if space.kind == "ve" else 1.0)
    companion = randn(shape, generator, device, torch.float32)
    clocks = process.clock_of_sigma(sigmas)
    at = lift(process.marginal(clocks[0]))
    return *at.state(latents.to(device, torch.float64) / alpha, companion.double()), clocks


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
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("ode_solver needs torchdiffeq: pip install diffusers-gm[ode]") from error
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
            clocks.log().to(x.device),
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
