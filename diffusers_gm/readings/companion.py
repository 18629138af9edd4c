"""Networks of critically-damped Langevin diffusion that see its state as what it is: a noisy image and a companion.

By the lift a state `(x, v)` is an ordinary noisy image y and an independent unit noise c. A network that is fed both,
and preconditioned as in EDM (arXiv 2206.00364), has nothing to learn but ordinary denoising, and that c says nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..processes.cld import Kernel, Lift, lift
from .noise_space import NoiseSpace
from .reading import per_image
from .velocity import VelocityCall, VelocityReading, check_halves

COMPANION_PREDICTION_TYPE = "cld_edm"


@dataclass(frozen=True)
class CompanionReading(VelocityReading):
    """A network fed `cat([y / sqrt(sigma^2 + sigma_data^2), c], 1)`, `(B, 2C, ...)`, and labels `t *
    num_train_timesteps`; it answers `(B, C, ...)`, the F of EDM. The sample is `cat([x, v], 1)`.

    Attributes:
        space: of kind `edm`: the noise levels that the network was trained at, and how y is seen at them.
    """

    space: NoiseSpace

    @property
    def timestep_range(self) -> tuple[float, float]:
        first, last = self.timestep(self.space.sigma(torch.tensor(self.space.timestep_range).double())).tolist()
        return first, last

    def denoiser(self, marginal: Kernel, at: Lift) -> tuple[Tensor, Tensor]:
        of: Any = self.space.denoised
        skip, gain = of(0.0, 1.0, at.sigma, "edm"), of(1.0, 0.0, at.sigma, "edm")
        return skip[..., None] * at.inverse[..., 0, :], gain

    def network_input(self, y: Tensor, companion: Tensor, sigma: Tensor) -> Tensor:
        """What the network is fed for y at noise levels `(B,)` or scalar and its companion noise, `(B, C, ...)`."""
        return torch.cat([per_image(self.space.alpha(sigma), y) * y, companion], 1)

    def model_input(self, sample: Tensor, timestep: Any, call: VelocityCall | None) -> Tensor:
        check_halves(sample)
        if call is not None:
            return self.network_input(*self.coordinates(sample, call), torch.tensor(call.sigma).double())
        if timestep is None:
            raise ValueError("scale_model_input needs the timestep of a network that sees y and its companion")
        at = lift(self.process.marginal(self.clock(torch.as_tensor(timestep))))
        return self.network_input(*at.image(*sample.chunk(2, 1)), at.sigma)

    def initial_sample(self, noise: Tensor, sigma: float) -> Tensor:
        """The state of an image that is nothing but noise: at the last level that was trained at, not at the prior."""
        check_halves(noise)
        y, companion = noise.chunk(2, 1)
        at = lift(self.process.marginal(self.process.clock_of_sigma(torch.tensor(sigma).double())))
        return torch.cat(at.state(sigma * y, companion), 1)
