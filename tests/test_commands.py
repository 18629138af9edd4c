"""Every `python -m diffusers_gm....` says what it is called and what it does."""

import argparse
import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_gm

# Some modules are imported already.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
PACKAGE = Path(diffusers_gm.__file__).parent


def commands():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "likelihood.py":
            continue  # says where its command is
        if path.name == "__main__.py" or 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
            parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
            yield ".".join(parts).removesuffix(".__main__")


@pytest.fixture
def help_of(tmp_path, monkeypatch, capsys):
    """What `python -m module --help` prints, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(module):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert ended.value.code in (None, 0)
        assert not list(tmp_path.iterdir()), "something was done"
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("module", commands())
def test_help(module, help_of):
    said = help_of(module)
    assert said.split()[:4] == ["usage:", "python", "-m", module]
    assert len(said.splitlines()) > 5


@pytest.mark.parametrize("module", commands())
def test_help_is_readable(module, help_of):
    """120 columns; no option beside its opposite."""
    lines = help_of(module).splitlines()
    assert module == "diffusers_gm.studies" or max(map(len, lines)) <= 120  # it lists the studies in one line each
    at = [i for i, line in enumerate(lines) if re.match(r"  --\w", line)] + [len(lines)]
    for begin, end in itertools.pairwise(at):
        entry = " ".join(line.strip() for line in lines[begin:end])
        assert not re.search(r"--no_|, --", entry.partition("  ")[0]), entry


@pytest.mark.parametrize("module", commands())
def test_all_options_say_what_they_are_and_defaults_stand_in_brackets(module, help_of, monkeypatch):
    parsers, show = [], argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: (parsers.append(self), show(self)))
    assert "[]" not in help_of(module)
    for action in parsers[0]._actions:
        assert action.help, action
        assert "default" not in action.help, action
        none = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if action.option_strings and not none:
            assert parsers[0]._get_formatter()._expand_help(action).count("]") == 1, action


def test_the_studies_are_listed(help_of):
    said = help_of("diffusers_gm.studies").splitlines()
    listed = [module.rpartition(".")[2] for module in commands() if module.startswith("diffusers_gm.studies.")]
    assert {"cld", "gm_sgm", "ncsnv2", "step_cost"} <= set(listed)
    for name in listed:
        (line,) = (line for line in said if line.split()[:1] == [name])
        assert len(line.split()) > 4
        assert line.endswith("."), line


def test_an_error_is_one_line(tmp_path):
    """In a process of its own: what Python says of modules that are imported twice would stand above."""
    command = [sys.executable, "-m", "diffusers_gm.evaluation.likelihood", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    said = [line for line in ended.stderr.splitlines() if "transformers" not in line]
    assert len(said) == 1
    assert said[0].startswith(f"error: {tmp_path} holds no trained model")


@pytest.mark.parametrize(
    ("words", "package", "name"),
    [
        ("evaluation nowhere --dataset_name digits", "matplotlib", "evaluation"),
        ("evaluation.likelihood nowhere", "torchdiffeq", "ode"),
        ("studies.demo nowhere", "matplotlib", "evaluation"),
        ("docs.build --output nowhere", "latex2mathml", "docs"),
    ],
)
def test_without_a_package_its_extra_is_named_before_any_work(words, package, name, tmp_path):
    stub = tmp_path / "stubs" / f"{package}.py"
    stub.parent.mkdir()
    stub.write_text(f"raise ModuleNotFoundError('not there', name={package!r})")
    module, *arguments = words.split()
    path = os.pathsep.join([str(stub.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", f"diffusers_gm.{module}", *arguments]
    work = tmp_path / "work"
    work.mkdir()
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=work, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert ended.returncode
    (said,) = (line for line in ended.stderr.splitlines() if "transformers" not in line)
    install = f'pip install "diffusers-gm[{name}]" (in a clone: pip install -e ".[{name}]")'
    assert said.endswith(f"{package} is not installed: {install}")
    assert not list(work.iterdir())


def test_the_mathematics_of_the_likelihood_name_their_command():
    command = [sys.executable, "-m", "diffusers_gm.likelihood", "outputs/digits-cld"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "the command is: python -m diffusers_gm.evaluation.likelihood FOLDER\n"
