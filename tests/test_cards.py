"""Model cards: what an evaluation adds to them, how they are kept, and the same figures on the results page."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from training import arguments, plan_for

from diffusers_gm import AnnealedLangevinScheduler, NCSNv2Pipeline
from diffusers_gm.evaluation import command
from diffusers_gm.evaluation.card import add_quality, scheduler_of
from diffusers_gm.evaluation.report import best, table, verdict
from diffusers_gm.evaluation.results import Cell, Results
from diffusers_gm.hub import cards
from diffusers_gm.studies.page import page
from diffusers_gm.training.plan import training_record

CARD = """---
license: mit
---

# model

![samples](samples.png)

```python
pipeline = NCSNv2Pipeline.from_pretrained(".")
```

Run it in the folder of this file. Not this.

<!-- best -->
<!-- end of best -->

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
    (folder / "training_args.json").write_text(json.dumps({"output_dir": "trained/here"}))
    Image.new("L", (8, 8)).save(folder / "samples.png")
    monkeypatch.chdir(tmp_path)
    words = "runs/model --dataset_name digits --metrics sw --num_samples 20 --num_reference 60 --calls 3 6"
    schedulers = "--scheduler AnnealedLangevinScheduler --scheduler DDIMScheduler"
    command.main([*words.split(), *schedulers.split(), "--output_dir", "runs/model", "--features_cache", "cache"])
    return folder


def by_calls(record):
    return [(n, [cell for cell in record["cells"] if cell["calls"] == n]) for n in (3, 6)]


def card_of(log=(), levels=(), **options):
    """What a training with these options says of itself."""
    args = arguments(**options)
    record = training_record(args, plan_for(args)) | {"mixed_precision": "no", "image_column": None}
    result = cards.TrainingResult(1437, 10, len(log), 99, 60.0, list(log), list(levels), "1 x CPU", "command", {})
    return cards.training_card(record, "GMSGMPipeline", result)


def test_the_losses_of_a_card_are_means():
    """Of the last ten lines of the log, also by level, and of eight parts of all of it."""
    log = [{"step": n, "loss": float(n), "loss_by_level": [2.0 * n, 1.0 if n == 24 else None]} for n in range(1, 25)]
    text = card_of(log, ["low", "high"]).text
    assert "Final loss 19.5 " in text
    assert "| low | 39 |\n| high | 1 |" in text
    assert [f"| up to {3 * i} | {3 * i - 1} |" in text for i in range(1, 9)] == [True] * 8


def test_a_card_says_where_the_data_are_and_what_it_takes_to_train_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    digits = card_of(report_to="tensorboard")
    assert "datasets" not in digits.data.to_dict()
    assert 'pip install "diffusers-gm[evaluation,trackers]>=' in digits.text
    of_hub = card_of(dataset_name="somebody/photos")
    assert of_hub.data.datasets == ["somebody/photos"]
    assert 'pip install "diffusers-gm>=' in of_hub.text
    of_folder = card_of(dataset_name="photos")  # which `datasets` takes, too
    assert "datasets" not in of_folder.data.to_dict()
    assert "Data: the folder `photos`" in of_folder.text


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
    best = {calls: min(measured, key=lambda cell: cell["scores"]["sliced W2"]) for calls, measured in by_calls(record)}
    said = re.search("<!-- best -->\n(.*)\n<!-- end of best -->", card.text).group(1)
    assert "nearest to real images by sliced W2 ([table](#quality-against-network-calls))" in said
    for calls, cell in best.items():
        assert re.search(rf"`{cell['scheduler']}` at [^`]*\b{calls}\b", said)
    assert "against 60 real images of digits, the training set, 1x8x8.\n" in card.text
    assert "Distances, lower is better: sliced W2, the sliced" in card.text
    for absent in ("kernel distance", "Mean ±", "NaN", "Features"):
        assert absent not in card.text
    assert "Not measured" not in card.text
    assert "![quality against network calls](results.png)" in card.text
    assert card.text.rstrip().endswith("Mine.")
    assert card.data.license == "mit"

    # Again is the same; and what was measured of another model is not this one's.
    add_quality(measured)
    assert (measured / "README.md").read_text() == ModelCard.load(measured / "README.md").content
    # Nor is what was measured with another scheduler than the one that is there.
    saved = (config := measured / "scheduler" / "scheduler_config.json").read_text()
    config.write_text(json.dumps(json.loads(saved) | {"sigma_max": 77.0}))
    add_quality(measured)
    found = ModelCard.load(measured / "README.md")
    assert "Not measured." in found.text
    assert not found.data.eval_results
    config.write_text(saved)
    record["conditions"]["model"] = "another"
    (measured / "results.json").write_text(json.dumps(record))
    (measured / "README.md").write_text(CARD)
    add_quality(measured)
    assert (measured / "README.md").read_text() == CARD


def test_a_scheduler_is_its_class_and_its_options(tmp_path):
    """And not the version that saved it, which says nothing of the samples."""
    (tmp_path / "scheduler").mkdir()
    assert scheduler_of(tmp_path) is None

    def of(**config):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return scheduler_of(tmp_path)

    saved = {"_class_name": "A", "_diffusers_version": "1", "sigma_max": 9.0}
    assert of(**saved) == of(**saved | {"_diffusers_version": "2"})
    assert len({of(**saved), of(**saved | {"_class_name": "B"}), of(**saved | {"sigma_max": 8.0})}) == 3


def test_a_card_is_kept_without_its_model(measured, tmp_path, capsys):
    cards.main(["runs/model", str(tmp_path / "kept.md")])
    card = ModelCard.load(tmp_path / "kept.md")
    assert "# model\n\n![samples](kept-samples.png)" in card.text
    assert 'from_pretrained("trained/here")' in card.text
    assert "Train the model first, into `trained/here`, with the command below. Not this." in card.text
    assert card.data.model_name == "kept"
    for name in ("samples", "results"):
        assert f"(kept-{name}.png)" in card.text
        assert (tmp_path / f"kept-{name}.png").read_bytes() == (measured / f"{name}.png").read_bytes()
    assert add_quality(tmp_path) is None
    (measured / "samples.png").unlink()
    with pytest.raises(SystemExit):
        cards.main(["runs/model", str(tmp_path / "again.md")])
    assert "No such file or directory: 'runs/model/samples.png'" in capsys.readouterr().err
    (measured / "training_args.json").unlink()
    for folder, path, message in [
        ("nowhere", "a.md", "no card of a training in nowhere: it has no README.md"),
        ("runs/model", "a.txt", "ending in .md"),
        ("runs/model", "a.md", "it has no training_args.json"),
    ]:
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


BELOW = "Below the floor of real images, less is not better."


def test_a_table_explains_what_stands_in_it_and_no_more(tmp_path):
    conditions = {
        "model": "m",
        "data": "mine",
        "num_samples": 5,
        "num_reference": 9,
        "shape": [1, 8, 8],
        "features": "f",
    }
    results = Results(tmp_path / "none.json", conditions)
    results.floor = [{"num_nan": 0, "FD-Lite0": 2.0, "KID-Lite0": 0.0}]
    good = {"num_nan": 0, "FD-Lite0": 4.0, "KID-Lite0": 0.1}
    results.cells = [
        Cell("A", 10, 0, good, 10),
        *(Cell("B", n, 0, reason=f"no way: {n} is too few. Use more; or less") for n in (2, 4, 5)),
        Cell("B", 10, 0, reason="another"),
    ]
    text = table(results).markdown()
    assert "- B, 10 calls: another\n- B, 2, 4 and 5 calls: no way\n" in text
    assert "against 9 real images of mine, 1x8x8. Features: f.\n" in text
    assert "KID-Lite0, the kernel distance of features, unbiased" in text
    assert not re.search("NaN|training set|sliced|±|Below 1", text)
    results.cells += [Cell("A", 10, 1, {**good, "FD-Lite0": 1.0}, 10), Cell("C", 10, 0, {**good, "FD-Lite0": 1.0}, 10)]
    text = table(results).markdown()
    assert "Below 1.00x, samples are nearer" in text
    assert "Mean ± standard deviation" in text


def test_the_verdict_names_the_best_at_every_number_of_calls(tmp_path):
    results = Results(tmp_path / "none.json", {})
    results.floor = [{"num_nan": 0, "FD-Lite0": 2.0, "KID-Lite0": 0.0}]
    for scheduler, calls, value in [("A", 10, 8.0), ("B", 10, 6.0), ("A", 20, 3.0), ("B", 20, 5.0)]:
        results.cells.append(Cell(scheduler, calls, 0, {"num_nan": 0, "FD-Lite0": value}, calls))
    assert verdict(results).endswith("the best scheduler: 3.00 at 10 (B), 1.50 at 20 (A).")
    assert best(results).endswith("): `B` at 10, `A` at 20 network calls.")
    results.cells += [Cell("B", 50, 0, {"num_nan": 0, "FD-Lite0": 1.0}, 50), Cell("A", 50, 0, {"num_nan": 1}, 50)]
    assert best(results).endswith("`B` at 10 and 50, `A` at 20 network calls. " + BELOW)
    results.cells = [cell for cell in results.cells if cell.scheduler == "A"]
    assert best(results) == "", "nothing was compared"
    results.floor = [{"num_nan": 0, "KID-Lite0": 0.0}]
    assert verdict(results) == "No distance was measured."
    given = Results(tmp_path / "none.json", {})
    given.floor, given.cells = [{"FD-Lite0": 2.0}], [Cell("mine.npy", None, None, {"FD-Lite0": 3.0})]
    assert verdict(given) == "FD-Lite0 over that of real images: 1.50."
