"""The file of results: every finished cell is in it at once, and none is measured twice."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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


class Results:
    """Cells, the floor, and the conditions that they share, in a JSON file that is written whole or not at all.

    Args:
        path: of the file; what it holds is taken over.
        conditions: all that the numbers depend on, besides what is in a `Cell`.
        command: the last that measured something.

    Raises:
        ValueError: if the file holds something else, or results under other conditions.
        OSError: if its folder cannot be made.
    """

    def __init__(self, path: Path, conditions: dict[str, Any], command: str = ""):
        self.path = path
        self.command = command
        self.conditions = conditions
        self.floor: list[dict[str, float]] = []
        self.cells: list[Cell] = []
        if path.is_file():
            found = Results.read(path)
            theirs, self.floor, self.cells = found.conditions, found.floor, found.cells
            different = [
                f"{name} {theirs.get(name)!r}, now {conditions.get(name)!r}"
                for name in dict.fromkeys([*theirs, *conditions])
                if theirs.get(name) != conditions.get(name)
            ]
            if different:
                raise ValueError(
                    f"{path} holds results under other conditions ({'; '.join(different)}): take another "
                    "--output_dir, or remove the file"
                )
        path.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The results in a file.

        Raises:
            ValueError: if it holds something else.
        """
        results = cls.__new__(cls)
        results.path = path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            results.command = found.get("command", "")
            results.conditions, results.floor = dict(found["conditions"]), list(found["floor"])
            results.cells = [Cell(**cell) for cell in found["cells"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} does not hold results of diffusers_gm.evaluation: {error!r}") from error
        return results

    def find(self, scheduler: str, calls: int | None, seed: int | None) -> Cell | None:
        """The finished cell, or None."""
        wanted = (scheduler, calls, seed)
        return next((c for c in self.cells if (c.scheduler, c.calls, c.seed) == wanted), None)

    def save(self) -> None:
        """Write the file."""
        content = {
            "command": self.command,
            "conditions": self.conditions,
            "floor": self.floor,
            "cells": [asdict(cell) for cell in self.cells],
        }
        unfinished = self.path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(self.path)
