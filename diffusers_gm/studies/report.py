"""What a study leaves behind: its tables, pictures and verdict as one JSON file, and the page made of such files."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from .common import machine, table


@dataclass
class Table:
    """Rows under a header; numbers stay numbers in the file."""

    caption: str
    header: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        return f"{self.caption}\n\n{table(self.header, self.rows)}"


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
        parts += [f"**Verdict.** {self.verdict}", f"*{self.conditions} {self.machine}*"]
        return "\n\n".join(parts)

    def write(self, folder: Path) -> None:
        """Print the study, and write `folder/name.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        self.command = self.command or command_line()
        self.machine = self.machine or f"{machine()}, {date.today()}"
        path = folder / f"{self.name}.json"
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
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


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command of this process, `python -m module options`, without the folder of the results."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("--output", "--output_dir"):
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", module, *words])
