"""The options of `python -m diffusers_gm.evaluation`."""

import argparse
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .features import EXTRACTORS
from .scoring import METRICS
from .sources import NUM_REFERENCE


def build_parser(description: str) -> argparse.ArgumentParser:
    """The options; those of the real data are named as in train_gm_sgm.py."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_gm.evaluation",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", help="a pipeline, its folder or its name on the Hub")
    add("--samples", type=Path, help="in place of a model: a folder of images, a .npy or a .safetensors file")
    add("--scheduler", nargs="+", action="append", metavar=("CLASS", "OPTION=VALUE"), help="of diffusers or ours, made of the config of the pipeline's own; may be given several times; default: its own")  # fmt: skip # noqa: E501
    add("--calls", type=int, nargs="+", default=[10, 20, 50], help="network calls")
    add("--seeds", type=int, nargs="+", default=[0], help="of the samples; also the number of draws for the floor")
    add("--num_samples", type=int, help="default 1000, or as many as the data have for the floor; with --samples: all")
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS, help="Frechet distance, kernel distance, sliced W2, and precision, recall, density and coverage")  # fmt: skip # noqa: E501
    add("--features", default="lite0", choices=list(EXTRACTORS), help="lite0 works without a download")
    add("--dataset_name", help="real images: 'digits' or a data set of the Hub")
    add("--dataset_config_name", help="configuration of the Hub data set")
    add("--train_data_dir", help="real images: a folder of images or of parquet files")
    add("--image_column", help="column with the images; default 'image' or 'img'")
    add("--background", default="white", help="colour seen through transparent pixels")
    add("--cache_dir", help="where downloaded data sets are kept")
    add("--resolution", type=int, help="side to which real images are resized; default: their own")
    add("--num_reference", type=int, default=NUM_REFERENCE, help="real images to compare with, at most")
    add("--features_cache", type=Path, default=Path(HF_HOME) / "diffusers_gm" / "features", help="where features of real images are kept")  # fmt: skip # noqa: E501
    add("--batch_size", type=int, default=64, help="images sampled at once, by each process")
    add("--output_dir", type=Path, default=Path("outputs/evaluation"))
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise a ValueError for whatever is wrong before anything is loaded."""
    if (args.model is None) == (args.samples is None):
        raise ValueError("give a model or --samples, one of them")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("say what the real images are: --dataset_name or --train_data_dir, one of them")
    if args.samples is not None and args.scheduler:
        raise ValueError("--scheduler means nothing for --samples: they are there already")
    for name in ("calls", "num_samples", "num_reference", "batch_size", "resolution"):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if any(v is not None and v < 1 for v in values):
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must not be negative, got {args.seeds}")
    for name in ("calls", "seeds"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must differ, got {values}: the same images twice would count as two draws")
