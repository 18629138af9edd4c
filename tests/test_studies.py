import json
import subprocess
import sys

import pytest

from diffusers_gm.studies.page import page
from diffusers_gm.studies.report import Report, Table, command_line


def report(name="one"):
    return Report(
        name=name,
        title=f"Study {name}: x & y",
        question="Is it?",
        verdict="It is not.",
        tables=[Table("A caption.", ["a", "b"], [["x", 1.23456], ["y", None]])],
        pictures=[f"{name}.png"],
        conditions="n = 3.",
    )


def test_a_report_comes_back_from_its_file_as_it_was(tmp_path, capsys):
    before = report()
    before.write(tmp_path)
    assert Report.read(tmp_path / "one.json") == before
    assert before.command
    assert before.machine
    assert [p.name for p in tmp_path.iterdir()] == ["one.json"]
    assert "Verdict: It is not." in capsys.readouterr().out


def test_a_file_that_is_no_report_is_refused_by_name(tmp_path):
    for text in ("{", json.dumps({"tables": []}), json.dumps({"name": "x"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json is not a report"):
            Report.read(tmp_path / "bad.json")


def test_the_page_holds_every_report_and_links_to_its_pictures(tmp_path):
    folder = tmp_path / "cards" / "results"
    for name in ("two", "one"):
        report(name).write(folder)
    text = page(folder, tmp_path / "cards" / "results.md")
    assert text.index("## Study one") < text.index("## Study two")
    assert "![Study one: x & y](results/one.png)" in text
    assert "| x | 1.235 |" in text
    assert "**Verdict.** It is not." in text
    assert "(#study-one-x--y)" in text
    with pytest.raises(ValueError, match="no reports"):
        page(tmp_path / "nothing", tmp_path / "page.md")


def test_page_command(tmp_path):
    report().write(tmp_path / "r")
    command = [sys.executable, "-m", "diffusers_gm.studies.page", "--output", str(tmp_path / "r.md"), "--reports"]
    subprocess.run([*command, str(tmp_path / "r")], check=True)
    assert "It is not." in (tmp_path / "r.md").read_text()
    failed = subprocess.run([*command, str(tmp_path / "none")], check=False, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "run a study" in failed.stderr


def test_command_line_leaves_out_the_folder():
    words = ["terminal", "--output", "a/b", "--steps", "3"]
    assert command_line(words).endswith(" terminal --steps 3")
