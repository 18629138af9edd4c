"""The file of results: every finished cell is in it at once, and none is measured twice."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from filelock import FileLock

from ..files import write_text
from ..launch import from_main, process_state
from .sampling import NoGridError

# Conditions that files of before do not have.
SAID_LATER = ("scheduler", "configs")


@dataclass(frozen=True)
class Cell:
    """A scheduler at a number of network calls, with one seed.

    Attributes:
        scheduler: its name, with its options.
        calls: network calls that were allowed; None for samples that someone else made.
        seed: of the samples; None likewise.
        scores: what `score` returned.
        network_calls: those that were made.
        sampling_seconds, scoring_seconds: wall time.
        reason: why there are no scores.
    """

    scheduler: str
    calls: int | None
    seed: int | None
    scores: dict[str, float] = field(default_factory=dict)
    network_calls: int | None = None
    sampling_seconds: float = 0.0
    scoring_seconds: float = 0.0
    reason: str = ""

    @property
    def which(self) -> tuple[str, int | None, int | None]:
        """What no two cells of one file share."""
        return self.scheduler, self.calls, self.seed

    def __str__(self) -> str:
        where = self.scheduler if self.calls is None else f"{self.scheduler}, {self.calls} calls, seed {self.seed}"
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        seconds = f"(sampled in {self.sampling_seconds:.1f} s, scored in {self.scoring_seconds:.1f} s)"
        return f"{where}: {self.reason or values} {seconds}"


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation over seeds; the spread is None for one seed."""

    mean: float
    spread: float | None
    num_values: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic":
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    @property
    def error(self) -> float:
        """Standard error of the mean; nan for one seed."""
        return float("nan") if self.spread is None else self.spread / self.num_values**0.5

    def over(self, unit: float) -> "Statistic":
        """The same in another unit."""
        return Statistic(self.mean / unit, None if self.spread is None else self.spread / unit, self.num_values)

    def __format__(self, spec: str) -> str:
        of_mean, of_spread = (spec, spec) if spec else (".4g", ".2g")
        return f"{self.mean:{of_mean}}" + (f" ± {self.spread:{of_spread}}" if self.spread is not None else "")

    def __str__(self) -> str:
        return format(self)


@dataclass
class Results:
    """Cells, the floor, and the conditions that they share, in a JSON file that is written whole or not at all.

    Attributes:
        path: of the file.
        conditions: all that the numbers depend on, besides what is in a `Cell`.
        command: the last that measured something.
        floor: scores of draws of real images.
        cells: what is finished.
    """

    path: Path
    conditions: dict[str, Any]
    command: str = ""
    floor: list[dict[str, float]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, conditions: dict[str, Any], command: str = "") -> "Results":
        """Results under these conditions: those of the file, if there is one, to be gone on with.

        Raises:
            ValueError: if the file holds something else, or results under other conditions.
            OSError: if its folder cannot be made.
        """
        ours = json.loads(json.dumps(conditions, default=str))
        found = cls.read(path) if path.is_file() else cls(path, ours)
        different = [
            f"{name} {found.conditions.get(name)!r}, now {ours.get(name)!r}"
            for name in dict.fromkeys([*found.conditions, *ours])
            if name not in SAID_LATER or name in found.conditions
            if found.conditions.get(name) != ours.get(name)
        ]
        if different:
            raise ValueError(
                f"{path} holds results under other conditions ({'; '.join(different)}): take another --output_dir, or "
                "remove the file"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        found.command = command
        return found

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The results in a file.

        Raises:
            ValueError: if it holds something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            cells = [Cell(**cell) for cell in found["cells"]]
            return cls(path, dict(found["conditions"]), found.get("command", ""), list(found["floor"]), cells)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold results of diffusers_gm.evaluation: {error!r}") from error

    def find(self, scheduler: str, calls: int | None, seed: int | None) -> Cell | None:
        """The finished cell, or None."""
        wanted = (scheduler, calls, seed)
        return next((cell for cell in self.cells if cell.which == wanted), None)

    def measure(
        self,
        scheduler: str,
        calls: int | None,
        seed: int | None,
        draw: Callable[[], tuple[Any, int | None]],
        score: Callable[[Any], dict[str, float]],
    ) -> Cell:
        """The finished cell; where there is none it is measured, written and printed. All processes take part.

        Args:
            scheduler, calls, seed: which cell.
            draw: gives the samples, and the network calls that were made. Where it raises a `NoGridError`, that is
                the reason why the cell has no scores.
            score: of the samples; its values must be the same on all processes.
        """
        if (found := self.find(scheduler, calls, seed)) is not None:
            return found
        start = time.perf_counter()
        try:
            samples, network_calls = draw()
            sampled = time.perf_counter()
            scores = score(samples)
            seconds = sampled - start, time.perf_counter() - sampled
            cell = Cell(scheduler, calls, seed, scores, network_calls, *seconds)
        except NoGridError as error:
            cell = Cell(scheduler, calls, seed, reason=str(error))
        self.cells.append(cell)
        self.save()
        if process_state().is_main_process:
            print(cell, flush=True)
        return cell

    def of_seeds(
        self, scheduler: str, calls: int | None, num_seeds: int, make: Callable[[int], dict[str, float]]
    ) -> list[dict[str, float]] | None:
        """Scores of the cells of seeds from 0 on, each `make(seed)` where it is not there; None if one has none."""

        def draw(seed: int) -> tuple[int, None]:
            return seed, None  # the scores are not of one set of samples

        cells = [self.measure(scheduler, calls, seed, partial(draw, seed), make) for seed in range(num_seeds)]
        return None if any(cell.reason for cell in cells) else [cell.scores for cell in cells]

    def lock(self) -> FileLock:
        """Held while the file, and what is made of it, is written: another run waits."""
        return FileLock(self.path.with_name(f".{self.path.name}.lock"))

    def save(self) -> None:
        """Write the file; the main process does. What another run has added to it meanwhile stays."""

        def write() -> None:
            with self.lock():
                found = Results.read(self.path) if self.path.is_file() else self
                if found.conditions != self.conditions:
                    raise ValueError(
                        f"{self.path} has meanwhile got results under other conditions, of another run: take another "
                        "--output_dir"
                    )
                ours = {cell.which for cell in self.cells}
                cells = [*self.cells, *(cell for cell in found.cells if cell.which not in ours)]
                content = {
                    "command": self.command,
                    "conditions": self.conditions,
                    "floor": max(self.floor, found.floor, key=len),
                    "cells": [asdict(cell) for cell in cells],
                }
                write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

        from_main(write)
