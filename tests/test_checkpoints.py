"""Checkpoints: which are taken, which are damaged, what may change between them, and that none is lost."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from images import save_images
from PIL import Image
from training import SMALL, WEIGHTS, arguments, load, same_state

from diffusers_gm import data, files
from diffusers_gm.training.folder import LOG_FILE, find_checkpoint, list_checkpoints
from diffusers_gm.training.plan import make_plan
from diffusers_gm.training.training_data import STATE_FILE, TrainingData, distance_measured_once

SAVED = ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl")


def options(steps=4, batch="--train_batch_size 16"):
    """A checkpoint every other step; a constant rate, so that a training may go on further than it was to."""
    shape = SMALL.replace("--train_batch_size 16", batch)
    return f"{shape} --lr_scheduler constant --max_train_steps {steps} --checkpointing_steps 2 --validation_steps 0"


@pytest.fixture
def trained(train, tmp_path):
    """A training of four steps, with `checkpoint-2` and `checkpoint-4`."""
    train(options(), "--output_dir", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints") / "out"


@pytest.fixture
def trained_once(train, kept):
    """As `trained`, the same for all tests: to be copied."""
    if not kept.exists():
        train(options(), "--output_dir", kept)
    return kept


def names(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def latest(folder):
    return find_checkpoint(arguments(output_dir=str(folder), resume_from_checkpoint="latest"))


def named(folder, name):
    return find_checkpoint(arguments(output_dir=str(folder), resume_from_checkpoint=str(name)))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def as_of_version_0_1_0(checkpoint):
    state = json.loads((checkpoint / STATE_FILE).read_text())
    levels = ("sigma_data", "timestep_sampling", "p_mean", "p_std", "snr_gamma", "uncertainty_weighting")
    for name in (*levels, "cld_feed_companion"):
        state["arguments"].pop(name)
    if state["arguments"]["method"] == "cld":
        state["arguments"]["objective"] = None
    state["state"].pop("training_id")
    (checkpoint / STATE_FILE).write_text(json.dumps({name: state[name] for name in ("state", "arguments")}))


# --- Names ---


def test_folders_that_are_called_almost_like_checkpoints_are_left_alone(train, trained):
    others = ("checkpoint-2-backup", "checkpoint-best", "my-checkpoint-3", "checkpoint--1", "tmp-checkpoint-notes")
    for name in others:
        shutil.copytree(trained / "checkpoint-2", trained / name)
    (trained / "checkpoint-9").write_text("a file")
    assert [path.name for path in list_checkpoints(trained)] == ["checkpoint-2", "checkpoint-4"]
    limit = "--checkpoints_total_limit 1 --resume_from_checkpoint"
    train(options(steps=6), "--output_dir", trained, limit, trained / "checkpoint-4")
    assert set(names(trained)) == {*others, "checkpoint-6", "superseded-checkpoint-9"}
    assert (trained / "superseded-checkpoint-9").read_text() == "a file"
    assert named(trained, "checkpoint-2-backup") == trained / "checkpoint-2-backup"


def test_a_running_training_saves_beside_a_backup(train, tmp_path):
    (tmp_path / "out" / "checkpoint-2-backup").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2-backup" / STATE_FILE).write_text("{}")
    train(options(), "--checkpoints_total_limit 1 --overwrite_output_dir --output_dir", tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-2-backup", "checkpoint-4"]


def test_data_are_the_same_however_their_path_is_written(train, tmp_path, monkeypatch):
    save_images(tmp_path / "data" / "photos", 16)
    monkeypatch.chdir(tmp_path)
    words = (
        f"{options()} --resume_from_checkpoint latest --output_dir {tmp_path / 'out'} --resolution 8 --train_data_dir"
    )
    train(words, "data/photos")
    for path in (tmp_path / "data" / "photos", "./data/photos/"):
        train(words, path)
    with pytest.raises(ValueError, match="--train_data_dir was 'data/photos' and is 'data'"):
        train(words, "data")


def test_a_precision_that_scales_losses_may_come_later(train, trained, monkeypatch):
    """As that of fp16 on a GPU, of which a checkpoint in another precision has nothing."""
    made, scalers = Accelerator.__init__, []

    def scaling(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu")
        scalers.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", scaling)
    train(options(steps=6), "--output_dir", trained, "--resume_from_checkpoint latest")
    assert scalers[0].state_dict()["_growth_tracker"] == 2, "it has scaled both steps"


# --- Damage ---


@pytest.mark.parametrize("name", [*SAVED, "random_states_0.pkl", STATE_FILE])
@pytest.mark.parametrize("how", [Path.unlink, cut, flip_a_bit], ids=["missing", "cut", "flipped"])
def test_what_is_damaged_is_passed_over_and_refused(trained_once, tmp_path, caplog, name, how):
    folder = shutil.copytree(trained_once, tmp_path / "out")
    assert latest(folder) == folder / "checkpoint-4"
    how(folder / "checkpoint-4" / name)
    assert latest(folder) == folder / "checkpoint-2"
    assert re.search(rf"passes over checkpoint-4 \(.*{name} (is missing|has \d+ of|is not what|cannot be)", caplog.text)
    with pytest.raises(ValueError, match=rf"'checkpoint-4'(: there is no complete| is damaged: .*{name})"):
        named(folder, "checkpoint-4")


@pytest.mark.parametrize("how", [Path.unlink, cut], ids=["missing", "cut"])
def test_a_training_goes_on_from_the_newest_whole_one_to_the_same_end(train, trained, how, tmp_path):
    whole = shutil.copytree(trained, tmp_path / "whole")
    how(trained / "checkpoint-4" / "optimizer.bin")
    train(options(), "--output_dir", trained, "--resume_from_checkpoint latest")
    for name in SAVED:
        assert same_state(*(load(folder / "checkpoint-4" / name) for folder in (whole, trained))), name
    assert names(trained) == ["checkpoint-2", "checkpoint-4", "superseded-checkpoint-4"], "nothing is thrown away"


def test_no_checkpoint_is_whole(trained_once, tmp_path):
    folder = shutil.copytree(trained_once, tmp_path / "out")
    for checkpoint in list_checkpoints(folder):
        cut(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: checkpoint-4 \(model.* checkpoint-2 \(model"):
        latest(folder)


@pytest.mark.parametrize(
    ("method", "published"),
    [
        ("", "--prediction_type epsilon"),
        ("--method ncsnv2", "--prediction_type sample"),
        ("--method cld", "--objective score"),
    ],
)
def test_trainings_of_version_0_1_0_go_on_as_they_were(train, tmp_path, method, published):
    """What they were by default then, and what they were given, without that it is said again."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(options(6), method, published, "--output_dir", whole)
    train(options(4), method, published, "--output_dir", resumed)
    for checkpoint in list_checkpoints(resumed):
        as_of_version_0_1_0(checkpoint)
    train(options(6), method, "--output_dir", resumed, "--resume_from_checkpoint latest")
    assert same_state(*(load(folder / WEIGHTS) for folder in (whole, resumed)))
    other = "--timestep_sampling log_uniform --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match="--timestep_sampling was 'uniform' and is 'log_uniform'|uniform times"):
        train(options(8), method, other, "--output_dir", resumed)


def test_checkpoints_of_version_0_1_0_load(train, tmp_path):
    trained = tmp_path / "out"
    train(options(), "--prediction_type epsilon --output_dir", trained)
    for checkpoint in list_checkpoints(trained):
        as_of_version_0_1_0(checkpoint)
        state = json.loads((checkpoint / STATE_FILE).read_text())
        state["arguments"]["sigma_max"] = 9.6299
        (checkpoint / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="in steps of 16 images and these options make 32"):
        train(options(6, "--train_batch_size 32"), "--output_dir", trained, "--resume_from_checkpoint latest")
    assert latest(trained).name == "checkpoint-4"
    train(options(6), "--output_dir", trained, "--resume_from_checkpoint latest")
    assert names(trained) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_checkpoints_of_version_0_1_0_that_changed_their_batch_load():
    """16 images, then 48; there is no telling what they were last."""
    options = {"train_batch_size": 48, "gradient_accumulation_steps": 1}
    before = TrainingData.of({"state": {"step": 2, "images_seen": 64}, "arguments": options})
    TrainingData(images_per_step=48).check_against(before, "checkpoint-2")
    before = TrainingData.of({"state": {"step": 2, "images_seen": 192}, "arguments": options})
    assert before.images_per_step == 96, "two processes"


@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors"])
def test_what_is_cut_short_of_version_0_1_0_is_passed_over(trained_once, tmp_path, name):
    folder = shutil.copytree(trained_once, tmp_path / "out")
    as_of_version_0_1_0(folder / "checkpoint-4")
    cut(folder / "checkpoint-4" / name)
    assert latest(folder).name == "checkpoint-2"


def test_what_killed_trainings_left_is_removed(train, trained):
    for name in ("tmp-checkpoint-6", "tmp-pipeline", "tmp-mine"):
        shutil.copytree(trained / "checkpoint-2", trained / name)
    with pytest.raises(ValueError, match="there is no complete checkpoint"):
        named(trained, "tmp-checkpoint-6")
    train(options(6), "--output_dir", trained, "--resume_from_checkpoint latest")
    assert [path.name for path in trained.glob("tmp-*")] == ["tmp-mine"]


# --- Branches ---


def test_latest_is_of_the_branch_that_ran_last(train, trained, tmp_path, caplog):
    """Back to step 2, and killed at 3: from there, and not from the 4 of before."""
    log = (trained / LOG_FILE).read_bytes()
    before = load(trained / "checkpoint-4" / "model.safetensors")
    slices = "--max_train_minutes 1e-9 --resume_from_checkpoint"
    train(options(8), "--output_dir", trained, slices, "checkpoint-2")
    assert "checkpoint-4 is later than where this training goes on: it is now superseded-checkpoint-4" in caplog.text
    assert names(trained) == ["checkpoint-2", "checkpoint-3", "superseded-checkpoint-4"]
    assert latest(trained).name == "checkpoint-3"
    assert (trained / "superseded-checkpoint-4" / LOG_FILE).read_bytes() == log

    train(options(8), "--output_dir", trained, slices, "superseded-checkpoint-4")
    assert latest(trained).name == "checkpoint-5"
    assert same_state(before, load(trained / "checkpoint-4" / "model.safetensors"))
    assert (trained / "superseded-checkpoint-4").is_dir(), "so that the same command works again"
    train(options(8), "--output_dir", trained, slices, "superseded-checkpoint-4")
    assert {"superseded-checkpoint-5", "superseded-checkpoint-4", "checkpoint-4"} < set(names(trained))


def test_names_of_branches_are_not_reused(train, trained):
    for _ in range(2):
        train(options(4), "--output_dir", trained, "--resume_from_checkpoint", trained / "checkpoint-2")
    assert names(trained) == [
        *("checkpoint-2", "checkpoint-4", "superseded-checkpoint-4", "superseded-checkpoint-4-2"),
    ]


# --- What may not change ---


def test_the_images_of_a_step_may_be_split_but_not_changed(train, trained):
    resume = "--output_dir", trained, "--resume_from_checkpoint latest"
    for batch, images in {
        "--train_batch_size 8": 8,
        "--train_batch_size 16 --gradient_accumulation_steps 2": 32,
    }.items():
        with pytest.raises(
            ValueError, match=f"checkpoint-4 was trained in steps of 16 images .* make {images}: --train"
        ):
            train(options(6, batch), *resume)
    train(options(6, "--train_batch_size 8 --gradient_accumulation_steps 2"), *resume)
    assert "checkpoint-6" in names(trained)


def test_steps_that_are_split_in_another_way_are_the_same_steps(train, tmp_path):
    """From a step that is no multiple of the parts: none is left over from those before."""
    steps = "--adam_epsilon 1 --learning_rate 0.1 --no_use_ema"  # in proportion to the gradients
    train(options(5).replace("steps 2", "steps 3"), steps, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "split" / "checkpoint-3")
    parts = options(5, "--train_batch_size 8 --gradient_accumulation_steps 2")
    train(parts, steps, "--output_dir", tmp_path / "split", "--resume_from_checkpoint latest")
    before = load(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    whole, split = (load(tmp_path / name / WEIGHTS) for name in ("whole", "split"))
    moved = max(float((whole[name] - before[name]).abs().max()) for name in whole)
    off = max(float((whole[name] - split[name]).abs().max()) for name in whole)
    assert off < 1e-4 * moved


def test_the_images_may_not_change(train, tmp_path):
    folder = save_images(tmp_path / "images", 40, size=(8, 8))
    command = options(), "--train_data_dir", folder, "--output_dir", tmp_path / "out"
    train(*command)
    resume = *command[1:], "--resume_from_checkpoint latest"
    for path in sorted(folder.glob("*.png"))[:8]:
        Image.open(path).convert("L").point(lambda value: 255 - value // 2).save(path)
    with pytest.raises(ValueError, match=r"checkpoint-4 was trained on other images, .* --model_name_or_path"):
        train(options(6), *resume, "--cache_dir", tmp_path / "other")
    save_images(folder, 50, size=(8, 8))
    with pytest.raises(ValueError, match="checkpoint-4 was trained on 40 images and there are 50 now"):
        train(options(6), *resume)
    shutil.rmtree(folder)
    moved = save_images(tmp_path / "elsewhere" / "images", 40, size=(8, 8))
    train(options(6), "--train_data_dir", moved, *resume[2:])
    assert "checkpoint-6" in names(tmp_path / "out"), "the same images in another place"


# --- The largest distance ---


def test_distances_are_measured_only_where_they_are_needed():
    def measured(images):
        raise AssertionError("measured")

    images = data.split_digits()[0]
    ladder = {"timestep_sampling": "uniform"}
    for given in ({}, {"method": "cld"}, {"method": "cld", "objective": "score"}, {"sigma_max": "7", **ladder}):
        make_plan(arguments(**given), data.Examination(images), len(images), 1, measured)
    plan = make_plan(arguments(**ladder), data.Examination(images), len(images), 1, lambda images: 8.0)
    assert plan.sigma_max == 8


@pytest.mark.parametrize(("method", "known"), [("gm-sgm --prediction_type epsilon", 9.6299), ("cld", None)])
def test_a_checkpoint_remembers_the_largest_distance(train, tmp_path, monkeypatch, method, known):
    """Identical images have none: the answer comes from the checkpoint."""
    train(options(2), "--method", method, "--output_dir", tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / STATE_FILE).read_text())["data"]["largest_distance"] == known
    assert distance_measured_once(checkpoint)(torch.zeros(4, 1, 8, 8)) == (known or 0)
    monkeypatch.setattr("diffusers_gm.launch.process_state", lambda: SimpleNamespace(is_main_process=False))
    assert distance_measured_once(checkpoint)(torch.zeros(4, 1, 8, 8)) == known


def test_a_number_in_place_of_the_measured_one_is_another_training(train, trained):
    resume = "--output_dir", trained, "--resume_from_checkpoint latest"
    with pytest.raises(ValueError, match=r"--sigma_max was 80.0 and is 5.0"):
        train(options(6), *resume, "--sigma_max 5")


@pytest.mark.parametrize("was_told", ["--method cld --cld_loss hsm", "--lr_warmup_steps 1"])
def test_trainings_of_before_go_on_by_their_own_command(train, tmp_path, was_told):
    """Versions that took an option named by its default for none, and a warm-up for one of a constant rate."""
    steps, folder = options(4), tmp_path / "out"
    train(options(2), was_told.partition("--cld_loss")[0].replace("--lr_warmup_steps 1", ""), "--output_dir", folder)
    if "warmup" in was_told:
        state = json.loads((folder / "checkpoint-2" / STATE_FILE).read_text())
        state["arguments"]["lr_warmup_steps"] = 1
        unsealed = {name: state[name] for name in ("state", "arguments")}
        (folder / "checkpoint-2" / STATE_FILE).write_text(json.dumps(unsealed))
    train(steps, was_told, "--output_dir", folder, "--resume_from_checkpoint latest")
    assert "checkpoint-4" in names(folder)


def test_what_auto_came_to_stays(train, tmp_path):
    """Versions differ in it."""
    resume = "--output_dir", tmp_path / "out", "--resume_from_checkpoint latest"
    train(options(2), "--sigma_max 29.9641 --p_mean -0.8 --output_dir", tmp_path / "out")
    train(options(4), *resume)
    record = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert (record["sigma_max"], record["p_mean"]) == (29.9641, -0.8)


# --- Files that are whole or not there ---


def test_what_is_published_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    source, target = tmp_path / "tmp-new", tmp_path / "new"
    (source / "unet").mkdir(parents=True)
    for name in ("unet/weights", "state"):
        (source / name).write_text("content")
    synced, sync = set(), os.fsync

    def watched(handle):
        synced.add((os.fstat(handle).st_ino, target.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    files.publish_folder(source, target)
    for path in (target, *target.rglob("*")):
        assert (path.stat().st_ino, False) in synced, path
    assert (tmp_path.stat().st_ino, True) in synced, "and the name, after it"
    assert not source.exists()


def test_the_last_of_what_is_published_is_the_last_on_the_disk(tmp_path, monkeypatch):
    """And the first that goes: where it is, all is of one making, also after a power cut."""
    source, folder = tmp_path / "tmp-new", tmp_path / "out"
    for path, text in ((source, "new"), (folder, "old")):
        (path / "unet").mkdir(parents=True)
        (path / "unet" / "weights").write_text(text)
        (path / "index").write_text(text)
    inodes = {path.stat().st_ino for path in (source, *source.rglob("*"))}
    seen, sync = [], os.fsync

    def watched(handle):
        index = (folder / "index").read_text() if (folder / "index").exists() else None
        seen.append((os.fstat(handle).st_ino, (index, (folder / "unet" / "weights").read_text())))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    files.publish_contents(source, folder, last="index")
    assert inodes <= {inode for inode, there in seen if there == ("old", "old")}, "before anything is moved"
    of_folder = [there for inode, there in seen if inode == folder.stat().st_ino]
    assert of_folder == [(None, "old"), (None, "new"), ("new", "new")]
    assert not source.exists()


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen, sync = tmp_path / "text", [], os.fsync
    path.write_text("old")

    def watched(handle):
        seen.append((os.fstat(handle).st_ino, path.read_text()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    files.write_text(path, "new")
    assert seen == [(path.stat().st_ino, "old"), (tmp_path.stat().st_ino, "new")]


def test_a_folder_is_discarded_name_first(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "weights").write_text("content")
    seen, sync = [], os.fsync

    def watched(handle):
        seen.append((os.fstat(handle).st_ino, (tmp_path / "old").exists(), len(list(tmp_path.rglob("weights")))))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    files.discard(tmp_path / "old")
    assert seen == [(tmp_path.stat().st_ino, False, 1)], "on the disk before the contents go"
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("tmp-new", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    files.publish_folder(tmp_path / "tmp-new", tmp_path / "new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["new", "new/tmp-new"]


def test_text_is_old_or_new(tmp_path):
    files.write_text(tmp_path / "text", "old Γ")

    def fail(path):
        with files.replacing(path) as temporary:
            temporary.write_text("ne")
            assert path.read_text(encoding="utf-8") == "old Γ"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert (tmp_path / "text").read_text(encoding="utf-8") == "old Γ"
    files.write_text(tmp_path / "text", "new")
    assert (tmp_path / "text").read_text() == "new"


def test_checksums_see_every_bit(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(bytes(1000))
    (tmp_path / "empty").touch()
    expected = files.checksums(tmp_path)
    assert files.damage(tmp_path, json.loads(json.dumps(expected))) == []
    for byte in (0, 500, 999):
        content = bytearray(1000)
        content[byte] = 128
        (tmp_path / "unet" / "weights").write_bytes(content)
        assert files.damage(tmp_path, expected) == ["unet/weights is not what was written"]
    (tmp_path / "empty").unlink()
    (tmp_path / "unet" / "weights").write_bytes(bytes(999))
    assert files.damage(tmp_path, expected) == ["empty is missing", "unet/weights has 999 of 1000 bytes"]
