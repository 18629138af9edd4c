"""Samplers of critically-damped Langevin diffusion, on a noisy image y and its companion noise c.

Every sampler here is a linear-Gaussian update of `u = (x, v)` with the denoiser D frozen, `u' = matrix @ u + gain * D +
root @ z`, carried over to `(y, c)` by the lift (`processes.cld.Lift`), so that any denoiser will do. The coefficients
are float64 and broadcast over steps, `(...)`. A step goes from clock `start` down to `end`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..processes.cld import CLD, Lift, cholesky, lift
from ..processes.random import Draw
from .sampler import Memory, Plan, Stepped, one_a_level, to_the_middle

Algorithm = Literal["sscs", "euler_maruyama", "probability_flow"]


@dataclass(frozen=True)
class CriticallyDamped:
    """SSCS, Euler-Maruyama or the probability flow of CLD (arXiv 2112.07068), one call a level.

    The companion noise is drawn at the first step of a run, or given by the reading of a network that was trained on
    CLD. `sscs` has weak order 1 or 2, `euler_maruyama` 1; `probability_flow` is deterministic given the start and has
    order 2.

    Attributes:
        process: the diffusion.
        algorithm: see above.
        splitting_order: of `sscs`. 1 is the published one, with an explicit step along the score at its start. 2 solves
            that step exactly in the middle of its interval, with D extrapolated there from two calls.
        half_step: of `sscs` of order 1: the network sees the state between the half-steps, the published order, rather
            than at the start of a step.
        published_end: the last clock of runs that end with the noiseless step of the paper to 0, which removes no more
            noise than there is so near the end; those that end above it end with D. 0: all.
    """

    process: CLD
    algorithm: Algorithm = "sscs"
    splitting_order: int = 2
    half_step: bool = False
    published_end: float = 0.0

    def calls_per_level(self, num_calls: int) -> list[int]:
        return one_a_level(num_calls)

    def plan(self, sigmas: Tensor) -> Plan:
        """Of each call, the coefficients of `(y, c, D, z_1, z_2)` in the next y, those in the next c, and the factor by
        which D is extrapolated, see `look_ahead`."""
        process, clocks = self.process, self.process.clock_of_sigma(sigmas)
        at = lift(process.marginal(clocks))
        rows = self._steps(clocks).in_images(at[:-1], at[1:].inverse).rows
        end = torch.tensor([[[0, 0, 1, 0, 0], [0, 1, 0, 0, 0]]], dtype=torch.float64)  # y is D, and c stays
        if clocks[-1] <= (1 + 1e-6) * self.published_end:
            # At clock 0, y is x, and c is v in units of its deviation.
            inverse = torch.diag(torch.tensor([1.0, (process.gamma * process.mass) ** -0.5], dtype=torch.float64))
            end = denoising_step(process, clocks[-1:]).in_images(at[-1:], inverse).rows
        two_step = self.algorithm == "probability_flow" or (self.algorithm == "sscs" and self.splitting_order == 2)
        ahead = look_ahead(sigmas.tolist(), damped=self.algorithm == "sscs") if two_step else [0.0] * len(sigmas)
        return Plan(sigmas, [(*of, a) for of, a in zip(torch.cat([rows, end]).tolist(), ahead, strict=True)])

    def _steps(self, clocks: Tensor) -> "Step":
        """The steps between neighbouring clocks, on `(x, v)` and D."""
        process, start, end = self.process, clocks[:-1], clocks[1:]
        if self.algorithm == "euler_maruyama":
            return euler_maruyama_step(process, start, end)
        if self.algorithm == "probability_flow":
            return probability_flow_step(process, start, end)
        if self.splitting_order == 2:
            return sscs_second_order_step(process, start, end)
        if not self.half_step:
            return sscs_step(process, start, end)
        middles = torch.cat([(start + end) / 2, end[-1:]])
        return sscs_loop_step(process, start, start - end, middles[:-1] - middles[1:])

    def step(self, plan: Plan, i: int, y: Tensor, denoised: Tensor, memory: Memory, draw: Draw) -> Stepped:
        """A run's first step draws the companion before its own noise."""
        of_y, of_c, a = plan.steps[i]
        c = draw.normal(y.shape) if memory.companion is None else memory.companion
        ahead = torch.lerp(memory.denoised[0][1], denoised, 1 + a) if a and memory.denoised else denoised
        images = [y, c, ahead]
        if self.algorithm != "probability_flow" and i < len(plan.steps) - 1:
            images += draw.normal((y.shape[0], 2, *y.shape[1:])).unbind(1)
        memory = memory._replace(companion=_combine(of_c, images), denoised=((0.0, denoised),))
        return _combine(of_y, images), memory


def look_ahead(sigmas: list[float], damped: bool) -> list[float]:
    """Factors a of `D + a (D - D_previous)`, D extrapolated in log sigma to the middle of the step that follows.

    `sigmas`: noise levels of all calls of a run, descending. a is that of `to_the_middle`; 0 at the first and the last
    call and after a step of no length. Under fresh noise the difference of two D's is noise as well as trend: `damped`
    divides by `1 + h^4`, h the step that follows in log sigma, which leaves the order alone, is next to nothing below h
    = 0.5, and drops the extrapolation where a step spans several e-folds of sigma.
    """
    steps = [math.log(sigma / after) for sigma, after in pairwise(sigmas)]
    between = [to_the_middle(h, after) / (1 + after**4 * damped) for h, after in pairwise(steps)]
    return [0.0, *between, 0.0][: len(sigmas)]


def _combine(coefficients: list[float], images: list[Tensor]) -> Tensor:
    """The sum of images `(B, ...)`, each times its coefficient; coefficients beyond the images are left out."""
    total = coefficients[0] * images[0]
    for coefficient, image in zip(coefficients[1:], images[1:], strict=False):
        if coefficient:
            total.add_(image, alpha=coefficient)
    return total


# --- One step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """`u' = matrix @ u + gain * D + root @ z`.

    Attributes:
        matrix: `(..., 2, 2)`.
        gain: `(..., 2)`.
        root: `(..., 2, 2)`, not necessarily triangular.
    """

    matrix: Tensor
    gain: Tensor
    root: Tensor

    @property
    def rows(self) -> Tensor:
        """The coefficients of `(u, D, z)`, `(..., 2, 5)`."""
        return torch.cat([self.matrix, self.gain[..., None], self.root], -1)

    def around(self, matrix: Tensor, covariance: Tensor) -> "Step":
        """This noiseless step between two of `u' = matrix @ u + noise of covariance`; D stays what it is."""
        before = self.matrix @ covariance @ self.matrix.mT
        return Step(
            matrix @ self.matrix @ matrix,
            (matrix @ self.gain[..., None])[..., 0],
            cholesky(matrix @ before @ matrix.mT + covariance),
        )

    def in_images(self, at: Lift, inverse: Tensor) -> "Step":
        """The same step on `(y, c)`: from the images of lift `at` to those of a lift of this `inverse`."""
        gain = (inverse @ self.gain[..., None])[..., 0]
        return Step(inverse @ self.matrix @ at.frame, gain, inverse @ self.root)


# --- The splitting: A is solved exactly, S carries the score ---------------------------------------------------------


def half_step(process: CLD, clock: Tensor) -> tuple[Tensor, Tensor]:
    """A over `clock` units of B: matrix and covariance.

    The part of the reverse diffusion that leaves the prior alone: the forward kernel with the momentum flipped.
    """
    flip = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    kernel = process.kernel(clock)
    return flip @ kernel.transition @ flip, flip @ kernel.covariance @ flip


def score_step(process: CLD, at: Lift, length: Tensor) -> Step:
    """S: `v' = v + 2 Gamma length (s_v + v / M)`, with s_v of the state before it and the frozen D."""
    push = (2 * process.friction * length)[..., None]
    to_velocity = torch.tensor([0.0, 1.0], dtype=torch.float64)
    row = push * (at.score_state + to_velocity / process.mass)
    matrix = torch.eye(2, dtype=torch.float64) + to_velocity[:, None] * row[..., None, :]
    gain = push * at.score_gain[..., None] * to_velocity
    return Step(matrix, gain, torch.zeros_like(matrix))


def sscs_step(process: CLD, start: Tensor, end: Tensor) -> Step:
    """SSCS with the network at the step's start: A over the first half, S, A over the second half; D of the start.

    `start`, `end`: clocks `(...)`. S is evaluated as of `start`. The network sees a marginal of the process, so a run
    may begin at any step. First order.
    """
    half = half_step(process, (start - end) / 2)
    at = lift(process.marginal(start))
    return score_step(process, at, start - end).around(*half)


def sscs_loop_step(process: CLD, start: Tensor, kick: Tensor, drift: Tensor) -> Step:
    """SSCS with the network between the half-steps: S over `kick`, then A over `drift`.

    In a loop, a step's second half-step A and the next one's first are one A. With `kick` the step's length, `drift`
    the distance from its middle to the next one's, and the network labelled with the step's start, it is the
    published order. First order.
    """
    kicked = score_step(process, lift(process.marginal(start)), kick)
    matrix, covariance = half_step(process, drift)
    return Step(matrix @ kicked.matrix, (matrix @ kicked.gain[..., None])[..., 0], cholesky(covariance))


def sscs_second_order_step(process: CLD, start: Tensor, end: Tensor) -> Step:
    """SSCS as a Strang splitting: half of A, the exact flow of S in the middle of the interval, half of A.

    Stable for any step: S pulls v towards its mean given x and D. Weakly second order with D extrapolated to the
    middle, see `look_ahead`; first order with D of the start.
    """
    half, middle = half_step(process, (start - end) / 2), (start + end) / 2
    at = lift(process.marginal(middle))
    return score_step(process, at, frozen_length(process, at, start - end)).around(*half)


def frozen_length(process: CLD, at: Lift, length: Tensor) -> Tensor:
    """The `length` of S in `score_step` that makes it the exact flow of S over `length` with D frozen: `(...)`.

    Then `dv/dB = -k v + ...`, `k = 2 Gamma (P - 1 / M) >= 0`, P the precision of v given x and x0, and
    `v' = v + (1 - e^{-k length}) / k * dv/dB`.
    """
    exponent = 2 * process.friction * (1 / process.mass + at.score_state[..., 1]) * length
    return length * torch.where(exponent == 0, 1.0, torch.expm1(exponent) / exponent)


# --- Other samplers --------------------------------------------------------------------------------------------------


def euler_maruyama_step(process: CLD, start: Tensor, end: Tensor) -> Step:
    """Euler-Maruyama on the reverse diffusion. Weak order 1."""
    length = (start - end)[..., None, None]
    step = score_step(process, lift(process.marginal(start)), start - end)
    # The score step has the v / M of the splitting, which here belongs to the drift.
    pull = torch.tensor([0.0, 2 * process.friction / process.mass], dtype=torch.float64)
    backward = -process.drift - torch.diag(pull)
    noise = torch.diag(torch.tensor([0.0, 2 * process.friction], dtype=torch.float64)).sqrt()
    return Step(step.matrix + length * backward, step.gain, length.sqrt() * noise)


def denoising_step(process: CLD, start: Tensor) -> Step:
    """The final step of the paper: Euler's, from clock `start` to 0 without noise. x gets `-B v / M`."""
    step = euler_maruyama_step(process, start, torch.zeros_like(start))
    return Step(step.matrix, step.gain, torch.zeros_like(step.matrix))


def probability_flow_step(process: CLD, start: Tensor, end: Tensor) -> Step:
    """Probability flow, exact for a frozen D: the noise `((y - D) / sigma, c)` turns.

    `du/dB = drift u - Gamma (0, s_v)` keeps `R^-1 (u - m D)` with `R R^T = Sigma`, so in the frame of the lift it is a
    rotation, by the integral of `-Gamma w_v m_x / (k sigma)`. First order with D of the call; second order with D
    extrapolated to the middle of the step, see `look_ahead`.
    """
    at, to = lift(process.marginal(start)), lift(process.marginal(end))
    angle = _turn(process, start, end)
    cosine, sine, ratio = angle.cos(), angle.sin(), to.sigma / at.sigma
    rows = [[ratio * cosine, to.sigma * sine], [-sine / at.sigma, cosine]]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    gain = torch.stack([1 - ratio * cosine, sine / at.sigma], -1)
    matrix, gain = to.frame @ matrix @ at.inverse, (to.frame @ gain[..., None])[..., 0]
    return Step(matrix, gain, torch.zeros_like(matrix))


def _turn(process: CLD, start: Tensor, end: Tensor) -> Tensor:
    """The angle of `probability_flow_step`, `(...)`: Gauss-Legendre over log B, 64 nodes."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(64))
    low, high = start.log()[..., None], end.log()[..., None]
    clock = ((low + high) / 2 + (high - low) / 2 * nodes).exp()
    at = lift(process.marginal(clock))
    # The rows of the inverse frame are w and n / k, and n_v = m_x.
    rate = -process.friction * at.inverse[..., 0, 1] * at.inverse[..., 1, 1] / at.sigma
    return ((high - low) / 2 * weights * clock * rate).sum(-1)
