"""What the studies share: trainings and measurements that are kept, reports, the results page, the command line."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from diffusers_gm import GMLangevinScheduler, GMSGMPipeline
from diffusers_gm.data import split_digits
from diffusers_gm.evaluation.report import curve_table, plot_curves
from diffusers_gm.evaluation.results import Results, Statistic
from diffusers_gm.evaluation.sampling import NoGridError
from diffusers_gm.evaluation.table import Table, this_command
from diffusers_gm.studies import cld, gm_sgm, ncsnv2
from diffusers_gm.studies.command import parse, study_parser
from diffusers_gm.studies.digits import (
    floor_of_digits,
    kept_results,
    kept_unet,
    name_of,
    over_floor,
    parts_of,
    quality,
    trained,
)
from diffusers_gm.studies.page import GLOSSARY, answer, page
from diffusers_gm.studies.report import Report
from diffusers_gm.training.options import TrainingArguments

ROOT = Path(__file__).parents[1]

# --- Trainings and measurements ---


def test_cells_are_measured_once_and_survive_in_their_file(tmp_path):
    calls = []

    def make(seed):
        calls.append(seed)
        return {"error": seed / 2}

    for _ in range(2):
        results = Results.open(tmp_path / "cells.json", {"n": 4})
        assert results.of_seeds("a", 5, 3, make) == [{"error": 0.0}, {"error": 0.5}, {"error": 1.0}]
    assert calls == [0, 1, 2]
    assert [(cell.scheduler, cell.calls, cell.seed) for cell in results.cells] == [("a", 5, seed) for seed in range(3)]


def test_cells_of_seeds_are_all_there_or_none(tmp_path):
    def at_times(seed):
        if seed:
            raise NoGridError("no stable step")
        return {"error": 0.0}

    for _ in range(2):
        results = Results.open(tmp_path / "cells.json", {"known": 1})
        assert results.of_seeds("at times", 5, 2, at_times) is None
        assert results.of_seeds("at times", 5, 1, lambda seed: pytest.fail("measured again")) == [{"error": 0.0}]
    assert [cell.reason for cell in results.cells] == ["", "no stable step"]


def test_results_of_two_models_are_not_mixed(tmp_path):
    """Two runs that begin at once, before there is a file that would tell them."""
    one, other = (Results.open(tmp_path / "cells.json", {"model": name}) for name in ("a", "b"))
    one.measure("DDIM", 5, 0, lambda: (None, 5), lambda _: {"score": 1.0})
    with pytest.raises(ValueError, match="meanwhile got results under other conditions"):
        other.measure("Euler", 5, 0, lambda: (None, 5), lambda _: {"score": 2.0})
    assert [cell.scheduler for cell in Results.read(tmp_path / "cells.json").cells] == ["DDIM"]


def test_what_two_runs_measure_at_once_is_kept(tmp_path):
    one, other = (Results.open(tmp_path / "cells.json", {}) for _ in range(2))
    one.of_seeds("a", 5, 1, lambda seed: {"error": 1.0})
    other.of_seeds("b", 5, 1, lambda seed: {"error": 2.0})
    assert {cell.scheduler for cell in Results.read(tmp_path / "cells.json").cells} == {"a", "b"}


def test_cells_are_not_mixed_between_settings(tmp_path):
    kept_results("it", 4, tmp_path, steps=7, models={"power law": {"alpha": 1.5}}).save()
    kept_results("it", 4, tmp_path, steps=7, models={"power law": {"alpha": 1.5}})
    kept_results("it", 4, tmp_path, steps=8, models={"power law": {"alpha": 1.2}})
    with pytest.raises(ValueError, match="it n=4 steps=7.json holds results under other conditions .*1.5.*now .*1.2"):
        kept_results("it", 4, tmp_path, steps=7, models={"power law": {"alpha": 1.2}})


def test_quality_is_over_the_floor_and_none_without_a_stable_step(tmp_path, tiny_unet):
    results = kept_results("it", 4, tmp_path)
    mixture = {"algorithm_type": "jump", "mixture_weights": [0.99, 0.01], "mixture_scales": [0.5, 8.0]}
    assert quality(results, "jump", 5, 1, lambda _: GMSGMPipeline(tiny_unet, GMLangevinScheduler(**mixture))) is None
    (cell,) = results.cells
    assert "no solution" in cell.reason
    (value,) = quality(results, "ode", 3, 1, lambda _: GMSGMPipeline(tiny_unet, GMLangevinScheduler()))
    assert value == results.cells[1].scores["sliced W2"] / floor_of_digits(4)["sliced W2"]


def test_a_network_of_other_options_is_not_taken_for_this_one(tmp_path, tiny_unet):
    kept_unet(tmp_path / "net", lambda: tiny_unet, {"learning_rate": 1e-3})
    kept_unet(tmp_path / "net", lambda: None, {"learning_rate": 1e-3, "new option": "its default"})
    with pytest.raises(ValueError, match=r"net was made with other settings \(learning_rate = 0.001, now 0.002\)"):
        kept_unet(tmp_path / "net", lambda: None, {"learning_rate": 2e-3})


def test_two_studies_that_train_the_same_network_do_not_disturb_each_other(tmp_path, tiny_unet):
    def meanwhile():
        kept_unet(tmp_path / "net", lambda: tiny_unet)
        return tiny_unet

    kept_unet(tmp_path / "net", meanwhile)
    assert (tmp_path / "net" / "config.json").is_file()


@pytest.mark.parametrize("method", ["ncsnv2", "ddpm"])
def test_networks_of_studies_learn_with_the_weights_that_the_training_learns(tmp_path, method):
    """A default of the options is one of the studies': the network is the one that was asked for."""
    small = {"method": method, "max_train_steps": 3, "train_batch_size": 16, "block_out_channels": [8, 8]}
    networks = {
        learned: trained(tmp_path / str(learned), uncertainty_weighting=learned, **small)[0]
        for learned in (True, False)
    }
    default, _ = trained(tmp_path / "default", **small)
    same = {
        learned: all(map(torch.equal, network.parameters(), default.parameters()))
        for learned, network in networks.items()
    }
    assert same == {True: method == "ncsnv2", False: method == "ddpm"}


def test_a_network_is_trained_once_and_kept(tmp_path, tiny_unet):
    trainings = []

    def train():
        trainings.append(1)
        return tiny_unet

    for _ in range(2):
        kept = kept_unet(tmp_path / "some name=1", train)
    assert trainings == [1]
    assert not any(p.requires_grad for p in kept.parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), tiny_unet.parameters(), strict=True))


def test_an_interrupted_training_leaves_nothing_that_looks_finished(tmp_path, tiny_unet):
    part = tmp_path / f"net.part{os.getpid()}"
    part.mkdir()
    (part / "rest").write_text("of an earlier run")
    kept_unet(tmp_path / "net", lambda: tiny_unet)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert not (tmp_path / "net" / "rest").exists()


def test_networks_are_named_after_their_options():
    args = TrainingArguments(method="ncsnv2", max_train_steps=7, seed=1, conditioning="none")
    assert name_of(args) == "ncsnv2 conditioning=none max_train_steps=7 seed=1"
    assert name_of(TrainingArguments()) == "gm-sgm"


def test_a_floor_is_of_as_many_images_as_there_are_samples():
    assert over_floor(split_digits()[1][:40]) == 1
    with pytest.raises(ValueError, match="num_samples 361: there are 360 held-out digits"):
        floor_of_digits(361)


def test_parts_are_ignored_by_git(tmp_path):
    assert (parts_of(tmp_path) / ".gitignore").read_text() == "*\n"


def test_seeds_in_words():
    value = Statistic.of([1.0, 2.0, 4.0])
    assert (value.mean, value.spread) == (pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5))
    assert value.error == pytest.approx((7 / 9) ** 0.5)
    assert f"{Statistic.of([1.0, 2.0]):.2f}" == "1.50 ± 0.71"
    assert f"{Statistic.of([1.234]):.2f}" == "1.23"
    assert str(Statistic.of([1.0, 2.0]).over(2)) == "0.75 ± 0.35"
    curves = {"a": {5: Statistic.of([1.0]), 10: None}, "b": {10: Statistic.of([2.0])}}
    assert curve_table("", "x", curves).rows == [["a", "1.00", "-"], ["b", "-", "2.00"]]


@pytest.mark.parametrize("highest", [1.4, 9, 40])
def test_the_distance_is_readable_off_a_picture(highest):
    """Plain numbers at two places or more, the calls below, a line at the floor: no powers of ten."""
    figure, axis = plt.subplots()
    plot_curves(axis, {"it": {10: Statistic.of([highest]), 50: Statistic.of([0.9])}}, 1)
    figure.canvas.draw()
    low, high = axis.get_ylim()
    shown = [
        label.get_text()
        for at, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        if low <= at <= high
    ]
    assert len(shown) >= 2
    assert all(low <= float(text) <= high for text in shown)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["10", "50"]
    assert list(axis.lines[-1].get_ydata()) == [1, 1]
    plt.close(figure)


# --- Reports and the page ---


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


def test_the_page_begins_with_the_answers_in_the_order_of_what_matters(tmp_path):
    names = [
        "cld_damping",
        "equal-budget-CIFAR-10",
        "my evaluation",
        "throughput",
        "samplers_exact",
        "equal-budget-digits",
    ]
    for name in names:
        replace(
            report(name), title=name, verdict=f"Yes. It is 1.5 times **{name}**, which is a lot and much of it. More."
        ).write(tmp_path)
    text = page(tmp_path, tmp_path / "results.md")
    in_order = [
        "equal-budget-digits",
        "equal-budget-CIFAR-10",
        "samplers_exact",
        "cld_damping",
        "throughput",
        "my evaluation",
    ]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["In short", "Words", *in_order]
    short = text[: text.index("## Words")]
    assert re.findall(r"^- \[(.*?)\]", short, re.MULTILINE) == in_order
    assert "*Yes. It is 1.5 times throughput, which is a lot and much of it.*" in short
    assert short.count("Is it?") == 1, "asked once"


def test_a_long_answer_is_cut_between_words():
    assert answer("a" * 30 + ". " + "word " * 100).endswith("word ...")
    assert len(answer("word " * 200)) <= 400


def test_the_words_that_are_explained_are_those_of_the_results():
    _, words, sections = (ROOT / "model_cards" / "results.md").read_text().partition(GLOSSARY)
    assert words, "python -m diffusers_gm.studies.page"
    explained = {word.lower() for word in re.findall(r"\*\*(.+?)\*\*", words)}
    assert {"floor", "ladder", "chain", "prop3", "tau", "martingale defect", "ays", "nor input scaled"} <= explained
    assert [word for word in explained if word not in sections.lower()] == []


def test_every_link_of_the_page_leads_to_a_heading_of_its_own(tmp_path):
    for name in ("one", "two"):
        replace(report(name), title="Samplers", pictures=[]).write(tmp_path)
    text = page(tmp_path, tmp_path / "results.md")
    assert re.findall(r"\(#(.*)\)", text) == ["samplers-one", "samplers-two"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[2:] == ["Samplers (one)", "Samplers (two)"]


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
    assert this_command(words).endswith(" terminal --steps 3")


def test_a_command_says_nothing_about_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", "/home/me/cifar10/train", "--model", str(tmp_path / "outputs" / "a"), "--name", "a/b", "-x", "/"]
    assert this_command(words).endswith(" --data cifar10/train --model outputs/a --name a/b -x .")


# --- The command line ---


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (cld.main, ["damping", "--steps", "0"], "--steps: must be at least 1, got 0"),
        (cld.main, ["likelihood", "--batch", "0"], "--batch: must be at least 1, got 0"),
        (cld.main, ["damping", "--calls", "5", "1"], "--calls: must be at least 2, got 1"),
        (cld.main, ["losses", "--num_samples", "361"], "--num_samples 361: there are 360 held-out digits"),
        (gm_sgm.main, ["claim", "--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (gm_sgm.main, ["claim", "--num_samples", "361"], "--num_samples 361: there are 360 held-out digits"),
        (ncsnv2.main, ["diversity", "--num_samples", "1"], "--num_samples: must be at least 2, got 1"),
        (ncsnv2.main, ["denoise", "--calls", "2"], "--calls: must be at least 3, got 2"),
        (ncsnv2.main, ["denoise", "--seeds", "1.5"], "--seeds: invalid whole_number value: '1.5'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_values_end_a_study_before_any_work(command, words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command([*words, "--output", str(tmp_path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_studies_over_the_floor_need_a_held_out_digit_for_every_sample():
    parser = study_parser("x", "What it is.\n\nMore.", ["tails", "claim"])
    args = parse(parser, ["tails", "--num_samples", "1000"], over_floor=["claim"])
    assert (args.study, args.num_samples, args.steps, args.seeds) == ("tails", 1000, 1200, 2)
    assert parser.description.startswith("What it is.")
    assert parser.prog == "python -m diffusers_gm.studies.x"


def test_the_only_study_of_a_module_needs_no_name():
    args = parse(study_parser("x", None, ["only"], steps=7, seeds=False), [], over_floor=["only"])
    assert (args.study, args.steps, hasattr(args, "seeds")) == ("only", 7, False)


def test_defaults_over_the_best_of_their_options(tmp_path):
    from diffusers_gm.studies import defaults

    words = ["--steps", "1", "--seeds", "1", "--num_samples", "8", "--calls", "4", "--output", str(tmp_path)]
    defaults.main([*words, "--networks", "exact, flow matching", "exact, CLD", "trained, gm-sgm"])
    report = Report.read(tmp_path / "defaults.json")
    assert [len(table.rows) for table in report.tables] == [4, 4, 2], "Langevin and CLD do not read mixtures"
    assert all(float(row[1].split()[0]) >= 1 for table in report.tables for row in table.rows), "over the best"


# --- Fine-tuning ---


@pytest.mark.slow  # eight trainings
def test_a_network_that_keeps_its_levels_starts_where_it_was(tmp_path):
    """And one that learns others behind it."""
    from diffusers_gm.studies import fine_tuning

    fine_tuning.main(["--steps", "40", "--output", str(tmp_path)])
    found = Report.read(tmp_path / "fine_tuning.json")
    first = {(row[0], row[1]): row[2] for row in found.tables[0].rows}
    assert len(first) == 8
    assert first["ncsnv2", "fine-tuned"] < 0.7 * first["ncsnv2", "from scratch"]
    for method in ("ncsnv2", "gm-sgm"):
        assert first[method, "fine-tuned"] < 0.8 * first[method, "fine-tuned, new levels"]
    assert ("cld", "fine-tuned") not in first, "it has levels of its own"
    assert "ncsnv2: the error" in found.verdict
    assert (tmp_path / "fine_tuning.png").is_file()
