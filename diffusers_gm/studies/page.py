"""The results page, made of the reports of the studies: `python -m diffusers_gm.studies.page`.

Every study writes its tables, pictures and verdict into a folder; this puts them on one page, typed by nobody. What
`diffusers_gm.evaluation` measured may lie there too, its `results.json` and `results.png` under any name.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser
from ..evaluation.report import table, verdict
from ..evaluation.results import Results
from ..files import write_text
from .report import Report

INTRODUCTION = """\
# Results

Made by `python -m diffusers_gm.studies.page` of the reports in `{reports}`; nothing here is typed by hand. Each section
gives the command that measured it, its conditions, and a verdict that the command worked out. Where a result goes
against us, it says so.
"""


def page(reports: Path, output: Path) -> str:
    """The page as Markdown, with links relative to `output`.

    Raises:
        ValueError: if there are no reports in the folder.
    """
    paths = sorted(reports.glob("*.json"))
    if not paths:
        raise ValueError(f"no reports (*.json) in {reports}: run a study with --output {reports}")
    folder = Path(os.path.relpath(reports, output.parent)).as_posix()
    studies = [read(path) for path in paths]
    titles = Counter(s.title for s in studies)
    for study in studies:  # links to headings tell them by their titles
        if titles[study.title] > 1:
            study.title += f" ({study.name})"
    contents = "\n".join(f"- [{s.title}](#{anchor(s.title)}): {s.question}" for s in studies)
    sections = "\n\n".join(s.markdown(folder) for s in studies)
    return f"{INTRODUCTION.format(reports=folder)}\n{contents}\n\n{sections}\n"


def read(path: Path) -> Report:
    """The report of a study, or of what an evaluation has measured.

    Raises:
        ValueError: if the file is neither.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not (isinstance(content, dict) and "cells" in content):
        return Report.read(path)
    results, picture = Results.read(path), path.with_suffix(".png")
    conditions = results.conditions
    return Report(
        path.stem,
        f"Evaluation: {conditions['model']} against {conditions['data']}",
        "How far are the samples from real images, at several numbers of network calls?",
        verdict(results),
        [table(results)],
        [picture.name] if picture.is_file() else [],
        f"{conditions['versions']}.",
        results.command,
    )


def anchor(title: str) -> str:
    """The link to a heading that Markdown viewers make of it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.page", (__doc__ or "").splitlines()[0])
    parser.add_argument("--reports", type=Path, default=Path("model_cards/results"), help="folder of the reports")
    parser.add_argument("--output", type=Path, default=Path("model_cards/results.md"), help="the page")
    args = parser.parse_args(arguments)
    try:
        text = page(args.reports, args.output)
    except ValueError as error:
        parser.error(str(error))
    write_text(args.output, text)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
