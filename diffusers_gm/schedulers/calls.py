"""Which labels and noise levels the network calls of a run have, as a config of ours says it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..readings import ImageReading, NoiseSpace, Reading, level_range
from ..readings.grids import SHORT, calibrated_levels, even_levels, shift_flow, sigma_grid
from .network import betas_from_config
from .options import SPACING_FLAGS
from .swap import ends_of_no_ladder

# How near to the highest level a calibrated one is that stands for it.
ROUNDED = 0.999

# Noise levels or labels, as users give them.
Levels = Sequence[float] | Tensor


class Calls:
    """The part of a scheduler that places its network calls. Labels and noise levels are `(n,)` float64 on the CPU."""

    config: Any
    reading: Reading
    noise_space: NoiseSpace | None

    @property
    def is_flow(self) -> bool:
        """Whether labels count the time of a rectified flow."""
        return self.noise_space is not None and self.noise_space.kind == "flow"

    # --- Of a run ---

    def passed_by_pipelines(self, sigmas: Levels) -> bool:
        """Whether these are what pipelines of flow networks pass where their user gave no levels, s = 1, 1 - 1/n, ...:
        a number of calls is meant, which the sampler spends and the config's grid lays out. A grid that waits for a
        calibration has none of its own."""
        if not self.is_flow or (self.config.grid == "calibrated" and self.config.calibration is None):
            return False
        return self.are_unasked(sigmas)

    def are_unasked(self, sigmas: Levels) -> bool:
        """Whether levels are s = 1, 1 - 1/n, ..., 1/n, or as many even ones down to the lowest s of the network, each
        moved to one that it was trained at, as Bria's pipeline passes them."""
        given = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten()
        n, num_train = len(given), self.config.num_train_timesteps
        if n == 0:
            return False
        even = [torch.linspace(1, end, n, dtype=torch.float64) for end in (1 / n, 1 / num_train)]
        of_bria = 1 - torch.linspace(0, num_train - 1, n, dtype=torch.float64).floor() / num_train
        return any(torch.allclose(given, unasked, rtol=0, atol=1e-6) for unasked in (*even, of_bria))

    def labels_of(self, num_levels: int, mu: float | None = None) -> Tensor:
        """The labels of `num_levels` levels on the config's grid; `mu`: see `resolution_shift`.

        Raises:
            ValueError: for an unknown spacing, or more levels than the network was trained at.
        """
        config, shift, n = self.config, self.resolution_shift(mu), self.config.num_train_timesteps
        if self.reading.counts_levels and num_levels > n:
            raise ValueError(
                f"{num_levels} noise levels are more than the {n} that the network was trained at: use at most {n} "
                "(num_inference_steps counts network calls; num_langevin_steps spends several on a level)"
            )
        if config.grid == "calibrated":
            levels = self.calibrated_or_even_levels(num_levels, shift)
            labels = self.reading.timestep(levels)
            if levels[0] > ROUNDED * level_range(self.reading)[1]:  # calibrations have six digits
                labels[0] = self.reading.timestep_range[1]
            return labels
        flags = [spacing for flag, spacing in SPACING_FLAGS.items() if config[flag]]
        spacing = flags[0] if flags else config.grid or config.timestep_spacing
        if flags and self.is_flow and config.get("use_flow_sigmas") and spacing != "beta":
            # Solvers that serve DDPM networks, too, mean sigma, unshifted; other flow schedulers mean s.
            return self.reading.timestep(sigma_grid(*self.ends_of_solvers(), num_levels, spacing))
        if flags and self.is_flow and spacing == "log_snr":  # as diffusers means these flags
            spacing = "exponential"
        return self.reading.grid(num_levels, spacing, config.steps_offset, shift, config.shift_terminal)

    def ends_of_solvers(self) -> tuple[float, float]:
        """The highest and the lowest level of the grids that these flags stand for in diffusers' solvers of DDPM and
        flow networks: those of the config, or where it has none of its betas, whatever the network."""
        config = self.config
        if not ends_of_no_ladder(config):
            return config.sigma_max, config.sigma_min
        low, high = level_range(ImageReading(NoiseSpace.vp(betas_from_config(config)[1]), "epsilon"))
        return high, low

    def labels_and_levels(
        self, timesteps: Levels | None, sigmas: Levels | None, mu: float | None
    ) -> tuple[Tensor, Tensor]:
        """Those of calls at given `timesteps`, `sigmas` or both, see `set_timesteps`.

        Raises:
            ValueError: unless they are descending, among those that the network was trained at, and as many.
        """
        given = None if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten()
        own = given if sigmas is None else self._labels_at(sigmas, mu)
        assert own is not None
        first, last = self.reading.timestep_range
        first = 1e-6 if self.is_flow else first
        inside = (first - 1e-6 <= own) & (own <= last + 1e-6)
        if len(own) < 1 or not inside.all() or (own.diff() > 0).any():
            raise ValueError(
                f"custom {'timesteps' if sigmas is None else 'sigmas'} (here, as timesteps, {own.tolist()}) must be at "
                f"least one, none above the one before, in [{first:g}, {last:g}]"
            )
        if given is not None and len(given) != len(own):
            raise ValueError(f"timesteps and sigmas must be as many, got {len(given)} and {len(own)}")
        return own if given is None else given, self.reading.sigma(own)

    def _labels_at(self, levels: Levels, mu: float | None) -> Tensor:
        """Labels of noise levels, without a final 0; in `flow` space they are s before the shift."""
        sigmas = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
        sigmas = sigmas[:-1] if len(sigmas) and sigmas[-1] == 0 else sigmas
        if self.is_flow:
            shift = self.resolution_shift(mu)
            return self.config.num_train_timesteps * shift_flow(sigmas, shift, self.config.shift_terminal)
        low, high = level_range(self.reading)
        # Published schedules are rounded.
        if not ((0.99 * low <= sigmas) & (sigmas <= 1.01 * high)).all():
            raise ValueError(f"custom sigmas {sigmas.tolist()} must be in [{low:.4g}, {high:.4g}]")
        return self.reading.timestep(sigmas.clamp(low, high))

    def resolution_shift(self, mu: float | None) -> float:
        """The factor on sigma of the resolution shift (`flow`), 1 in the other spaces.

        Raises:
            ValueError: if it depends on the resolution, and `mu` is not given.
        """
        config = self.config
        if not self.is_flow:
            return 1.0
        if not config.use_dynamic_shifting:
            return 1.0 if config.shift is None else config.shift
        if mu is None:
            raise ValueError(
                "use_dynamic_shifting=True needs mu in set_timesteps, which pipelines compute from the size, some for "
                "schedulers of diffusers alone: to them give from_config use_dynamic_shifting=False and shift=exp(mu)"
            )
        if config.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"unknown time_shift_type {config.time_shift_type!r}: use 'exponential' or 'linear'")
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def calibrated_or_even_levels(self, num_levels: int, shift: float = 1.0) -> Tensor:
        """The noise levels of the config's calibration, or without one `even_levels`, between the ends of what the
        network was trained at. `flow`: moved by the shift of the resolution.

        A calibration for few calls may begin below the highest level, which a run of more calls than it knows does not;
        unless runs of many calls do, too.
        """
        low, high = level_range(self.reading)
        calibration = self.config.calibration
        if calibration is None:
            levels = even_levels(high / shift, low / shift, num_levels) * shift
        else:
            levels = calibrated_levels(calibration, num_levels) * (shift / calibration.get("shift", 1.0))
            most = max(int(key) for key in calibration if key.isdigit())
            if num_levels == 1 or (num_levels > most and most <= SHORT):
                levels[0] = high
        return levels.clamp(low, high)

    # --- What pipelines and training scripts read ---

    def trained_labels(self) -> Tensor:
        """What training scripts draw from before any run: labels that the network was trained at, `(N,)`.

        As schedulers of diffusers hold them: in `flow` space shifted, unless by the image's size; where labels are not
        counted those of EDM's own grid.
        """
        n = self.config.num_train_timesteps
        if self.noise_space is not None and not self.noise_space.counts_levels:
            return self.reading.grid(n, "karras")
        first, last = self.reading.timestep_range
        labels = torch.linspace(last, first, n, dtype=torch.float64)
        labels = labels.round() if self.reading.counts_levels else labels
        if not self.is_flow or self.config.use_dynamic_shifting:
            return labels
        return n * shift_flow(labels / n, self.resolution_shift(None))

    def visible_sigmas(self, levels: Tensor) -> Tensor:
        """`sigmas` of a scheduler, `(n + 1,)` float32: the levels, ending at 0; s in `flow` space."""
        if self.is_flow:
            levels = self.reading.timestep(levels) / self.config.num_train_timesteps
        return torch.cat([levels, torch.zeros(1)]).float()

    def as_timesteps(self, labels: Tensor) -> Tensor:
        """Labels as networks take them: integers where levels are counted and all are, else float32."""
        integral = self.reading.counts_levels and bool((labels == labels.round()).all())
        return labels.to(torch.int64 if integral else torch.float32)
