"""Images that are read as they come: parts, order, and going on from any place to the bit."""

import io
import json
import shutil
import tarfile
from dataclasses import asdict
from itertools import islice

import pytest
import torch
from images import ROWS, SHARDS, png, save_parquets
from PIL import Image
from torch.utils.data import DataLoader
from training import SMALL, WEIGHTS, arguments, load, same_state

from diffusers_gm.data import Place, StreamedBatches, TrainingImages, open_stream
from diffusers_gm.training.folder import list_checkpoints
from diffusers_gm.training.training_data import STATE_FILE


def save_tars(folder):
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in range(shard * ROWS, (shard + 1) * ROWS):
                for suffix, content in (("png", png(number)), ("json", b'{"label": 1}')):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(params=[save_parquets, save_tars], ids=["parquet", "webdataset"])
def folder(request, tmp_path):
    return request.param(tmp_path / "stream")


def batches(folder, size=5, processes=1, index=0, places=None, num_images=SHARDS * ROWS, block=8, turn=0, seed=0):
    images = TrainingImages(open_stream(train_data_dir=str(folder)), 8, 3, seed)
    return StreamedBatches(images, size, block, num_images, processes, index, places or [Place()], turn)


def numbers(images):
    """Which images these are."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def rows(taken):
    return [number for seen, _ in taken for number in seen]


def take(stream, count):
    return [(numbers(images), place) for images, place in islice(iter(stream), count)]


def test_an_epoch_has_every_image_once_and_no_two_are_alike(folder):
    epochs = take(batches(folder), 24)
    orders = [rows(epochs[start : start + 8]) for start in (0, 8, 16)]
    assert all(sorted(order) == list(range(SHARDS * ROWS)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    shards = [[number // ROWS for number in order] for order in orders]
    assert any(order != shards[0] for order in shards[1:]), "files come in another order, too"
    assert any(a != b for a, b in zip(orders[0], sorted(orders[0]), strict=True))
    places = [[number % ROWS for number in order] for order in orders]
    assert places[0] != places[1] != places[2], "and so do the rows of a block"
    of_another_seed = [number % ROWS for number in rows(take(batches(folder, seed=1), 24))]
    assert sorted(of_another_seed[:8]) == sorted(places[0][:8]) == list(range(8))
    assert of_another_seed[:8] != places[0][:8], "and by another seed"


def test_it_goes_on_from_every_place(folder):
    whole = take(batches(folder), 20)
    for done, (_, place) in enumerate(whole[:-1], 1):
        kept = Place(**json.loads(json.dumps(asdict(place))))  # as in a checkpoint
        assert rows(take(batches(folder, places=[kept]), 20 - done)) == rows(whole[done:]), done


def test_it_goes_on_again_and_again(folder):
    whole, place, seen = take(batches(folder, 1), 60), Place(), []
    for count in (1, 2, 9, 3, 12, 1, 20, 12):
        some = take(batches(folder, 1, places=[place]), count)
        seen, place = seen + some, some[-1][1]
    assert rows(seen) == rows(whole)


def test_flips_are_drawn_anew_in_each_block_and_epoch(folder):
    images = TrainingImages(open_stream(train_data_dir=str(folder)), 8, 3, seed=0, random_flip=True)
    blocks = islice(StreamedBatches(images, 8, 8, SHARDS * ROWS, 1, 0, [Place()]), 10)
    flipped = [int((images[:, 2, 0, -1] > 0).sum()) for images, _ in blocks]  # whose corner is on the right
    assert len(set(flipped[:5])) > 1, "rows of a block are counted from the beginning of the epoch"
    assert flipped[:5] != flipped[5:]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_an_epoch(folder, processes):
    """Of two or four each has its shards; of three each reads all, and takes its rows."""
    seen = []
    for index in range(processes):
        part = take(batches(folder, 1, processes, index), 40)
        mine = [(numbers, place) for numbers, place in part if place.epoch == 0]
        seen += rows(mine)
        for done in (1, len(mine) // 2, len(mine)):
            rest = take(batches(folder, 1, processes, index, [part[done - 1][1]]), 9)
            assert rows(rest) == rows(part[done:][:9]), done
    assert sorted(seen) == list(range(SHARDS * ROWS))


def test_workers_of_a_loader_have_parts_too_and_go_on(folder):
    def of(places, count, turn=0):
        loader = DataLoader(batches(folder, places=places, turn=turn), batch_size=None, num_workers=2)
        with torch.random.fork_rng():  # which it draws a seed for its workers from
            given = (batch for batch in loader if batch is not None)
            return [(numbers(images), place) for images, place in islice(given, count)]

    whole = of([Place(), Place()], 8)
    assert sorted(rows(whole)) == list(range(SHARDS * ROWS))
    assert rows(of([whole[2][1], whole[3][1]], 4)) == rows(whole[4:])
    turned = of([whole[4][1], whole[3][1]], 3, turn=1)
    assert rows(turned) == rows(whole[5:]), "after an odd number of batches it is the other one's turn"
    with pytest.raises(ValueError, match=r"--dataloader_num_workers 5: a process reads 4 shards .* use at most 4"):
        batches(folder, places=[Place()] * 5)


# --- What is wrong ---


def test_a_stream_that_ends_early(folder):
    with pytest.raises(ValueError, match=r"ended after 40 images, and --num_train_samples 50 says 50: set it to"):
        take(batches(folder, num_images=50), 9)
    with pytest.raises(ValueError, match=r"part of 2 parts of the .* ended after 20 images, .* 100 says 50"):
        take(batches(folder, 5, 2, num_images=100), 9)


def test_a_stream_that_breaks_off(tmp_path):
    folder = save_tars(tmp_path / "stream")
    stream = batches(folder)
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(RuntimeError, match=r"the stream of .* broke off after \d+ rows or more"):
        take(stream, 9)


def test_images_that_cannot_be_read_are_passed_over(tmp_path, caplog):
    folder = save_parquets(tmp_path / "stream", broken={3, 17})
    seen = rows(take(batches(folder, 2), 19))
    assert sorted(seen) == sorted(set(range(40)) - {3, 17})
    assert "2 of" in caplog.text
    with pytest.raises(ValueError, match=r"\d+ of 10\d images of the stream cannot be read"):
        take(batches(save_parquets(tmp_path / "worse", broken=set(range(0, 40, 3))), 1), 100)


def test_what_cannot_be_streamed(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no parquet or tar files to be streamed"):
        open_stream(train_data_dir=str(tmp_path / "empty"))
    Image.new("L", (8, 8)).save(tmp_path / "empty" / "image.png")
    with pytest.raises(ValueError, match="image files are read one by one anyway: leave out --streaming"):
        open_stream(train_data_dir=str(tmp_path / "empty"))
    for name in ({"dataset_name": "digits"}, {"train_data_dir": str(tmp_path / "none")}):
        with pytest.raises(ValueError, match="cannot be streamed: give a data set of the Hub, or a folder"):
            open_stream(**name)
    folder = save_parquets(tmp_path / "stream")
    with pytest.raises(
        ValueError, match=r"--image_column 'picture' is not in the data: use one of \['image', 'label'\]"
    ):
        open_stream(train_data_dir=str(folder), image_column="picture")
    with pytest.raises(ValueError, match="--image_column 'label' holds .* not images"):
        open_stream(train_data_dir=str(folder), image_column="label")
    for options, said in (
        ({"streaming": True}, "--streaming needs --num_train_samples"),
        ({"streaming": True, "num_train_samples": 9, "max_train_samples": 5}, "goes without --max_train_samples"),
        ({"streaming": True, "num_train_samples": 9, "vae": "x"}, "--vae keeps the latents of all images"),
        ({"streaming": True, "num_train_samples": 9, "class_conditional": True}, "a stream cannot be counted"),
        ({"num_train_samples": 9}, "--num_train_samples is for --streaming"),
    ):
        with pytest.raises(ValueError, match=said):
            arguments(**options)


# --- Trainings ---

OPTIONS = (
    f"{SMALL} --streaming --num_train_samples 40 --shuffle_buffer_size 7 --random_flip --validation_steps 0 "
    "--checkpointing_steps 3 --train_batch_size 6 --num_train_epochs 2"
)


@pytest.mark.parametrize("workers", [0, 2])
def test_slices_of_a_training_give_what_one_run_does(train, tmp_path, folder, workers):
    options = OPTIONS, f"--train_data_dir {folder} --dataloader_num_workers {workers}"
    train(*options, "--output_dir", tmp_path / "whole")
    assert list_checkpoints(tmp_path / "whole")[-1].name == "checkpoint-14", "2 x 40 images, 6 a step"
    slices = (1, 3, 7) if workers else range(1, 14)
    while not list_checkpoints(tmp_path / "sliced") or len(list_checkpoints(tmp_path / "sliced")) < len(slices):
        train(*options, "--max_train_minutes 1e-9 --resume_from_checkpoint latest --output_dir", tmp_path / "sliced")
    train(*options, "--resume_from_checkpoint latest --output_dir", tmp_path / "sliced")
    assert same_state(load(tmp_path / "whole" / WEIGHTS), load(tmp_path / "sliced" / WEIGHTS))
    assert "40 images" in (tmp_path / "whole" / "README.md").read_text()


def test_a_stream_that_ends_early_is_gone_on_with(train, tmp_path, folder):
    """Nothing is lost: the length is corrected, and the end is that of a training that had it right."""
    options = OPTIONS, f"--train_data_dir {folder} --checkpointing_steps 1 --max_train_steps 9"
    with pytest.raises(ValueError, match="--num_train_samples 50 says 50: set it to what the stream holds, and go on"):
        train(*options, "--num_train_samples 50 --output_dir", tmp_path / "out")
    assert list_checkpoints(tmp_path / "out")[-1].name == "checkpoint-6", "36 of 40 images"
    train(*options, "--resume_from_checkpoint latest --output_dir", tmp_path / "out")
    train(*options, "--output_dir", tmp_path / "right")
    assert same_state(load(tmp_path / "right" / WEIGHTS), load(tmp_path / "out" / WEIGHTS))


def test_other_workers_would_be_another_order(train, tmp_path, folder):
    options = OPTIONS, f"--train_data_dir {folder} --output_dir {tmp_path / 'out'}"
    train(*options)
    state = json.loads((tmp_path / "out" / "checkpoint-3" / STATE_FILE).read_text())["state"]
    assert len(state["places"]) == len(state["places"][0]["workers"]) == 1
    with pytest.raises(ValueError, match="as many processes and --dataloader_num_workers as before: 1 x 1, not 1 x 2"):
        train(*options, "--dataloader_num_workers 2 --resume_from_checkpoint checkpoint-3")
    with pytest.raises(ValueError, match="--shuffle_buffer_size was 7 and is 8"):
        train(*options, "--shuffle_buffer_size 8 --resume_from_checkpoint checkpoint-3")


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_held_out_files_are_not_streamed(tmp_path, kind, caplog):
    save = {"parquet": save_parquets, "webdataset": save_tars}[kind]
    parts = sorted(save(tmp_path / "stream").iterdir())
    for number, part in enumerate(parts):
        of = f"-of-{SHARDS:05d}" if kind == "parquet" else ""
        part.rename(part.with_name(f"{'train' if number else 'test'}-{number:05d}{of}{part.suffix}"))
    images = open_stream(train_data_dir=str(tmp_path / "stream"))
    assert len(list(images.dataset)) == (SHARDS - 1) * ROWS
    assert "not used are 1 files of the split 'test'" in caplog.text


@pytest.mark.parametrize("other", ["b.parquet", "c.png"])
def test_a_stream_is_of_one_kind_of_files(tmp_path, other):
    folder = save_tars(tmp_path / "stream")
    (folder / ".trash").mkdir()
    sorted(folder.glob("*.tar"))[0].rename(folder / ".trash" / "0.tar")
    assert len(list(open_stream(train_data_dir=str(folder)).dataset)) == (SHARDS - 1) * ROWS, "hidden files are no data"
    if other == "c.png":
        Image.new("L", (8, 8)).save(folder / other)
    else:
        shutil.move(sorted(save_parquets(tmp_path / "tables").iterdir())[0], folder / other)
    with pytest.raises(ValueError, match=f"holds 3 tar files, such as .*, and 1 .* files.*, such as {other}: which"):
        open_stream(train_data_dir=str(folder))


def test_a_broken_table_beside_tar_files_is_left_out(tmp_path, caplog):
    folder = save_tars(tmp_path / "stream")
    (folder / "broken.parquet").write_bytes(b"no parquet")
    assert len(list(open_stream(train_data_dir=str(folder)).dataset)) == SHARDS * ROWS
    assert f"{SHARDS} files are used, not used are 1 parquet files that cannot be read" in caplog.text


def test_pairs_of_images_are_told_apart_by_their_user(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(0))
            tar.addfile(member, io.BytesIO(png(0)))
    with pytest.raises(ValueError, match=r"images in the columns \['png', 'jpg'\]: say which with --image_column"):
        open_stream(train_data_dir=str(tmp_path))
    assert open_stream(train_data_dir=str(tmp_path), image_column="jpg").image_column == "jpg"
