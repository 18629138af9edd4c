"""Networks that learn latents."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DDPMScheduler
from images import corrupt, open_folder, save_images
from networks import seeded, tiny_autoencoder, tiny_network
from PIL import Image
from training import ROOT, SMALL, TINY, WEIGHTS, launch, load, same_state

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    GMSGMPipeline,
    NCSNv2Pipeline,
    UnconditionalPipeline,
)
from diffusers_gm.autoencoders import fingerprint, load_autoencoder
from diffusers_gm.data import LabelledImages, LatentCache, TrainingImages, TrainingLatents
from diffusers_gm.training.folder import claim, list_checkpoints, read_log
from diffusers_gm.training.options import TrainingArguments

CACHE = "latents"
OF_A_NETWORK = (
    "--train_batch_size 16 --validation_inference_steps 4 --num_validation_images 4 --max_train_steps 2 "
    "--validation_steps 0 --max_train_samples 40"
)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A path of an untrained autoencoder of gray images."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    tiny_autoencoder(channels=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2", "cld"])
def test_training_on_latents_and_going_on_with_it(train, tmp_path, autoencoder, method):
    options = (
        f"{SMALL} --method {method} --vae {autoencoder} --random_flip --max_train_steps 3 --checkpointing_steps 2 "
        f"--validation_steps 2 --max_train_samples 300 --latents_cache_dir {tmp_path / CACHE}"
    )
    train(options, "--output_dir", tmp_path / "whole")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / CACHE).glob("*.safetensors")}
    assert len(made) == 2
    train(options, "--output_dir", tmp_path / "sliced", "--max_train_minutes 1e-9")
    train(options, "--output_dir", tmp_path / "sliced", "--resume_from_checkpoint latest")
    assert {path: path.stat().st_mtime_ns for path in made} == made, "computed once"
    for name in (WEIGHTS, "checkpoint-3/model.safetensors", "checkpoint-3/optimizer.bin"):
        assert same_state(load(tmp_path / "whole" / name), load(tmp_path / "sliced" / name)), name
    assert read_log(tmp_path / "whole") != []

    pipeline = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}[method].from_pretrained(
        tmp_path / "whole"
    )
    pipeline.set_progress_bar_config(disable=True)
    assert fingerprint(pipeline.vae) == fingerprint(load_autoencoder(str(autoencoder)))
    assert pipeline(1, 4, seeded(0), output_type="latent").images.shape == (1, 4, 4, 4)
    assert pipeline(1, 4, seeded(0)).images[0].size == (8, 8)
    assert Image.open(tmp_path / "whole" / "samples.png").size == (132, 132), "decoded: 2 x 2 images, 8 times as large"
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "This is a latent model" in card
    assert "generation of 8x8 images" in card
    record = json.loads((tmp_path / "whole" / "training_args.json").read_text())
    assert (record["vae"], record["resolution"]) == ("vae", 8)
    assert "latents_cache_dir" not in record


def scaling_of(folder):
    index = json.loads((folder / "model_index.json").read_text())
    return [list(index[name].values()) for name in ("latents_mean", "latents_std")]


@pytest.mark.parametrize("said_by", ["the pipeline", "the autoencoder"])
def test_a_network_of_latents_goes_on_with_those_it_knows(train, tmp_path, said_by, caplog):
    """Scaled as before, whatever the images are now; also after an interruption, and without its pipeline."""
    vae = tiny_autoencoder(channels=1)
    vae.register_to_config(scaling_factor=4.0, shift_factor=0.5)
    scaling = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    known = {} if said_by == "the autoencoder" else scaling
    before = NCSNv2Pipeline(tiny_network(4, 4), AnnealedLangevinScheduler(), vae=vae, **known)
    before.save_pretrained(tmp_path / "before")
    expected = list(scaling.values()) if known else [[0.5] * 4, [0.25] * 4]
    options = f"--method ncsnv2 {OF_A_NETWORK} --vae {tmp_path / 'before'} --model_name_or_path {tmp_path / 'before'}"
    train(options, "--dry_run --output_dir", tmp_path / "out")
    train(options, "--max_train_minutes 1e-9 --output_dir", tmp_path / "out")
    (tmp_path / "before" / "model_index.json").unlink()
    train(options, "--resume_from_checkpoint latest --output_dir", tmp_path / "out")
    for one, other in zip(scaling_of(tmp_path / "out"), expected, strict=True):
        assert one == pytest.approx(other)
    assert "not the autoencoder of" not in caplog.text


def test_latents_of_another_autoencoder_are_measured_and_that_is_said(train, tmp_path, autoencoder, caplog):
    scaling = {"latents_mean": [0.0] * 4, "latents_std": [9.0] * 4}
    vae = tiny_autoencoder(channels=1)
    torch.nn.init.constant_(vae.quant_conv.bias, 0.5)
    before = NCSNv2Pipeline(tiny_network(4, 4), AnnealedLangevinScheduler(), vae=vae, **scaling)
    before.save_pretrained(tmp_path / "before")
    options = f"--method ncsnv2 {OF_A_NETWORK} --model_name_or_path {tmp_path / 'before'} --output_dir"
    train(options, tmp_path / "measured", "--vae", autoencoder)
    assert scaling_of(tmp_path / "measured")[1] != [9.0] * 4
    assert "is not the autoencoder of --model_name_or_path" in caplog.text


def test_latents_of_a_training_that_runs_are_left_alone(train, tmp_path, autoencoder):
    """By one that is refused, as by one that would begin anew."""
    options = f"{SMALL} --vae {autoencoder} --max_train_samples 40 --max_train_steps 1 --output_dir {tmp_path / 'out'}"
    train(options)
    before = {path: path.read_bytes() for path in (tmp_path / "out" / CACHE).iterdir()}
    tiny_autoencoder("AutoencoderTiny", 1).save_pretrained(tmp_path / "other")
    held = claim(tmp_path / "out")
    for more in ("", f"--vae {tmp_path / 'other'}"):
        with pytest.raises(ValueError, match="is in use by another training"):
            train(options, more, "--overwrite_output_dir")
    assert {path: path.read_bytes() for path in (tmp_path / "out" / CACHE).iterdir()} == before
    held.release()
    train(options, "--overwrite_output_dir")


def test_a_ddpm_does_not_clip_latents(train, tmp_path, autoencoder):
    """To [-1, 1], as it does with pixels."""
    options = f"{TINY} --method ddpm --max_train_samples 40"
    train(options, f"--vae {autoencoder} --output_dir", tmp_path / "latents")
    train(options, "--output_dir", tmp_path / "pixels")
    for name, clips in (("latents", False), ("pixels", True)):
        scheduler = UnconditionalPipeline.from_pretrained(tmp_path / name).scheduler
        assert (type(scheduler), scheduler.config["clip_sample"]) == (DDPMScheduler, clips)


@pytest.mark.slow
def test_two_processes_compute_latents_and_train_on_them(tmp_path, autoencoder):
    """As one process does with accumulated gradients."""
    options = f"{SMALL} --vae {autoencoder} --random_flip --max_train_steps 3 --max_train_samples 300 --logging_steps 1"
    two = ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29613")
    launch(options, "--output_dir", tmp_path / "two", launcher=two, env={"ACCELERATE_USE_CPU": "true"})
    launch(options, "--gradient_accumulation_steps 2 --output_dir", tmp_path / "one")
    for path in (tmp_path / "one" / CACHE).glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / CACHE / path.name).read_bytes()
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [entry["loss"] for entry in logs[0]] == pytest.approx([entry["loss"] for entry in logs[1]], rel=1e-3)


def test_a_dry_run_computes_a_few_latents_and_writes_nothing(train, tmp_path, autoencoder, capsys):
    train(SMALL, f"--vae {autoencoder} --dry_run --output_dir", tmp_path / "out")
    assert "1437 images of 1x8x8, as latents of 4x4x4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_training_killed_while_it_computes_latents_goes_on_where_it_was(train, tmp_path, autoencoder):
    """Latents that are there are not computed again, and those of a killed training are as good as others."""
    folder = save_images(tmp_path / "images", 600, size=(8, 8))
    options = f"{SMALL} --vae {autoencoder} --train_data_dir {folder} --max_train_steps 1 --eval_batch_size 1"
    command = [sys.executable, str(ROOT / "train_gm_sgm.py"), *options.split(), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    cache = tmp_path / "out" / CACHE
    deadline = time.monotonic() + 200
    while not list(cache.glob("latents-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in cache.glob("latents-*.safetensors")}
    assert 1 <= len(made) < 3
    train(options, "--output_dir", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    train(options, "--output_dir", tmp_path / "whole")
    assert same_state(load(tmp_path / "out" / WEIGHTS), load(tmp_path / "whole" / WEIGHTS))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--resolution 9", "--vae makes one latent of 2x2 pixels, and the images are 9x9: set --resolution to multipl"),
        ("--resolution 12", "--resolution 6 must be a multiple of 4, as the network has 3 levels"),
        ("--lr_warmup_steps 9 --max_train_steps 3", "--lr_warmup_steps 9 must be smaller than the 3 steps"),
        ("--algorithm_type gibbs", "unknown algorithm_type 'gibbs'"),
        ("--vae nowhere", "--vae nowhere holds no autoencoder"),
    ],
)
def test_what_does_not_go_together_is_said_before_latents_are_computed(train, tmp_path, autoencoder, options, said):
    with pytest.raises(ValueError, match=said):
        train(f"--block_out_channels 8 8 16 --vae {autoencoder} {options} --output_dir {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_network_of_other_latents_or_of_latents_that_nothing_explains(train, tmp_path, autoencoder):
    tiny_network(3, 3).save_pretrained(tmp_path / "three")
    tiny_network(4, 4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="needs a network from 4 channels to 4, this one goes from 3 to 3"):
        train(f"--model_name_or_path {tmp_path / 'three'} --vae {autoencoder} --output_dir {tmp_path / 'out'}")
    with pytest.raises(ValueError, match="goes from 4 to 4: for latents, give their autoencoder with --vae"):
        train(f"--model_name_or_path {tmp_path / 'four'} --output_dir {tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latents_cache_dir": "somewhere"}, "--latents_cache_dir is for --vae"),
        ({"vae": "somewhere", "dequantize": 256}, "--dequantize is for images of few levels"),
        ({"resolution": [8, 8, 8]}, "--resolution must be a side or a height and a width"),
        ({"resolution": 0}, "--resolution must be a side or a height and a width, at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(ValueError, match=said):
        TrainingArguments(**options)


def test_starting_anew_computes_latents_anew(train, tmp_path, autoencoder):
    options = f"{SMALL} --vae {autoencoder} --max_train_steps 1 --max_train_samples 40 --output_dir {tmp_path / 'out'}"
    train(options)
    tiny_autoencoder("AutoencoderTiny", 1).save_pretrained(tmp_path / "other")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    with pytest.raises(ValueError, match="holds the latents of another training set or autoencoder: vae was"):
        train(options, f"--resume_from_checkpoint latest --vae {tmp_path / 'other'}")
    train(options, f"--overwrite_output_dir --vae {tmp_path / 'other'}")
    assert "AutoencoderTiny" in (tmp_path / "out" / CACHE / "latents.json").read_text()
    mine = tmp_path / "mine" / CACHE / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(ValueError, match="holds other files than latents"):
        train(options, f"--overwrite_output_dir --output_dir {tmp_path / 'mine'}")
    assert mine.read_text() == "years of work"


def test_latents_by_class(train, tmp_path, autoencoder):
    """Labels stay with their images, and a class can be asked for."""
    options = f"{SMALL} --vae {autoencoder} --class_conditional --max_train_steps 2 --max_train_samples 300"
    train(options, "--random_flip --output_dir", tmp_path / "out")
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.num_classes == 10
    assert pipeline(1, 4, seeded(0), class_labels=3, guidance_scale=2.0).images[0].size == (8, 8)


def test_an_image_in_place_of_one_that_cannot_be_read_has_its_own_class(tmp_path):
    for name in ("a", "b"):
        save_images(tmp_path / "images" / name, 10)
    corrupt(tmp_path / "images" / "a" / "009.png")
    images = TrainingImages(open_folder(tmp_path / "images"), 8, 1, seed=0)
    encode = lambda pixels: torch.nn.functional.pixel_unshuffle(pixels, 2)
    cache = LatentCache(tmp_path / "latents", images, encode, "of no autoencoder", (4, 4, 4), False)
    with cache.being_filled():
        cache.fill(8)
    latents = TrainingLatents(cache, seed=0)
    labels = [0] * 10 + [1] * 10
    shown = LabelledImages(latents, labels, null=2, dropout=0.0, seed=0).__getitems__([(0, i) for i in range(20)])
    assert torch.equal(shown[9][0], shown[10][0])
    assert [label for _, label in shown] == [0] * 9 + [1] * 11
