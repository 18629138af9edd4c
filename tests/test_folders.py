"""Which files of a folder are data: names do not decide."""

import logging
import os
import shutil
import sys

import pytest
import torch
from images import corrupt, open_folder, save_images, save_parquet
from PIL import Image

import train_gm_sgm
from diffusers_gm import data
from diffusers_gm.data.folders import split_of_table
from diffusers_gm.evaluation.sources import read_samples
from diffusers_gm.training.folder import ARGS_FILE, LOG_FILE
from diffusers_gm.training.training_data import STATE_FILE


def picture(path, gray=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), gray).save(path)


def count(folder):
    return open_folder(folder).num_images


def test_names_of_files_do_not_decide(tmp_path):
    names = ["train-0.png", "train-1.png", "test_2.png", "validation.png", "a.PNG", "b [1].jpeg", "dev*.bmp", "ü.tif"]
    for name in names:
        picture(tmp_path / "photos [new]" / name)
    assert count(tmp_path / "photos [new]") == len(names)


@pytest.mark.parametrize("classes", [("car", "plane", "train"), ("good", "test"), ("a/train", "a/test")])
def test_classes_called_like_splits_are_classes(tmp_path, classes):
    for name in classes:
        save_images(tmp_path / "images" / name, 5)
    assert count(tmp_path / "images") == 5 * len(classes)


def test_images_come_in_the_order_of_their_paths(tmp_path):
    for i, name in enumerate(("a.png", "b/a.png", "b/c/a.png", "b.png", "c.png")):
        picture(tmp_path / "images" / name, 10 * i)
    source = open_folder(tmp_path / "images")
    order = [os.path.relpath(source.name(i), tmp_path / "images") for i in range(5)]
    assert order == ["a.png", "b.png", "b/a.png", "b/c/a.png", "c.png"]
    grays = [round(float((source.read(i)[0, 0, 0] + 1) * 127.5)) for i in range(5)]
    assert grays == [0, 30, 10, 20, 40]


def test_splits_where_all_folders_are_splits(tmp_path, caplog):
    folder = tmp_path / "images"
    for split, number in (("Train/cat", 4), ("Train/test", 2), ("test/cat", 3), ("val", 1)):
        save_images(folder / split, number)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "boxes.json").touch()
    with caplog.at_level(logging.INFO):
        assert count(folder) == 6
    assert "3 files of the split 'test', 1 files of the split 'val'" in caplog.text
    picture(folder / "cover.png")
    assert count(folder) == 11, "an image beside them: they are no splits"


def test_splits_without_one_for_training_are_all_used(tmp_path):
    save_images(tmp_path / "images" / "test", 3)
    save_images(tmp_path / "images" / "dev", 3)
    assert count(tmp_path / "images") == 6


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path, caplog):
    folder = tmp_path / "images"
    save_images(folder / "own", 2)
    save_images(tmp_path / "elsewhere" / "deep", 3)
    picture(tmp_path / "not_meant.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "twice").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "gone.png").symlink_to(tmp_path / "gone.png")
    (folder / "a.png").symlink_to(tmp_path / "not_meant.png")
    with caplog.at_level(logging.INFO):
        assert count(folder) == 6
    assert "3 links to folders that are above or used already" in caplog.text
    assert "1 links that lead nowhere" in caplog.text


def test_hidden_files_and_lists_of_files_are_no_data(tmp_path, caplog):
    folder = save_images(tmp_path / "images", 6)
    for name in (".hidden.png", "._000.png", ".thumbnails/0.png"):
        picture(folder / name)
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png"}\n')
    (folder / "metadata.csv").write_text("file_name\n000.png\n")
    (folder / "README").touch()
    with caplog.at_level(logging.INFO):
        assert count(folder) == 6
    for words in (
        "6 files are used",
        "3 hidden files or folders",
        "1 .jsonl files",
        "1 .csv",
        "1 files without a suffix",
    ):
        assert words in caplog.text


@pytest.mark.parametrize("name", [ARGS_FILE, LOG_FILE, STATE_FILE, "model_index.json"])
def test_what_a_training_wrote_is_no_data(tmp_path, caplog, name):
    folder = save_images(tmp_path / "images", 6)
    picture(folder / "out" / "samples" / "step-0000500.png")
    picture(folder / "out" / "samples.png")
    assert count(folder) == 8
    (folder / "out" / name).write_text("{}")
    with caplog.at_level(logging.INFO):
        assert count(folder) == 6
    assert "1 folders written by a training or a measurement" in caplog.text


def test_a_folder_that_a_training_wrote_to_itself(tmp_path):
    """Images in it are data, samples are not; unless these are what is asked for."""
    folder = save_images(tmp_path / "images", 6)
    (folder / ARGS_FILE).write_text("{}")
    picture(folder / "samples.png")
    for name in ("results", "results-before", "results-before-2", "calibration-before"):
        picture(folder / f"{name}.png")
    picture(folder / "samples" / "step-0000500.png")
    picture(folder / "samples" / "mine.png")
    assert count(folder) == 7
    assert count(folder / "samples") == 2


def test_a_measurement_is_no_data(tmp_path):
    folder = save_images(tmp_path / "images", 6)
    picture(folder / "measured" / "results.png")
    (folder / "measured" / "results.json").touch()
    (folder / "measured" / "results.md").touch()
    assert count(folder) == 6


def test_a_training_writes_into_the_folder_of_its_data(tmp_path, monkeypatch):
    """And goes on, and another one on the same data does not see it."""
    folder = save_images(tmp_path / "photos", 12)
    words = ["train_gm_sgm.py", "--train_data_dir", folder, "--train_batch_size", 4, "--block_out_channels", 8,
             "--lr_scheduler", "constant", "--num_validation_images", 1, "--validation_inference_steps", 2,
             "--validation_steps", 1, "--output_dir", folder / "out", "--resume_from_checkpoint", "latest"]  # fmt: skip
    for steps in (2, 3):
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--max_train_steps", str(steps)])
        with torch.random.fork_rng():
            train_gm_sgm.main()
    assert (folder / "out" / "samples" / "step-0000001.png").is_file()
    assert count(folder) == 12


# --- Tables beside images ---


def test_a_stray_table_beside_images(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    folder = save_images(tmp_path / "images", 6)
    datasets.Dataset.from_dict({"file_name": ["000.png"], "label": [1]}).to_parquet(str(folder / "metadata.parquet"))
    (folder / "broken.parquet").write_bytes(b"no parquet")
    with caplog.at_level(logging.INFO):
        assert count(folder) == 6
    assert "1 parquet files that cannot be read, 1 parquet files without a column of images" in caplog.text


def test_images_and_tables_of_images(tmp_path):
    folder, _ = save_parquet(tmp_path)
    picture(folder / "sub" / "a.png")
    with pytest.raises(ValueError, match=r"it holds 1 image files, such as sub/a.png, and 1 parquet files of images"):
        open_folder(folder)


def test_tables_by_content_and_split(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    made, _ = save_parquet(tmp_path)
    folder = tmp_path / "set [1]"
    folder.mkdir()
    table = made / "train-00000-of-00001.parquet"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        shutil.copy(table, folder / f"{name}.parquet")
    datasets.Dataset.from_dict({"label": [1]}).to_parquet(str(folder / "metadata.parquet"))
    with caplog.at_level(logging.INFO):
        source = open_folder(folder)
    assert (source.num_images, source.image_column) == (48, "img")
    assert "1 files of the split 'test'" in caplog.text
    assert torch.equal(source.read(24 + 3), source.read(3))
    (folder / "test-00000-of-00001.parquet").rename(folder / "more.parquet")
    assert open_folder(folder).num_images == 72
    assert [split_of_table(f"{path}/0000.parquet") for path in ("test/train", "train/test")] == ["train", "test"]


# --- What is said ---


def test_folders_without_images_say_what_they_hold(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.zip", ".d.png"):
        (folder / name).touch()
    with pytest.raises(ValueError, match="holds no images, but 2 .txt files, 1 .zip files, 1 hidden files or folders"):
        open_folder(folder)


def test_an_unreadable_file_is_named(tmp_path, caplog):
    folder = save_images(tmp_path / "images")
    corrupt(folder / "007.png")
    source = open_folder(folder)
    with caplog.at_level(logging.WARNING):
        data.examine(source, seed=0)
        data.TrainingImages(data.subset(source, 24, 0), 8, 1, seed=0).__getitems__([(0, i) for i in range(24)])
    examined, trained = caplog.records
    assert str(folder / "007.png") in examined.getMessage()
    assert str(folder / "007.png") in trained.getMessage()
    with pytest.raises(ValueError, match="--samples .* cannot be read: .*007.png: "):
        read_samples(folder)


def test_samples_are_read_in_the_same_room(tmp_path):
    folder = tmp_path / "my [samples]"
    for name in ("train-0.png", "1.png", "test/2.png", ".3.png"):
        picture(folder / name)
    assert read_samples(folder).shape == (3, 1, 8, 8)


def test_a_folder_named_as_a_set_of_the_hub_is_read_alike(tmp_path):
    for name in ("train-0.png", "1.png"):
        picture(tmp_path / "photos" / name)
    source = data.open_source(str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    assert source.num_images == 2
