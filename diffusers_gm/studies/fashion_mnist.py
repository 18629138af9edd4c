"""Fashion-MNIST as PNGs, `OUTPUT/train/CLASS` and `OUTPUT/test/CLASS`.

They are made of the idx files of Debian's package `dataset-fashion-mnist`, or of any folder.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..cli import Parser

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an idx file, packed or not."""
    packed = path.with_name(f"{path.name}.gz")
    content = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    return np.frombuffer(content, np.uint8)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.fashion_mnist", __doc__)
    parser.add_argument("output", type=Path, help="folder of the PNGs")
    parser.add_argument("--source", type=Path, default=DEBIAN, help="folder of the idx files")
    args = parser.parse_args(arguments)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        try:
            images = read_idx(args.source / f"{prefix}-images-idx3-ubyte")[16:].reshape(-1, 28, 28)
            labels = read_idx(args.source / f"{prefix}-labels-idx1-ubyte")[8:]
        except OSError as error:
            parser.error(f"--source {args.source}: {error}")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = args.output / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05d}.png")
        print(f"{split}: {len(images)} images")


if __name__ == "__main__":
    main()
