"""What the numbers in image files mean, through real files."""

import logging
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from images import open_folder
from PIL import Image

from diffusers_gm import data
from diffusers_gm.evaluation.sources import read_samples

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def save(folder, *images, suffix="tif", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        picture.save(folder / f"{i:03d}.{suffix}", **options)
    return folder


def read(folder, index=0, **options):
    return open_folder(folder, **options).read(index)


def assert_is_the_ramp(image, atol):
    """Of each mode's own fineness."""
    assert image.dtype == torch.float32
    assert torch.allclose(image, torch.tensor(2 * RAMP - 1).float().expand(len(image), -1, -1), atol=atol)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_eight_bits(tmp_path, mode):
    image = Image.fromarray((RAMP * 255).round().astype(np.uint8)).convert(mode)
    options = {"suffix": "jpg", "quality": 100, "subsampling": 0} if mode == "YCbCr" else {}
    tensor = read(save(tmp_path / "images", image, **options))
    assert len(tensor) == (1 if mode in ("L", "LA") else 3)
    assert_is_the_ramp(tensor, 0.5 / 127 + (mode == "YCbCr") * 2 / 127)


def test_black_and_white_and_palettes(tmp_path):
    folder = save(tmp_path / "images", Image.fromarray(RAMP > 0.5), suffix="png")
    assert torch.equal(read(folder)[0], torch.tensor(RAMP > 0.5) * 2.0 - 1)
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    tensor = read(save(tmp_path / "palette", image, suffix="png"))
    assert torch.equal(tensor, torch.eye(3)[torch.tensor(indices.astype(int))].permute(2, 0, 1) * 2 - 1)


@pytest.mark.parametrize(
    ("dtype", "white", "words"),
    [
        (np.uint16, 255, "16-bit images .* largest value is 255: read as 8 bits"),
        (np.uint16, 4095, "16-bit images .* largest value is 4095: read as 12 bits"),
        (">u2", 4095, "16-bit images .* largest value is 4095: read as 12 bits"),
        (np.uint16, 16383, "read as 14 bits"),
        (np.uint16, 65535, "read as 16 bits"),
        (np.int32, 255, "32-bit integer images .* read as 8 bits"),
        (np.int32, 4095, "read as 12 bits"),
        (np.int32, 65535, "read as 16 bits"),
        (np.int32, 2**31 - 1, "read as 31 bits"),
        (np.float32, 1, r"floating-point images .* read as \[0, 1\]"),
        (np.float32, 255, r"read as \[0, 255\]"),
        (np.float32, 65535, r"read as \[0, 65535\]"),
    ],
)
def test_wide_pixels_are_scaled_by_what_the_set_holds(tmp_path, caplog, dtype, white, words):
    """The second image is dark: it is scaled as the first is."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, share in (("a", 1), ("b", 0.2)):
        pixels = RAMP * white * share if dtype is np.float32 else (RAMP * white * share).round()
        if dtype == ">u2":
            Image.frombytes("I;16B", (8, 8), pixels.astype(dtype).tobytes()).save(folder / f"{name}.tif")
        else:
            Image.fromarray(pixels.astype(dtype)).save(folder / f"{name}.tif")
    with caplog.at_level(logging.INFO):
        source = open_folder(folder)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(words, record.getMessage())
    step = 0 if dtype is np.float32 else 1 / white
    assert_is_the_ramp(source.read(0), step + 1e-6)
    assert torch.allclose((source.read(1) + 1) * 5 - 1, source.read(0), atol=5 * step + 1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(1), source.read(1))


def test_what_is_white_is_looked_for_in_the_whole_set(tmp_path, monkeypatch):
    """Of more images than are looked at, some of each part: sets may begin with dark ones."""
    monkeypatch.setattr("diffusers_gm.data.sources.NUM_LOOKED_AT", 4)
    for i in range(8):
        Image.fromarray((RAMP * (65535 if i >= 4 else 255)).round().astype(np.uint16)).save(tmp_path / f"{i}.tif")
    assert_is_the_ramp(open_folder(tmp_path).read(7), 1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_negative_is_turned_or_refused(tmp_path, dtype):
    """A TIFF in which 0 is white."""
    white = np.iinfo(dtype).max
    path = save(tmp_path / "images", (RAMP * white).round().astype(dtype)) / "000.tif"
    tag, black_is_zero = struct.pack("<HHI", 262, 3, 1), struct.pack("<I", 1)
    path.write_bytes(path.read_bytes().replace(tag + black_is_zero, tag + struct.pack("<I", 0)))
    if dtype is np.uint8:
        assert_is_the_ramp(-read(path.parent), 0.5 / 127)
    else:
        with pytest.raises(ValueError, match="a TIFF of mode I;16 in which 0 is white: save it with 0 as black"):
            read(path.parent)


def png_of_16_bits(path, white):
    """A colour image, which PIL reads and does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = np.repeat((RAMP * white).round().astype(">u2")[..., None], 3, 2)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(("white", "said"), [(4095, True), (65535, False)])
def test_colours_of_16_bits(tmp_path, caplog, white, said):
    png_of_16_bits(tmp_path / "a.png", white)
    source = open_folder(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * said
    if said:
        assert "largest value is below 4096 are read as dark ones" in caplog.text
    else:
        assert_is_the_ramp(source.read(0)[:1], 2 / 255)


def test_one_bright_image_of_16_bits_says_that_the_others_are_dark(tmp_path, caplog):
    for name, white in (("a", 65535), ("b", 4095)):
        png_of_16_bits(tmp_path / f"{name}.png", white)
    open_folder(tmp_path)
    assert not caplog.records


def test_floats_from_minus_one(tmp_path):
    folder = save(tmp_path / "images", (2 * RAMP - 1).astype(np.float32), np.full((8, 8), 0.5, dtype=np.float32))
    assert_is_the_ramp(read(folder), 1e-6)
    assert torch.equal(read(folder, 1), torch.full((1, 8, 8), 0.5))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[-1024, 3000]], dtype=np.int32), "32-bit integer images with pixels from -1024 to 3000"),
        (np.array([[-3.0, 2.0]], dtype=np.float32), "floating-point images with pixels from -3 to 2"),
        (np.array([[0, 1e9]], dtype=np.float32), r".*from 0 to 1e\+09: .* give whole numbers from 0"),
    ],
)
def test_ranges_that_cannot_be_told_are_refused(tmp_path, pixels, message):
    with pytest.raises(ValueError, match=f"--train_data_dir .*: {message}"):
        open_folder(save(tmp_path / "images", pixels))


def test_pixels_that_are_not_finite_make_an_image_unreadable(tmp_path, caplog):
    images = [RAMP.astype(np.float32) for _ in range(30)]
    images[3] = np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)
    images[4] = np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32)
    source = open_folder(save(tmp_path / "images", *images))
    for i in (3, 4):
        with pytest.raises(ValueError, match="not finite"):
            source.read(i)
    examination = data.examine(source, seed=0)
    assert "2 of 30 training images examined cannot be read" in caplog.text
    assert torch.isfinite(examination.images).all()
    assert (len(examination.images), float(examination.images.max())) == (28, 1)


def test_an_image_out_of_the_range_of_the_examined_ones_is_unreadable(tmp_path):
    dark = (RAMP * 4095).astype(np.uint16)
    folder = save(tmp_path / "images", dark, dark, dark)
    source = open_folder(folder)
    save(tmp_path / "bright", (RAMP * 65535).astype(np.uint16))
    (tmp_path / "bright" / "000.tif").replace(folder / "001.tif")
    with pytest.raises(ValueError, match="pixels from 0 to 65535, while the images examined are read as 12 bits"):
        source.read(1)
    save(tmp_path / "float", RAMP.astype(np.float32))
    (tmp_path / "float" / "000.tif").replace(folder / "002.tif")
    with pytest.raises(ValueError, match="a floating-point image, where"):
        source.read(2)
    assert_is_the_ramp(source.read(0), 1e-3)


# --- Transparency ---


def transparent(mode):
    """A hidden colour under alpha 0 on the left, opaque on the right."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (90, 90, 90, 0)
    pixels[:, 4:] = (200, 200, 200, 255)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_the_background(tmp_path, mode):
    folder = save(tmp_path / "images", transparent(mode), suffix="png")
    seen, opaque = read(folder)[:, 0, 0], read(folder)[:, 0, 7]
    assert torch.equal(seen, torch.ones(3 if mode == "RGBA" else 1)), "white"
    assert opaque.tolist() == pytest.approx([200 / 127.5 - 1] * len(opaque))
    assert read(folder, background="black")[0, 0, 0] == -1
    assert read(folder, background=(0, 0, 255))[:, 0, 0].tolist() == [-1, -1, 1]
    assert read(folder, background="#808080")[0, 0, 0] == pytest.approx(0, abs=0.01)


def test_half_transparent_pixels_are_mixed(tmp_path):
    folder = save(tmp_path / "images", Image.new("RGBA", (8, 8), (0, 0, 255, 128)), suffix="png")
    assert read(folder)[:, 0, 0].tolist() == pytest.approx([127 / 127.5 - 1, 127 / 127.5 - 1, 1], abs=0.01)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palettes(tmp_path, suffix):
    image = Image.fromarray(np.repeat([[0, 0, 1, 1]], 4, 0).astype(np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    folder = save(tmp_path / "images", image, suffix=suffix, transparency=0)
    assert read(folder)[:, 0, 0].tolist() == [1, 1, 1]
    assert read(folder)[:, 0, 3].tolist() == [-1, -1, 1]


def test_transparent_colours_of_gray_and_rgb(tmp_path):
    gray = (RAMP * 255).astype(np.uint8)
    folder = save(tmp_path / "gray", gray, suffix="png", transparency=0)
    assert read(folder)[0, 0, 0] == 1
    folder = save(tmp_path / "rgb", Image.fromarray(gray).convert("RGB"), suffix="png", transparency=(0, 0, 0))
    assert read(folder)[:, 0, 0].tolist() == [1, 1, 1]
    folder = save(tmp_path / "wide", gray.astype(np.uint16), suffix="png", transparency=0)
    with pytest.raises(ValueError, match="with a transparent colour"):
        read(folder)


def test_the_background_is_an_option(tmp_path):
    folder = save(tmp_path / "images", transparent("RGBA"), suffix="png")
    assert read_samples(folder, background="black")[0, 0, 0, 0] == -1
    for wrong in ("nocolour", (1, 2), (0, 0, 300)):
        with pytest.raises(ValueError, match="is no colour"):
            open_folder(folder, background=wrong)


# --- Frames, orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA"])
def test_scans_that_are_to_be_turned_are(tmp_path, mode, orientation):
    """TIFFs that are not compressed, which Pillow maps into memory where it is told their name."""
    stored = Image.new("L", (20, 10), 0)
    stored.paste(255, (0, 0, 20, 3))
    stored.paste(128, (0, 0, 5, 10))
    stored = Image.fromarray(np.array(stored).astype(np.uint16) * 257) if mode == "I;16" else stored.convert(mode)
    folder = save(tmp_path / "images", stored, tiffinfo={0x0112: orientation})
    ways = (None, 0, 3, 1, 5, 4, 6, 2)  # of `Image.transpose`, by orientation; 5 is the transposition
    way = ways[orientation - 1]
    upright = stored if way is None else stored.transpose(Image.Transpose(way))
    expected = np.array(upright.convert("RGB") if mode[0] == "R" else upright)
    expected = expected.reshape(*expected.shape[:2], -1) / (65535 if mode == "I;16" else 255) * 2 - 1
    found = read(folder).permute(1, 2, 0)
    assert found.shape == expected.shape
    assert torch.allclose(found, torch.tensor(expected).float(), atol=1e-4)


def test_images_are_upright(tmp_path):
    """Orientation 6: the row at the top of what is seen is the column on the left of what is stored, upwards."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = (RAMP[:, :4] * 255).astype(np.uint8)
    folder = save(tmp_path / "images", stored, suffix="png", exif=exif)
    assert torch.equal(read(folder)[0], torch.tensor(np.rot90(stored, -1).copy()) / 255 * 2 - 1)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("L", (8, 8), gray) for gray in (255, 0, 0)]
    more = {"lossless": True} if suffix == "webp" else {}
    folder = save(tmp_path / "images", frames[0], suffix=suffix, save_all=True, append_images=frames[1:], **more)
    assert open_folder(folder).num_images == 1
    assert torch.equal(read(folder).mean((1, 2)), torch.ones(len(read(folder))))
