"""Networks that see a noisy image: vp, ve, flow, edm."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..processes.broadcast import per_image
from .grids import level_grid
from .noise_space import PREDICTION_TYPES, NoiseSpace


@dataclass(frozen=True)
class Call:
    """One network call: Python floats, worked out once a run in float64, so that a step never waits for the device.

    Attributes:
        label: the timestep fed to the network.
        sigma: noise level of y.
    """

    label: float
    sigma: float


@dataclass(frozen=True)
class ImageCall(Call):
    """The coefficients have the names of EDM (arXiv 2206.00364).

    Attributes:
        visible: the sample is `visible * y`.
        c_in: of the sample: the network is fed `c_in * sample`.
        c_skip, c_out: of y and of the network's output: `D = c_skip * y + c_out * output`.
    """

    visible: float
    c_in: float
    c_skip: float
    c_out: float


@dataclass(frozen=True)
class ImageReading:
    """A network that is fed `alpha * y`, in a noise space and with a prediction type.

    The sample is `alpha * y` in `vp` and `flow` space, so that pipelines which neither scale the network's input nor
    the first noise are served; in `ve` and `edm` space it is y.
    """

    space: NoiseSpace
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES[self.space.kind]:
            raise ValueError(
                f"prediction_type {self.prediction_type!r} is not offered in noise space {self.space.kind!r}: use one "
                f"of {PREDICTION_TYPES[self.space.kind]}"
            )

    @property
    def timestep_range(self) -> tuple[float, float]:
        """The smallest and the largest label that the network was trained at."""
        return self.space.timestep_range

    @property
    def counts_levels(self) -> bool:
        """Whether labels count noise levels, so that integers are exact."""
        return self.space.counts_levels

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels at labels, any shape, float64."""
        return self.space.sigma(timestep)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Labels of noise levels, the inverse of `sigma`."""
        return self.space.timestep(sigma)

    def grid(self, num_levels: int, spacing: str, *shifts: Any) -> Tensor:
        """Descending labels `(num_levels,)` of a spacing, float64; `shifts`: the further arguments of `level_grid`."""
        return level_grid(self.space, num_levels, spacing, *shifts)

    def calls(self, labels: Tensor, sigmas: Tensor | None = None) -> list[Any]:
        """The calls at `labels` `(n,)`, and one more: the end of a run, where sigma is 0 and there is no network.

        `sigmas`: levels that are not those of the labels.
        """
        levels, found = self.space.sigma(labels) if sigmas is None else sigmas, []
        rows = zip(labels.tolist(), levels.tolist(), self.space.alpha(levels).tolist(), strict=True)
        for label, sigma, alpha in rows:
            visible, c_in = (1.0, alpha) if self.space.carries_y else (alpha, 1.0)
            # D is linear in y and in the output: what it makes of either alone.
            of: Any = self.space.denoised
            c_skip, c_out = of(0.0, 1.0, sigma, self.prediction_type), of(1.0, 0.0, sigma, self.prediction_type)
            found.append(ImageCall(label, sigma, visible, c_in, float(c_skip), float(c_out)))
        return [*found, ImageCall(0.0, 0.0, visible=1.0, c_in=1.0, c_skip=0.0, c_out=0.0)]

    def coordinates(self, sample: Tensor, call: ImageCall) -> tuple[Tensor, None]:
        """`y` at a call, and the companion noise of a network that was trained on CLD."""
        return (sample if call.visible == 1 else sample / call.visible), None

    def denoised(self, output: Tensor, sample: Tensor, call: ImageCall) -> Tensor:
        """`D(y; sigma)` of the network's output at a call."""
        if call.c_skip == 0:  # never the output itself, which a compiled network may write its next one into
            return call.c_out * output
        return torch.add(sample * (call.c_skip / call.visible), output, alpha=call.c_out)

    def visible(self, y: Tensor, companion: Tensor | None, call: ImageCall) -> Tensor:
        """The sample at a call, the inverse of `coordinates`."""
        return y if call.visible == 1 else call.visible * y

    def model_input(self, sample: Tensor, timestep: Any, call: ImageCall | None) -> Tensor:
        """What the network is fed for a sample at `timestep`; `call`: the same, where it is known."""
        if not self.space.carries_y:
            return sample
        if call is not None:
            return sample if call.c_in == 1 else call.c_in * sample
        if timestep is None:
            raise ValueError(f"scale_model_input needs the timestep in {self.space.kind!r} noise space")
        alpha = self.space.alpha(self.space.sigma(torch.as_tensor(timestep, dtype=torch.float32)))
        return per_image(alpha, sample) * sample

    def initial_scale(self, sigma: float) -> float:
        """Standard deviation of the sample that a run at first level `sigma` starts from."""
        return sigma if self.space.carries_y else 1.0

    def start_deviation(self, sigma: float) -> float:
        """Standard deviation of the y of that sample: sigma, or what unit noise amounts to."""
        visible = 1.0 if self.space.carries_y else float(self.space.alpha(torch.tensor(sigma, dtype=torch.float64)))
        return self.initial_scale(sigma) / visible

    def initial_sample(self, noise: Tensor, sigma: float) -> Tensor:
        """The sample that a run at first level `sigma` starts from, of unit noise `(B, ...)` of its shape."""
        return self.initial_scale(sigma) * noise

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The sample at `timesteps` `(B,)` or scalar, of clean images and unit noise."""
        if self.space.carries_y:
            noise_factor = self.space.sigma(timesteps)
            return combine(torch.ones_like(noise_factor), images, noise_factor, noise)
        alpha, noise_factor = self.space.coefficients(timesteps)
        return combine(alpha, images, noise_factor, noise)

    def velocity(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a velocity network is trained to answer: in `flow` space `noise - images`, in the others
        `(s noise - sigma / s images) / sqrt(s^2 + sigma^2)`, s the `sigma_data` of `edm` and 1 elsewhere."""
        if self.space.kind == "flow":
            return noise - images
        if self.space.kind == "vp":
            alpha, noise_factor = self.space.coefficients(timesteps)
            return combine(-noise_factor, images, alpha, noise)
        sigma, s = self.space.sigma(timesteps), self.space.sigma_data
        scale = torch.rsqrt(s**2 + sigma**2)
        return combine(-sigma / s * scale, images, s * scale, noise)

    def image(self, sample: Tensor) -> Tensor:
        """The image in the last sample of a run."""
        return sample

    def check(self, output: Tensor, sample: Tensor) -> None:
        """Raise a ValueError unless the shapes of output and sample go together."""
        if output.shape != sample.shape:
            raise ValueError(
                f"the network's output has shape {tuple(output.shape)}, the sample {tuple(sample.shape)}: they "
                "must agree (for a network that also answers a variance, set variance_type='learned_range')"
            )


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """`a * x + b * y` in float32 or better, in the dtype of x; a and b are `(B,)` or scalar."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (per_image(a, wide) * wide + per_image(b, wide) * y.to(wide)).to(x.dtype)
