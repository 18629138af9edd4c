"""What was measured of a model does not go with another one."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from networks import tiny_network

from diffusers_gm import GMLangevinScheduler, GMSGMPipeline
from diffusers_gm.evaluation.card import add_quality
from diffusers_gm.pipelines import loading
from diffusers_gm.pipelines.measurements import forget_quality, hash_of_card

FIGURES = """\
model-index:
- name: m
  results:
  - task:
      type: unconditional-image-generation
    dataset:
      type: d
      name: d
    metrics:
    - type: sliced-w2
      value: 1.5
      name: sliced W2, GMLangevinScheduler, 10 network calls, n = 20
"""
OF_A_USER = """\
    - type: fid
      value: 3.21
      name: FID, as I compute it
"""
CARD = "---\nlicense: mit\n{figures}---\n\n# Mine\n\n<!-- quality -->\n{quality}\n<!-- end of quality -->\n"
CELL = {"sampler": "gm-sgm", "calls": 5, "ratio": 1.25}
MEASURED = CARD.format(figures=FIGURES, quality="1.5")


@pytest.fixture
def folder(tmp_path):
    """Of a pipeline that was measured."""
    GMSGMPipeline(tiny_network(), GMLangevinScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "m")
    (tmp_path / "m/README.md").write_text(MEASURED)
    (tmp_path / "m/results.json").write_text("{}")
    return tmp_path / "m"


def other_weights(pipeline):
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1)


def other_scheduler(pipeline):
    pipeline.scheduler = GMLangevinScheduler.from_config(pipeline.scheduler.config, algorithm_type="ode")


def other_precision(pipeline):
    pipeline.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [(None, True), (other_precision, True), (other_weights, False), (other_scheduler, False)],
)
def test_a_push_has_the_figures_of_its_own_model_alone(folder, tmp_path, monkeypatch, change, is_same):
    monkeypatch.setattr(loading, "upload", lambda pushed, *_: shutil.copytree(pushed, tmp_path / "pushed"))
    pipeline = GMSGMPipeline.from_pretrained(folder)
    if change:
        change(pipeline)
    pipeline.push_to_hub("me/m")
    card = (tmp_path / "pushed/README.md").read_text()
    assert "# Mine" in card
    assert ("model-index" in card, "1.5" in card, (tmp_path / "pushed/results.json").is_file()) == (is_same,) * 3
    assert (folder / "README.md").read_text() == MEASURED, "the folder stays as it is"


def test_a_model_that_is_saved_over_a_measured_one(folder):
    pipeline = GMSGMPipeline.from_pretrained(folder)
    pipeline.save_pretrained(folder)
    assert (folder / "README.md").read_text() == MEASURED, "it is the same"
    other_weights(pipeline)
    pipeline.save_pretrained(folder)
    assert "1.5" not in (folder / "README.md").read_text()
    assert json.loads((folder / "results-before.json").read_text()) == {}
    assert not (folder / "results.json").exists()


def test_what_a_user_has_measured_stays_in_the_card(folder):
    """When ours goes, and when it comes again; and it is an edit."""
    (folder / "README.md").write_text(MEASURED.replace(FIGURES, FIGURES + OF_A_USER))
    forget_quality(folder)
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.metric_type, result.metric_value) == ("fid", 3.21)
    (folder / "quality.json").write_text(json.dumps({"n": 5, "floor": 1.0, "m": [CELL]}))
    for _ in range(2):
        add_quality(folder)
        results = ModelCard.load(folder / "README.md").data.eval_results
        assert sorted(result.metric_value for result in results) == [1.25, 3.21]
    assert hash_of_card(MEASURED.replace(FIGURES, FIGURES + OF_A_USER)) != hash_of_card(MEASURED)


def test_measurements_are_no_edit_of_a_card():
    assert hash_of_card(MEASURED) == hash_of_card(CARD.format(figures="", quality="Not measured."))
    assert hash_of_card(MEASURED) != hash_of_card(MEASURED.replace("Mine", "Ours"))
