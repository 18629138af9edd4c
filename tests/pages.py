"""What pages of documentation tell people to run."""

import json
import re
import shlex


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def snippets(page):
    """The Python of a page; of one that is a notebook too, the code cells of the notebook."""
    notebook = page.with_suffix(".ipynb")
    if not notebook.is_file():
        return blocks(page, "python")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def commands(page):
    """The commands of the shell blocks of a page, lines that go on in one, as words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def inline_commands(page):
    """The modules that the text of a page tells people to run, with their arguments, FOLDER for <folder>."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = [
        shlex.split(re.sub(r"[<>]", "", words)) for words in re.findall(r"`python\s-m\s(diffusers_gm[^`]*)`", text)
    ]
    return [(module.removesuffix("."), words) for module, *words in found]
