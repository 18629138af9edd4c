"""Noise spaces: how a network wants to see the noisy image `y = x0 + sigma * n`.

Every sampler of this package works on `y`, its noise level `sigma` and the denoiser `D(y; sigma) = E[x0 | y]`.
A network is fed `alpha(sigma) * y` and a timestep label instead, and answers in one of several conventions. This
module is the only place that knows about those: timestep <-> sigma <-> alpha, and network output -> `D`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["vp", "ve", "flow", "edm"]

# The largest noise level a sampler starts from when the schedule's own is infinite (zero terminal SNR, flow at
# s = 1): the sample is unit noise to within 1 / MAX_SIGMA. diffusers uses the same figure (abar = 2**-24).
MAX_SIGMA = 4096.0

PREDICTION_TYPES: dict[str, tuple[str, ...]] = {
    "vp": ("epsilon", "sample", "v_prediction", "score", "scaled_score"),
    "ve": ("epsilon", "sample", "v_prediction", "score", "scaled_score"),
    "flow": ("flow_prediction", "epsilon", "sample", "score", "scaled_score"),
    "edm": ("epsilon", "sample", "v_prediction", "edm", "score", "scaled_score"),
}


@dataclass(frozen=True, eq=False)
class NoiseSpace:
    """One of the four conventions by which pretrained networks see a noisy image.

    | kind | alpha(sigma) | timestep label |
    |---|---|---|
    | `vp` | `1 / sqrt(1 + sigma^2)` | index t of the beta schedule, in `[0, N - 1]` |
    | `ve` | as `vp`, or 1 if not `scale_input` | index on a geometric ladder, 0 = smallest sigma; or sigma itself |
    | `flow` | `1 / (1 + sigma)` | `N * s` with `sigma = s / (1 - s)`, in `[0, N]` |
    | `edm` | `1 / sqrt(sigma_data^2 + sigma^2)` | `log(sigma) / 4` (arXiv 2206.00364) |

    Fractional labels are meaningful in all: between integers, `log sigma` is interpolated linearly.

    Attributes:
        kind: `vp`, `ve`, `flow` or `edm`.
        num_train_timesteps: N.
        log_sigmas: float64, increasing: `log sigma` at the integer labels, `(N,)` (`vp`, `ve`); at the ends of the
            trained range, `(2,)` (`edm`); none in `flow`.
        scale_input: `ve` only: whether the network is fed `y / sqrt(1 + sigma^2)` (True) or `y` itself.
        sigma_labels: `ve` only: whether the network is told sigma (NCSN++, arXiv 2011.13456), not an index.
        zero_terminal_snr: `vp` only: whether the last label is pure noise, `sigma` infinite.
        sigma_data: `edm` only: standard deviation of the data that the network was preconditioned for.
    """

    kind: Kind
    num_train_timesteps: int
    log_sigmas: Tensor
    scale_input: bool = True
    zero_terminal_snr: bool = False
    sigma_data: float = 1.0
    sigma_labels: bool = False

    @classmethod
    def vp(cls, alphas_cumprod: Tensor) -> "NoiseSpace":
        """The space of a DDPM network with cumulative products `alphas_cumprod`, shape `(N,)`, in [0, 1).

        Raises:
            ValueError: for a first level without noise, which has no logarithm.
        """
        if not alphas_cumprod[0] < 1:
            raise ValueError(
                f"the betas begin with {float(1 - alphas_cumprod[0]):g}, a level without noise: the first beta "
                "(beta_start, or that of trained_betas) must be above 0"
            )
        abar = alphas_cumprod.double().clamp(min=1 / (1 + MAX_SIGMA**2))
        log_sigmas = 0.5 * (torch.log1p(-abar) - abar.log())
        return cls("vp", len(abar), log_sigmas, zero_terminal_snr=bool(alphas_cumprod[-1] == 0))

    @classmethod
    def ve(
        cls,
        sigma_min: float,
        sigma_max: float,
        num_train_timesteps: int,
        scale_input: bool = True,
        sigma_labels: bool = False,
    ) -> "NoiseSpace":
        """The space of a variance-exploding network on a geometric ladder of `num_train_timesteps` levels."""
        ends = _log_ends(sigma_min, sigma_max)
        ladder = torch.linspace(float(ends[0]), float(ends[1]), num_train_timesteps, dtype=torch.float64)
        return cls("ve", num_train_timesteps, ladder, scale_input, sigma_labels=sigma_labels)

    @classmethod
    def flow(cls, num_train_timesteps: int) -> "NoiseSpace":
        """The space of a rectified-flow network, `x_s = (1 - s) * x0 + s * n`."""
        return cls("flow", num_train_timesteps, torch.empty(0))

    @classmethod
    def edm(cls, sigma_min: float, sigma_max: float, num_train_timesteps: int, sigma_data: float = 1.0) -> "NoiseSpace":
        """The space of a network that is told `log(sigma) / 4`: EDM, and Stable Video Diffusion (`sigma_data` 1)."""
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        return cls("edm", num_train_timesteps, _log_ends(sigma_min, sigma_max), sigma_data=sigma_data)

    @property
    def carries_y(self) -> bool:
        """Whether the sample in a pipeline is y itself; elsewhere it is `alpha * y`, what the network is fed."""
        return self.kind in ("ve", "edm")

    @property
    def counts_levels(self) -> bool:
        """Whether labels count noise levels, so that integers are exact."""
        return self.kind != "edm" and not self.sigma_labels

    @property
    def is_of_betas(self) -> bool:
        """Whether a schedule of betas has the network's inputs and labels."""
        return self.kind in ("vp", "ve") and self.scale_input and not self.sigma_labels

    def betas(self) -> Tensor:
        """The betas of the DDPM network that a network fed `y / sqrt(1 + sigma^2)` is: `(N,)` float64 in (0, 1).

        `abar = 1 / (1 + sigma^2)`, so that `beta_t = (sigma_t^2 - sigma_(t-1)^2) / (1 + sigma_t^2)`.

        Raises:
            ValueError: in `flow` and `edm` space, and in `ve` space without input scaling or with `sigma_labels`.
        """
        if not self.is_of_betas:
            raise ValueError(
                "only a network that is fed y / sqrt(1 + sigma^2), and told an index, has betas: noise space vp, or ve "
                "with scale_input=True and sigma_labels=False"
            )
        variances = (2 * self.log_sigmas).exp()
        return variances.diff(prepend=torch.zeros(1, dtype=torch.float64)) / (1 + variances)

    @property
    def timestep_range(self) -> tuple[float, float]:
        """The smallest and largest timestep label at which the network was trained."""
        if self.kind == "flow":
            return 1.0, float(self.num_train_timesteps)
        if self.kind == "edm":
            return float(self.log_sigmas[0]) / 4, float(self.log_sigmas[1]) / 4
        if self.sigma_labels:
            return math.exp(self.log_sigmas[0]), math.exp(self.log_sigmas[-1])
        return 0.0, self.num_train_timesteps - 1.0

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level at (fractional) labels, any shape, on their device: float64 on a CPU, else float32, which all
        devices have and none needs to wait for.

        Labels outside the trained range are clamped to it; levels are capped at `MAX_SIGMA`.
        """
        t = _precise(timestep)
        if self.kind == "edm":
            return (4 * t).clamp(*(4 * end for end in self.timestep_range)).exp()
        if self.sigma_labels:
            return t.clamp(*self.timestep_range)
        if self.kind == "flow":
            return torch.logit(t / self.num_train_timesteps).exp().clamp(max=MAX_SIGMA)
        ladder = self._ladder(t.dtype, t.device)
        t = t.clamp(0, len(ladder) - 1)
        low = t.floor().long().clamp(max=max(len(ladder) - 2, 0))
        high = (low + 1).clamp(max=len(ladder) - 1)
        return torch.lerp(ladder[low], ladder[high], t - low).exp()

    @cached_property
    def _ladders(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        return {}

    def _ladder(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`log_sigmas` there; sent once, as the CPU waits for a device that it sends something."""
        if (dtype, device) not in self._ladders:
            with torch.inference_mode(False):  # a gradient may pass through a later use
                self._ladders[dtype, device] = self.log_sigmas.to(dtype).to(device)
        return self._ladders[dtype, device]

    def timestep(self, sigma: Tensor) -> Tensor:
        """The fractional label of noise levels, the inverse of `sigma`: same shape, precision as there.

        Levels outside the trained range get its nearest end.
        """
        sigma = _precise(sigma)
        if self.kind == "flow":
            return torch.where(sigma < MAX_SIGMA, sigma / (1 + sigma), 1.0) * self.num_train_timesteps
        log_sigma = sigma.log().clamp(float(self.log_sigmas[0]), float(self.log_sigmas[-1]))
        if self.kind == "edm":
            return log_sigma / 4
        if self.sigma_labels:
            return log_sigma.exp()
        ladder = self.log_sigmas.to(sigma.dtype).to(sigma.device)
        high = torch.searchsorted(ladder, log_sigma.contiguous()).clamp(1, len(ladder) - 1)
        below, above = ladder[high - 1], ladder[high]
        return high - 1 + (log_sigma - below) / (above - below)

    def alpha(self, sigma: Tensor) -> Tensor:
        """The factor on `y` in the network's input, same shape and dtype as `sigma`."""
        if self.kind == "flow":
            return 1 / (1 + sigma)
        if self.kind == "ve" and not self.scale_input:
            return torch.ones_like(sigma)
        return torch.rsqrt(self.sigma_data**2 + sigma**2)

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha, alpha * sigma)` at labels, so that `alpha * y = alpha * x0 + (alpha * sigma) * n`, as `sigma`.

        Exact where sigma is infinite and the network sees pure noise: `(0, 1)`.
        """
        t = _precise(timestep)
        if self.kind == "flow":
            s = (t / self.num_train_timesteps).clamp(0, 1)
            return 1 - s, s
        sigma = self.sigma(t)
        alpha = self.alpha(sigma)
        noise = alpha * sigma
        if self.zero_terminal_snr:
            last = t >= self.num_train_timesteps - 1
            alpha, noise = torch.where(last, 0.0, alpha), torch.where(last, 1.0, noise)
        return alpha, noise

    def denoised(self, output: Tensor, y: Tensor, sigma: Tensor | float, prediction_type: str) -> Tensor:
        """The denoiser `D(y; sigma)` behind a network's output: linear in both. Numbers will do for all three.

        `score` (the score of the density of `y`) and `scaled_score` (`-sigma * score`) are read as the score of a
        model of *Gaussian* noise (Tweedie); for mixture noise see `GaussianMixtureNoise.displacement_precision`.
        `edm` is the preconditioned network of EDM (arXiv 2206.00364, eq. 7), `v_prediction` the same with the other
        sign; where `sigma_data` is 1 that is the velocity of DDPM networks.

        Args:
            output: the network's output, same shape as `y`.
            y: noisy image `x0 + sigma * n`, any shape.
            sigma: number or tensor that broadcasts against `y`.
            prediction_type: one of `PREDICTION_TYPES[self.kind]`.
        """
        if prediction_type in ("epsilon", "scaled_score"):
            return y - sigma * output
        if prediction_type == "sample":
            return output
        if prediction_type == "score":
            return y + sigma**2 * output
        if prediction_type in ("v_prediction", "edm"):
            s = self.sigma_data
            sign = 1 if prediction_type == "edm" else -1
            total = s**2 + sigma**2
            return (s**2 * y + sign * s * sigma * total**0.5 * output) / total
        if prediction_type == "flow_prediction":
            return (y - sigma * output) / (1 + sigma)
        raise ValueError(f"unknown prediction_type {prediction_type!r}: use one of {PREDICTION_TYPES[self.kind]}")

    def output(self, denoised: Tensor, noise: Tensor, sigma: Tensor | float, prediction_type: str) -> Tensor:
        """What a network answers whose denoiser is D: the inverse of `denoised`, for all types but the scores.

        Args:
            denoised: D, any shape.
            noise: `(y - D) / sigma`, same shape.
            sigma: number or tensor that broadcasts against them.
            prediction_type: `epsilon`, `sample`, `v_prediction`, `edm` or `flow_prediction`.
        """
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return denoised
        if prediction_type in ("v_prediction", "edm"):
            s = self.sigma_data
            sign = 1 if prediction_type == "v_prediction" else -1
            return sign * (s * noise - sigma / s * denoised) / (s**2 + sigma**2) ** 0.5
        if prediction_type == "flow_prediction":
            return noise - denoised
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}: use 'epsilon', 'sample', 'v_prediction', 'edm' or "
            "'flow_prediction'"
        )


def _precise(values: Tensor) -> Tensor:
    """Labels or levels in float64 on a CPU; elsewhere in float32: Apple's GPUs have no float64."""
    return values.to(torch.float64 if values.device.type == "cpu" else torch.float32)


def _log_ends(sigma_min: float, sigma_max: float) -> Tensor:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
    return torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
