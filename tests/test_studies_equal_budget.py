"""The study that trains all methods at an equal budget, and the data that it can use."""

import argparse
import gzip
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusers_gm.evaluation.results import Cell, Results
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


def test_the_verdict_says_where_a_kind_is_ahead():
    ratios = {"a": [0.8, 0.9], "b": [0.5, 0.5], "c": [0.99, 1.01], "d": [1.0, 2.0]}
    assert equal_budget.comparison(ratios, "FD", "diffusers' DDPM") == (
        "each by its best sampler, FD beside that of diffusers' DDPM is lower for a (0.80 to 0.90 times), b (0.50 "
        "times); lower at some numbers of calls only for c (0.99 to 1.01 times); not lower for d (1.00 to 2.00 times)."
    )


def test_what_is_far_from_trained_is_said():
    floor = {"FD": 2.0, "recall": 0.8}
    good, bad = ({"FD": fd, "recall": 0.01} for fd in (9.0, 30.0))
    assert equal_budget.far_from_trained([good, bad], floor, "FD") == ""
    said = equal_budget.far_from_trained([{"FD": 40.0, "recall": 0.5}, bad], floor, "FD")
    assert "lowest FD 15.0 times the floor (recall 0.01 where real images have 0.80)" in said


@pytest.mark.parametrize("kinds", [["ncsnv2", "cld"], ["ddpm", "cld"]])
def test_a_report_of_finished_cells(kinds, tmp_path):
    """Equal networks are said to be; the sampler is chosen on the first draw, and judged on the second."""
    args = argparse.Namespace(kinds=kinds, calls=[4, 8], draws=2, seeds=2, samplers="multistep", steps=9)
    vars(args).update(cpu_seconds=None, num_samples=5, training=["--resolution", "12"])
    results = Results(tmp_path / "cells.json", {})
    results.floor = [{"num_nan": 0, "FD-Lite0": 1.0, "recall": 0.9}]
    for (i, kind), seed, n, drawn in itertools.product(enumerate(kinds), range(2), args.calls, range(2)):
        for tau in ("0", "0.4", "1"):
            scores = {"FD-Lite0": 4.0 + i + seed if drawn else 1.0 + (tau != "0.4"), "recall": 0.5}
            results.cells.append(
                Cell(f"{kind} {seed}: CalibratedMultistepScheduler stochasticity={tau}", n, drawn, scores)
            )
    seconds = {(kind, seed): 7.0 for kind in kinds for seed in range(2)}
    found = equal_budget.report(args, "it", results, seconds, dict.fromkeys(kinds, 9))
    assert found.tables[0].rows == [["cld", "1.22 (1.25, 1.20)", "1.22 (1.25, 1.20)"]]
    assert found.tables[1].rows[0] == [
        kinds[0], 4, "CalibratedMultistepScheduler stochasticity=0.4", "4.5 ± 0.707", "0.5 ± 0"
    ]  # fmt: skip
    assert ("the very network" in found.conditions) == ("ncsnv2" in kinds)
    assert found.verdict.startswith("Each by its best sampler")
    assert "not lower for cld (1.22 times)" in found.verdict


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
    words = [
        "--kinds",
        "ncsnv2",
        "ncsnv2 unit weights",
        "--cpu_seconds",
        "1",
        "--seeds",
        "1",
        "--draws",
        "2",
        "--calls",
    ]
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
        assert record["uncertainty_weighting"] == (kind == "ncsnv2")
        milliseconds = float(re.search(rf": {kind} (\S+) ms", said)[1])
        assert number * milliseconds == pytest.approx(1000, rel=0.05)
    over, distances, every, seconds = report.tables
    assert [row[1] for row in seconds.rows] == list(steps.values())
    assert "over that of ncsnv2 (by training)" in over.caption
    values = {row[0]: float(row[3].split()[0]) for row in distances.rows}
    ratio = values["ncsnv2 unit weights"] / values["ncsnv2"]
    assert [float(text.strip("()")) for text in over.rows[0][1].split()] == pytest.approx([ratio] * 2, abs=0.02)
    assert len(every.rows) == 6
    assert f"is {'lower' if ratio < 1 else 'not lower'} for ncsnv2 unit weights (" in report.verdict
    equal_budget.main([*words, *small])
    assert json.loads(path.read_text()) == steps
    assert " ms" not in capfd.readouterr().out, "timed once"
