"""What a study leaves behind: its tables, pictures and verdict as one JSON file, a section of the results page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ..evaluation.table import Table, machine, this_command
from ..files import write_text


def by_calls(calls: Iterable[int]) -> list[str]:
    """The columns of a table of numbers of network calls."""
    return [f"{n} calls" for n in calls]


def table_of(caption: str, found: Mapping[str, Sequence[Any]], calls: Sequence[int]) -> Table:
    """Values, a row a name and a column a number of calls."""
    return Table(caption, ["", *by_calls(calls)], [[name, *values] for name, values in found.items()])


@dataclass
class Report:
    """One study.

    Attributes:
        name: stem of the JSON file, and of the pictures where there is one picture.
        title: of the section on the results page.
        question: what is asked, one or two sentences.
        verdict: the answer, worked out from the figures by the study itself; what went against us included.
        tables, pictures: pictures are names of files in the folder of the report.
        conditions: data, sizes, seeds, whatever a reader needs to repeat it.
        command: how to run it again.
        machine: where it ran, and when.
    """

    name: str
    title: str
    question: str
    verdict: str
    tables: list[Table]
    pictures: list[str] = field(default_factory=list)
    conditions: str = ""
    command: str = ""
    machine: str = ""

    def markdown(self, pictures: str = ".") -> str:
        """A section of the results page; `pictures` is the folder of the pictures, seen from the page."""
        parts = [f"## {self.title}", self.question, f"```sh\n{self.command}\n```"]
        parts += [f"![{self.title}]({pictures}/{name})" for name in self.pictures]
        parts += [t.markdown() for t in self.tables]
        parts += [f"**Verdict.** {self.verdict}", f"*{f'{self.conditions} {self.machine}'.strip()}*"]
        return "\n\n".join(parts)

    def write(self, folder: Path) -> None:
        """Print the study, and write `folder/name.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.command = self.command or this_command()
        self.machine = self.machine or f"{machine()}, {date.today()}"
        path = folder / f"{self.name}.json"
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        print("\n\n".join([t.markdown() for t in self.tables]))
        print(f"\nVerdict: {self.verdict}\nwrote {path}")

    @staticmethod
    def read(path: Path) -> "Report":
        """The report in a JSON file.

        Raises:
            ValueError: if the file is not one.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return Report(**{**fields, "tables": [Table(**t) for t in fields["tables"]]})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a report of a study: {error}") from error
