"""The site of the documentation, and the notebook of the tour."""

import json
import re
import time
from urllib.parse import unquote

import pytest
from pages import blocks

from diffusers_gm.docs import build, notebook


def broken_links(site):
    """Links of the site, opened as files, that lead to no file or to no heading."""
    pages = {path.resolve(): path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    names = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"]+)"', text):
            file, _, name = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or (name and target in names and name not in names[target]):
                yield f"{path.relative_to(site)}: {link}"


def test_the_site_has_no_warning_and_no_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    started, site = time.process_time(), tmp_path / "site"
    build.build(site)
    assert time.process_time() - started < 60
    assert list(broken_links(site)) == []
    page = (site / "diffusers_gm" / "docs" / "theory-cld.html").read_text()
    assert page.count("<math") > 20
    assert "$" not in page.partition("<article")[2].partition("</article")[0]
    assert (site / "model_cards" / "tour.png").is_file()
    api = (site / "api" / "pipelines.html").read_text()
    assert "diffusers_gm.schedulers.scheduling_cld_sscs.CLDSSCSScheduler" in api


def test_a_broken_link_is_an_error():
    page = build.ROOT / "README.md"
    with pytest.raises(ValueError, match=r"README.md links to nowhere.md, which is not there"):
        build.with_links("[a](nowhere.md)", page)
    said = build.with_links("[a](pyproject.toml) [b](model_cards/results.md#x) `[c](d)` [e](https://f)", page)
    assert said == f"[a]({build.BLOB}/pyproject.toml) [b](model_cards/results.md#x) `[c](d)` [e](https://f)"


def test_formulas_are_found_and_code_is_left_alone():
    pytest.importorskip("latex2mathml", reason="needs the docs extra")
    said = build.with_mathml("$x_0$ costs $5, `$y$`\n\n```bash\necho $HOME $PATH\n```\n\n$$\na^2\n$$\n")
    assert said.count("<math") == 2
    assert 'display="block"' in said
    for left in ("costs $5", "`$y$`", "echo $HOME $PATH"):
        assert left in said


def test_the_notebook_is_that_of_the_tour():
    """Its cells run with the snippets of the other pages."""
    path = notebook.PAGE.with_suffix(".ipynb")
    assert path.read_text() == notebook.notebook(notebook.PAGE.read_text()), "python -m diffusers_gm.docs.notebook"
    cells = json.loads(path.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == [
        block.strip() for block in blocks(notebook.PAGE, "python")
    ]
