"""Folders of images in tests."""

import io

import datasets
import numpy as np
import torch
from PIL import Image

from diffusers_gm import data


def save_images(folder, count=24, size=(8, 8), mode="L"):
    """`count` random images of `size` (width, height) as PNG files."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], *([] if mode == "L" else [3])), dtype=np.uint8)
        Image.fromarray(pixels, mode).save(folder / f"{i:03d}.png")
    return folder


def save_parquet(folder, column="img", count=24):
    images = [Image.open(path) for path in sorted(save_images(folder / "png", count, mode="RGB").iterdir())]
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({column: images, "label": list(range(count))}, features=features)
    target = folder / "parquet"
    target.mkdir()
    table.to_parquet(str(target / "train-00000-of-00001.parquet"))
    return target, images


def corrupt(path):
    path.write_bytes(path.read_bytes()[:40])


def open_folder(folder, **options):
    return data.open_source(None, train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), **options)


# --- In shards ---

SHARDS, ROWS = 4, 10


def png(number):
    """An image whose corner tells its number."""
    pixels = torch.full((8, 8, 3), 7, dtype=torch.uint8)
    pixels[0, 0] = torch.tensor([number, 255 - number, 128])
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def save_parquets(folder, shards=SHARDS, broken=()):
    folder.mkdir()
    for shard in range(shards):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        rows = [{"bytes": b"broken" if n in broken else png(n), "path": f"{n}.png"} for n in numbers]
        table = datasets.Dataset.from_dict({"image": rows, "label": list(numbers)})
        table.cast_column("image", datasets.Image()).to_parquet(folder / f"part-{shard}.parquet")
    return folder
