"""Which labels and noise levels the network calls of a run have, as a config of ours says it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.cld import CLD
from ..readings import ImageReading, Reading, VelocityReading, level_range
from ..readings.grids import TIME_SPACINGS, calibrated_levels, check_num_levels, even_levels, shift_flow, time_grid
from .options import SPACING_FLAGS

# Noise levels or labels, as users give them.
Levels = Sequence[float] | Tensor


class CallGrid:
    """Labels and noise levels of network calls, `(n,)` float64 on the CPU.

    Args:
        config: of a scheduler of ours.
        reading: how its network sees noise.
    """

    def __init__(self, config: Any, reading: Reading):
        self.config, self.reading = config, reading
        self.space = reading.space if isinstance(reading, ImageReading) else None
        self.is_flow = self.space is not None and self.space.kind == "flow"

    # --- Of a run ---

    def of_number(self, num_levels: int, mu: float | None = None) -> Tensor:
        """The labels of `num_levels` levels on the config's grid; `mu`: see `shift`."""
        config, shift = self.config, self.shift(mu)
        if config.grid == "calibrated":
            return self._calibrated(num_levels, shift)
        return self.reading.grid(num_levels, self._spacing(), config.steps_offset, shift, config.shift_terminal)

    def of_levels(self, timesteps: Levels | None, sigmas: Levels | None, mu: float | None) -> tuple[Tensor, Tensor]:
        """The labels and levels of calls at given `timesteps`, `sigmas` or both, see `set_timesteps`.

        Raises:
            ValueError: unless they are descending, among those that the network was trained at, and as many.
        """
        given = None if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten()
        if sigmas is None:
            assert given is not None
            self._check_descending("timesteps", given)
            return given, self.reading.sigma(given)
        own = self._labels_of(torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"), self.shift(mu))
        self._check_descending("sigmas", own)
        if given is not None and len(given) != len(own):
            raise ValueError(f"timesteps and sigmas must be as many, got {len(given)} and {len(own)}")
        return own if given is None else given, self.reading.sigma(own)

    def shift(self, mu: float | None) -> float:
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
            raise ValueError("use_dynamic_shifting=True needs mu in set_timesteps (pipelines compute it from the size)")
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def calibrated_or_even_levels(self, num_levels: int, shift: float = 1.0) -> Tensor:
        """The noise levels of the config's calibration, or without one `even_levels`: `(num_levels,)` float64, between
        the ends of what the network was trained at. `flow`: moved by the shift of the resolution."""
        low, high = level_range(self.reading)
        calibration = self.config.calibration
        if calibration is None:
            levels = even_levels(high, low, num_levels) * shift
        else:
            levels = calibrated_levels(calibration, num_levels) * (shift / calibration.get("shift", 1.0))
        return levels.clamp(low, high)

    def _spacing(self) -> str:
        config = self.config
        flags = [spacing for flag, spacing in SPACING_FLAGS.items() if config[flag]]
        return flags[0] if flags else config.grid or config.timestep_spacing

    def _calibrated(self, num_levels: int, shift: float) -> Tensor:
        """The labels of `calibrated_or_even_levels`, the first one at the end of what the network was trained at."""
        if self.space is not None:
            check_num_levels(self.space, num_levels)
        last = torch.tensor([self.reading.timestep_range[1]], dtype=torch.float64)
        return torch.cat([last, self.reading.timestep(self.calibrated_or_even_levels(num_levels, shift))[1:]])

    def _labels_of(self, sigmas: Tensor, shift: float) -> Tensor:
        """Labels of noise levels, without a final 0; in `flow` space they are s before the shift."""
        sigmas = sigmas[:-1] if len(sigmas) and sigmas[-1] == 0 else sigmas
        if self.is_flow:
            return self.config.num_train_timesteps * shift_flow(sigmas, shift, self.config.shift_terminal)
        low, high = level_range(self.reading)
        # Published schedules are rounded.
        if not ((0.99 * low <= sigmas) & (sigmas <= 1.01 * high)).all():
            raise ValueError(f"custom sigmas {sigmas.tolist()} must be in [{low:.4g}, {high:.4g}]")
        return self.reading.timestep(sigmas.clamp(low, high))

    def _check_descending(self, name: str, labels: Tensor) -> None:
        first, last = self.reading.timestep_range
        first = 1e-6 if self.is_flow else first
        inside = (first - 1e-6 <= labels) & (labels <= last + 1e-6)
        if len(labels) < 1 or not inside.all() or (labels.diff() > 0).any():
            raise ValueError(
                f"custom {name} (here, as timesteps, {labels.tolist()}) must be at least one, none above the one "
                f"before, in [{first:g}, {last:g}]"
            )

    # --- What pipelines and training scripts read ---

    def trained(self) -> Tensor:
        """What training scripts draw from before any run: labels that the network was trained at, `(N,)`.

        As schedulers of diffusers hold them: in `flow` space shifted, unless by the image's size; in `edm` space those
        of EDM's own grid.
        """
        n = self.config.num_train_timesteps
        if self.space is not None and self.space.kind == "edm":
            return self.reading.grid(n, "karras")
        first, last = self.reading.timestep_range
        labels = torch.linspace(last, first, n, dtype=torch.float64)
        labels = labels.round() if self.reading.counts_levels else labels
        if not self.is_flow or self.config.use_dynamic_shifting:
            return labels
        return n * shift_flow(labels / n, self.shift(None))

    def visible_sigmas(self, labels: Tensor, levels: Tensor) -> Tensor:
        """`sigmas` of a scheduler, `(n + 1,)` float32: the levels, ending at 0; s in `flow` space."""
        if self.is_flow:
            levels = torch.where(labels == self.config.num_train_timesteps, 1.0, levels / (1 + levels))
        return torch.cat([levels, torch.zeros(1)]).float()

    def as_timesteps(self, labels: Tensor) -> Tensor:
        """Labels as networks take them: integers where levels are counted and all are, else float32."""
        integral = self.reading.counts_levels and bool((labels == labels.round()).all())
        return labels.to(torch.int64 if integral else torch.float32)


class TimeGrid(CallGrid):
    """A `CallGrid` that may be even in the time of a critically-damped diffusion which the network has no part in."""

    def __init__(self, config: Any, reading: Reading, process: CLD):
        super().__init__(config, reading)
        self.process = process

    def of_number(self, num_levels: int, mu: float | None = None) -> Tensor:
        # As ever, the flags of other spacings leave those in time alone.
        spacing = self.config.grid or self.config.timestep_spacing
        if spacing not in TIME_SPACINGS or isinstance(self.reading, VelocityReading):
            return super().of_number(num_levels, mu)
        ends = torch.tensor(self.reading.timestep_range[::-1], dtype=torch.float64)
        high, low = self.process.time(self.process.clock_of_sigma(self.reading.sigma(ends))).tolist()
        times = time_grid(high, low, num_levels, spacing)
        return self.reading.timestep(self.process.sigma(self.process.clock(times)))
