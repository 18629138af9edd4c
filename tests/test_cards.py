"""Model cards: what an evaluation adds to them, how they are kept, and the same figures on the results page."""

import json

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_gm import AnnealedLangevinScheduler, NCSNv2Pipeline
from diffusers_gm.evaluation import command
from diffusers_gm.evaluation.card import add_quality
from diffusers_gm.evaluation.report import verdict
from diffusers_gm.evaluation.results import Cell, Results
from diffusers_gm.hub import cards
from diffusers_gm.studies.page import page

CARD = """---
license: mit
---

# model

![samples](samples.png)

```python
pipeline = NCSNv2Pipeline.from_pretrained(".")
```

Run it in the folder of this file. Not this.

<!-- quality -->
Not measured.
<!-- end of quality -->

Mine.
"""


@pytest.fixture
def measured(tiny_unet, tmp_path, monkeypatch):
    """A model in `runs/model` with a card, evaluated into its own folder, under our sampler and one of diffusers."""
    folder = tmp_path / "runs" / "model"
    NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler(noise_space="ve", sigma_max=9.0)).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    Image.new("L", (8, 8)).save(folder / "samples.png")
    monkeypatch.chdir(tmp_path)
    words = "runs/model --dataset_name digits --metrics sw --num_samples 20 --num_reference 60 --calls 3 6"
    schedulers = "--scheduler AnnealedLangevinScheduler --scheduler DDIMScheduler"
    command.main([*words.split(), *schedulers.split(), "--output_dir", "runs/model", "--features_cache", "cache"])
    return folder


def test_an_evaluation_stands_in_the_card_of_its_model(measured):
    record = json.loads((measured / "results.json").read_text())
    assert record["conditions"]["model"] == "model"
    card = ModelCard.load(measured / "README.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    floor = record["floor"][0]["sliced W2"]
    for cell in record["cells"]:
        value = cell["scores"]["sliced W2"]
        name = f"sliced W2, {cell['scheduler']}, {cell['calls']} network calls, n = 20 (real images: {floor:.4g})"
        assert results.pop(name) == round(value, 4)
        assert f"| {cell['scheduler']} | {cell['calls']} | {value:.4g} ({value / floor:.2f}x) |" in card.text
    assert not results
    assert "Not measured" not in card.text
    assert "![quality against network calls](results.png)" in card.text
    assert card.text.rstrip().endswith("Mine.")
    assert card.data.license == "mit"

    # Again is the same; and what was measured of another model is not this one's.
    add_quality(measured)
    assert (measured / "README.md").read_text() == ModelCard.load(measured / "README.md").content
    record["conditions"]["model"] = "another"
    (measured / "results.json").write_text(json.dumps(record))
    (measured / "README.md").write_text(CARD)
    add_quality(measured)
    assert (measured / "README.md").read_text() == CARD


def test_a_card_is_kept_without_its_model(measured, tmp_path):
    cards.main(["runs/model", str(tmp_path / "kept.md")])
    card = ModelCard.load(tmp_path / "kept.md")
    assert "# model\n\n![samples](kept-samples.png)" in card.text
    assert 'from_pretrained("runs/model")' in card.text
    assert "Train it first, with the command below. Not this." in card.text
    assert card.data.model_name == "kept"
    for name in ("samples", "results"):
        assert f"(kept-{name}.png)" in card.text
        assert (tmp_path / f"kept-{name}.png").read_bytes() == (measured / f"{name}.png").read_bytes()
    assert add_quality(tmp_path) is None
    for folder, path, message in [("nowhere", "a.md", "no card in nowhere"), ("runs/model", "a.txt", "ending in .md")]:
        with pytest.raises(ValueError, match=message):
            cards.keep_card(tmp_path.relative_to(tmp_path) / folder, tmp_path / path)


def test_an_evaluation_stands_on_the_results_page(measured, tmp_path):
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "mine.json").write_bytes((measured / "results.json").read_bytes())
    (folder / "mine.png").write_bytes((measured / "results.png").read_bytes())
    text = page(folder, tmp_path / "results.md")
    assert "[Evaluation: model against digits](#evaluation-model-against-digits)" in text
    assert "![Evaluation: model against digits](reports/mine.png)" in text
    assert "| DDIMScheduler | 6 |" in text
    assert "**Verdict.** sliced W2 over that of real images" in text
    (folder / "mine.json").write_text("[]")
    with pytest.raises(ValueError, match="not a report"):
        page(folder, tmp_path / "results.md")


def test_the_verdict_names_the_best_at_every_number_of_calls(tmp_path):
    results = Results(tmp_path / "none.json", {})
    results.floor = [{"num_nan": 0, "FD-Lite0": 2.0, "KID-Lite0": 0.0}]
    for scheduler, calls, value in [("A", 10, 8.0), ("B", 10, 6.0), ("A", 20, 3.0), ("B", 20, 5.0)]:
        results.cells.append(Cell(scheduler, calls, 0, {"num_nan": 0, "FD-Lite0": value}, calls))
    assert verdict(results).endswith("the best scheduler: 3.00 at 10 (B), 1.50 at 20 (A).")
    results.floor = [{"num_nan": 0, "KID-Lite0": 0.0}]
    assert verdict(results) == "No distance was measured."
    given = Results(tmp_path / "none.json", {})
    given.floor, given.cells = [{"FD-Lite0": 2.0}], [Cell("mine.npy", None, None, {"FD-Lite0": 3.0})]
    assert verdict(given) == "FD-Lite0 over that of real images: 1.50."
