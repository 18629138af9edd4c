"""A bound on the likelihood that a model of critically-damped Langevin diffusion gives to images.

`python -m diffusers_gm.evaluation.likelihood outputs/digits-cld` prints it for the digits, in bits per dimension.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .extra import extra
from .processes.cld import CLD
from .random import Generators, randn
from .readings.velocity import score_coefficients

# The smallest time of the training: earlier ones would be new to the network.
FIRST_TIME = 1e-5


def cld_nll(
    model: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    process: CLD,
    prediction_type: str = "cld_mixed",
    num_steps: int = 50,
    num_velocities: int = 1,
    generator: Generators = None,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """Upper bound on `-log p(x0)` in nats, `(B,)` float64 on the CPU (arXiv 2112.07068, appendix B).

    With v0 from `p(v0) = N(0, gamma M)`, `-log p(x0) <= E[log p(v0) - log p(x0, v0)]`: an equality where image and
    velocity are independent in the model, as they are for the exact score. `log p(x0, v0)` is that of the probability
    flow: of its end under the prior, plus the divergence along the way. Of the divergence the drift's part and that
    of the mixed score are known; only `d output / dv` is estimated, with one Hutchinson probe per image. Fourth-order
    Runge-Kutta of torchdiffeq on a quadratic grid of times, so `4 num_steps` network calls, each with its gradient.

    Args:
        model: `(cat([x, v / sqrt(M)], 1), t * num_train_timesteps) -> output`: `(B, 2C, H, W)` and `(B,)` float32 to
            `(B, C, H, W)`, differentiable in its input.
        images: x0, `(B, C, H, W)`, at least float32.
        process: the diffusion.
        prediction_type: how the output becomes a score, see `score_coefficients`.
        num_steps: steps of the solver.
        num_velocities: v0 per image, over which the bound is averaged.
        generator: decides velocities and probes; one per image in a list.
        num_train_timesteps: the unit of the labels.

    Raises:
        ValueError: for images that are not finite, fewer than one step or velocity, an unknown prediction type.
        ImportError: without torchdiffeq.
    """
    if num_steps < 1 or num_velocities < 1:
        raise ValueError(f"num_steps and num_velocities must be at least 1, got {num_steps} and {num_velocities}")
    if not images.isfinite().all():
        raise ValueError("the images hold values that are not finite")
    with extra("ode"):
        from torchdiffeq import odeint
    grid = process.clock(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64) ** 2)
    score_coefficients(process.marginal(grid[-1]), prediction_type)  # an unknown type is refused before all work
    clocks = grid.to(images.dtype).to(images.device)  # not all devices have float64
    per_pixel = images[0].numel()

    def flow(clock: Tensor, state: tuple[Tensor, Tensor, Tensor], probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`d(x, v)/dB` of the probability flow and its divergence, `(B,)`."""
        x, v, _ = state
        # ell jumps at time 0, where x0 and x alone no longer give v away: the score of the first time stands for it.
        time = process.time(clock.cpu().double()).clamp(min=FIRST_TIME)
        of_velocity, of_output = map(float, score_coefficients(process.marginal(process.clock(time)), prediction_type))
        labels = torch.full((len(x),), float(time) * num_train_timesteps, dtype=torch.float32, device=x.device)
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            output = model(torch.cat([x, leaf / process.velocity_scale], 1), labels).to(v.dtype)
            (slope,) = torch.autograd.grad(output, leaf, probe)
        score = of_velocity * v + of_output * output.detach()
        trace = of_velocity * per_pixel + of_output * (slope * probe).flatten(1).sum(1)
        divergence = float(process.drift[1, 1]) * per_pixel - process.friction * trace
        return *process.probability_flow(x, v, score), divergence

    def log_joint(x: Tensor, v: Tensor, probe: Tensor) -> Tensor:
        """`log p(x, v)` at time 0, `(B,)`."""
        x, v, divergence = odeint(
            lambda clock, state: flow(clock, state, probe),
            (x, v, x.new_zeros(len(x))),
            clocks[[0, -1]],
            method="rk4",
            options={"grid_constructor": lambda *_: clocks},
        )
        return divergence[-1].cpu().double() + normal_log_prob(x[-1], 1.0) + normal_log_prob(v[-1], process.mass)

    bound = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(num_velocities):
        noise, probe = randn((len(images), 2, *images.shape[1:]), generator, images.device, images.dtype).unbind(1)
        velocity = math.sqrt(process.gamma * process.mass) * noise
        joint = log_joint(images, velocity, torch.where(probe >= 0, 1.0, -1.0).to(images))
        bound += normal_log_prob(velocity, process.gamma * process.mass) - joint
    return bound / num_velocities


def normal_log_prob(x: Tensor, variance: float) -> Tensor:
    """Log density of `N(0, variance I)`, `(B, ...)` to `(B,)` float64 on the CPU: not all devices have it."""
    x = x.cpu().flatten(1).double()
    return -0.5 * (x.square().sum(1) / variance + x.shape[1] * math.log(2 * math.pi * variance))


def bits_per_dimension(nats: Tensor, num_elements: int, num_levels: int) -> Tensor:
    """Bits per element of images of `num_levels` equal levels from -1 to 1, given `-log p` of the dequantised ones.

    A model of density p gives the discrete image k, of d elements, the probability `P(k) = int p(k + u) du` over the
    cube of side `w = 2 / (num_levels - 1)`. By Jensen, for u uniform on that cube,
    `-log P(k) <= E_u[-log p(k + u)] - d log w`. The last term is the Jacobian of the unit in which images are
    measured; an upper bound on `-log p` thus gives one on `-log P(k)`:
    `bits = nats / (d log 2) + log2((num_levels - 1) / 2)`.
    """
    return nats / (num_elements * math.log(2)) + math.log2((num_levels - 1) / 2)


def mean_and_error(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


if __name__ == "__main__":
    # These are mathematics, which know neither data nor pipelines.
    raise SystemExit("the command is: python -m diffusers_gm.evaluation.likelihood FOLDER")
