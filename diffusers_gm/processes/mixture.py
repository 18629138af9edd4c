"""Gaussian-mixture noise: `eta = c_k * sigma * g` with `k ~ weights` and `g ~ N(0, I)`.

A finite Gaussian scale mixture is the tractable stand-in for the increments of a Levy process, which are Gaussian
scale mixtures with infinitely many components: large `c_k` are jumps, small ones roaming. One `k` per image
(default) or per element. With one component of scale 1 everything here is exactly Gaussian noise.

Two functions of a noisy image `y = x0 + sigma * eta` matter, and they differ for more than one component:

- the denoiser `D(y) = E[x0 | y]`, which the ODE, the ancestral sampler and the final denoising need;
- the score `grad log p(y)`, which Langevin dynamics need.

Both follow from the posterior of the component, `r_k`, given the residual `y - D` (see `residual_precision`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .random import Draw, Generators


class GaussianMixtureNoise:
    """A zero-mean Gaussian scale mixture.

    Args:
        weights: probabilities of the components, each >= 0, summing to one. Length K.
        scales: scales `c_k > 0` of the components. Length K. Models are trained with `E[c^2] = 1`; see `normalized`.
        per_element: draw the component for every element on its own instead of once per image.

    Raises:
        ValueError: if the lengths differ, a weight is negative, the weights do not sum to one, a scale is not > 0.
    """

    def __init__(self, weights: Sequence[float], scales: Sequence[float], per_element: bool = False):
        self.weights = torch.as_tensor(weights, dtype=torch.float64).cpu()
        self.scales = torch.as_tensor(scales, dtype=torch.float64).cpu()
        self.per_element = per_element
        if self.weights.ndim != 1 or self.weights.shape != self.scales.shape or len(self.weights) == 0:
            raise ValueError(
                "weights and scales must be lists of the same length, at least one: got "
                f"{self.weights.tolist()} and {self.scales.tolist()}"
            )
        if not bool((self.weights >= 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(f"weights must be non-negative and sum to one, got {self.weights.tolist()}")
        if not bool((self.scales > 0).all() and torch.isfinite(self.scales).all()):
            raise ValueError(f"scales must be positive and finite, got {self.scales.tolist()}")
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        # Whether this is unit Gaussian noise: one component of scale 1.
        self.is_standard_gaussian = self.scales.tolist() == [1.0]

    def __repr__(self) -> str:
        return f"GaussianMixtureNoise({self.weights.tolist()}, {self.scales.tolist()}, per_element={self.per_element})"

    def __len__(self) -> int:
        """The number of components K."""
        return len(self.weights)

    # --- Constructors ---

    @classmethod
    def from_power_law(
        cls, alpha: float, num_components: int, base: float = 2.0, per_element: bool = False
    ) -> "GaussianMixtureNoise":
        """The power-law mixture `c_k ~ base^k`, `pi_k ~ base^(-alpha k)`, k = 0..K-1, normalised to `E[c^2] = 1`.

        `alpha > 0` is the tail index its upper components imitate, `base > 1` the ratio of neighbouring scales.
        """
        if not alpha > 0 or num_components < 1 or not base > 1:
            raise ValueError(
                "a power law needs alpha > 0, num_components >= 1 and base > 1, got "
                f"alpha={alpha}, num_components={num_components}, base={base}"
            )
        k = torch.arange(num_components, dtype=torch.float64)
        return cls(torch.softmax(-alpha * k * math.log(base), 0).tolist(), (base**k).tolist(), per_element).normalized()

    @classmethod
    def from_stable(cls, alpha: float, num_components: int, per_element: bool = False) -> "GaussianMixtureNoise":
        """The quantised symmetric alpha-stable law, normalised to `E[c^2] = 1`.

        A symmetric alpha-stable variable is `sqrt(A) g` with A positive (alpha/2)-stable. A, truncated at its
        quantile 1 - 1e-4, is cut into `num_components` bins of probability that shrink geometrically towards the
        tail; a component stands for a bin, with `c_k^2 = E[A | bin k]`. Two or three components have no heavy
        tails yet; five follow the law far beyond its scale. `alpha = 2` is Gaussian noise.

        Args:
            alpha: stability index in (0, 2].
            num_components: K >= 1.
            per_element: as in the constructor.
        """
        if not 0 < alpha <= 2 or num_components < 1:
            raise ValueError(
                f"need 0 < alpha <= 2 and num_components >= 1, got alpha={alpha}, num_components={num_components}"
            )
        if alpha == 2 or num_components == 1:
            return cls([1.0], [1.0], per_element)
        truncation = 1e-4
        tails = torch.logspace(math.log10(0.4), math.log10(truncation), num_components, dtype=torch.float64)[:-1]
        edges = torch.cat([torch.zeros(1), 1 - tails, torch.ones(1)]).double()
        partial_means = _positive_stable_partial_means(alpha / 2, edges * (1 - truncation))
        weights = edges.diff()
        return cls(weights.tolist(), (partial_means.diff() / weights).sqrt().tolist(), per_element).normalized()

    def normalized(self) -> "GaussianMixtureNoise":
        """The same mixture with scales divided by `sqrt(E[c^2])`, so that its variance per element is one."""
        return GaussianMixtureNoise(
            self.weights.tolist(), (self.scales / self.moment(2) ** 0.5).tolist(), self.per_element
        )

    def moment(self, order: int) -> float:
        """`E[c^order]`."""
        return float((self.weights * self.scales**order).sum())

    @property
    def commonest_scale(self) -> float:
        """The scale of the most probable component: 1 for unit Gaussian noise."""
        return float(self.scales[self.weights.argmax()])

    # --- Draws ---

    def sample(
        self,
        shape: Sequence[int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sigma: float = 1.0,
    ) -> Tensor:
        """Noise of `shape` `(B, ...)`, `sigma * c_k * g`. A list of generators decides one sample each."""
        draw = Draw(generator, torch.device(device), dtype)
        scales = self.sample_scales(shape, draw)
        return sigma * scales * draw.normal(shape)

    def sample_scales(self, shape: Sequence[int], draw: Draw, probabilities: Tensor | None = None) -> Tensor:
        """Jump sizes `c_k`, shape `(B, 1, ...)`, or `shape` if `per_element`. One component draws nothing.

        `probabilities`, shape `(B, K, ...)` as `responsibilities` returns them, replaces the weights. Components are
        drawn in float32 or better: half precision would round the rare ones away.
        """
        index_shape = tuple(shape) if self.per_element else (shape[0],) + (1,) * (len(shape) - 1)
        precise = replace(draw, dtype=torch.promote_types(draw.dtype, torch.float32))
        weights = self._on(precise.dtype, torch.device(draw.device))[0]
        scales = self._on(draw.dtype, torch.device(draw.device))[1]
        if len(self) == 1:
            return scales.expand(index_shape)
        if probabilities is None:
            probabilities = weights[(None, ...) + (None,) * (len(shape) - 1)]
        elif not self.per_element:
            probabilities = probabilities[(...,) + (None,) * (len(shape) - 1)]
        u = precise.uniform(index_shape)[:, None]
        component = (u >= probabilities.cumsum(1)[:, :-1]).sum(1)
        return scales[component]

    # --- Densities. eta has shape (B, ...), sigma is a number or a tensor of shape (B,). ---

    def log_prob(self, eta: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
        """Log density of noise `eta` at level `sigma`, shape `(B,)`, in nats."""
        log_prob = torch.logsumexp(self._log_joint(eta, sigma), 1).reshape(eta.shape[0], -1).sum(1)
        log_sigma = torch.log(torch.as_tensor(sigma, dtype=log_prob.dtype, device=eta.device)).flatten()
        return log_prob - eta[0].numel() * (log_sigma + 0.5 * math.log(2 * math.pi))

    def responsibilities(self, eta: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
        """Posterior `rho_k(eta)` of the components: `(B, K)`, or `(B, K, ...)` if `per_element`; sums to one over k."""
        return torch.softmax(self._log_joint(eta, sigma), 1)

    def score(self, eta: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
        """`grad_eta log p(eta)` `= -sum_k rho_k(eta) eta / (c_k sigma)^2`, same shape as `eta`."""
        sigma = _per_sample(_precise(sigma), eta)
        return -self.precision(self.responsibilities(eta, sigma), eta.ndim) * eta / sigma**2

    def precision(self, responsibilities: Tensor, ndim: int) -> Tensor:
        """`sum_k r_k / c_k^2`, shape `(B, 1, ...)` of `ndim` dimensions, or `(B, ...)` if `per_element`."""
        precisions = self._on(responsibilities.dtype, responsibilities.device)[2]
        # No matrix product, which autocast would round.
        precision = (responsibilities * precisions[(slice(None),) + (None,) * (responsibilities.ndim - 2)]).sum(1)
        return precision if self.per_element else precision[(...,) + (None,) * (ndim - 1)]

    # --- Score <-> denoiser ---

    def residual_precision(self, residual: Tensor, sigma: Tensor | float) -> Tensor:
        """The factor w that turns the denoiser into the score, `sigma^2 * score(y) = w * (D - y)`.

        `w = sum_k r_k / c_k^2` with r_k the posterior of the component given that the noise is the residual
        `y - D(y)`. Exact for one component and for data that are a point mass; otherwise an approximation for data
        of a dimension well below that of the image, where the residual has the length of the noise.
        Shape `(B, 1, ...)`, or that of the residual if `per_element`.
        """
        return self.precision(self.responsibilities(residual, sigma), residual.ndim)

    def displacement_precision(self, displacement: Tensor, sigma: Tensor | float) -> Tensor:
        """The same factor w from `displacement = sigma^2 * score(y)`, so that `D = y + displacement / w`.

        The component is inferred from the length of the score: under component k, `sigma * score` has variance
        `1 / c_k^2` per element. Same shape and accuracy as `residual_precision`.
        """
        return self.precision(self._of_score.responsibilities(displacement, sigma), displacement.ndim)

    @cached_property
    def _of_score(self) -> "GaussianMixtureNoise":
        """The law of `sigma * score` under data that are a point mass: scales `1 / c_k`."""
        return GaussianMixtureNoise(self.weights.tolist(), (1 / self.scales).tolist(), self.per_element)

    def _log_joint(self, eta: Tensor, sigma: Tensor | float) -> Tensor:
        """`log(pi_k N(eta; 0, (c_k sigma)^2))`: `(B, K)`, or elementwise `(B, K, ...)`; without what all components
        share, `-log(sqrt(2 pi) sigma)` of each element. In float32 or better."""
        eta, sigma = _precise(eta), _precise(sigma)
        if self.per_element:
            dim, squares, sigma = 1, eta**2, _per_sample(sigma, eta)
        else:
            dim, squares = eta[0].numel(), eta.flatten(1).square().sum(1)
            sigma = sigma.flatten() if isinstance(sigma, Tensor) else sigma
        tables = self._on(eta.dtype, eta.device)
        weights, scales, precisions = (table[(slice(None),) + (None,) * (squares.ndim - 1)] for table in tables)
        return weights.log() - dim * scales.log() - (squares / (2 * sigma**2))[:, None] * precisions

    def _on(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, scales and `1 / scales^2` there; moved once, as a device waits for what it is sent."""
        if (dtype, device) not in self._tables:
            with torch.inference_mode(False):  # a gradient may pass through a later use
                weights, scales, precisions = (
                    table.to(dtype).to(device) for table in (self.weights, self.scales, self.scales**-2)
                )
            self._tables[dtype, device] = weights, scales, precisions
        return self._tables[dtype, device]


# Unit Gaussian noise: one component of scale 1.
GAUSSIAN = GaussianMixtureNoise([1.0], [1.0])


def _precise(x: Any) -> Any:
    """In float32 or better, as half precision has no squares of large levels; numbers pass."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) else x


def _per_sample(sigma: Tensor | float, like: Tensor) -> Tensor | float:
    """`sigma` of shape `(B,)` (or already broadcastable) so that it broadcasts against `like`; numbers pass."""
    if not isinstance(sigma, Tensor) or sigma.ndim != 1:
        return sigma
    return sigma[(...,) + (None,) * (like.ndim - 1)]


def _positive_stable_partial_means(rho: float, probabilities: Tensor) -> Tensor:
    """`E[A 1(F(A) <= p)]` of the positive rho-stable law (Laplace transform `exp(-s^rho)`) at each `p`; float64.

    Kanter's representation (Ann. Probab. 3, 1975) gives the distribution function as
    `F(a) = mean over u in (0, pi) of exp(-a^(-rho / (1 - rho)) K(u))`,
    `K(u) = sin((1 - rho) u) sin(rho u)^(rho / (1 - rho)) / sin(u)^(1 / (1 - rho))`.
    """
    exponent = rho / (1 - rho)
    # u = pi - v with log-spaced v: K explodes as v -> 0, which is where the tail of A comes from.
    v = math.pi * torch.exp(-(torch.arange(2500, dtype=torch.float64) + 0.5) * (25 / 2500))
    u = math.pi - v
    log_k = ((1 - rho) * u).sin().log() + exponent * (rho * u).sin().log() - v.sin().log() / (1 - rho)
    # From where F vanishes (the smallest K is the first) to far beyond the truncated tail, P(A > a) ~ a^-rho.
    log_a = torch.linspace((float(log_k.min()) - 6) / exponent, math.log(1e7) / rho, 8001, dtype=torch.float64)
    survival = torch.cat([-torch.expm1(-torch.exp(log_k - exponent * x[:, None])) @ v for x in log_a.split(500)])
    cdf = 1 - survival / v.sum()
    partial_means = (cdf.diff() * ((log_a[1:] + log_a[:-1]) / 2).exp()).cumsum(0)
    partial_means = torch.cat([partial_means.new_zeros(1), partial_means])
    index = torch.searchsorted(cdf, probabilities.contiguous()).clamp(1, len(cdf) - 1)
    part = (probabilities - cdf[index - 1]) / (cdf[index] - cdf[index - 1]).clamp(min=1e-300)
    return torch.lerp(partial_means[index - 1], partial_means[index], part.clamp(0, 1))
