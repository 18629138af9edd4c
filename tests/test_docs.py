"""The site of the documentation, and the notebook of the tour."""

import json
import time

import pytest
from test_readme import blocks

from diffusers_gm.docs import build, notebook


def test_the_site_has_no_warning_and_no_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    started = time.process_time()
    build.build(tmp_path / "site")
    assert time.process_time() - started < 60
    page = (tmp_path / "site" / "diffusers_gm" / "docs" / "theory-cld" / "index.html").read_text()
    assert page.count("<math") > 20
    assert "$" not in page.partition("<article")[2].partition("</article")[0]
    assert (tmp_path / "site" / "model_cards" / "tour.png").is_file()
    api = (tmp_path / "site" / "api" / "pipelines" / "index.html").read_text()
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
    """Whose snippets run with those of the other pages."""
    path = notebook.PAGE.with_suffix(".ipynb")
    assert path.read_text() == notebook.notebook(notebook.PAGE.read_text()), "python -m diffusers_gm.docs.notebook"
    cells = json.loads(path.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == [
        block.strip() for block in blocks(notebook.PAGE, "python")
    ]
