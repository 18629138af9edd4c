"""`python -m diffusers_gm.evaluation`: what it samples, compares, keeps, goes on with and refuses."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
)
from networks import tiny_network
from PIL import Image
from safetensors.torch import save_file

from diffusers_gm import (
    AnnealedLangevinScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
)
from diffusers_gm.data import (
    EXAMINATION,
    SAMPLES,
    TensorImages,
    examine,
    generator_for,
    split_digit_labels,
    split_digits,
)
from diffusers_gm.data.seeds import order_for
from diffusers_gm.evaluation import command, num_steps_for
from diffusers_gm.evaluation.distances import sliced_wasserstein
from diffusers_gm.evaluation.features import fingerprint
from diffusers_gm.evaluation.options import build_parser
from diffusers_gm.evaluation.report import plot, table, verdict
from diffusers_gm.evaluation.results import Cell, Results
from diffusers_gm.evaluation.sampling import NoGridError, load_pipeline, scheduler_by_name
from diffusers_gm.evaluation.sources import read_samples, some_of
from diffusers_gm.evaluation.table import this_command
from diffusers_gm.files import write_text

CPU = torch.device("cpu")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """The command in this process, on the digits; the results and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words, data="--dataset_name digits", out="out"):
        command.main([*map(str, words), *data.split(), "--features_cache", "cache", "--output_dir", out])
        return json.loads((tmp_path / out / "results.json").read_text()), capsys.readouterr().out

    return run


QUICK = ["--metrics", "sw", "--num_samples", "20", "--num_reference", "60", "--batch_size", "10"]


# --- Samples of others ---


def test_samples_in_every_form(tmp_path, generator):
    pixels = torch.randint(0, 256, (6, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = pixels.float() / 127.5 - 1
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / f"{i}.png")
    np.save(tmp_path / "bytes.npy", pixels.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "gray.npy", pixels[:, 0].double().numpy() / 255)
    save_file({"images": pixels.float() / 255}, tmp_path / "floats.safetensors")
    for name in ("pictures", "bytes.npy", "floats.safetensors"):
        read = read_samples(tmp_path / name, cache_dir=str(tmp_path / "cache"))
        torch.testing.assert_close(read, images, msg=name)
    some = read_samples(tmp_path / "gray.npy", 4)
    which = [int((image == images[:, :1]).flatten(1).all(1).nonzero()) for image in some]
    assert len(set(which)) == 4
    assert [0, 1, 2, 3] != which == sorted(which)


def test_some_of_many_samples_are_not_the_first_which_may_be_of_one_class(tmp_path):
    """And of a folder of classes the same as of an array."""
    values = np.repeat(np.arange(0, 200, 50, dtype=np.uint8), 25)
    np.save(tmp_path / "sorted.npy", np.broadcast_to(values[:, None, None], (100, 4, 4)))
    for i, value in enumerate(values):
        (tmp_path / "by class" / f"{value:03d}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), int(value)).save(tmp_path / "by class" / f"{value:03d}" / f"{i:02d}.png")
    some = read_samples(tmp_path / "sorted.npy", 40)
    assert (some[:, 0, 0, 0].unique(return_counts=True)[1] - 10).abs().max() <= 6
    assert torch.equal(read_samples(tmp_path / "by class", 40), some)


def test_some_samples_are_not_those_that_are_drawn_of_the_real_images():
    """A folder of as many would have all its partners in the reference."""
    shared = set(some_of(1000, 100)) & set(order_for(1000, 0, EXAMINATION)[:100])
    assert abs(len(shared) - 10) < 5 * 3


def test_samples_that_cannot_be_read(tmp_path):
    np.save(tmp_path / "channels_first.npy", np.zeros((4, 3, 8, 8)))
    np.save(tmp_path / "range.npy", np.full((4, 8, 8), -1.0))
    np.save(tmp_path / "integers.npy", np.zeros((4, 8, 8), dtype=np.int64))
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.npy").touch()
    for name in ("broken.npy", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"something else")
    for name, message in [
        ("channels_first.npy", r"must hold images \(n, H, W\).* it has images \(8, 3, 8\)"),
        ("range.npy", r"range.npy cannot be read: it must hold numbers in \[0, 1\], it has -1 ... -1"),
        ("empty.npy", "--samples .*empty.npy cannot be read"),
        ("broken.npy", "--samples .*broken.npy cannot be read"),
        ("broken.safetensors", "--samples .*broken.safetensors cannot be read"),
        ("none.npy", "none.npy holds no images"),
        ("folder", "--samples .*folder cannot be read: it holds no images, but nothing at all"),
        ("integers.npy", "uint8 or floating point numbers, it has torch.int64"),
        ("two.safetensors", r"one tensor, it has \['a', 'b'\]"),
        ("nowhere", "must be a folder of images"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_samples(tmp_path / name, cache_dir=str(tmp_path / "cache"))
    np.save(tmp_path / "few.npy", np.zeros((4, 8, 8)))
    with pytest.raises(ValueError, match="--num_samples 5: .* holds 4"):
        read_samples(tmp_path / "few.npy", 5)


def test_real_digits_are_as_good_as_the_floor(evaluate, tmp_path):
    """All metrics, on held-out digits in place of samples; the second run finds everything there."""
    np.save(tmp_path / "real.npy", (split_digits()[1][:120, 0].numpy() + 1) / 2)
    words = ["--samples", "real.npy", "--num_reference", 130]
    record, printed = evaluate(*words)
    (cell,) = record["cells"]
    # The floor is a draw of 120 from the same 360 digits.
    for name in ("FD-Lite0", "sliced W2", "precision", "recall", "coverage"):
        assert cell["scores"][name] == pytest.approx(record["floor"][0][name], rel=0.3), name
    assert abs(cell["scores"]["KID-Lite0"]) < 0.05
    assert f"scored in {cell['scoring_seconds']:.1f} s" in printed
    assert "| real.npy |  | " in printed
    assert not (tmp_path / "out" / "results.png").exists()
    assert evaluate(*words)[0] == record


# --- The whole ---


def save_conditional(folder):
    """A folder with a pipeline for the ten digits."""
    network = tiny_network(num_class_embeds=11)
    pipeline = GMSGMPipeline(network, GMLangevinScheduler(), class_names=[str(digit) for digit in range(10)])
    pipeline.save_pretrained(folder / "conditional")
    return "conditional"


def test_conditional_models_are_measured_with_guidance(evaluate, tmp_path):
    folder = save_conditional(tmp_path)
    words = [folder, *QUICK, "--calls", 3, "--guidance_scale", 1, 3]
    record, printed = evaluate(*words)
    plain, guided = record["cells"]
    assert [cell["scheduler"] for cell in (plain, guided)] == ["GMLangevinScheduler", "GMLangevinScheduler, guidance 3"]
    assert "| GMLangevinScheduler, guidance 3 | 3 | " in printed
    assert plain["network_calls"] == guided["network_calls"] == 3
    assert plain["scores"] != guided["scores"]

    # The images are those of the pipeline, the interval counts, and what was measured before stays.
    pipeline = load_pipeline(folder, CPU)
    generators = [generator_for(0, SAMPLES, i) for i in range(20)]
    images = pipeline(20, 3, generators, guidance_scale=3.0, output_type="pt").images * 2 - 1
    distance = sliced_wasserstein(images, split_digits()[0][reference_order(60)])
    assert guided["scores"]["sliced W2"] == pytest.approx(distance, rel=1e-4)
    more, _ = evaluate(*words, "--guidance_interval", 0.01, 2)
    assert more["cells"][:2] == record["cells"]
    assert more["cells"][2]["scheduler"] == "GMLangevinScheduler, guidance 3 in [0.01, 2]"
    assert len({cell["scores"]["sliced W2"] for cell in more["cells"]}) == 3


def reference_order(n):
    """The first `n` of the training digits as they are examined."""
    return torch.randperm(1437, generator=generator_for(0, EXAMINATION))[:n]


def test_samples_and_real_images_of_some_classes(evaluate, tmp_path):
    """A model that draws what it is told, measured on two digits: as good as these, and far from all."""
    folder = save_conditional(tmp_path)
    seen = []
    words = [folder, *QUICK, "--calls", 2, "--class_labels", 3, 7]
    original = GMSGMPipeline._network

    def watched(self, model_input, timestep, labels=None):
        seen.extend(labels.tolist())
        return original(self, model_input, timestep, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GMSGMPipeline, "_network", watched)
        record, printed = evaluate(*words)
    assert set(seen) == {3, 7}
    assert record["conditions"]["classes"] == ["3", "7"]
    assert "of digits, the training set, 1x8x8, of the classes 3, 7." in printed

    # Real threes and sevens are as far from the reference as the floor.
    images, labels = split_digits()[1], split_digit_labels()[1]
    np.save(tmp_path / "real.npy", (images[(labels == 3) | (labels == 7), 0][:60].numpy() + 1) / 2)
    words = ["--samples", "real.npy", "--metrics", "sw", "--class_labels", 3, 7, "--output_dir", "two"]
    command.main([*map(str, words), "--dataset_name", "digits", "--features_cache", "cache"])
    found = json.loads((tmp_path / "two" / "results.json").read_text())
    assert found["conditions"]["num_reference"] == int(torch.isin(split_digit_labels()[0], torch.tensor([3, 7])).sum())
    assert found["cells"][0]["scores"]["sliced W2"] == pytest.approx(found["floor"][0]["sliced W2"], rel=0.25)
    command.main([*map(str, words[:4]), "--output_dir", "all", "--dataset_name", "digits", "--features_cache", "cache"])
    every = json.loads((tmp_path / "all" / "results.json").read_text())
    assert every["cells"][0]["scores"]["sliced W2"] > 1.5 * found["cells"][0]["scores"]["sliced W2"]


def test_classes_of_a_folder(evaluate, tmp_path):
    for name, value in (("black", 0), ("white", 255)):
        (tmp_path / "tones" / name).mkdir(parents=True)
        for i in range(50):
            Image.new("L", (8, 8), value).save(tmp_path / "tones" / name / f"{i}.png")
    np.save(tmp_path / "white.npy", np.ones((20, 8, 8)))
    words = ["--samples", "white.npy", "--metrics", "sw", "--class_labels"]
    data = f"--train_data_dir tones --cache_dir {tmp_path / 'cache'}"
    record, _ = evaluate(*words, "white", data=data)
    assert record["cells"][0]["scores"]["sliced W2"] == 0
    assert record["conditions"]["num_reference"] == 30
    said = verdict(Results.read(tmp_path / "out" / "results.json"))
    assert said == "sliced W2 of real images is 0: nothing is a multiple of it."
    with pytest.raises(SystemExit):
        evaluate(*words, "grey", data=data)
    # Of samples that lie in folders of classes, too, those of the class alone are measured.
    words = ["--samples", "tones", *QUICK[:4], "--class_labels", "white"]
    record, _ = evaluate(*words, data=data, out="of-tones")
    assert record["cells"][0]["scores"]["sliced W2"] == 0


def test_images_that_are_no_squares(evaluate, tmp_path):
    network = tiny_network(sample_size=(8, 12))
    GMSGMPipeline(network, GMLangevinScheduler()).save_pretrained(tmp_path / "wide")
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = torch.randint(0, 256, (240, 16, 26), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    data = f"--train_data_dir pictures --cache_dir {tmp_path / 'cache'}"
    words = ["wide", "--calls", 2, "--num_samples", 115, "--num_reference", 120, "--resolution", 8, 12]
    record, printed = evaluate(*words, data=data)
    assert record["conditions"]["shape"] == [1, 8, 12]
    assert set(record["cells"][0]["scores"]) >= {"FD-Lite0", "KID-Lite0", "sliced W2", "precision"}
    assert "1x8x12" in printed
    # Without a resolution, and with that of a square, it says what to set.
    for resolution, message in (
        ([], "the images are not square (16x26): set --resolution, to one side or to height and width"),
        (["--resolution", 8], "the samples are 8x12, the real images 8x8: resize these with --resolution 8 12"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            command.run(options(*words[:-3], *resolution, *data.split()))


def options(*words):
    return build_parser("").parse_args([*map(str, words), "--output_dir", "other"])


def test_runs_are_resumed(ddpm, evaluate, tmp_path):
    """What is in the file is taken from there: with its seconds, which would be others if it were measured again."""
    words = [ddpm, *QUICK, "--calls", 3, 6, "--seeds", 0, 1]
    evaluate(*words)
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    first = {**whole, "cells": whole["cells"][:2]}  # as if it had been interrupted there
    (tmp_path / "out" / "results.json").write_text(json.dumps(first))

    record, printed = evaluate(*words, "--scheduler", "DDPMScheduler", "--scheduler", "HeunDiscreteScheduler")
    assert record["cells"][:2] == first["cells"]
    assert record["floor"] == first["floor"]
    assert len(record["floor"]) == 2
    made = {(cell["scheduler"], cell["calls"], cell["network_calls"]) for cell in record["cells"]}
    assert made == {
        ("DDPMScheduler", 3, 3),
        ("DDPMScheduler", 6, 6),
        ("HeunDiscreteScheduler", 3, 3),
        ("HeunDiscreteScheduler", 6, 5),
    }
    written = (tmp_path / "out" / "results.md").read_text()
    assert written in printed
    assert "| HeunDiscreteScheduler | 5 | " in written
    assert "± standard deviation over seeds" in written
    with Image.open(tmp_path / "out" / "results.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10

    with pytest.raises(SystemExit):  # the same folder, for something else
        evaluate(*words, "--num_samples", 21)


def test_results_are_of_one_config_of_the_network(ddpm, evaluate, tmp_path, capsys):
    folder = shutil.copytree(tmp_path / ddpm, tmp_path / "changed")
    words = ["changed", *QUICK, "--calls", 3]
    evaluate(*words)
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text().replace('"act_fn": "silu"', '"act_fn": "gelu"'))
    with pytest.raises(SystemExit):
        evaluate(*words)
    assert "results under other conditions (configs" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"act_fn": "gelu"', '"act_fn": "silu"'))
    # What was measured before this was noted, stays.
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    del written["conditions"]["configs"]
    (tmp_path / "out" / "results.json").write_text(json.dumps(written))
    record, _ = evaluate(*words, "--seeds", 0, 1)
    assert record["cells"][0] == written["cells"][0]


def test_seeds_are_added_to_what_is_there(ddpm, evaluate, tmp_path):
    """Neither the reference nor the first draws of the floor change with their number."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = torch.randint(0, 256, (90, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(pictures / f"{i}.png")
    data = f"--train_data_dir pictures --cache_dir {tmp_path / 'cache'}"
    one, _ = evaluate(ddpm, *QUICK, "--calls", 3, data=data)
    two, _ = evaluate(ddpm, *QUICK, "--calls", 3, "--seeds", 0, 1, data=data)
    assert two["cells"][0] == one["cells"][0]
    assert [cell["seed"] for cell in two["cells"]] == [0, 1]
    # 90 images are a reference of 60 and one draw of 20.
    assert two["floor"] == one["floor"]
    assert two["conditions"] == one["conditions"]
    assert two["conditions"]["num_reference"] == 60


def test_a_seed_that_is_added_brings_its_own_draw_for_the_floor(ddpm, evaluate):
    """Of the digits there are enough."""
    one, _ = evaluate(ddpm, *QUICK, "--calls", 3)
    two, _ = evaluate(ddpm, *QUICK, "--calls", 3, "--seeds", 0, 1)
    assert len(two["floor"]) == 2
    assert two["floor"][0] == one["floor"][0] != two["floor"][1]
    held_out = examine(TensorImages(split_digits()[1]), 0, num_images=20).images
    assert one["conditions"]["floor"] == fingerprint(held_out), "results over another floor would be refused"


def test_a_grid_that_starts_with_the_same_timestep_twice_is_none():
    scheduler = scheduler_by_name(DDPMScheduler(), ["DPMSolverMultistepScheduler", "timestep_spacing=leading"])[1]
    assert num_steps_for(scheduler, 500) == 500
    with pytest.raises(NoGridError, match="1000 steps has the first timestep twice"):
        num_steps_for(scheduler, 1000)


def test_a_ladder_of_few_levels_has_no_grid_of_more_calls():
    own = AnnealedLangevinScheduler(noise_space="ve", sigma_max=9.0, num_train_timesteps=21)
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler"):
        scheduler = scheduler_by_name(own, [name])[1]
        assert num_steps_for(scheduler, 20) == 20
        with pytest.raises(NoGridError, match="trained at 21 noise levels, and 50 calls need more"):
            num_steps_for(scheduler, 50)


def test_nan_is_counted_and_never_averaged_away(tiny_unet, evaluate, tmp_path):
    with torch.no_grad():
        tiny_unet.conv_out.weight.fill_(math.nan)
    GMSGMPipeline(tiny_unet, GMLangevinScheduler()).save_pretrained(tmp_path / "broken")
    record, printed = evaluate("broken", *QUICK, "--calls", 2)
    assert record["cells"][0]["scores"] == {"num_nan": 20}
    assert "| GMLangevinScheduler | 2 | - | 20 of 20 |" in printed

    results = Results(tmp_path / "none.json", {**record["conditions"], "num_samples": 10})
    results.floor = [{"num_nan": 0, "FD-Lite0": 2.0, "KID-Lite0": -1e-3}]
    good = {"num_nan": 0, "FD-Lite0": 4.0, "KID-Lite0": 0.1}
    worse = {**good, "FD-Lite0": 8.0}
    results.cells = [
        Cell("A", 10, 0, good, 10, 1.0, 1.0),
        Cell("A", 10, 1, {"num_nan": 3}, 10, 1.0, 1.0),
        Cell("B", 10, 0, good, 9, 1.0, 3.0),
        Cell("B", 10, 1, worse, 9, 2.0, 1.0),
        Cell("B", 5, 0, reason="no stable step"),
    ]
    lines = table(results).markdown().splitlines()
    assert "| A | 10 | - | - | 3 of 20 | 1.0 | 1.0 |" in lines
    assert "| B | 9 | 6 ± 2.8 (3.00x) | 0.1 ± 0 | 0 of 20 | 1.5 | 2.0 |" in lines
    assert "| B | 5 | - | - | - | - | 0.0 |" in lines
    assert "- B, 5 calls: no stable step" in lines
    results.cells = results.cells[2:4]
    assert "NaN" not in table(results).markdown(), "a column of which nobody learns anything"
    results.conditions["model"] = "run_$1_$x"  # no formula
    plot(results, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give a model or --samples"),
        ("{ddpm} --samples x.npy", "give a model or --samples"),
        ("{ddpm} --train_data_dir x", "--dataset_name or --train_data_dir"),
        ("--samples x.npy --scheduler DDIMScheduler", "--scheduler means nothing for --samples"),
        ("{ddpm} --calls 0", "--calls: must be at least 1, got 0"),
        ("{ddpm} --seeds -1", "--seeds: must be at least 0, got -1"),
        ("{ddpm} --seeds 1 2 1", "--seeds must differ"),
        ("{ddpm} --calls 5 5", "--calls must differ"),
        ("{ddpm} --scheduler Nothing", "no scheduler"),
        ("{ddpm} --resolution 16", "the samples are 8x8, the real images 16x16: resize these with --resolution 8"),
        ("{ddpm} --num_samples 361", "have enough for 360, set --num_samples"),
        ("{ddpm} --num_samples 100", "FD-Lite0 needs more than 112 images"),
        ("{ddpm} --resolution 8 8 8", "--resolution must be a side, or a height and a width, got [8, 8, 8]"),
        ("{ddpm} --resolution 8 12", "the real images 8x12: resize these with --resolution 8, or give others"),
        ("{ddpm} --guidance_scale 2", "guidance_scale=2 needs a class-conditional network"),
        ("{ddpm} --guidance_scale 2 2", "--guidance_scale must differ"),
        ("{ddpm} --guidance_interval 0 1", "--guidance_interval means nothing without a --guidance_scale"),
        ("{ddpm} --class_labels 3", "--class_labels 3: this model has no classes"),
        ("{ddpm} --label_column kind", "--label_column means nothing without --class_labels"),
        ("{conditional} --label_column kind --class_labels 3", "--label_column means nothing for the digits"),
        ("{ddpm} --image_column image", "--image_column means nothing for the digits"),
        ("{ddpm} --background black", "--background means nothing for the digits"),
        ("{ddpm} --dataset_config_name all", "--dataset_config_name means nothing without a --dataset_name of the Hub"),
        ("--samples x.npy --calls 3", "--calls means nothing for --samples"),
        ("--samples x.npy --batch_size 3", "--batch_size means nothing for --samples"),
        ("{ddpm} --metrics sw --features inception", "--features means nothing for --metrics that need none"),
        ("--samples x.npy --guidance_scale 2", "--guidance_scale means nothing for --samples"),
        ("{conditional} --class_labels cow", "class_labels 'cow' is no class of this model"),
        ("{conditional} --guidance_scale -1", "guidance_scale must be a number of at least 0, got -1.0"),
        ("{conditional} --class_labels 3 --num_samples 80", "have enough for 36, set --num_samples"),
        ("{ddpm} --features inception", "pip install torch-fidelity"),
        ("nowhere", "nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(words, message, ddpm, evaluate, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        evaluate(*words.format(ddpm=ddpm, conditional=save_conditional(tmp_path)).split())
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "sampled in" not in said.out
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    for text in ('{"floor": 1}', "[1]", "{", '{"conditions": 1, "floor": [], "cells": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="does not hold results"):
            Results.open(tmp_path / "results.json", {})
    with pytest.raises(OSError, match="Not a directory"):
        Results.open(tmp_path / "results.json" / "folder" / "results.json", {})


def test_what_another_run_has_measured_meanwhile_stays(tmp_path):
    """Its cells, and draws of real images that this one had no need of."""
    many, few = (Results.open(tmp_path / "results.json", {"model": "m", "num_samples": 4}) for _ in range(2))
    many.floor = [{"sliced W2": 1.0}, {"sliced W2": 2.0}]
    many.measure("a", 5, 0, lambda: (None, 5), lambda _: {"sliced W2": 3.0})
    few.floor = [{"sliced W2": 1.0}]
    few.measure("b", 5, 0, lambda: (None, 5), lambda _: {"sliced W2": 4.0})
    found = Results.read(tmp_path / "results.json")
    assert found.floor == many.floor
    assert {cell.scheduler for cell in found.cells} == {"a", "b"}
    assert few.floor != many.floor


def test_a_run_waits_while_another_writes(tmp_path, monkeypatch):
    first, second = (Results.open(tmp_path / "results.json", {"model": "m"}) for _ in range(2))
    late = Thread(target=second.measure, args=("b", 5, 0, lambda: (None, 5), lambda _: {"sliced W2": 4.0}))

    def after_the_other(path, text):
        monkeypatch.undo()
        late.start()
        late.join(0.5)
        write_text(path, text)

    monkeypatch.setattr("diffusers_gm.evaluation.results.write_text", after_the_other)
    first.measure("a", 5, 0, lambda: (None, 5), lambda _: {"sliced W2": 3.0})
    late.join()
    assert {cell.scheduler for cell in Results.read(tmp_path / "results.json").cells} == {"a", "b"}


def test_results_of_before_schedulers_were_told_go_on(tmp_path):
    then = Results.open(tmp_path / "results.json", {"model": "m"})
    then.save()
    assert Results.open(tmp_path / "results.json", {"model": "m", "scheduler": "a"}).conditions == {"model": "m"}
    Results.open(tmp_path / "new.json", {"model": "m", "scheduler": "a"}).save()
    with pytest.raises(ValueError, match="scheduler 'a', now 'b'"):
        Results.open(tmp_path / "new.json", {"model": "m", "scheduler": "b"})


def test_two_processes_give_the_figures_of_one(ddpm, evaluate, tmp_path):
    """In real processes: `accelerate launch --num_processes 2`, all metrics, batches that do not come out even."""
    words = [ddpm, "--calls", 3, "--num_samples", 120, "--num_reference", 130, "--batch_size", 50]
    words += ["--scheduler", "CLDSSCSScheduler"]
    record, _ = evaluate(*words)
    launcher = "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --main_process_port 29617 -m"
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), "diffusers_gm.evaluation", *map(str, words),
         *("--dataset_name", "digits", "--output_dir", "two", "--features_cache", "another")],
        check=True,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )  # fmt: skip
    assert done.stdout.count("wrote two/results.json") == 1, "each process was on its own"
    theirs = json.loads((tmp_path / "two" / "results.json").read_text())
    assert theirs["conditions"] == record["conditions"]
    assert theirs["floor"] == record["floor"]
    assert [cell["scores"] for cell in theirs["cells"]] == [cell["scores"] for cell in record["cells"]]
    assert record["cells"][0]["scores"]["FD-Lite0"] > record["floor"][0]["FD-Lite0"]


def test_no_path_of_this_machine_is_written(evaluate, tmp_path):
    """Neither of a folder that is named as a data set, nor of an option with an equals sign."""
    train, _ = split_digits()
    for name, some in (("samples", train[:20]), ("real", train[20:100])):
        (tmp_path / name).mkdir()
        for i, image in enumerate(some):
            Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(tmp_path / name / f"{i}.png")
    data = f"--dataset_name {tmp_path / 'real'} --cache_dir={tmp_path / 'cache-of-me'}"
    quick = [word for word in QUICK if word not in ("--batch_size", "10")]
    results, _ = evaluate("--samples", tmp_path / "samples", *quick[:4], "--num_reference", 40, data=data)
    assert results["conditions"]["data"] == "real"
    assert str(tmp_path.parent) not in (tmp_path / "out" / "results.md").read_text()
    assert this_command(["--cache_dir=/home/me/some/cache"]).endswith(" --cache_dir=some/cache")
    assert this_command(["model", "--output_dir=/home/me/out"]).endswith(" model")
    words = this_command(["model", "--output_dir", "out", "--seeds", "0", "1"]).split()
    assert words[-4:] == ["model", "--seeds", "0", "1"], "without the folder of the results"
