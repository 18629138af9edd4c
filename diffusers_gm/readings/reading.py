"""What every reading can do, and what it knows of a network call."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One network call: Python floats, worked out once a run in float64, so that a step never waits for the device.

    Attributes:
        label: the timestep fed to the network.
        sigma: noise level of y.
    """

    label: float
    sigma: float


class Reading(Protocol):
    """A network, as samplers and schedulers see it. `sample` is the tensor that the pipeline carries, `(B, ...)`.

    Attributes:
        timestep_range: the smallest and the largest label that the network was trained at.
        prediction_type: what it answers.
        counts_levels: whether labels count noise levels, so that integers are exact.
    """

    @property
    def prediction_type(self) -> str: ...

    @property
    def counts_levels(self) -> bool: ...

    @property
    def timestep_range(self) -> tuple[float, float]: ...

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels at labels, any shape, float64."""
        ...

    def timestep(self, sigma: Tensor) -> Tensor:
        """Labels of noise levels, the inverse of `sigma`."""
        ...

    def grid(self, num_levels: int, spacing: str, *shifts: Any) -> Tensor:
        """Descending labels `(num_levels,)` of a spacing, float64; `shifts`: the further arguments of `level_grid`."""
        ...

    def calls(self, labels: Tensor, sigmas: Tensor | None = None) -> list[Any]:
        """The calls at `labels` `(n,)`, and one more: the end of a run, where sigma is 0 and there is no network.

        `sigmas`: levels that are not those of the labels.
        """
        ...

    def coordinates(self, sample: Tensor, call: Any) -> tuple[Tensor, Tensor | None]:
        """`y` at a call, and the companion noise of a network that was trained on CLD."""
        ...

    def denoised(self, output: Tensor, sample: Tensor, call: Any) -> Tensor:
        """`D(y; sigma)` of the network's output at a call."""
        ...

    def visible(self, y: Tensor, companion: Tensor | None, call: Any) -> Tensor:
        """The sample at a call, the inverse of `coordinates`."""
        ...

    def model_input(self, sample: Tensor, timestep: Any, call: Any | None) -> Tensor:
        """What the network is fed for a sample at `timestep`; `call`: the same, where it is known."""
        ...

    def initial_scale(self, sigma: float) -> float:
        """Standard deviation of the sample that a run at first level `sigma` starts from."""
        ...

    def initial_sample(self, noise: Tensor, sigma: float) -> Tensor:
        """The sample that a run at first level `sigma` starts from, of unit noise `(B, ...)` of its shape."""
        ...

    def velocity(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network of `v_prediction` or `flow_prediction` is trained to answer, arguments as in `add_noise`."""
        ...

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The sample at `timesteps` `(B,)` or scalar, of clean images and unit noise."""
        ...

    def image(self, sample: Tensor) -> Tensor:
        """The image in the last sample of a run."""
        ...

    def check(self, output: Tensor, sample: Tensor) -> None:
        """Raise a ValueError unless the shapes of output and sample go together."""
        ...


def level_range(reading: Reading) -> tuple[float, float]:
    """The smallest and the largest noise level that the network was trained at."""
    low, high = reading.sigma(torch.tensor(reading.timestep_range, dtype=torch.float64)).tolist()
    return low, high


def per_image(coefficient: Tensor, like: Tensor) -> Tensor:
    """Coefficients `(B,)` or scalar, in the dtype and on the device of `like` `(B, ...)`, to broadcast against it."""
    return coefficient.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))
