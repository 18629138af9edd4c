"""Training images: sources, transforms, order."""

import logging
import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from images import corrupt, open_folder, png, save_images, save_parquet
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_gm import data

# --- Digits ---


def test_digits_are_in_the_range_of_images():
    images = data.load_digits_images()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round()), "17 gray levels"


def test_the_digits_used_for_training_leave_the_held_out_ones_alone():
    train, held_out = data.split_digits()
    assert (len(train), len(held_out)) == (1437, 360)
    assert torch.equal(data.split_digits()[1], held_out)
    together = torch.cat([train, held_out]).flatten(1)
    everything = data.load_digits_images().flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, everything.tolist()))
    source = data.open_source("digits")
    assert torch.equal(torch.stack([source.read(i) for i in range(source.num_images)]), train)


# --- Sources ---


def test_a_folder_of_images(tmp_path):
    source = open_folder(save_images(tmp_path / "images"))
    assert (source.num_images, source.image_column) == (24, "image")
    first = np.asarray(Image.open(tmp_path / "images" / "000.png"))
    assert torch.allclose(source.read(0), torch.tensor(first)[None] / 127.5 - 1, atol=1e-6)


def test_a_folder_of_parquet_files(tmp_path):
    folder, images = save_parquet(tmp_path)
    source = open_folder(folder)
    assert (source.num_images, source.image_column) == (24, "img")
    expected = torch.from_numpy(np.array(images[5])).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(source.read(5), expected, atol=1e-6)


def test_columns_that_are_not_there_are_listed(tmp_path):
    folder, _ = save_parquet(tmp_path, column="picture")
    with pytest.raises(ValueError, match=r"set --image_column to one of \['picture', 'label'\]"):
        open_folder(folder)
    with pytest.raises(ValueError, match=r"'photo' is not in the data: use one of \['picture', 'label'\]"):
        open_folder(folder, image_column="photo")
    with pytest.raises(ValueError, match=r"--image_column 'label' holds .*, not images"):
        open_folder(folder, image_column="label")
    assert open_folder(folder, image_column="picture").num_images == 24


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"--train_data_dir .* is not a folder"):
        open_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--train_data_dir .* holds no images, but nothing at all"):
        open_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"--dataset_name 'nobody/nothing' has no training images"):
        data.open_source("nobody/nothing")


def test_a_subset_is_chosen_by_the_seed():
    source = data.open_source("digits")
    one, same, other = (data.subset(source, 10, seed) for seed in (0, 0, 1))
    images = [torch.stack([s.read(i) for i in range(10)]) for s in (one, same, other)]
    assert one.num_images == 10
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    # What is said of an image is said of the same one as in the whole.
    names, of_all = source.labels()
    whole = torch.stack([source.read(i) for i in range(source.num_images)])
    places = [int((whole == image).flatten(1).all(1).nonzero()[0]) for image in images[0]]
    assert [one.name(i) for i in range(10)] == [source.name(place) for place in places]
    assert one.labels() == (names, [of_all[place] for place in places])


# --- Transforms ---


def test_gray_and_colour():
    gray = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    assert torch.allclose(data.as_channels(data.as_channels(gray, 3), 1), gray, atol=1e-6)


def test_fit_keeps_the_aspect_ratio_and_takes_the_crop_asked_for():
    ramp = torch.linspace(-1, 1, 40)[None, None].expand(1, 20, 40)
    assert data.fit(ramp, 10).shape == (1, 10, 10)
    left, centre, right = (data.fit(ramp, 20, (0, place)) for place in (0, 0.5, 1))
    assert torch.equal(left, ramp[..., :20])
    assert torch.equal(centre, ramp[..., 10:30])
    assert torch.equal(right, ramp[..., 20:])
    flat = torch.full((3, 33, 47), 0.25)
    assert torch.allclose(data.fit(flat, 16), torch.full((3, 16, 16), 0.25), atol=1e-6)
    stripes = torch.tensor([1.0, -1, -1, 1]).repeat(16).expand(1, 64, 64)
    assert data.fit(stripes, 16)[..., 2:-2].abs().max() < 1e-5, "all pixels count where an image is made smaller"


# --- Examination ---


def test_examination_takes_size_and_channels_from_the_images(tmp_path):
    source = open_folder(save_images(tmp_path / "gray"))
    assert data.examine(source, seed=0).images.shape == (24, 1, 8, 8)
    assert data.examine(source, seed=0, channels=3, resolution=4).images.shape == (24, 3, 4, 4)
    Image.new("RGB", (8, 8)).save(tmp_path / "gray" / "colour.png")
    source = open_folder(tmp_path / "gray")
    assert data.examine(source, seed=0).images.shape == (25, 3, 8, 8)
    examined = data.examine(source, seed=0)
    gray = data.examine(source, seed=0, channels=1).images
    assert torch.equal(gray.expand(-1, 3, -1, -1), examined.images), "the colour image is black"
    Image.new("RGB", (9, 9)).save(tmp_path / "gray" / "larger.png")
    source = open_folder(tmp_path / "gray")
    with pytest.raises(ValueError, match=r"differ in size .* set --resolution"):
        data.examine(source, seed=0)


def test_examination_is_of_images_that_the_seed_chooses():
    """Not of the first ones: sets are often in the order of their classes."""
    source = data.open_source("digits")
    one, same, other = (data.examine(source, seed, num_images=50).images for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    first = {image.numpy().tobytes() for image in map(source.read, range(50))}
    assert all(len(first & {image.numpy().tobytes() for image in some}) < 25 for some in (one, other))


def test_examination_is_bounded():
    source = data.open_source("digits")
    assert len(data.examine(source, seed=0, num_images=50).images) == 50
    assert len(data.examine(source, seed=0, max_elements=640).images) == 10
    large = data.examine(data.TensorImages(torch.zeros(1, 3, 256, 256, dtype=torch.uint8).expand(600, -1, -1, -1)), 0)
    assert 200e6 < large.images.numel() * 4 < 400e6, "bytes"
    with pytest.raises(ValueError, match="no training images in the data"):
        data.examine(data.TensorImages(torch.zeros(0, 1, 8, 8)), 0)


def test_unreadable_images_are_skipped_and_counted(tmp_path, caplog):
    """Up to a tenth of them."""
    folder = save_images(tmp_path / "images", 20)
    corrupt(folder / "003.png")
    corrupt(folder / "004.png")
    source = open_folder(folder)
    with caplog.at_level(logging.WARNING):
        examination = data.examine(source, seed=0)
    assert len(examination.images) == 18
    assert "2 of 20 training images examined cannot be read" in caplog.text

    images = data.TrainingImages(source, 8, 1, seed=0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(images[0, 3], images[0, 5]), "the next one that can be read"
    assert images.unreadable == {3, 4}
    assert "2 skipped so far" in caplog.text


def test_too_many_unreadable_images_are_an_error(tmp_path):
    folder = save_images(tmp_path / "images")
    for i in range(3):
        corrupt(folder / f"{i:03d}.png")
    source = open_folder(folder)
    with pytest.raises(ValueError, match="3 of 24 training images examined cannot be read"):
        data.examine(source, seed=0)
    images = data.TrainingImages(source, 8, 1, seed=0)
    with pytest.raises(ValueError, match="3 of 24 training images cannot be read"):
        images[0, 0]
    for i in range(3, 12):
        corrupt(folder / f"{i:03d}.png")
    with pytest.raises(ValueError) as error:
        data.examine(source, seed=0, max_elements=4 * 64)
    unreadable, _, drawn, *_ = str(error.value).split()
    assert int(drawn) == int(unreadable) + 4, "of those that were looked at until there were four"


# --- The stream ---


def take(stream, count):
    batches = iter(stream)
    return [next(batches) for _ in range(count)]


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    flat = [key for batch in take(data.ImageStream(10, 4, seed=0), 10) for key in batch]
    epochs = [[index for epoch, index in flat if epoch == e] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert take(data.ImageStream(10, 4, seed=1), 1) != take(data.ImageStream(10, 4, seed=0), 1)


@pytest.mark.parametrize("start", [4, 8, 10, 28])
def test_the_stream_goes_on_where_it_stopped(start):
    whole = [key for batch in take(data.ImageStream(10, 4, seed=0), 12) for key in batch]
    rest = [key for batch in take(data.ImageStream(10, 4, seed=0, start=start), 3) for key in batch]
    assert rest == whole[start : start + 12]


def test_processes_share_the_stream():
    whole = take(data.ImageStream(10, 4, seed=0), 8)
    parts = [take(data.ImageStream(10, 4, seed=0, num_processes=2, process_index=i), 4) for i in range(2)]
    assert whole == [batch for pair in zip(*parts, strict=True) for batch in pair]


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (32, 48)])
def test_crops_are_random_wherever_something_is_cropped(size, generator):
    images = data.TrainingImages(data.TensorImages(torch.rand(1, 1, *size, generator=generator)), [32, 48], 1, seed=0)
    different = {float(images[epoch, 0].sum()) for epoch in range(20)}
    assert (len(different) > 5) == (size != (32, 48))


def test_crops_and_flips_are_decided_by_seed_epoch_and_index():
    wide = torch.linspace(-1, 1, 8 * 30).reshape(1, 8, 30)
    source = data.TensorImages(wide.expand(40, -1, -1, -1))
    images = data.TrainingImages(source, 8, 1, seed=0, random_flip=True)
    again = data.TrainingImages(source, 8, 1, seed=0, random_flip=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(40)]
    crops = [images[key] for key in keys]
    assert all(torch.equal(crop, again[key]) for crop, key in zip(crops, keys, strict=True))
    assert len({float(crop.min()) for crop in crops}) > 15, "23 places"
    flipped = sum(bool(crop[0, 0, 0] > crop[0, 0, 1]) for crop in crops)
    assert 25 <= flipped <= 55, "80 fair coins: three standard deviations are 27 to 53"
    of_another_seed = data.TrainingImages(source, 8, 1, seed=1, random_flip=True)
    assert sum(torch.equal(crop, of_another_seed[key]) for crop, key in zip(crops, keys, strict=True)) < 20
    centred = data.TrainingImages(source, 8, 1, seed=0, center_crop=True)
    assert torch.equal(centred[0, 0], wide[..., 11:19])
    centred.random_flip = True
    seen = {tuple(centred[key].flatten().tolist()) for key in keys}
    assert seen == {tuple(centre.flatten().tolist()) for centre in (wide[..., 11:19], wide[..., 11:19].flip(-1))}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_what_its_images_are_one_by_one(tmp_path, flip, channels):
    """Bit by bit: of one size, of several, of both kinds of colours, with images that cannot be read."""
    one_size = open_folder(save_images(tmp_path / "one"))
    save_images(tmp_path / "mixed" / "a", 8, size=(8, 8))
    save_images(tmp_path / "mixed" / "b", 8, size=(13, 8), mode="RGB")
    save_images(tmp_path / "mixed" / "c", 8, size=(11, 20))
    for name in ("a/002", "a/003"):
        corrupt(tmp_path / "mixed" / f"{name}.png")
    keys = [(epoch, index) for epoch in range(2) for index in (5, 2, 23, 2, 3, 15, 9)]
    for source in (one_size, open_folder(tmp_path / "mixed"), data.open_source("digits")):
        together = data.TrainingImages(source, 8, channels, seed=0, random_flip=flip).__getitems__(keys)
        alone = data.TrainingImages(source, 8, channels, seed=0, random_flip=flip)
        assert all(torch.equal(image, alone[key]) for image, key in zip(together, keys, strict=True))
        assert all(image.dtype == torch.float32 for image in together)


def test_colours_that_are_made_gray_are_said_once(caplog):
    images = data.TrainingImages(data.TensorImages(torch.zeros(4, 3, 8, 8)), 8, 1, 0)
    images.__getitems__([(0, 2), (0, 3)])
    images.__getitems__([(1, 1)])
    (record,) = caplog.records
    assert "there are colour images among the training images, such as image 2" in record.getMessage()


def test_files_of_several_images_are_said(tmp_path, caplog):
    pages = [Image.new("L", (8, 8), gray) for gray in (0, 100, 200)]
    pages[0].save(tmp_path / "0.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "1.png")
    assert open_folder(tmp_path).num_images == 2
    assert "1 of 2 files that were looked at hold several images, such as " in caplog.text
    assert "0.tif: of each, the first is used" in caplog.text


def test_names_of_files_are_bytes(tmp_path):
    save_images(tmp_path / "latin", 2)
    os.rename(tmp_path / "latin" / "000.png", os.fsencode(tmp_path / "latin") + b"/caf\xe9.png")
    assert len(open_folder(tmp_path / "latin").fingerprint()) == 64


@pytest.mark.parametrize("tables", [False, True])
def test_images_are_told_from_others_without_decoding_them(tmp_path, tables):
    def source(name, longer=""):
        if tables:
            (tmp_path / name).mkdir()
            rows = [{"bytes": png(n) + longer.encode() * (n == 1), "path": None} for n in range(3)]
            datasets.Dataset.from_dict({"image": rows}).to_parquet(str(tmp_path / name / "rows.parquet"))
        else:
            with (save_images(tmp_path / name, 3) / "001.png").open("a") as file:
                file.write(longer)
        return open_folder(tmp_path / name)

    one = source("a")
    assert one.fingerprint() == source("b").fingerprint()
    assert one.fingerprint() != source("c", "more").fingerprint()
    assert data.subset(one, 2, 0).fingerprint() != data.subset(one, 1, 0).fingerprint()


def test_an_unreadable_image_that_a_batch_holds_twice_is_counted_once(tmp_path):
    folder = save_images(tmp_path / "images")
    corrupt(folder / "003.png")
    images = data.TrainingImages(open_folder(folder), 8, 1, seed=0)
    batch = images.__getitems__([(0, 3), (0, 3), (0, 4)])
    assert images.unreadable == {3}
    assert torch.equal(torch.stack(batch), torch.stack([images[0, 4]] * 3))


def test_a_batch_of_a_table_is_one_access(tmp_path, monkeypatch):
    import datasets

    folder, _ = save_parquet(tmp_path)
    source = open_folder(folder)
    accesses = []
    access = datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, key: accesses.append(key) or access(self, key))
    images, stream = data.TrainingImages(source, 8, 3, seed=0), data.ImageStream(24, 12, seed=0)
    batch = next(iter(DataLoader(images, batch_sampler=stream, generator=torch.Generator())))
    assert batch.shape == (12, 3, 8, 8)
    assert len(accesses) == 1


def test_seeds_do_not_collide():
    seeds = {data.seed_for(seed, use, n) for seed in range(4) for use in range(3) for n in range(200)}
    assert len(seeds) == 4 * 3 * 200


def test_sources_can_be_sent_to_workers(tmp_path):
    for source in (data.open_source("digits"), open_folder(save_images(tmp_path / "images"))):
        chosen = data.subset(source, 5, seed=0)
        copied = pickle.loads(pickle.dumps(chosen))
        assert torch.equal(copied.read(3), chosen.read(3))
