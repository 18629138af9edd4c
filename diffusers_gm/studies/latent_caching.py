"""How fast latents are computed beside the autoencoder alone: `python -m diffusers_gm.studies.latent_caching`.

CPU seconds per image of the cache of a training on a folder of PNGs (the digits, repeated to the resolution), with
reading, encoding and writing; and of the same autoencoder, called as pipelines of diffusers call it, on images that are
there. In processes of one thread, few images taken from many, in turns; see `.throughput`.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..autoencoders import LatentSpace, fingerprint, load_autoencoder
from ..cli import Parser, at_least
from ..data import LatentCache, TrainingImages, open_folder
from ..evaluation.table import Table
from .report import Report
from .throughput import Command, cpu_seconds, write_digits

CHANNELS = (32, 64, 64, 64)
# What happens once is in few batches as in many.
FEW = 10


def cache(folder: Path, vae: str, resolution: int, batch_size: int, num_batches: int) -> None:
    """As a training does it."""
    autoencoder = load_autoencoder(vae)
    images = TrainingImages(open_folder(folder), resolution, 3, 0, center_crop=True)
    images.source.num_images = num_batches * batch_size
    shape = LatentSpace.of(autoencoder).encode(images[0, 0][None]).shape[1:]
    autoencoder.to(memory_format=torch.channels_last)
    encode = LatentSpace.of(autoencoder, [0.0], [1.0]).encode
    with tempfile.TemporaryDirectory() as name:
        found = LatentCache(Path(name) / "latents", images, encode, fingerprint(autoencoder), shape, False)
        with found.being_filled():
            found.fill(batch_size)


def alone(vae: str, resolution: int, batch_size: int, num_batches: int) -> None:
    """The autoencoder, and nothing else."""
    autoencoder = load_autoencoder(vae)
    images = torch.rand(batch_size, 3, resolution, resolution) * 2 - 1
    with torch.no_grad():
        for _ in range(num_batches):
            autoencoder.encode(images).latent_dist.mode()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.latent_caching", (__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--vae", help=f"an AutoencoderKL, a folder or on the Hub [one of widths {CHANNELS}, untrained]")
    add("--resolution", type=at_least(8), default=64, help="side of the images, a multiple of 8")
    add("--batch_size", type=at_least(1), default=8, help="images that are encoded at once")
    add("--batches", type=at_least(1), default=60, help="batches that are measured in a run")
    add("--repeats", type=at_least(1), default=5, help="runs of each")
    add("--output", type=Path, default=Path("outputs/studies"), help="folder of the report")
    add("--run", nargs=2, metavar=("WHAT", "N"), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.resolution % 8 or (args.batches + FEW) * args.batch_size > 1437:
        parser.error(f"--resolution {args.resolution} must be a multiple of 8, and all batches at most 1437 images")
    if args.run:
        what, number = args.run
        numbers = args.vae, args.resolution, args.batch_size, int(number)
        return cache(args.folder, *numbers) if what == "cache" else alone(*numbers)

    with tempfile.TemporaryDirectory() as name:
        cwd, vae = Path(name), args.vae
        write_digits(cwd / "digits", args.resolution)
        if vae is None:
            blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoencoderKL(block_out_channels=CHANNELS, layers_per_block=2, **blocks).save_pretrained(cwd / "vae")
            vae = str(cwd / "vae")
        given = ["--vae", vae, "--resolution", args.resolution, "--batch_size", args.batch_size]

        def command(what: str, number: int) -> Command:
            run = ["--run", what, number, "--folder", cwd / "digits"]
            return [sys.executable, "-m", "diffusers_gm.studies.latent_caching", *given, *run]

        names = {"the cache": "cache", "the autoencoder alone": "alone"}
        found: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeats):
            few, many = (
                cpu_seconds([command(run, n) for run in names.values()], cwd) for n in (FEW, FEW + args.batches)
            )
            for what, one, other in zip(names, few, many, strict=True):
                found[what].append(1000 * (other - one) / (args.batches * args.batch_size))
                print(f"{what}: {found[what][-1]:.2f} ms", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ours, theirs = medians.values()
    rows = [[name, f"{each:.2f}", f"{1000 / each:.0f}"] for name, each in medians.items()]
    Report(
        name="latent_caching",
        title="Caching latents",
        question="How fast are latents computed and kept, beside the autoencoder as pipelines of diffusers call it?",
        verdict=f"The cache works at {theirs / ours:.3f} times the rate of the autoencoder alone: with reading and "
        "writing, but with the autoencoder in channels-last layout, where pipelines leave it in the default one.",
        tables=[Table("", ["", "CPU ms per image, median", "images per CPU second"], rows)],
        conditions=f"Images of 3x{args.resolution}x{args.resolution}, batches of {args.batch_size}; "
        f"{args.vae or f'an untrained AutoencoderKL of widths {CHANNELS}'}; {args.batches} batches a run, medians of "
        f"{args.repeats} runs, whose processes, of one thread, took turns; CPU time.",
    ).write(args.output)
    return None


if __name__ == "__main__":
    main()
