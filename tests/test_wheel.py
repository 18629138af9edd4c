"""What users install: the wheel, its contents and commands; and slowly, in an environment of its own, and the sdist."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    """What a command prints; none of this repository is on its path."""
    outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=outer | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, unpacked, and the wheel that is built from it."""
    pytest.importorskip("hatchling", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("built")
    build = sys.executable, "-m", "hatchling", "build", "-d", folder
    run(*build, "-t", "sdist", cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # as of Python 3.11.4, and the default of 3.14
        tar.extractall(folder)
    source = folder / archive.name.removesuffix(".tar.gz")
    run(*build, "-t", "wheel", cwd=source)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel; what it depends on comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A plain folder on the path: an editable install that is in it does not take effect.
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = sys.executable, "-m", "pip", "--python", python
    run(*pip, "install", "-q", "--no-deps", "--no-index", built[1], cwd=folder)
    return folder / "env" / "bin"


def test_the_wheel_holds_what_users_need_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata, scripts = (
            next(wheel.read(name).decode() for name in names if name.endswith(end))
            for end in (".dist-info/METADATA", ".dist-info/entry_points.txt")
        )
    assert {"train_gm_sgm.py", "diffusers_gm/__init__.py", "diffusers_gm/py.typed"} <= names
    assert {f"diffusers_gm/training/recipes/{name}.yaml" for name in ("digits", "cifar10-cpu", "cifar10-gpu")} <= names
    assert any(name.endswith("/templates/model_card.md") for name in names)
    assert {f"diffusers_gm/app/{name}.py" for name in ("__main__", "compare", "cells", "page")} <= names
    assert any(name.endswith("/licenses/diffusers_gm/LICENSE") for name in names)
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"train_gm_sgm.py", "diffusers_gm"}
    assert not [name for name in names if "/studies/" in name or "test" in name]
    assert "https://github.com/diffusers-gm/diffusers-gm" in metadata
    assert "Classifier: Programming Language :: Python :: 3.11" in metadata
    assert set(re.findall(r"^(\S+) = ", scripts, re.MULTILINE)) == {
        *("diffusers-gm-train", "diffusers-gm-evaluate", "diffusers-gm-push")
    }


def test_the_commands_of_the_wheel_are_its_own(built, tmp_path):
    pip = sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "wheel"
    run(*pip, built[1], cwd=tmp_path)
    path = {"PYTHONPATH": str(tmp_path / "wheel")}
    for name, option in {"train": "--train_batch_size N", "evaluate": "--scheduler", "push": "--private"}.items():
        assert option in run(tmp_path / "wheel" / "bin" / f"diffusers-gm-{name}", "--help", cwd=tmp_path, **path)
    origin = "from importlib.util import find_spec; print(find_spec('diffusers_gm').origin)"
    where = run(sys.executable, "-c", origin, cwd=tmp_path, **path)
    assert Path(where.split()[-1]).is_relative_to(tmp_path), "the wheel's, not this repository's"


@pytest.mark.slow
def test_a_training_of_three_steps(installed, tmp_path):
    tiny = (
        "--config digits --max_train_steps 3 --block_out_channels 8 16 --validation_inference_steps 4 --output_dir out"
    )
    run(installed / "diffusers-gm-train", *tiny.split(), cwd=tmp_path, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["max_train_steps"] == 3
    sample = (
        "import diffusers_gm as d; p = d.GMSGMPipeline.from_pretrained('out'); p(1, 4).images[0].save('one.png'); "
        "print(d.__file__)"
    )
    where = run(installed / "python", "-c", sample, cwd=tmp_path)
    assert Path(where.split()[-1]).is_relative_to(installed.parent), "the wheel's, not this repository's"
    assert (tmp_path / "one.png").is_file()


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(built):
    source, _ = built
    here = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert {path.name for path in (source / "tests").glob("*.py")} == here
    pytest_ = sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"
    run(*pytest_, "--collect-only", cwd=source, PYTHONPATH=str(source))
    printed = run(*pytest_, "tests/test_options.py", "tests/test_recipe.py", cwd=source, PYTHONPATH=str(source))
    assert " passed" in printed
    assert "skipped" not in printed
