"""Exact denoisers of known data: what a perfectly trained network would answer. For tests and studies."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..processes.mixture import GaussianMixtureNoise
from ..readings import NoiseSpace

# A network or an exact answer: `(scaled sample, timestep) -> output`.
Network = Callable[[Tensor, Tensor], Tensor]

# Images at a time: what fits into the cache.
CHUNK = 256


class ExactDenoiser:
    """`E[x0 | y]` and the score for data that are a mixture of equal Gaussians `N(points_i, width^2 I)`.

    Args:
        points: centres `(n, C, H, W)`.
        width: their common standard deviation; 0 for point masses.
        noise: law of the noise; None for Gaussian noise. Not per element.
        weights: probabilities of the centres `(n,)`; None for equal ones.
    """

    def __init__(
        self,
        points: Tensor,
        width: float = 0.0,
        noise: GaussianMixtureNoise | None = None,
        weights: Tensor | None = None,
    ):
        self.points = points
        self.width = width
        self.noise = noise or GaussianMixtureNoise([1.0], [1.0])
        self.log_weights = torch.zeros(len(points)) if weights is None else weights.log()
        if self.noise.per_element:
            raise ValueError("per-element mixtures have no exact denoiser: pass noise with per_element=False")

    def _posterior(self, y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Posterior of centre and component `(B, n, K)`, and the variances `width^2 + (c_k sigma)^2`, `(K,)`."""
        flat, centres = y.flatten(1).double(), self.points.to(y).flatten(1).double()
        # |y - x|^2 through a matrix product: in float64 nothing is lost down to sigma = 1e-4.
        squares = flat.square().sum(1)[:, None] + centres.square().sum(1)
        distances = squares.addmm_(flat, centres.mT, alpha=-2).to(y)
        variances = self.width**2 + (self.noise.scales.to(y) * sigma) ** 2
        log_weights = self.noise.weights.log().to(y) - 0.5 * flat.shape[1] * variances.log()
        log_joint = distances[..., None] * (-0.5 / variances) + log_weights + self.log_weights.to(y)[:, None]
        return torch.softmax(log_joint.flatten(1), 1).view(log_joint.shape), variances

    def __call__(self, y: Tensor, sigma: float) -> Tensor:
        """`E[x0 | y]` for `y = x0 + sigma * eta`, `(B, C, H, W)`."""
        return torch.cat([self._denoised(part, sigma) for part in y.split(CHUNK)])

    def _denoised(self, y: Tensor, sigma: float) -> Tensor:
        posterior, variances = self._posterior(y, sigma)
        kept = self.width**2 / variances
        centres = self.points.to(y).flatten(1)
        mean = (posterior @ (1 - kept)) @ centres + (posterior.sum(1) @ kept)[:, None] * y.flatten(1)
        return mean.view(y.shape)

    def score(self, y: Tensor, sigma: float) -> Tensor:
        """`grad log p(y)`, `(B, C, H, W)`."""
        posterior, variances = self._posterior(y, sigma)
        precise = posterior @ (1 / variances)
        centres = self.points.to(y).flatten(1)
        score = precise @ centres - precise.sum(1)[:, None] * y.flatten(1)
        return score.view(y.shape)

    def components(self, y: Tensor, sigma: float) -> Tensor:
        """Posterior probabilities of the noise's components given y, `(B, K)`."""
        return self._posterior(y, sigma)[0].sum(1)

    def network_output(self, sample: Tensor, timestep: Tensor, space: NoiseSpace, prediction_type: str) -> Tensor:
        """What a perfect network answers to its input `alpha * y` at a label, in any prediction type."""
        level = space.sigma(torch.as_tensor(timestep))
        sigma, alpha = float(level), float(space.alpha(level))
        y = sample / alpha
        if prediction_type == "score":
            return self.score(y, sigma)
        if prediction_type == "scaled_score":
            return -sigma * self.score(y, sigma)
        denoised = self(y, sigma)
        return space.output(denoised, (y - denoised) / sigma, sigma, prediction_type)


def exact_network(denoiser: ExactDenoiser, scheduler: Any) -> Network:
    """What a perfect network for these data answers to the scheduler's inputs."""
    space, prediction_type = scheduler.noise_space, scheduler.config["prediction_type"]
    return lambda sample, t: denoiser.network_output(sample, t, space, prediction_type)


class NetworkOf(nn.Module):
    """A function in place of the UNet2DModel of a pipeline.

    Args:
        function: the network.
        shape: `(C, H, W)` of its output.
        in_channels: of its input; None: as many as of the output.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, function: Network, shape: Sequence[int], in_channels: int | None = None):
        super().__init__()
        self.function = function
        self.config = {
            "in_channels": in_channels or shape[0],
            "out_channels": shape[0],
            "sample_size": tuple(shape[1:]),
        }

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.function(sample, timestep))


@torch.no_grad()
def run(network: Network, scheduler: Any, sample: Tensor, generator: torch.Generator) -> Tensor:
    """The last sample of the run that `scheduler.set_timesteps` has prepared, from a first one."""
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample
