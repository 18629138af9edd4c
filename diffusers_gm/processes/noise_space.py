"""Noise spaces: how a network wants to see the noisy image `y = x0 + sigma * n`.

Every sampler of this package works on `y`, its noise level `sigma` and the denoiser `D(y; sigma) = E[x0 | y]`.
A network is fed `alpha(sigma) * y` and a timestep label instead, and answers in one of several conventions. This
module is the only place that knows about those: timestep <-> sigma <-> alpha, and network output -> `D`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["vp", "ve", "flow"]

# The largest noise level a sampler starts from when the schedule's own is infinite (zero terminal SNR, flow at
# s = 1): the sample is unit noise to within 1 / MAX_SIGMA. diffusers uses the same figure (abar = 2**-24).
MAX_SIGMA = 4096.0

PREDICTION_TYPES: dict[str, tuple[str, ...]] = {
    "vp": ("epsilon", "sample", "v_prediction", "score", "scaled_score"),
    "ve": ("epsilon", "sample", "v_prediction", "score", "scaled_score"),
    "flow": ("flow_prediction", "epsilon", "sample", "score", "scaled_score"),
}


@dataclass(frozen=True, eq=False)
class NoiseSpace:
    """One of the three conventions by which pretrained networks see a noisy image.

    | kind | alpha(sigma) | timestep label |
    |---|---|---|
    | `vp` | `1 / sqrt(1 + sigma^2)` | index t of the beta schedule, in `[0, N - 1]` |
    | `ve` | as `vp`, or 1 if not `scale_input` | index on a geometric ladder, 0 = smallest sigma |
    | `flow` | `1 / (1 + sigma)` | `N * s` with `sigma = s / (1 - s)`, in `[0, N]` |

    Fractional labels are meaningful in all three: between integers, `log sigma` is interpolated linearly.

    Attributes:
        kind: `vp`, `ve` or `flow`.
        num_train_timesteps: N.
        log_sigmas: `(N,)` float64, increasing: `log sigma` at the integer labels (`vp`, `ve`); None in `flow`.
        scale_input: `ve` only: whether the network is fed `y / sqrt(1 + sigma^2)` (True) or `y` itself.
        zero_terminal_snr: `vp` only: whether the last label is pure noise, `sigma` infinite.
    """

    kind: Kind
    num_train_timesteps: int
    log_sigmas: Tensor | None = None
    scale_input: bool = True
    zero_terminal_snr: bool = False

    @classmethod
    def vp(cls, alphas_cumprod: Tensor) -> "NoiseSpace":
        """The space of a DDPM network with cumulative products `alphas_cumprod`, shape `(N,)`, in [0, 1)."""
        abar = alphas_cumprod.double().clamp(min=1 / (1 + MAX_SIGMA**2))
        log_sigmas = 0.5 * (torch.log1p(-abar) - abar.log())
        return cls("vp", len(abar), log_sigmas, zero_terminal_snr=bool(alphas_cumprod[-1] == 0))

    @classmethod
    def ve(cls, sigma_min: float, sigma_max: float, num_train_timesteps: int, scale_input: bool = True) -> "NoiseSpace":
        """The space of a variance-exploding network on a geometric ladder of `num_train_timesteps` levels."""
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
        ladder = torch.linspace(float(ends[0]), float(ends[1]), num_train_timesteps, dtype=torch.float64)
        return cls("ve", num_train_timesteps, ladder, scale_input)

    @classmethod
    def flow(cls, num_train_timesteps: int) -> "NoiseSpace":
        """The space of a rectified-flow network, `x_s = (1 - s) * x0 + s * n`."""
        return cls("flow", num_train_timesteps)

    def betas(self) -> Tensor:
        """The betas of the DDPM network that a network fed `y / sqrt(1 + sigma^2)` is: `(N,)` float64 in (0, 1).

        `abar = 1 / (1 + sigma^2)`, so that `beta_t = (sigma_t^2 - sigma_(t-1)^2) / (1 + sigma_t^2)`.

        Raises:
            ValueError: in `flow` space, and in `ve` space without input scaling.
        """
        if self.log_sigmas is None or not self.scale_input:
            raise ValueError("only a network that is fed y / sqrt(1 + sigma^2) has betas: noise space vp, or ve with scale_input=True")  # fmt: skip # noqa: E501
        variances = (2 * self.log_sigmas).exp()
        return variances.diff(prepend=torch.zeros(1, dtype=torch.float64)) / (1 + variances)

    @property
    def timestep_range(self) -> tuple[float, float]:
        """The smallest and largest timestep label at which the network was trained."""
        return (1.0, float(self.num_train_timesteps)) if self.kind == "flow" else (0.0, self.num_train_timesteps - 1.0)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise level at (fractional) labels: any shape, returned in float64 on the labels' device.

        Labels outside the trained range are clamped to it; levels are capped at `MAX_SIGMA`.
        """
        t = timestep.double()
        if self.kind == "flow":
            return torch.logit(t / self.num_train_timesteps).exp().clamp(max=MAX_SIGMA)
        assert self.log_sigmas is not None
        ladder = self.log_sigmas.to(t.device)
        t = t.clamp(0, len(ladder) - 1)
        low = t.floor().long().clamp(max=max(len(ladder) - 2, 0))
        high = (low + 1).clamp(max=len(ladder) - 1)
        return torch.lerp(ladder[low], ladder[high], t - low).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The fractional label of noise levels, the inverse of `sigma`: any shape, float64.

        Levels outside the trained range get its nearest end.
        """
        if self.kind == "flow":
            s = sigma.double() / (1 + sigma.double())
            return torch.where(sigma < MAX_SIGMA, s, 1.0) * self.num_train_timesteps
        assert self.log_sigmas is not None
        ladder = self.log_sigmas.to(sigma.device)
        log_sigma = sigma.double().log().clamp(float(ladder[0]), float(ladder[-1]))
        high = torch.searchsorted(ladder, log_sigma.contiguous()).clamp(1, len(ladder) - 1)
        below, above = ladder[high - 1], ladder[high]
        return high - 1 + (log_sigma - below) / (above - below)

    def alpha(self, sigma: Tensor) -> Tensor:
        """The factor on `y` in the network's input, same shape and dtype as `sigma`."""
        if self.kind == "flow":
            return 1 / (1 + sigma)
        if self.kind == "ve" and not self.scale_input:
            return torch.ones_like(sigma)
        return torch.rsqrt(1 + sigma**2)

    def coefficients(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha, alpha * sigma)` at labels, so that `alpha * y = alpha * x0 + (alpha * sigma) * n`; float64.

        Exact where sigma is infinite and the network sees pure noise: `(0, 1)`.
        """
        t = timestep.double()
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
        """The denoiser `D(y; sigma)` behind a network's output.

        `score` (the score of the density of `y`) and `scaled_score` (`-sigma * score`) are read as the score of a
        model of *Gaussian* noise (Tweedie); for mixture noise see `GaussianMixtureNoise.denoised_from_score`.

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
        if prediction_type == "v_prediction":
            return (y - sigma * (1 + sigma**2) ** 0.5 * output) / (1 + sigma**2)
        if prediction_type == "flow_prediction":
            return (y - sigma * output) / (1 + sigma)
        raise ValueError(f"unknown prediction_type {prediction_type!r}: use one of {PREDICTION_TYPES[self.kind]}")

    def output(self, denoised: Tensor, noise: Tensor, sigma: Tensor | float, prediction_type: str) -> Tensor:
        """What a network answers whose denoiser is D: the inverse of `denoised`, for all types but the scores.

        Args:
            denoised: D, any shape.
            noise: `(y - D) / sigma`, same shape.
            sigma: number or tensor that broadcasts against them.
            prediction_type: `epsilon`, `sample`, `v_prediction` or `flow_prediction`.
        """
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return denoised
        if prediction_type == "v_prediction":
            return (noise - sigma * denoised) / (1 + sigma**2) ** 0.5
        if prediction_type == "flow_prediction":
            return noise - denoised
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}: use 'epsilon', 'sample', 'v_prediction' or 'flow_prediction'"
        )


def level_grid(
    space: NoiseSpace,
    num_levels: int,
    spacing: str,
    steps_offset: int = 0,
    shift: float = 1.0,
    shift_terminal: float | None = None,
) -> Tensor:
    """Descending timestep labels of `num_levels` noise levels, shape `(num_levels,)`, float64.

    Between the ends of the trained range, `log_snr` takes equal ratios of sigma, `karras` equal steps of sigma^(1/7)
    (arXiv 2206.00364, eq. 5), `beta` the quantiles of a Beta(0.6, 0.6) law of sigma (arXiv 2407.12173; needs scipy).
    `linspace`, `leading` and `trailing` are those of diffusers' DDPM (arXiv 2305.08891, table 2), except that a `ve`
    ladder, whose labels may be fractional, is not rounded. `shift` and `shift_terminal`: `flow`, see `shift_flow`.

    Raises:
        ValueError: for an unknown spacing, or more levels than the network was trained at.
    """
    first, last = space.timestep_range
    n = space.num_train_timesteps
    if num_levels > n:
        raise ValueError(
            f"{num_levels} noise levels are more than the {n} that the network was trained at: use at most {n} "
            "(num_inference_steps counts network calls; num_langevin_steps spends several on a level)"
        )
    if spacing in ("log_snr", "karras", "beta"):
        high, low = space.sigma(torch.tensor([last, first], dtype=torch.float64)).tolist()
        ramp = torch.linspace(0, 1, num_levels, dtype=torch.float64)
        if spacing == "log_snr":
            sigmas = (math.log(high) * (1 - ramp) + math.log(low) * ramp).exp()
        elif spacing == "karras":
            sigmas = (high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7
        else:
            from scipy.stats import beta

            sigmas = low + (high - low) * torch.from_numpy(beta.ppf(1 - ramp.numpy(), 0.6, 0.6))
        # Labels are exact integers where they should be: learned embeddings take nothing else.
        grid = space.timestep(sigmas).mul(1e8).round().div(1e8)
        grid[0] = last  # also where its sigma is capped
    elif spacing == "linspace":
        grid = torch.linspace(last, first, num_levels, dtype=torch.float64)
    elif spacing == "leading":
        grid = torch.arange(num_levels - 1, -1, -1, dtype=torch.float64) * (n // num_levels) + first + steps_offset
    elif spacing == "trailing":
        grid = last - torch.arange(num_levels, dtype=torch.float64) * (n / num_levels)
    else:
        raise ValueError(
            f"unknown timestep_spacing {spacing!r}: use 'log_snr', 'karras', 'beta', 'linspace', 'leading' or "
            "'trailing'"
        )
    if space.kind == "vp" and spacing in ("linspace", "leading", "trailing"):
        grid = grid.round()
    if space.kind == "flow":
        grid = n * shift_flow(grid / n, shift, shift_terminal)
    return grid.clamp(first if space.kind != "flow" else None, last)


def shift_flow(s: Tensor, shift: float = 1.0, shift_terminal: float | None = None) -> Tensor:
    """Rectified flow's resolution shift of a descending grid of s in (0, 1], which multiplies sigma by `shift`:
    `s -> shift * s / (1 + (shift - 1) * s)` (arXiv 2403.03206, eq. 23).

    With `shift_terminal`, 1 - s is then stretched so that the grid ends there (LTX-Video's rule, as in diffusers).
    """
    s = shift * s / (1 + (shift - 1) * s)
    if shift_terminal is None:
        return s
    return 1 - (1 - s) * (1 - shift_terminal) / (1 - s[-1])
