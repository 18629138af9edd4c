"""Denoisers of known data: what a perfectly trained network would answer, or one that errs. For tests and studies."""

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..processes.broadcast import per_image
from ..processes.mixture import GAUSSIAN, GaussianMixtureNoise
from ..readings import NoiseSpace
from ..readings.velocity import VELOCITY_PREDICTION_TYPES, VelocityReading

# A network or an exact answer: `(scaled sample, timestep) -> output`.
Network = Callable[[Tensor, Tensor], Tensor]

# Images at a time: what fits into the cache.
CHUNK = 256
# Of the field of `Erring`.
NUM_FEATURES = 256


class Denoiser:
    """`D(y, sigma)` of `y = x0 + sigma * eta`, `(B, C, H, W)`, and its score by Tweedie, as of Gaussian noise."""

    def __call__(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        raise NotImplementedError

    def score(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """`grad log p(y)`, `(B, C, H, W)`."""
        return (self(y, sigma) - y) / sigma**2

    def network_output(self, sample: Tensor, timestep: Tensor, space: NoiseSpace, prediction_type: str) -> Tensor:
        """What a perfect network answers to its input `alpha * y` at a label, or one for each image, in any prediction
        type."""
        labels = torch.as_tensor(timestep).reshape(-1)
        levels = space.sigma(labels)
        sigma, alpha = (per_image(values, sample) for values in (levels, space.alpha(levels)))
        y, level = sample / alpha, levels.to(sample).expand(len(sample)) if len(labels) > 1 else float(levels)
        if prediction_type == "score":
            return self.score(y, level)
        if prediction_type == "scaled_score":
            return -sigma * self.score(y, level)
        denoised = self(y, level)
        return space.output(denoised, (y - denoised) / sigma, sigma, prediction_type)


@dataclass(eq=False)
class ExactDenoiser(Denoiser):
    """`E[x0 | y]` and the score for data that are a mixture of equal Gaussians `N(points_i, width^2 I)`.

    Attributes:
        points: centres `(n, C, H, W)`.
        width: their common standard deviation; 0 for point masses.
        noise: law of the noise.
        weights: probabilities of the centres `(n,)`; None for equal ones.

    `sigma` is a number, or a tensor `(B,)` of a level for each image.
    """

    points: Tensor
    width: float = 0.0
    noise: GaussianMixtureNoise = GAUSSIAN
    weights: InitVar[Tensor | None] = None

    def __post_init__(self, weights: Tensor | None) -> None:
        self.log_weights = torch.zeros(len(self.points)) if weights is None else weights.log()

    def __call__(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        # Under component k, x0 is on the way from y to the centre by 1 - width^2 / v_k.
        return y + self._towards_centres(y, sigma, lambda variances: 1 - self.width**2 / variances)

    def score(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        return self._towards_centres(y, sigma, lambda variances: 1 / variances)

    def _towards_centres(self, y: Tensor, sigma: float | Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """`E[gain(v_k) (centre - y) | y]`, over centres and components, `v_k = width^2 + (c_k sigma)^2`: the shape of
        y."""
        levels = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))
        variances_of = self.width**2 + (levels[:, None] * self.noise.scales.to(y)) ** 2
        of_part, chunk = (self._by_element, CHUNK // 8) if self.noise.per_element else (self._by_image, CHUNK)
        parts = zip(y.flatten(1).split(chunk), variances_of.split(chunk), strict=True)
        return torch.cat([of_part(part, variances, gain) for part, variances in parts]).view(y.shape)

    def _by_image(self, y: Tensor, variances: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        pull = (self._posterior(y, variances) * gain(variances)[:, None]).sum(2)
        return pull @ self.points.to(y).flatten(1) - pull.sum(1, keepdim=True) * y

    def _posterior(self, y: Tensor, variances: Tensor) -> Tensor:
        """Posterior of centre and component, `(B, n, K)`; y is `(B, d)`."""
        flat, centres = y.double(), self.points.to(y).flatten(1).double()
        # |y - x|^2 through a matrix product: in float64 nothing is lost down to sigma = 1e-4.
        squares = flat.square().sum(1)[:, None] + centres.square().sum(1)
        distances = squares.addmm_(flat, centres.mT, alpha=-2).to(y)
        log_weights = self.noise.weights.log().to(y) - 0.5 * flat.shape[1] * variances.log()
        log_joint = distances[..., None] * (-0.5 / variances)[:, None] + log_weights[:, None]
        log_joint = log_joint + self.log_weights.to(y)[:, None]
        return torch.softmax(log_joint.flatten(1), 1).view(log_joint.shape)

    def _by_element(self, y: Tensor, variances: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """With a component of its own for every element, given the centre elements are independent:
        `p_n ~ w_n prod_i sum_k pi_k N(y_i; x_ni, v_k)`."""
        offsets = self.points.to(y).flatten(1) - y[:, None]
        variances = variances[:, None, None]
        log_joint = self.noise.weights.log().to(y) - 0.5 * (variances.log() + offsets[..., None] ** 2 / variances)
        log_centres = torch.logsumexp(log_joint, -1).sum(-1) + self.log_weights.to(y)
        pull = (torch.softmax(log_joint, -1) * gain(variances)).sum(-1)
        return (torch.softmax(log_centres, 1)[..., None] * pull * offsets).sum(1)


@dataclass(eq=False)
class GaussianMixture(Denoiser):
    """The exact denoiser of a mixture of Gaussians, each with a deviation of its own for every element: as all samplers
    are the same in every rotated basis, these are any covariances that share their axes.

    Attributes:
        points: centres `(K, C, H, W)`.
        deviations: `(K, C, H, W)`.
        weights: probabilities `(K,)`.
    """

    points: Tensor
    deviations: Tensor
    weights: Tensor

    @classmethod
    def drawn(cls, shape: tuple[int, int, int], seed: int, num_components: int = 12) -> "GaussianMixture":
        """A mixture that a seed decides: centres of deviation 0.35, deviations from 0.02 to 0.3 in random order."""
        generator = torch.Generator().manual_seed(seed)
        size = math.prod(shape)
        points = (0.35 * torch.randn(num_components, *shape, generator=generator)).clamp(-0.7, 0.7)
        spectrum = torch.logspace(math.log10(0.02), math.log10(0.3), size)
        order = torch.stack([torch.randperm(size, generator=generator) for _ in range(num_components)])
        weights = torch.rand(num_components, generator=generator) + 0.2
        return cls(points, spectrum[order].view(points.shape), weights / weights.sum())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n, C, H, W)`."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.points.shape[1:], generator=generator)
        return self.points[chosen] + self.deviations[chosen] * noise

    def __call__(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        return torch.cat([self._denoised(part, float(sigma)) for part in y.split(CHUNK)])

    def _denoised(self, y: Tensor, sigma: float) -> Tensor:
        flat, centres = y.flatten(1).double(), self.points.to(y.device).flatten(1).double()
        variances = self.deviations.to(y.device).flatten(1).double().square()
        precisions = 1 / (variances + sigma**2)
        distances = flat.square() @ precisions.T - 2 * flat @ (centres * precisions).T
        constant = (centres.square() * precisions - precisions.log()).sum(1)
        posterior = torch.softmax(self.weights.to(y.device).log().double() - 0.5 * (distances + constant), 1)
        kept = variances * precisions
        mean = posterior @ (centres * (1 - kept)) + (posterior @ kept) * flat
        return mean.view(y.shape).to(y)


@dataclass(eq=False)
class Erring(Denoiser):
    """A denoiser with the kind of error that a network has: smooth in the image and in the noise level, the same at
    every call.

    `D + error sigma s / sqrt(sigma^2 + s^2) e(u, ln sigma)`, `u = y / sqrt(sigma^2 + s^2)`: s is the deviation of the
    data, the factor that of `x0` given y if both were Gaussian, and e a field of unit variance,
    `sqrt(2 / F) V cos(W u + a ln sigma + b)` with F features of normal weights, always the same.

    Attributes:
        denoiser: the one that is right.
        deviation: s.
        error: the relative error.
    """

    denoiser: Denoiser
    deviation: float
    error: float

    def __call__(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        sigma = float(sigma)
        flat = y.flatten(1)
        size, count = flat.shape[1], NUM_FEATURES
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(size, count, generator=generator).to(flat) / size**0.5
        of_level, phase = torch.randn(count, generator=generator).to(flat), torch.rand(count, generator=generator)
        back = torch.randn(count, size, generator=generator).to(flat) * (2 / count) ** 0.5
        scale = math.hypot(sigma, self.deviation)
        angles = flat / scale @ mixing + of_level * math.log(sigma) + 2 * math.pi * phase.to(flat)
        field = (angles.cos() @ back).view(y.shape)
        return self.denoiser(y, sigma) + self.error * sigma * self.deviation / scale * field


def exact_network(denoiser: Denoiser, scheduler: Any) -> Network:
    """What a perfect network for these data answers to the scheduler's inputs.

    Raises:
        ValueError: for networks of `cld_edm`, of which there is no exact one here.
    """
    space, prediction_type = scheduler.noise_space, scheduler.reading.prediction_type
    if space is not None:
        return lambda sample, t: denoiser.network_output(sample, t, space, prediction_type)
    if prediction_type not in VELOCITY_PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r}: must be one of {', '.join(VELOCITY_PREDICTION_TYPES)}")
    reading: VelocityReading = scheduler.reading

    def network(model_input: Tensor, t: Tensor) -> Tensor:
        call = reading.calls(t.reshape(-1)[:1].double())[0]
        x, v = model_input.chunk(2, 1)
        state = torch.cat([x, v * reading.process.velocity_scale], 1)
        y, _ = reading.coordinates(state, call)
        return (denoiser(y, call.sigma) - reading.denoised(torch.zeros_like(y), state, call)) / call.gain

    return network


class NetworkOf(nn.Module):
    """A function in place of the UNet2DModel of a pipeline.

    Args:
        function: the network.
        shape: `(C, H, W)` of its output.
        in_channels: of its input; None: as many as of the output.
    """

    dtype = torch.float32

    def __init__(self, function: Network, shape: Sequence[int], in_channels: int | None = None):
        super().__init__()
        self.function = function
        self.register_buffer("nothing", torch.empty(0), persistent=False)  # but a place
        self.config = {
            "in_channels": in_channels or shape[0],
            "out_channels": shape[0],
            "sample_size": tuple(shape[1:]),
            "block_out_channels": (1,),  # it takes images of any size
        }

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self.nothing).device

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.function(sample, timestep))


@torch.no_grad()
def run(network: Network, scheduler: Any, sample: Tensor, generator: torch.Generator) -> Tensor:
    """The last sample of the run that `scheduler.set_timesteps` has prepared, from a first one."""
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample
