"""One step of each CLD sampler, as a 2 x 2 linear-Gaussian update with the network's answer frozen.

Every sampler here is `u' = matrix @ u + gain * D + root @ z` for `u = (x, v)`, D the denoiser at the step's network
call and z standard normal. The coefficients are float64 and broadcast over steps, `(...)`; a scheduler computes them
once per run. A step goes from clock `start` down to `end`; `Lift`s say when the network looked and at what.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cld import CLD, Lift, cholesky, lift
from .extrapolation import to_the_middle


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
    def covariance(self) -> Tensor:
        """Covariance of the added noise, `(..., 2, 2)`."""
        return self.root @ self.root.mT

    def then(self, matrix: Tensor, covariance: Tensor) -> "Step":
        """This step followed by `u'' = matrix @ u' + noise of covariance`."""
        return Step(
            matrix @ self.matrix,
            (matrix @ self.gain[..., None])[..., 0],
            cholesky(matrix @ self.covariance @ matrix.mT + covariance),
        )

    def after(self, matrix: Tensor, covariance: Tensor) -> "Step":
        """This step preceded by `u = matrix @ u'' + noise of covariance`; D stays what it is."""
        return Step(
            self.matrix @ matrix,
            self.gain,
            cholesky(self.matrix @ covariance @ self.matrix.mT + self.covariance),
        )

    def in_images(self, at: Lift, to: Lift) -> "Step":
        """The same step on `(y, c)`: from the images of lift `at` to those of `to`."""
        return Step(
            to.inverse @ self.matrix @ at.frame,
            (to.inverse @ self.gain[..., None])[..., 0],
            to.inverse @ self.root,
        )

    def in_states(self, at: Lift, to: Lift) -> "Step":
        """The same step on `(x, v)`, given on `(y, c)`: the inverse of `in_images`."""
        return Step(
            to.frame @ self.matrix @ at.inverse,
            (to.frame @ self.gain[..., None])[..., 0],
            to.frame @ self.root,
        )

    def with_scores(self, at: Lift) -> "Step":
        """The same step with the velocity score of the network call, made at lift `at`, in place of D."""
        gain = self.gain / at.score_gain[..., None]
        return Step(self.matrix - gain[..., :, None] * at.score_state[..., None, :], gain, self.root)

    @staticmethod
    def cat(*steps: "Step") -> "Step":
        """Tables of steps, `(n, ...)` each, one after the other."""
        return Step(*(torch.cat([getattr(step, name) for step in steps]) for name in ("matrix", "gain", "root")))

    def __getitem__(self, index: int | slice) -> "Step":
        return Step(self.matrix[index], self.gain[index], self.root[index])

    def __call__(self, a: Tensor, b: Tensor, answer: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The step of a pair of images a, b and the network's answer, `(B, ...)` each; noise `(B, 2, ...)`."""
        images = [a, b, answer] if noise is None else [a, b, answer, *noise.unbind(1)]
        first, second = torch.cat([self.matrix, self.gain[:, None], self.root], 1).tolist()
        return _combine(first, images), _combine(second, images)


def _combine(coefficients: Sequence[float], images: Sequence[Tensor]) -> Tensor:
    """The sum of images `(B, ...)`, each times its coefficient; coefficients beyond the images are left out."""
    total = coefficients[0] * images[0]
    for coefficient, image in zip(coefficients[1:], images[1:], strict=False):
        if coefficient:
            total.add_(image, alpha=coefficient)
    return total


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
    return score_step(process, at, start - end).after(*half).then(*half)


def sscs_loop_step(process: CLD, start: Tensor, kick: Tensor, drift: Tensor) -> Step:
    """SSCS with the network between the half-steps: S over `kick`, then A over `drift`.

    In a loop, a step's second half-step A and the next one's first are one A. With `kick` the step's length, `drift`
    the distance from its middle to the next one's, and the network labelled with the step's start, it is the
    published order. First order.
    """
    at = lift(process.marginal(start))
    return score_step(process, at, kick).then(*half_step(process, drift))


def sscs_second_order_step(process: CLD, start: Tensor, end: Tensor) -> Step:
    """SSCS as a Strang splitting: half of A, the exact flow of S in the middle of the interval, half of A.

    Stable for any step: S pulls v towards its mean given x and D. Weakly second order with D extrapolated to the
    middle, see `look_ahead`; first order with D of the start.
    """
    half, middle = half_step(process, (start - end) / 2), (start + end) / 2
    length = frozen_length(process, middle, start - end)
    return score_step(process, lift(process.marginal(middle)), length).after(*half).then(*half)


def frozen_length(process: CLD, clock: Tensor, length: Tensor) -> Tensor:
    """The `length` of S in `score_step` that makes it the exact flow of S over `length` with D frozen: `(...)`.

    Then `dv/dB = -k v + ...`, `k = 2 Gamma (P - 1 / M) >= 0`, P the precision of v given x and x0, and
    `v' = v + (1 - e^{-k length}) / k * dv/dB`.
    """
    kernel = process.marginal(clock)
    precision = kernel.covariance[..., 0, 0] / (kernel.root[..., 0, 0] * kernel.root[..., 1, 1]) ** 2
    exponent = 2 * process.friction * (1 / process.mass - precision) * length
    return length * torch.where(exponent == 0, 1.0, torch.expm1(exponent) / exponent)


def look_ahead(sigmas: Tensor, damped: bool) -> Tensor:
    """Factors a of `D + a (D - D_previous)`, D extrapolated in log sigma to the middle of the step that follows.

    `sigmas`: noise levels of all calls of a run, descending, `(n,)`. a is that of `extrapolation.to_the_middle`; 0 at
    the first and the last call and after a step of no length. Under fresh noise the difference of two D's is noise as
    well as trend: `damped` divides by `1 + h^4`, h the step that follows in log sigma, which leaves the order alone, is
    next to nothing below h = 0.5, and drops the extrapolation where a step spans several e-folds of sigma.
    """
    steps = (sigmas[:-1] / sigmas[1:]).log()
    before, after = steps[:-1], steps[1:]
    factors = torch.where(before > 0, to_the_middle(before, after), 0.0) / (1 + after**4 if damped else 1)
    return torch.nn.functional.pad(factors, (1, 1))


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
    return Step(step.matrix, step.gain, torch.zeros_like(step.root))


def probability_flow_step(process: CLD, start: Tensor, end: Tensor) -> Step:
    """Probability flow, exact for a frozen D, on the images `(y, c)`: the noise `((y - D) / sigma, c)` turns.

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
    return Step(matrix, gain, torch.zeros_like(matrix))


def _turn(process: CLD, start: Tensor, end: Tensor) -> Tensor:
    """The angle of `probability_flow_step`, `(...)`: Gauss-Legendre over log B, 64 nodes."""
    nodes, weights = _gauss_legendre(64)
    low, high = start.log()[..., None], end.log()[..., None]
    clock = ((low + high) / 2 + (high - low) / 2 * nodes).exp()
    at = lift(process.marginal(clock))
    # The rows of the inverse frame are w and n / k, and n_v = m_x.
    rate = -process.friction * at.inverse[..., 0, 1] * at.inverse[..., 1, 1] / at.sigma
    return ((high - low) / 2 * weights * clock * rate).sum(-1)


def _gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1] (Golub and Welsch)."""
    i = torch.arange(1, num_nodes, dtype=torch.float64)
    off = i / (4 * i**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, 2 * vectors[0] ** 2
