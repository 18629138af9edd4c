"""The options of `python -m diffusers_gm.evaluation`."""

import argparse
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from ..cli import Parser, at_least
from .features import EXTRACTORS
from .scoring import METRICS, OF_FEATURES
from .sources import NUM_REFERENCE


def build_parser(description: str) -> Parser:
    """The options; those of the real data are named as in train_gm_sgm.py."""
    parser = Parser("diffusers_gm.evaluation", description)
    add = parser.add_argument_group("What is measured").add_argument
    add("model", nargs="?", help="a pipeline, its folder or its name on the Hub")
    add("--samples", type=Path, help="in place of a model: a folder of images, a .npy or a .safetensors file")
    add("--scheduler", nargs="+", action="append", metavar=("CLASS", "OPTION=VALUE"), help="of diffusers or ours, made of the config of the pipeline's own; may be given several times [its own]")  # fmt: skip # noqa: E501
    add("--calls", type=at_least(1), nargs="+", default=[10, 20, 50], help="network calls")
    add(
        "--seeds",
        type=at_least(0),
        nargs="+",
        default=[0],
        help="of the samples, and as many draws for the floor",
    )
    add(
        "--num_samples",
        type=at_least(1),
        help="images that are measured [1000, or as many as the floor has; with --samples all, else so many by chance]",
    )
    add("--batch_size", type=at_least(1), default=64, help="images sampled at once, by each process")

    add = parser.add_argument_group("Classes, where the network knows any").add_argument
    add("--class_labels", nargs="+", metavar="CLASS", help="names, or of a model indices: samples and real images are of these; samples in files have to be already [all, as often as in the training data]")  # fmt: skip # noqa: E501
    add("--guidance_scale", type=float, nargs="+", default=[1.0], help="classifier-free guidance, 1 for none; every scale is measured; a call with guidance is of twice the batch")  # fmt: skip # noqa: E501
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels with guidance [all]")  # fmt: skip # noqa: E501

    add = parser.add_argument_group("Real images").add_argument
    add("--dataset_name", help="'digits' or a data set of the Hub")
    add("--dataset_config_name", help="configuration of the Hub data set")
    add("--train_data_dir", metavar="PATH", help="a folder of images or of parquet files")
    add("--image_column", help="column with the images [image or img]")
    add("--label_column", help="column with the classes, for --class_labels [label]")
    add("--background", help="colour seen through transparent pixels [white]")
    add("--cache_dir", metavar="PATH", help="where downloaded data sets are kept")
    add("--resolution", type=at_least(1), nargs="+", help="side, or height and width, to which they are resized and cropped [their own]")  # fmt: skip # noqa: E501
    add(
        "--num_reference",
        type=at_least(1),
        default=NUM_REFERENCE,
        help="as many to compare with, or as there are, and no fewer than samples",
    )

    add = parser.add_argument_group("How it is measured, and where that goes").add_argument
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS, help="Frechet distance, kernel distance, sliced W2, and precision, recall, density and coverage")  # fmt: skip # noqa: E501
    add("--features", default="lite0", choices=list(EXTRACTORS), help="lite0 works without a download")
    add("--features_cache", type=Path, default=Path(HF_HOME) / "diffusers_gm" / "features", help="where features of real images are kept")  # fmt: skip # noqa: E501
    add("--output_dir", type=Path, default=Path("outputs/evaluation"), help="folder of the results")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise a ValueError for whatever is wrong before anything is loaded."""
    if (args.model is None) == (args.samples is None):
        raise ValueError("give a model or --samples, one of them")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("say what the real images are: --dataset_name or --train_data_dir, one of them")
    default = build_parser("").get_default
    for name, why in without_meaning(args).items():
        if getattr(args, name) != default(name):
            raise ValueError(f"--{name} means nothing {why}")
    if len(args.resolution or []) > 2:
        raise ValueError(f"--resolution must be a side, or a height and a width, got {args.resolution}")
    for name in ("calls", "seeds", "guidance_scale"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} must differ, got {values}: the same images twice would count as two draws")


def without_meaning(args: argparse.Namespace) -> dict[str, str]:
    """Options that would change nothing, and why."""
    found: dict[str, str] = {}
    if args.dataset_name in (None, "digits"):
        found["dataset_config_name"] = "without a --dataset_name of the Hub"
    if args.dataset_name == "digits":
        found |= dict.fromkeys(("image_column", "label_column"), "for the digits")
    if not set(args.metrics) & set(OF_FEATURES):
        found["features"] = "for --metrics that need none"
    if args.class_labels is None:
        found["label_column"] = "without --class_labels"
    if args.samples is not None:
        of_runs = ("scheduler", "calls", "batch_size", "guidance_scale", "guidance_interval")
        return found | dict.fromkeys(of_runs, "for --samples: they are there already")
    if args.dataset_name == "digits":
        found |= dict.fromkeys(("background", "cache_dir"), "for the digits")
    if args.guidance_scale == [1]:
        found["guidance_interval"] = "without a --guidance_scale other than 1"
    return found
