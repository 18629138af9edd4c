"""Critically-damped Langevin diffusion (CLD, arXiv 2112.07068): the process, its kernel, and the lift of any denoiser.

Data x and velocity v diffuse together. On the clock `B(t)`, the integral of beta,

    dx = v / M dB,    dv = -x dB - Gamma v / M dB + sqrt(2 Gamma) dw,    v0 ~ N(0, gamma M).

Every pixel is its own copy of this 2 x 2 linear system, so all coefficients are 2 x 2 matrices that act on the pair
`u = (x, v)`. They are computed in float64 and broadcast over clocks of any shape `(...)`. No randomness in here.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .broadcast import per_image


@dataclass(frozen=True)
class Kernel:
    """A Gaussian transition `u' = transition @ u + root @ z`, z standard normal.

    Attributes:
        transition: F, `(..., 2, 2)`.
        covariance: Sigma, `(..., 2, 2)`.
        root: the lower Cholesky factor L of Sigma, `(..., 2, 2)`.
    """

    transition: Tensor
    covariance: Tensor
    root: Tensor


@dataclass(frozen=True)
class CLD:
    """The process. Its defaults are the paper's.

    Attributes:
        beta_0, beta_1: `beta(t) = beta_0 + beta_1 * t`, positive on [0, 1].
        mass: M > 0.
        gamma: variance of the initial velocity in units of M, positive.
        damping: `Gamma / (2 sqrt(M))`: 1 is critical damping, less is under-, more is over-damped.

    Raises:
        ValueError: for a parameter out of range.
    """

    beta_0: float = 4.0
    beta_1: float = 0.0
    mass: float = 0.25
    gamma: float = 0.04
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not (self.beta_0 > 0 and self.beta_0 + self.beta_1 > 0):
            raise ValueError(
                f"beta(t) = beta_0 + beta_1 * t must be positive on [0, 1], got beta_0={self.beta_0}, "
                f"beta_1={self.beta_1}"
            )
        for name in ("mass", "gamma", "damping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    @property
    def friction(self) -> float:
        """Gamma."""
        return 2 * self.damping * self.velocity_scale

    @property
    def velocity_scale(self) -> float:
        """`sqrt(M)`: the prior is `x ~ N(0, 1)`, `v ~ N(0, M)`."""
        return math.sqrt(self.mass)

    @property
    def drift(self) -> Tensor:
        """The matrix of the forward drift per unit of B, `(2, 2)`."""
        return torch.tensor([[0, 1 / self.mass], [-1, -self.friction / self.mass]], dtype=torch.float64)

    def probability_flow(self, x: Tensor, v: Tensor, velocity_score: Tensor) -> tuple[Tensor, Tensor]:
        """`d(x, v)/dB` of the probability flow, `drift u - Gamma (0, s_v)`: all `(B, ...)`."""
        (_, of_v), (of_x, friction) = self.drift.tolist()
        return of_v * v, of_x * x + friction * v - self.friction * velocity_score

    # --- Time and clock ---

    def beta(self, time: Tensor) -> Tensor:
        """`beta(t)`, same shape, float64."""
        return self.beta_0 + self.beta_1 * time.double()

    def clock(self, time: Tensor) -> Tensor:
        """`B(t)`, the integral of beta from 0 to t: same shape, float64."""
        return time.double() * (self.beta_0 + 0.5 * self.beta_1 * time.double())

    def time(self, clock: Tensor) -> Tensor:
        """The inverse of `clock`, same shape, float64; beyond t = 1 beta goes on in a straight line.

        Raises:
            ValueError: if a falling beta reaches zero before the clock gets there.
        """
        discriminant = self.beta_0**2 + 2 * self.beta_1 * clock.double()
        if not (discriminant > 0).all():
            raise ValueError(
                f"the clock of beta_0={self.beta_0}, beta_1={self.beta_1} never reaches {float(clock.max()):.4g}, "
                "which the largest noise level asks for: use a larger or constant beta, or timestep_spacing='log_snr'"
            )
        return 2 * clock.double() / (self.beta_0 + discriminant.sqrt())

    # --- The kernel ---

    def kernel(self, clock: Tensor, velocity_variance: float = 0.0) -> Kernel:
        """The law of u after `clock` units of B, from known x0 and a velocity of mean v0 and `velocity_variance`.

        With variance 0 it serves denoising score matching and the analytic half-steps; see `marginal` for the other
        one. Semigroup: `F(a + b) = F(a) F(b)`. Fixed point of every kernel: `diag(1, M)`, the prior.

        Args:
            clock: any shape `(...)`, non-negative. At critical damping the entries keep a relative accuracy of 1e-14
                down to 0 (`gammainc` does not cancel); other dampings go through the matrix exponential, 1e-12.
        """
        clock = clock.double()
        transition, known = self._critical(clock) if self.damping == 1 else self._exponential(clock)
        f = transition[..., 1]
        covariance = known + velocity_variance * f[..., :, None] * f[..., None, :]
        # det(known + s f f^T) = det(known) + s f^T adj(known) f, where nothing cancels for small clocks.
        xx, xv, vv = known[..., 0, 0], known[..., 0, 1], known[..., 1, 1]
        spread = f[..., 0] ** 2 * vv - 2 * f[..., 0] * f[..., 1] * xv + f[..., 1] ** 2 * xx
        return Kernel(transition, covariance, cholesky(covariance, xx * vv - xv**2 + velocity_variance * spread))

    def marginal(self, clock: Tensor) -> Kernel:
        """The kernel with the initial velocity integrated out, that of hybrid score matching: `u | x0`."""
        return self.kernel(clock, self.gamma * self.mass)

    def _critical(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """F and Sigma in closed form."""
        tau = 2 * clock / self.friction
        decay = torch.exp(-tau)
        transition = decay[..., None, None] * _matrix(
            1 + tau, 2 * tau / self.friction, -self.friction * tau / 2, 1 - tau
        )
        p = torch.special.gammainc(torch.full_like(tau, 3.0), 2 * tau)
        xv = self.friction * tau**2 * decay**2
        return transition, _matrix(p, xv, xv, self.mass * (p + 4 * tau * decay**2))

    def _exponential(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """F and Sigma for any damping: Van Loan's matrix exponential over a short interval b, then doubling.

        `x / b` in place of x makes the exponent's entries comparable, so that even the x-variance, of order b^3, is
        accurate; doubling, `Sigma(2b) = Sigma(b) + F Sigma(b) F^T`, only adds.
        """
        rate = max(self.friction / self.mass, 1 / self.velocity_scale)
        doublings = max(0, math.ceil(math.log2(max(float(clock.max()) * rate, 1.0))))
        b = clock / 2**doublings
        zero, one = torch.zeros_like(b), torch.ones_like(b)
        drift = _matrix(zero, one / self.mass, -(b**2), -self.friction / self.mass * b)
        noise = _matrix(zero, zero, zero, one)
        top = torch.cat([-drift, noise], -1)
        bottom = torch.cat([torch.zeros_like(drift), drift.mT], -1)
        exponential = torch.linalg.matrix_exp(torch.cat([top, bottom], -2))
        scaled = exponential[..., 2:, 2:].mT
        integral = scaled @ exponential[..., :2, 2:] * (2 * self.friction * b)[..., None, None]
        xv = b * scaled[..., 0, 1]
        transition = _matrix(scaled[..., 0, 0], xv, -self.mass * xv, scaled[..., 1, 1])
        covariance = integral * _matrix(b**2, b, b, one)
        for _ in range(doublings):
            covariance = covariance + transition @ covariance @ transition.mT
            transition = transition @ transition
        return transition, covariance

    # --- The noise level of the equivalent image ---

    def sigma(self, clock: Tensor) -> Tensor:
        """`sigma_eff`, the noise level of the image y that u amounts to, see `Lift`: same shape, float64.

        Strictly increasing: the state only ever loses information about x0.
        """
        return lift(self.marginal(clock)).sigma

    @cached_property
    def _clocks(self) -> tuple[Tensor, Tensor]:
        """Clocks on a fine grid and their `sigma`, from next to nothing to where nothing of the image is left."""
        unit = self.velocity_scale * max(self.damping, 1.0)
        clocks = unit * torch.logspace(-9, 3, 1024, dtype=torch.float64)
        return clocks, self.sigma(clocks)

    def clock_of_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`, same shape, float64, by Newton's method in log B to full precision.

        Raises:
            ValueError: for a level that is not positive and finite, or beyond every clock.
        """
        sigma = sigma.double()
        clocks, sigmas = self._clocks
        if not ((sigma > sigmas[0]) & (sigma < sigmas[-1]) & sigma.isfinite()).all():
            raise ValueError(f"noise levels must be positive and finite, got {sigma.tolist()}")
        clock = clocks[torch.searchsorted(sigmas, sigma.contiguous()) - 1]
        for _ in range(5):
            at = lift(self.marginal(clock))
            # 1 / sigma^2 is the information about x0, of which the noise on v takes 2 Gamma (Sigma^-1 m)_v^2 dB.
            slope = clock * self.friction * (at.score_gain * at.sigma) ** 2
            clock = clock * ((sigma / at.sigma).log() / slope).exp()
        return clock


# --- The lift: any denoiser is a CLD model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Lift:
    """A CLD state is an ordinary noisy image y and an independent unit-noise image c: `u = frame @ (y, c)`.

    `u | x0 ~ N(m x0, Sigma)` informs about x0 only through `y = w^T u`, with `y | x0 ~ N(x0, sigma^2)`; the remaining
    coordinate c is noise, whatever x0 is. The velocity score follows from the denoiser D of y, and D from it:
    `s_v = score_state . u + score_gain * D(y; sigma)`.

    Attributes:
        sigma: noise level of y, `(...)`.
        frame: columns m and `Sigma n / k`, `(..., 2, 2)`.
        inverse: rows `w = Sigma^-1 m sigma^2` and `n / k`, `(..., 2, 2)`, the inverse of `frame`.
        score_state: second row of `-Sigma^-1`, `(..., 2)`.
        score_gain: second entry of `Sigma^-1 m`, `(...)`, negative.
    """

    sigma: Tensor
    frame: Tensor
    inverse: Tensor
    score_state: Tensor
    score_gain: Tensor

    def __getitem__(self, index: int | slice) -> "Lift":
        return Lift(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def image(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`(y, c)` of a state: x, v and both results `(B, ...)`; one clock, or one per sample `(B,)`."""
        return transform(self.inverse, x, v)

    def state(self, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """`(x, v)` of a noisy image and its companion noise, the inverse of `image`."""
        return transform(self.frame, y, c)

    def velocity_score(self, x: Tensor, v: Tensor, denoised: Tensor) -> Tensor:
        """`grad_v log p(x, v)` from `D(y; sigma)`, all `(B, ...)`."""
        a, b = self.score_state.unbind(-1)
        return per_image(a, x) * x + per_image(b, x) * v + per_image(self.score_gain, x) * denoised


def lift(marginal: Kernel) -> Lift:
    """The lift at the clock of a `CLD.marginal` kernel, which must not be 0.

    With `p = adj(Sigma) m`: `w = p / (m . p)` and `sigma^2 = det(Sigma) / (m . p)`; sums of terms of one sign.
    """
    m = marginal.transition[..., 0]
    xx, xv, vv = (marginal.covariance[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    determinant = (marginal.root[..., 0, 0] * marginal.root[..., 1, 1]) ** 2
    p = torch.stack([vv * m[..., 0] - xv * m[..., 1], xx * m[..., 1] - xv * m[..., 0]], -1)
    information = (m * p).sum(-1)
    n = torch.stack([-m[..., 1], m[..., 0]], -1)
    spread = (marginal.covariance @ n[..., None])[..., 0]
    k = (n * spread).sum(-1).sqrt()[..., None]
    return Lift(
        sigma=(determinant / information).sqrt(),
        frame=torch.stack([m, spread / k], -1),
        inverse=torch.stack([p / information[..., None], n / k], -2),
        score_state=torch.stack([xv, -xx], -1) / determinant[..., None],
        score_gain=p[..., 1] / determinant,
    )


def perturb(
    process: CLD, images: Tensor, times: Tensor, noise: Tensor, velocity: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state `(x, v)` at `times`, each `(B, C, ...)`.

    Args:
        images: x0, `(B, C, ...)`, at least float32.
        times: t in [0, 1], `(B,)` or `(1,)`.
        noise: standard normal, `(B, 2C, ...)`, the first half for x.
        velocity: v0, `(B, C, ...)`; None: integrated out, as in hybrid score matching.

    Raises:
        ValueError: for a time outside [0, 1], noise or a velocity of another shape.
    """
    if not ((times >= 0) & (times <= 1)).all():
        raise ValueError(f"times must be in [0, 1], got {times.min().item():.4g} to {times.max().item():.4g}")
    if tuple(noise.shape) != (images.shape[0], 2 * images.shape[1], *images.shape[2:]):
        raise ValueError(
            f"noise must hold x and v, twice the channels of {tuple(images.shape)}; got {tuple(noise.shape)}"
        )
    clock = process.clock(times.cpu())
    kernel = process.marginal(clock) if velocity is None else process.kernel(clock)
    mean = transform(kernel.transition, images, torch.zeros_like(images) if velocity is None else velocity)
    drawn = transform(kernel.root, *noise.chunk(2, 1))
    return mean[0] + drawn[0], mean[1] + drawn[1]


# --- Pairs -----------------------------------------------------------------------------------------------------------


def transform(matrix: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix @ (a, b)` for every element; `matrix` is `(2, 2)` or `(B, 2, 2)`, a and b are `(B, ...)`."""
    if a.shape != b.shape:
        raise ValueError(f"the two halves of a state must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    (aa, ab), (ba, bb) = [[per_image(matrix[..., i, j], a) for j in (0, 1)] for i in (0, 1)]
    return aa * a + ab * b, ba * a + bb * b


def _matrix(xx: Tensor, xv: Tensor, vx: Tensor, vv: Tensor) -> Tensor:
    return torch.stack([torch.stack([xx, xv], -1), torch.stack([vx, vv], -1)], -2)


def cholesky(covariance: Tensor, determinant: Tensor | None = None) -> Tensor:
    """Lower Cholesky factors of `(..., 2, 2)`, from the determinants `(...)` where those are known to more digits."""
    xx, xv, vv = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    if determinant is None:
        determinant = (xx * vv - xv**2).clamp(min=0)
    known = xx == 0
    safe = torch.where(known, 1.0, xx)
    residual = torch.where(known, vv, determinant / safe)
    return _matrix(xx.sqrt(), torch.zeros_like(xx), xv / safe.sqrt(), residual.sqrt())
