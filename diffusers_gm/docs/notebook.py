"""Make the notebook of the tour from its page.

python -m diffusers_gm.docs.notebook
"""

import json
import re
from pathlib import Path
from typing import Any

from ..cli import Parser
from ..files import write_text

PAGE = Path(__file__).with_name("tour.md")
BLOB = "https://github.com/diffusers-gm/diffusers-gm/blob/main/diffusers_gm/docs/"


def notebook(page: str) -> str:
    """The JSON of a notebook: prose and ```python blocks in turn, links as on GitHub."""
    cells: list[dict[str, Any]] = []
    for i, text in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)):
        code = i % 2 == 1
        source = text.strip() if code else re.sub(r"\]\((?!https?:)", f"]({BLOB}", text.strip())
        if source:
            head: dict[str, Any] = {
                "cell_type": "code" if code else "markdown",
                "id": f"cell-{len(cells)}",
                "metadata": {},
            }
            of_code: dict[str, Any] = {"execution_count": None, "outputs": []} if code else {}
            cells.append({**head, "source": source.splitlines(keepends=True), **of_code})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    Parser("diffusers_gm.docs.notebook", __doc__).parse_args()
    path = PAGE.with_suffix(".ipynb")
    write_text(path, notebook(PAGE.read_text("utf-8")))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
