"""What the README tells people to type, typed; and the demo, on a model trained for a moment."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from diffusers_gm import GMLangevinScheduler
from diffusers_gm.studies.demo import CALLS, SAMPLERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


TRAININGS = [b.replace("\\\n", "") for b in blocks("bash") if "train_gm_sgm.py" in b]


def train(command, folder, *more):
    """A training command of the README, cut short."""
    words = shlex.split(command)
    words[words.index("--output_dir") + 1] = str(folder)
    short = ["--max_train_steps", "2", "--validation_steps", "0", "--checkpointing_steps", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
    subprocess.run([*launcher, *short, "--validation_inference_steps", "5", *more], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "demo"
    train(TRAININGS[0], folder, "--num_validation_images", "2")
    return folder


def test_opens_with_the_two_commands():
    first = blocks("bash")[0].split()
    assert first[:2] == ["make", "demo"]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z0-9-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


# Blocks marked `py` and `sh` need the real Hub; test_hub.py and test_swap_pipelines.py make the same calls.
def test_python_snippets_run_in_order(digits_model, tiny_unet, tmp_path, monkeypatch):
    vp = DDPMPipeline(tiny_unet, DDPMScheduler())
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", lambda name: vp)
    monkeypatch.chdir(tmp_path)
    scope = {}
    with torch.random.fork_rng():  # the last snippet passes no generator
        for snippet in blocks("python"):
            exec(snippet.replace("outputs/demo", str(digits_model)), scope)
    assert Image.open("digit.png").size == (8, 8)
    assert len(scope["images"]) == 16
    assert scope["image"].size == (8, 8)


def test_training_on_a_folder_of_images(tmp_path):
    numbers = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(130):
        pixels = numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    command = TRAININGS[1].replace("path/to/images", str(tmp_path / "images"))
    train(command, tmp_path / "mine", "--num_validation_images", "1", "--block_out_channels", "8", "16")
    config = json.loads((tmp_path / "mine" / "scheduler" / "scheduler_config.json").read_text())
    assert config["mixture_weights"] == [0.8, 0.2]
    assert config["mixture_scales"][1] == pytest.approx(3 * config["mixture_scales"][0])


def test_demo_leaves_its_pictures_and_the_table(digits_model, tmp_path):
    twin = shutil.copytree(digits_model, tmp_path / "twin")
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_gm.studies.demo", digits_model, "--num_samples", "8", "--compare", twin],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in ("digits.png", "forward_noise.png", "comparison.png"):
        with Image.open(digits_model / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, name
        assert name in done.stdout
    cells, again = (json.loads((folder / "results.json").read_text())["cells"] for folder in (digits_model, twin))
    assert [c["scores"] for c in cells] == [c["scores"] for c in again]
    expected = {(s, n) for s in SAMPLERS[GMLangevinScheduler] for n in CALLS}
    assert {(c["scheduler"], c["calls"]) for c in cells} == expected
    assert all(("sliced W2" in c["scores"]) != bool(c["reason"]) for c in cells)
    assert "| ode | 200 | " in (digits_model / "results.md").read_text()
    comparison = (digits_model / "comparison.md").read_text()
    assert f"| {digits_model.name}: ode | " in comparison
    assert "| twin: ode | " in comparison
    assert "| ode | 200 | " in (digits_model / "README.md").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.slow  # six real processes
def test_make_demo_goes_on_where_it_was(tmp_path):
    """Neither a complete training nor a measured cell is done again; an interrupted one goes on at its checkpoint."""
    installed, folder = f"{sys.prefix}/.installed", tmp_path / "demo"
    words = [
        "make",
        "-o",
        installed,
        "demo",
        f"VENV={sys.prefix}",
        f"OUTPUT={folder}",
        "DEMO=--calls 12 --num_samples 8",
    ]

    def make(steps, status=0):
        done = subprocess.run([*words, f"STEPS={steps}"], cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    first = make(2)
    assert "steps: 0 to 2" in first
    assert first.count("sampled in") == len(SAMPLERS[GMLangevinScheduler])
    again = make(2)
    assert "steps:" not in again
    assert "sampled in" not in again
    (folder / "model_index.json").unlink()  # as if it had been interrupted before the pipeline was written
    assert "steps: 2 to 2" in make(2)
    assert "--max_train_steps" in make(3, status=2), "another demo needs another folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "no trained pipeline"), (["{model}", "--num_samples", "1000"], r"\[2, 360\]")],
)
def test_demo_refuses_bad_arguments(digits_model, arguments, message):
    arguments = [a.format(model=digits_model) for a in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_gm.studies.demo", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr)
