"""What a step is made of: the draws of its images, losses by level, the optimizer, the compiler, trackers."""

import contextlib
import importlib.util
import json
import platform
import re
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from training import ROOT, SMALL, TINY, WEIGHTS, arguments, launch, load, plan_for, same_state, small_unet

from diffusers_gm import GMSGMPipeline
from diffusers_gm.pictures import image_grid
from diffusers_gm.training.draws import StepDraws
from diffusers_gm.training.folder import read_log
from diffusers_gm.training.level_losses import LevelLosses
from diffusers_gm.training.objective import Objective, build_scheduler
from diffusers_gm.training.optimizer import build_ema, build_optimizer
from diffusers_gm.training.samples import sample_images

METHODS = ("gm-sgm", "ncsnv2", "cld")

# --- Splits of a step ---

SPLIT = (
    f"{SMALL.replace('--train_batch_size 16', '')} --max_train_steps 4 --checkpointing_steps 0 --validation_steps 0 "
    "--random_flip --lr_scheduler constant --learning_rate 0.1 --adam_epsilon 1 --logging_steps 1"
)  # an epsilon of 1: AdamW divides by next to nothing, which would magnify rounding errors


def same_to_rounding(one, other, start):
    """Whether weights differ by far less than the training moved them."""
    moved = sum(float((one[name] - start[name]).square().sum()) for name in one) ** 0.5
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
    return 0 <= apart < 1e-4 * moved


@pytest.mark.parametrize("method", [*METHODS, "gm-sgm --uncertainty_weighting"])
def test_a_step_of_32_is_two_of_16_accumulated(train, tmp_path, method):
    train(SPLIT.replace("0.1", "1e-30"), f"--method {method} --train_batch_size 32 --output_dir", tmp_path / "start")
    splits = {"32": "", "16": "--gradient_accumulation_steps 2", "8": "--gradient_accumulation_steps 4"}
    for size, more in splits.items():
        train(SPLIT, f"--method {method} --train_batch_size {size}", more, "--output_dir", tmp_path / size)
    start, whole, *parts = (load(tmp_path / name / WEIGHTS) for name in ("start", *splits))
    for part in parts:
        assert same_to_rounding(whole, part, start)
    logs = [[entry["loss_by_level"] for entry in read_log(tmp_path / name)] for name in splits]
    for one, other in zip(logs[0], logs[1], strict=True):
        assert [loss is None for loss in one] == [loss is None for loss in other]
        assert [loss or 0 for loss in one] == pytest.approx([loss or 0 for loss in other], rel=1e-3)


@pytest.mark.slow  # processes of their own
@pytest.mark.parametrize("weights", ["", "--uncertainty_weighting --checkpointing_steps 4"])
def test_a_step_of_32_is_one_of_two_processes(tmp_path, weights):
    split = f"{SPLIT} {weights}"
    launch(split.replace("0.1", "1e-30"), "--train_batch_size 32 --output_dir", tmp_path / "start")
    launch(split, "--train_batch_size 32 --output_dir", tmp_path / "one")
    two = ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29615")
    for size, more in (("16", ""), ("8", "--gradient_accumulation_steps 2")):
        words = f"--train_batch_size {size} {more} --output_dir {tmp_path / size}"
        launch(split, words, launcher=two, env={"ACCELERATE_USE_CPU": "true"})
        for file in [WEIGHTS, *(["checkpoint-4/model_1.safetensors"] if weights else [])]:
            start, one, other = (load(tmp_path / name / file) for name in ("start", "one", size))
            assert same_to_rounding(one, other, start)


def test_draws_follow_from_the_place_of_an_image_in_the_stream():
    def of(splits, start=96):
        """What 12 images get, in batches of these sizes."""
        draws, first, found = StepDraws(0, 12, torch.device("cpu")), 0, []
        for size in splits:
            some = draws.of_batch(start, first, size)
            found.append((some.levels, some.noise.normal((size, 1, 4, 4)), some.noise.uniform((size,))))
            first += size
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    whole = of([12])
    assert same_state(whole, of([6, 6]))
    assert same_state(whole, of([3, 4, 5]))
    assert not any(torch.equal(*pair) for pair in zip(whole, of([12], start=108), strict=True))
    levels, noise, _ = whole
    assert ((levels >= 0) & (levels < 1)).all()
    assert len({tuple(image.flatten().tolist()) for image in noise}) == 12


def test_checkpoints_of_noise_per_batch_are_gone_on_from_and_it_is_said(train, tmp_path, caplog):
    options = TINY.replace("--checkpointing_steps 0", "--checkpointing_steps 1")
    train(options, "--output_dir", tmp_path / "out")
    state = tmp_path / "out" / "checkpoint-1" / "training_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({name: content[name] for name in ("state", "arguments")}))  # as of version 0.1.0
    train(options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint checkpoint-1")
    assert "checkpoint-1 is of an earlier version, which drew noise for batches" in caplog.text
    caplog.clear()
    train(options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint checkpoint-1")
    train(options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint checkpoint-2")
    assert caplog.text.count("which drew noise for batches") == 1


def test_dropout_is_drawn_anew_for_every_batch_by_the_seed(train, tmp_path, monkeypatch):
    """The rest of what is drawn is that of each image."""
    seeds, forward = [], UNet2DModel.forward

    def noted(unet, *rest, **named):
        seeds.extend([torch.initial_seed()] * unet.training)
        return forward(unet, *rest, **named)

    monkeypatch.setattr(UNet2DModel, "forward", noted)
    for seed in (0, 1):
        train(TINY, f"--gradient_accumulation_steps 2 --seed {seed} --output_dir", tmp_path / str(seed))
    assert len(seeds) == len(set(seeds)) == 8, "two batches in each of two steps of two trainings"


def test_the_seed_decides_the_first_weights_and_the_samples(train, tmp_path):
    weights = []
    for seed in (0, 1):
        train(TINY, f"--learning_rate 1e-30 --seed {seed} --output_dir", tmp_path / str(seed))
        weights.append(load(tmp_path / str(seed) / WEIGHTS)["conv_in.weight"])
    assert not torch.allclose(*weights, atol=1e-3)
    pipeline = GMSGMPipeline.from_pretrained(tmp_path / "1")
    grid = image_grid(sample_images(pipeline, 4, batch_size=4, num_inference_steps=4, seed=1))
    assert grid.tobytes() == Image.open(tmp_path / "1" / "samples.png").tobytes()


def test_the_time_that_samples_take_is_none_of_the_training_s(train, tmp_path, monkeypatch):
    """In the log: images per second while they are learned."""
    call = GMSGMPipeline.__call__
    monkeypatch.setattr(GMSGMPipeline, "__call__", lambda *rest, **named: time.sleep(3) or call(*rest, **named))
    options = TINY.replace("--validation_steps 0", "--validation_steps 1 --logging_steps 1 --eval_batch_size 4")
    train(options, "--output_dir", tmp_path / "out")
    assert read_log(tmp_path / "out")[1]["images_per_second"] > 16 / 3


# --- Losses by level ---


@pytest.fixture(params=METHODS)
def objective(request):
    args = arguments(method=request.param)
    plan = plan_for(args)
    return Objective(args, plan, build_scheduler(args, plan))


def test_a_level_that_fails_is_seen(objective):
    """A network whose answers are right but for one band of levels."""
    levels = LevelLosses(objective, SimpleNamespace(device=torch.device("cpu"), reduce=lambda x, how: x))
    assert len(levels.edges) == 11
    assert levels.edges == sorted(levels.edges)
    uniform = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    sigma = objective.sigma(uniform)
    bad = (sigma > levels.edges[6]) & (sigma < levels.edges[7])
    assert bad.any()
    losses = torch.where(bad, 5.0, 0.1)
    for part in range(0, 2000, 500):  # in batches
        levels.note(losses[part : part + 500], uniform[part : part + 500])
    mean, bands = levels.means()
    assert mean == pytest.approx(float(losses.mean()), rel=1e-4)
    assert bands[6] == pytest.approx(5, rel=0.05)
    assert all(band == pytest.approx(0.1, rel=0.3) for i, band in enumerate(bands) if i != 6 and band is not None)
    levels.note(losses[bad][:3], uniform[bad][:3])
    mean, bands = levels.means()
    assert mean == 5
    assert [i for i, band in enumerate(bands) if band is not None] == [6]


def test_they_are_logged_and_on_the_card(train, tmp_path):
    train(TINY, "--logging_steps 1 --output_dir", tmp_path / "out")
    for entry in read_log(tmp_path / "out"):
        known = [loss for loss in entry["loss_by_level"] if loss is not None]
        assert len(entry["loss_by_level"]) == 10
        assert min(known) <= entry["loss"] <= max(known)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| noise level sigma | final loss |" in card
    rows = re.findall(r"^\| (\d\S*) to (\S+) \| (\S+) \|$", card, re.MULTILINE)
    assert len(rows) == 10
    assert [high for _, high, _ in rows[:-1]] == [low for low, *_ in rows[1:]], "one band after the other"


# --- Optimizer, formats, compiler ---


def test_the_optimizer_and_the_average_are_those_of_the_options():
    """None of them by its default, which would be there without being passed on."""
    of_adam = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1, "adam_epsilon": 1e-3}
    of_average = {"ema_decay": 0.9, "ema_inv_gamma": 2.0, "ema_power": 0.5}
    args, unet = arguments(learning_rate=0.5, **of_adam, **of_average), small_unet()
    optimizer = build_optimizer(args, plan_for(args), unet)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.8, 0.9), 0.1, 1e-3)
    assert len(group["params"]) == len(list(unet.parameters()))
    ema = build_ema(args, unet, torch.device("cpu"))
    # Of n steps diffusers counts n - 1.
    assert [ema.get_decay(n) for n in (7, 1001)] == [1 - (1 + 6 / 2.0) ** -0.5, 0.9]
    assert build_ema(arguments(use_ema=False), unet, torch.device("cpu")) is None


def test_a_gradient_is_as_long_as_it_may_be(train, tmp_path):
    """One step of Adam whose epsilon is 1 goes as far as the gradient times the rate."""
    options = SPLIT.replace("--max_train_steps 4", "--max_train_steps 1 --no_use_ema --adam_weight_decay 0")
    options += " --train_batch_size 8"
    train(options.replace("0.1", "1e-30"), "--output_dir", tmp_path / "start")
    for limit in (0.01, 0.02):
        train(options, f"--max_grad_norm {limit} --output_dir", tmp_path / str(limit))
    start, *ends = (load(tmp_path / name / WEIGHTS) for name in ("start", "0.01", "0.02"))
    moved = [sum(float((end[name] - start[name]).square().sum()) for name in end) ** 0.5 for end in ends]
    assert moved == pytest.approx([0.1 * 0.01, 0.1 * 0.02], rel=0.02)


def test_matrices_are_multiplied_in_tf32_where_that_is_wanted(train, tmp_path):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for options, expected in (("--allow_tf32", True), ("", False)):
            train(TINY, options, "--overwrite_output_dir --output_dir", tmp_path / "out")
            assert torch.backends.cuda.matmul.allow_tf32 == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_rate_in_the_log_is_that_of_the_step(train, tmp_path):
    options = TINY.replace("--max_train_steps 2", "--max_train_steps 4 --logging_steps 1 --learning_rate 1e-3")
    train(options, "--lr_scheduler linear --lr_warmup_steps 2 --output_dir", tmp_path / "out")
    assert [entry["lr"] for entry in read_log(tmp_path / "out")] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_8_bits_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--use_8bit_adam: the package is not installed; pip install bitsandbytes"):
        arguments(use_8bit_adam=True)


def test_the_format_of_images_in_memory_is_not_the_networks_business(train, tmp_path):
    for name, option in (("usual", ""), ("last", "--channels_last")):
        train(SPLIT, option, "--train_batch_size 16 --output_dir", tmp_path / name)
    train(SPLIT.replace("0.1", "1e-30"), "--train_batch_size 16 --output_dir", tmp_path / "start")
    start, usual, last = (load(tmp_path / name / WEIGHTS) for name in ("start", "usual", "last"))
    assert same_to_rounding(usual, last, start)
    assert all(weight.is_contiguous() for weight in last.values())


def test_adam_of_8_bits_learns_and_goes_on(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = f"{SMALL} --max_train_steps 4 --checkpointing_steps 2 --validation_steps 0 --use_8bit_adam"
    train(options, "--output_dir", tmp_path / "whole")
    train(
        options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"
    )
    assert same_state(*(load(tmp_path / name / WEIGHTS) for name in ("whole", "resumed")))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_is_saved_as_any_other(train, tmp_path, monkeypatch, backend):
    """Checkpoints, too: what was trained compiled goes on without, and the other way round. With all that can be
    learned."""
    options = TINY.replace("--checkpointing_steps 0", "--checkpointing_steps 1 --uncertainty_weighting")
    train(options, "--output_dir", tmp_path / "plain")
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_DYNAMO_BACKEND", backend)  # as `accelerate launch --dynamo_backend` does
        train(options, "--output_dir", tmp_path / "compiled")
        train(options, "--output_dir", tmp_path / "plain", "--resume_from_checkpoint checkpoint-1")
    train(options, "--output_dir", tmp_path / "compiled", "--resume_from_checkpoint checkpoint-1")
    checkpoints = [f"checkpoint-{step}/{model}.safetensors" for step in (1, 2) for model in ("model", "model_1")]
    for name in (WEIGHTS, *checkpoints):
        one, other = (load(tmp_path / folder / name) for folder in ("plain", "compiled"))
        assert one.keys() == other.keys(), name
        assert all(torch.allclose(one[key], other[key], atol=1e-2) for key in one), name


# --- Trackers ---


def test_tensorboard_has_losses_images_and_typed_options(train, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(TINY, "--report_to tensorboard --logging_steps 1 --output_dir", tmp_path / "out")
    found = events.EventAccumulator(str(tmp_path / "out" / "logs" / "diffusers_gm")).Reload()
    assert {"loss", "lr", "images_per_second"} < set(found.Tags()["scalars"])
    assert any(name.startswith("loss_by_level/") for name in found.Tags()["scalars"])
    assert found.Tags()["images"] == ["samples"]
    options = next((tmp_path / "out" / "logs").rglob("hparams.yml")).read_text()
    for line in ("train_batch_size: 16", "learning_rate: 0.002", "use_ema: true", "method: gm-sgm"):
        assert line in options.splitlines()


def test_tensorboard_has_every_step_once(train, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = TINY.replace("--max_train_steps 2 --checkpointing_steps 0", "--max_train_steps 4 --checkpointing_steps 2")
    options += f" --logging_steps 1 --report_to tensorboard --output_dir {tmp_path / 'out'}"
    for resumed in ("", "--resume_from_checkpoint checkpoint-2"):
        train(options, resumed)
    found = events.EventAccumulator(str(tmp_path / "out" / "logs" / "diffusers_gm")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]


def test_mlflow_has_losses_images_and_options(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    train(TINY, "--report_to mlflow --logging_steps 1 --output_dir", tmp_path / "out")
    (run,) = mlflow.search_runs(experiment_names=["diffusers_gm"], output_format="list")
    assert run.data.metrics["loss"] > 0
    assert run.data.params["train_batch_size"] == "16"
    client = mlflow.MlflowClient()
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 2
    assert any(file.path.endswith(".png") for file in client.list_artifacts(run.info.run_id, "images"))


def test_trackio_has_losses_images_and_options(tmp_path):
    pytest.importorskip("trackio")
    options = TINY, "--report_to trackio --logging_steps 1 --output_dir", tmp_path / "out"
    launch(*options, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "diffusers_gm.db")) as database:
        metrics = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
        ((config,),) = database.execute("select config from configs").fetchall()
    assert len([entry for entry in metrics if "loss" in entry]) == 2
    assert json.loads(config)["train_batch_size"] == 16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other rules")
def test_steps_reuse_the_memory_that_they_free():
    """40 MB in blocks: without it, each step has ten thousand pages made."""

    def pages_made(kept):
        program = f"""
import resource, torch
from diffusers_gm.training.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
faults = []
for _ in range(10):
    step = [torch.ones(10**5) for _ in range(100)]
    del step
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[2])
"""
        command = [sys.executable, "-c", program]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    if pages_made(kept=False) < 1000:
        pytest.skip("this build of torch keeps what is freed by itself")
    assert pages_made(kept=True) < 100
