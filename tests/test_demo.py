"""The demo, on a model trained for a moment."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import tiny_network
from PIL import Image

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    UnconditionalPipeline,
)
from diffusers_gm.app.models import Sampler
from diffusers_gm.app.runs import Run
from diffusers_gm.data import split_digit_labels, split_digits
from diffusers_gm.studies import demo, pictures
from diffusers_gm.studies.demo import CALLS, SAMPLERS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "train_gm_sgm.py"]
    short = ["--max_train_steps", "2", "--validation_steps", "0", "--checkpointing_steps", "0"]
    few = ["--class_conditional", "--num_validation_images", "2", "--validation_inference_steps", "5"]
    subprocess.run([*launcher, *short, *few, "--output_dir", str(folder)], check=True, cwd=ROOT)
    return folder


def test_demo_leaves_its_pictures_and_the_table(digits_model, tmp_path):
    twin = shutil.copytree(digits_model, tmp_path / "twin")
    done = subprocess.run(
        [sys.executable, "-m", "diffusers_gm.studies.demo", digits_model, "--num_samples", "8", "--compare", twin],
        check=True,
        capture_output=True,
        text=True,
    )
    for name in ("digits.png", "forward_noise.png", "trajectories.png", "comparison.png"):
        with Image.open(digits_model / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, name
        assert name in done.stdout
    cells, again = (json.loads((folder / "results.json").read_text())["cells"] for folder in (digits_model, twin))
    assert [c["scores"] for c in cells] == [c["scores"] for c in again]
    expected = {(s, n) for s in SAMPLERS[GMLangevinScheduler] for n in CALLS}
    assert {(c["scheduler"], c["calls"]) for c in cells} == expected
    assert all(("sliced W2" in c["scores"]) != bool(c["reason"]) for c in cells)
    assert "| ode | 100 | " in (digits_model / "results.md").read_text()
    comparison = (digits_model / "comparison.md").read_text()
    assert f"| {digits_model.name}: ode | " in comparison
    assert "| twin: ode | " in comparison
    assert "| ode | 100 | " in (digits_model / "README.md").read_text()


def test_a_row_is_a_class(digits_model, monkeypatch):
    drawn = []
    monkeypatch.setattr(demo, "plot_samples", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(demo, "plot_forward_noise", lambda *arguments: None)
    monkeypatch.setattr(demo, "plot_trajectories", lambda *arguments: None)
    demo.draw_pictures(digits_model, seed=0)
    ((samples, real, _, _, columns, names),) = drawn
    assert names == list("0123456789")
    (held_out, digits), pipe = (split_digits()[1], split_digit_labels()[1]), demo.load_pipeline(digits_model, "cpu")
    assert len(samples) == len(real) == columns * len(names)
    for digit, row in enumerate(real.split(columns)):
        assert all(any(image.equal(other) for other in held_out[digits == digit]) for image in row)
    labels = [digit for digit in range(10) for _ in range(columns)]
    again = pipe(100, generator=torch.Generator().manual_seed(0), output_type="pt", class_labels=labels).images
    assert samples.equal(2 * again - 1)


def test_of_a_calibrated_model_the_noise_of_its_method_is_drawn(monkeypatch, tmp_path):
    """And its samples at a number of calls that it is for, under one name everywhere."""
    config = CLDSSCSScheduler(noise_space="ve", sigma_max=9.0, mass=0.5).config
    CLDPipeline(tiny_network(), CalibratedMultistepScheduler.from_config(config)).save_pretrained(tmp_path)
    drawn = {}
    for name in ("samples", "forward_cld", "trajectories"):
        monkeypatch.setattr(demo, f"plot_{name}", lambda *arguments, name=name: drawn.update({name: arguments}))
    monkeypatch.setattr(demo, "FEW", 2)
    demo.draw_pictures(tmp_path, seed=0)
    assert drawn["samples"][2] == "CLDPipeline, calibrated, 20 network calls"
    assert drawn["forward_cld"][1].mass == 0.5
    runs = drawn["trajectories"][0]
    assert [run.sampler.name for run in runs] == [*SAMPLERS[CLDSSCSScheduler], "calibrated"]

    # Calls have numbers, and what could not be done is named with its reason.
    figures = []
    monkeypatch.setattr(pictures, "save_picture", lambda figure, path: figures.append(figure))
    pictures.plot_trajectories([*runs, Run(Sampler("jump", None), 2, error="no way: 2 is too few. Use more")], tmp_path)
    (figure,) = figures
    assert figure.get_suptitle().endswith("\nnot shown: jump: no way")
    assert len(figure.axes) == len(runs)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2"]
    pictures.plt.close(figure)


def test_a_ddpm_has_samplers_too():
    pipe = UnconditionalPipeline(tiny_network(), DDPMScheduler(clip_sample=False))
    assert [*demo.samplers(pipe)] == [*SAMPLERS[AnnealedLangevinScheduler], "DDPMScheduler"]
    pipe.scheduler = CalibratedMultistepScheduler.from_config(pipe.scheduler.config)
    assert [*demo.samplers(pipe)] == [*SAMPLERS[AnnealedLangevinScheduler], "calibrated"]


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
    assert first.count("sampled in") == len(SAMPLERS[GMLangevinScheduler]) + 1, "the calibrated one beside them"
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
def test_demo_refuses_bad_arguments(digits_model, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main([a.format(model=digits_model) for a in arguments])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
