"""The folder of a training: what is in it, what is left alone, and dry runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from images import save_images
from PIL import Image
from training import TINY, WEIGHTS, load, same_state

from diffusers_gm import files
from diffusers_gm.training.folder import LOG_FILE, append_log, list_checkpoints, read_log
from diffusers_gm.training.rehearsal import rehearse


@pytest.mark.parametrize("below", ["", "/sub/folder"])
def test_a_file_is_no_output_folder(train, tmp_path, below):
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(ValueError, match="--output_dir '.*': '.*/thesis' is a file"):
        train(TINY, "--output_dir", f"{tmp_path}/thesis{below}", "--overwrite_output_dir")
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_folder_with_other_files_is_left_alone(train, tmp_path):
    folder = tmp_path / "out"
    (folder / "unet").mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="files that are not from a training: .* --overwrite_output_dir"):
        train(TINY, "--output_dir", folder)
    train(TINY, "--output_dir", folder, "--overwrite_output_dir")
    assert (folder / "thesis.tex").read_text() == "years of work"
    before = load(folder / WEIGHTS)
    train(TINY, "--output_dir", folder, "--seed 1 --overwrite_output_dir")
    assert not same_state(before, load(folder / WEIGHTS))
    assert (folder / "thesis.tex").exists()


def test_what_a_model_would_replace_is_left_alone(train, tmp_path):
    folder = tmp_path / "out"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("my project")
    (folder / "unet" / "net.py").write_text("years of work")
    with pytest.raises(ValueError, match="holds unet, not from a training, which a model would replace"):
        train(TINY, "--output_dir", folder, "--overwrite_output_dir")
    (folder / "unet").rename(folder / "code")
    train(TINY, "--output_dir", folder, "--overwrite_output_dir")
    assert (folder / "README-before.md").read_text() == "my project"
    train(TINY, "--output_dir", folder, "--overwrite_output_dir")
    assert not (folder / "README-before-2.md").exists(), "the training's own card"
    with (folder / "README.md").open("a") as card:
        card.write("my notes")
    train(TINY, "--output_dir", folder, "--overwrite_output_dir")
    assert "my notes" in (folder / "README-before-2.md").read_text()


def test_starting_anew_forgets_the_checkpoints_of_before(train, tmp_path):
    options = TINY.replace("--checkpointing_steps 0", "--checkpointing_steps 2")
    train(options.replace("--max_train_steps 2", "--max_train_steps 4"), "--output_dir", tmp_path / "out")
    train(options, "--output_dir", tmp_path / "out", "--overwrite_output_dir")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert [entry["step"] for entry in read_log(tmp_path / "out")] == [2]


def test_a_half_moved_pipeline_does_not_load(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, content in ((source, "new"), (target, "old")):
        for name in ("unet", "scheduler"):
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(content)
        (folder / "model_index.json").write_text(content)
    replace, moved = Path.replace, []

    def killed_at_the_second(path, to):
        if moved:
            raise KeyboardInterrupt
        moved.append(path)
        return replace(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            files.publish_contents(source, target, last="model_index.json")
    assert not (target / "model_index.json").exists()
    files.publish_contents(source, target, last="model_index.json")
    assert {path.read_text() for path in target.rglob("*.json")} == {"new"}
    assert not source.exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(train, tmp_path, capsys):
    train("--dry_run --output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    for said in (
        "651,041 parameters",
        "1437 images of 1x8x8",
        "log-normal noise levels from 0.01 to 80 (ln sigma of mean -1.2 and deviation 1.2)",
        "0 to 1500 of 128",
        "for the first step, then ",
        "GiB",
        "Nothing was written.",
    ):
        assert said in printed
    assert not (tmp_path / "out").exists()
    for changed, said in {
        "--first_batch x.png": "--first_batch 'x.png' goes with --dry_run",
        "--dry_run --first_batch x.text": "must be the name of a picture",
        f"--dry_run --first_batch {tmp_path}/no/x.png": "there is no folder",
    }.items():
        with pytest.raises(SystemExit):
            train(changed)
        assert said in capsys.readouterr().err


def test_a_dry_run_counts_the_first_step_once(monkeypatch):
    """It is slower than the others, which are measured without it."""
    clock, durations = [0.0], iter([10, 2, 2, 2, 2, 2])
    monkeypatch.setattr("diffusers_gm.training.rehearsal.time.monotonic", lambda: clock[-1])
    said = rehearse(lambda: clock.append(clock[-1] + next(durations)), 20, torch.device("cpu"))
    assert "10 s for the first step, then 2 s a step (5 measured): 20 steps last 48 s" in said


def test_a_dry_run_shows_the_first_batch(train, tmp_path):
    folder = save_images(tmp_path / "images", 30, size=(8, 8), mode="RGB")
    words = f"--train_data_dir {folder} --random_flip --output_dir {tmp_path / 'out'}"
    train(TINY, words, "--dry_run --first_batch", tmp_path / "first.png")
    with Image.open(tmp_path / "first.png") as picture:
        assert picture.size == (4 * 64 + 3 * 4, 4 * 64 + 3 * 4), "16 images, enlarged, with gaps"
        pixels, at = np.asarray(picture), range(0, 4 * 68, 68)
        seen = [pixels[i : i + 64 : 8, j : j + 64 : 8] for i in at for j in at]
    given = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    both = [*given, *(image[:, ::-1] for image in given)]
    assert all(any(np.array_equal(image, one) for one in both) for image in seen)
    assert not (tmp_path / "out").exists()


def test_a_cut_line_of_the_log_is_dropped(tmp_path):
    append_log(tmp_path, {"step": 1, "loss": 0.5})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
