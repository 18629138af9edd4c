"""The study that trains all methods at an equal budget, and the data that it can use."""

import gzip
import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusers_gm.evaluation.results import Results
from diffusers_gm.studies import equal_budget, fashion_mnist
from diffusers_gm.studies.report import Report


def idx(values):
    return b"\0" * (16 if values.ndim == 3 else 8) + values.astype(np.uint8).tobytes()


def test_fashion_mnist_becomes_pngs_by_class(tmp_path):
    rng = np.random.default_rng(0)
    source, output = tmp_path / "idx", tmp_path / "png"
    source.mkdir()
    written = {}
    for prefix, pack in (("train", True), ("t10k", False)):
        written[prefix] = rng.integers(0, 256, (3, 28, 28))
        for name, values in (("images-idx3", written[prefix]), ("labels-idx1", np.array([9, 0, 9]))):
            path = source / f"{prefix}-{name}-ubyte"
            if pack:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx(values)))
            else:
                path.write_bytes(idx(values))
    fashion_mnist.main([str(output), "--source", str(source)])
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for i, name in enumerate(("ankle boot", "t-shirt", "ankle boot")):
            np.testing.assert_array_equal(Image.open(output / split / name / f"{i:05d}.png"), written[prefix][i])


def test_what_cannot_be_compared_is_an_error(tmp_path, capsys):
    for words, said in (
        (["--train_data_dir", str(tmp_path)], "--train_data_dir and --test_data_dir go together"),
        (["--num_samples", "361"], "there are 360 held-out digits"),
        (["--kinds", "vdm"], "invalid choice: 'vdm'"),
    ):
        with pytest.raises(SystemExit):
            equal_budget.main([*words, "--output", str(tmp_path)])
        assert said in capsys.readouterr().err


def test_every_kind_has_as_many_samplers():
    assert {len(equal_budget.samplers_of(kind)) for kind in equal_budget.KINDS} == {7}


@pytest.mark.slow
def test_the_study_trains_measures_and_goes_on(tmp_path, capfd):
    words = ["--kinds", "ddpm", "ncsnv2", "--steps", "2", "--seeds", "1", "--draws", "1", "--calls", "4"]
    words += ["--num_samples", "114", "--output"]
    small = ["--training", "--train_batch_size", "16", "--block_out_channels", "8", "16"]
    equal_budget.main([*words, str(tmp_path), *small])
    report = Report.read(tmp_path / "equal-budget-digits.json")
    over, distances, every, seconds = report.tables
    assert [row[0] for row in over.rows] == ["ncsnv2"]
    assert [row[0] for row in distances.rows] == ["ddpm", "ncsnv2", "training images"]
    assert all(float(row[1]) > 0 for row in seconds.rows)
    (path,) = (tmp_path / ".parts").glob("equal-budget digits n=*.json")
    cells = Results.read(path).cells
    assert len(cells) == len(every.rows) == 14
    best = min((c for c in cells if c.scheduler.startswith("ddpm")), key=lambda c: c.scores["FD-Lite0"])
    assert distances.rows[0][2] in best.scheduler
    capfd.readouterr()
    equal_budget.main([*words, str(tmp_path), *small])
    assert "sampled in" not in capfd.readouterr().out, "nothing is done twice"


@pytest.mark.slow  # seven trainings in processes of their own
def test_equal_seconds_are_steps_that_are_kept(tmp_path, capfd):
    words = ["--kinds", "ncsnv2", "ncsnv2 uncertainty", "--cpu_seconds", "1", "--seeds", "1", "--draws", "2", "--calls"]
    words += ["4", "--num_samples", "114", "--samplers", "multistep", "--output", str(tmp_path)]
    small = ["--training", "--train_batch_size", "16", "--block_out_channels", "8", "8"]
    equal_budget.main([*words, *small])
    said = capfd.readouterr().out
    report = Report.read(tmp_path / "equal-budget-digits.json")
    (path,) = (tmp_path / ".parts").glob("*1 CPU seconds.json")
    steps = json.loads(path.read_text())
    for kind, number in steps.items():
        record = json.loads((path.parent / f"equal-budget digits {kind} 0" / "training_args.json").read_text())
        assert record["max_train_steps"] == number > 1
        assert record["uncertainty_weighting"] == ("uncertainty" in kind)
        milliseconds = float(re.search(rf": {kind} (\S+) ms", said)[1])
        assert number * milliseconds == pytest.approx(1000, rel=0.05)
    over, distances, every, seconds = report.tables
    assert [row[1] for row in seconds.rows] == list(steps.values())
    assert "over that of ncsnv2 (by training)" in over.caption
    values = {row[0]: float(row[3].split()[0]) for row in distances.rows}
    ratio = values["ncsnv2 uncertainty"] / values["ncsnv2"]
    assert [float(text.strip("()")) for text in over.rows[0][1].split()] == pytest.approx([ratio] * 2, abs=0.02)
    assert len(every.rows) == 6
    assert f"ncsnv2 uncertainty {'at most' if ratio <= 1 else 'above'} at all budgets" in report.verdict
    equal_budget.main([*words, *small])
    assert json.loads(path.read_text()) == steps
    assert " ms" not in capfd.readouterr().out, "timed once"
