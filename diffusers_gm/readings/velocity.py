"""Networks that were trained on critically-damped Langevin diffusion: they see `(x, v)` and answer a velocity score.

By the lift such a state is a noisy image y and an independent unit noise c (see `processes.cld.Lift`), and the score
gives the denoiser of y. So a velocity network is read like any other.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..processes.broadcast import per_image
from ..processes.cld import CLD, Kernel, Lift, lift, perturb
from .grids import TIME_SPACINGS, sigma_grid, time_grid
from .image import Call
from .noise_space import NoiseSpace

# How a velocity network's output is read, see `score_coefficients`.
VELOCITY_PREDICTION_TYPES = ("velocity_score", "scaled_velocity_score", "cld_mixed")

# That of a `CompanionReading`.
COMPANION_PREDICTION_TYPE = "cld_edm"

# A run ends at this time and leaves the rest to the last call (arXiv 2112.07068, appendix B).
LAST_TIME = 1e-3

Pair = tuple[float, float]


@dataclass(frozen=True)
class VelocityCall(Call):
    """Attributes:
    frame, inverse: rows of the lift, `(x, v) = frame @ (y, c)`.
    state, gain: `D = state . (x, v) + gain * output`.
    """

    frame: tuple[Pair, Pair]
    inverse: tuple[Pair, Pair]
    state: Pair
    gain: float


@dataclass(frozen=True)
class VelocityReading:
    """A network fed `cat([x, v / sqrt(M)], 1)`, `(B, 2C, ...)`, and labels `t * num_train_timesteps`; it answers
    `(B, C, ...)`. The sample is `cat([x, v], 1)`. What it can do is said by `ImageReading`."""

    process: CLD
    prediction_type: str
    num_train_timesteps: int

    @property
    def timestep_range(self) -> tuple[float, float]:
        return LAST_TIME * self.num_train_timesteps, float(self.num_train_timesteps)

    @property
    def counts_levels(self) -> bool:
        return False

    def clock(self, timestep: Tensor) -> Tensor:
        """The clock of labels, any shape, float64 on the CPU, where all coefficients are worked out."""
        return self.process.clock(timestep.cpu().double() / self.num_train_timesteps)

    def sigma(self, timestep: Tensor) -> Tensor:
        # Samplers compare levels, and matrix products of many do not promise equal ones for equal labels.
        distinct, places = torch.as_tensor(timestep).unique(return_inverse=True)
        return self.process.sigma(self.clock(distinct))[places]

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.process.time(self.process.clock_of_sigma(sigma)) * self.num_train_timesteps

    def grid(self, num_levels: int, spacing: str, *_: object) -> Tensor:
        """Labels in the trained range, `(num_levels,)` float64: `uniform` or `quadratic` in t, or those of `sigma_grid`
        in `sigma_eff`. All but `even` end at its end.

        What is asked of image networks besides (offsets, shifts) has no meaning here.

        Raises:
            ValueError: for another spacing.
        """
        last, first = self.timestep_range
        if spacing in TIME_SPACINGS:
            n = self.num_train_timesteps
            return n * time_grid(first / n, last / n, num_levels, spacing)
        if spacing not in ("even", "log_snr", "karras"):
            raise ValueError(
                f"timestep_spacing {spacing!r} is not offered for velocity networks: use 'uniform', "
                "'quadratic', 'even', 'log_snr' or 'karras'"
            )
        high, low = self.sigma(torch.tensor([first, last], dtype=torch.float64)).tolist()
        labels = self.timestep(sigma_grid(high, low, num_levels, spacing))
        labels[0] = first
        if spacing != "even" and num_levels > 1:
            labels[-1] = last
        return labels

    def calls(self, labels: Tensor, sigmas: Tensor | None = None) -> list[Any]:
        clocks = self.clock(labels) if sigmas is None else self.process.clock_of_sigma(sigmas)
        marginal = self.process.marginal(clocks)
        at = lift(marginal)
        state, gain = self.denoiser(marginal, at)
        rows = zip(labels.tolist(), *(t.tolist() for t in (at.sigma, at.frame, at.inverse, state, gain)), strict=True)
        # At time 0, v is pure noise of variance gamma M and y is x.
        v0 = math.sqrt(self.process.gamma * self.process.mass)
        end = VelocityCall(0.0, 0.0, ((1.0, 0.0), (0.0, v0)), ((1.0, 0.0), (0.0, 1 / v0)), (0.0, 0.0), 0.0)
        return [*(VelocityCall(*row) for row in rows), end]

    def denoiser(self, marginal: Kernel, at: Lift) -> tuple[Tensor, Tensor]:
        """`(state, gain)` of `D = state . (x, v) + gain * output`, `(..., 2)` and `(...)`: the score of
        `score_coefficients` and `s_v = score_state . u + score_gain * D` solved for D."""
        of_velocity, of_output = score_coefficients(marginal, self.prediction_type)
        of_state = torch.stack([torch.zeros_like(of_velocity), of_velocity], -1) - at.score_state
        return of_state / at.score_gain[..., None], of_output / at.score_gain

    def coordinates(self, sample: Tensor, call: VelocityCall) -> tuple[Tensor, Tensor]:
        return transform_pair(call.inverse, *sample.chunk(2, 1))

    def denoised(self, output: Tensor, sample: Tensor, call: VelocityCall) -> Tensor:
        x, v = sample.chunk(2, 1)
        return (call.state[0] * x).add_(v, alpha=call.state[1]).add_(output, alpha=call.gain)

    def visible(self, y: Tensor, companion: Tensor | None, call: VelocityCall) -> Tensor:
        assert companion is not None
        return torch.cat(transform_pair(call.frame, y, companion), 1)

    def model_input(self, sample: Tensor, timestep: Any, call: VelocityCall | None) -> Tensor:
        check_halves(sample)
        x, v = sample.chunk(2, 1)
        return torch.cat([x, v / self.process.velocity_scale], 1)

    def initial_scale(self, sigma: float) -> float:
        return 1.0

    def initial_sample(self, noise: Tensor, sigma: float) -> Tensor:
        """The prior: `x ~ N(0, 1)`, `v ~ N(0, M)`."""
        check_halves(noise)
        x, v = noise.chunk(2, 1)
        return torch.cat([x, self.process.velocity_scale * v], 1)

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        times = timesteps.cpu().double() / self.num_train_timesteps
        return torch.cat(perturb(self.process, wide, times.reshape(-1), noise.to(wide)), 1).to(images.dtype)

    def velocity(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        raise ValueError(
            f"a network of prediction_type {self.prediction_type!r} answers a velocity score, not the velocity of "
            "v_prediction: its training target is that of diffusers_gm.losses.cld_loss"
        )

    def image(self, sample: Tensor) -> Tensor:
        return sample.chunk(2, 1)[0]

    def check(self, output: Tensor, sample: Tensor) -> None:
        check_halves(sample)
        expected = (sample.shape[0], sample.shape[1] // 2, *sample.shape[2:])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"a velocity network answers {expected} for a sample cat([x, v], 1) of shape {tuple(sample.shape)}, "
                f"but the output has shape {tuple(output.shape)}; for an ordinary network set its own prediction_type"
            )


@dataclass(frozen=True)
class CompanionReading(VelocityReading):
    """A network that sees a state of CLD as what it is by the lift: a noisy image y and an independent unit noise c.
    Preconditioned as in EDM (arXiv 2206.00364) it has nothing to learn but ordinary denoising, and that c says nothing.

    It is fed `cat([y / sqrt(sigma^2 + sigma_data^2), c], 1)`, `(B, 2C, ...)`, and labels `t *
    num_train_timesteps`, and answers `(B, C, ...)`, the F of EDM. The sample is `cat([x, v], 1)`.

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


def score_coefficients(marginal: Kernel, prediction_type: str) -> tuple[Tensor, Tensor]:
    """How a velocity network's output becomes a score: `(a, b)` of `s_v = a * v + b * output`, each `(...)`.

    | | a | b |
    |---|---|---|
    | `velocity_score` | 0 | 1 |
    | `scaled_velocity_score` | 0 | `-ell` |
    | `cld_mixed` | `-1 / Sigma_vv` | `-ell` |

    with `ell = 1 / L22` of the HSM kernel. The last is the paper's mixed score (eq. 9): the output only corrects the
    score of a velocity that knows nothing of x, which is all there is near the prior.
    """
    nothing = torch.zeros_like(marginal.root[..., 1, 1])
    if prediction_type == "velocity_score":
        return nothing, nothing + 1
    if prediction_type == "scaled_velocity_score":
        return nothing, -1 / marginal.root[..., 1, 1]
    if prediction_type == "cld_mixed":
        return -1 / marginal.covariance[..., 1, 1], -1 / marginal.root[..., 1, 1]
    raise ValueError(f"unknown prediction_type {prediction_type!r}: use one of {VELOCITY_PREDICTION_TYPES}")


def transform_pair(rows: tuple[Pair, Pair], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`rows @ (a, b)` for every element of two tensors of one shape."""
    (aa, ab), (ba, bb) = rows
    return torch.add(aa * a, b, alpha=ab), torch.add(ba * a, b, alpha=bb)


def check_halves(sample: Tensor) -> None:
    if sample.ndim < 2 or sample.shape[1] % 2:
        raise ValueError(
            f"the sample of a velocity network is cat([x, v], 1), an even number of channels; got {tuple(sample.shape)}"
        )
