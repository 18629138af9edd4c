"""Calibrate the sampler of a saved pipeline on its own network, and keep the result in the pipeline's folder.

    python -m diffusers_gm.calibrate outputs/demo --calls 5 8 10 20

Writes the scheduler into the folder (of a model on the Hub: into --output_dir), and `calibration.png` beside it: the
levels of each budget before and after, and, where they were measured (`--effort full`, and calls enough for the errors
of the network), how far the last images are from those of very many calls, before and after. With --train_data_dir or
--dataset_name real images may overrule its stochasticity.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibrate import CALLS, Calibration, calibrate_in_full, in_words
from ..calibration.picture import plot
from ..cli import Parser, at_least
from ..data import examine, open_source
from ..evaluation.sampling import image_shape, load_pipeline
from ..extra import how_to_install
from ..files import replacing, write_json, write_text
from ..pipelines.loading import write_component_loader
from ..pipelines.measurements import set_aside_measurements
from ..pipelines.repository import QUALITY_FILES
from ..samplers.multistep import Stochasticity


def stochasticity(word: str) -> Stochasticity:
    """Of `0.5`, or of `0.5,1`."""
    taus = tuple(map(float, word.split(",")))
    return taus if len(taus) > 1 else taus[0]


def build_parser() -> Parser:
    parser = Parser("diffusers_gm.calibrate", __doc__)
    parser.add_argument("model", help="folder of a saved pipeline, or its name on the Hub")
    parser.add_argument("--calls", type=int, nargs="+", help=f"numbers of network calls [{' '.join(map(str, CALLS))}]")
    parser.add_argument("--effort", choices=("full", "fast"), default="full", help="fast: levels from a single run")
    parser.add_argument(
        "--stochasticity",
        type=stochasticity,
        metavar="X[,X]",
        default=None,
        help="tau of the sampler, or two: above noise level 1 and below [by the network's errors]",
    )
    parser.add_argument(
        "--dataset_name", help="by whose images stochasticity is chosen: 'digits' or a set of the Hub [none]"
    )
    parser.add_argument("--train_data_dir", metavar="PATH", help="the same, of a folder of images or of parquet files")
    parser.add_argument("--batch_size", type=at_least(1), default=None, help="images [64, fewer if they are large]")
    parser.add_argument("--output_dir", type=Path, default=None, help="where the scheduler goes [the folder]")
    return parser


def real_images(pipe: Any, args: argparse.Namespace) -> Tensor | None:
    """Of the options, as large as those of the pipeline."""
    if args.dataset_name is None and args.train_data_dir is None:
        return None
    if args.dataset_name is not None and args.train_data_dir is not None:
        raise ValueError("say what the real images are: --dataset_name or --train_data_dir, one of them")
    channels, *size = image_shape(pipe)
    return examine(open_source(args.dataset_name, train_data_dir=args.train_data_dir), 0, size, channels).images


def keep(calibration: Calibration, folder: Path) -> list[Path]:
    """Put the scheduler into the folder of its pipeline, whose `model_index.json` names its class; what was written."""
    index = folder / "model_index.json"
    config = (folder / "scheduler" if index.is_file() else folder) / "scheduler_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, calibration.scheduler.to_json_string())
    if not index.is_file():
        return [config]
    content = json.loads(index.read_text(encoding="utf-8"))
    content["scheduler"] = ["diffusers_gm", type(calibration.scheduler).__name__]
    write_component_loader(folder, "scheduler", type(calibration.scheduler).__name__)
    write_json(index, content)
    return [config, index]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    folder = args.output_dir or Path(args.model)
    is_pipeline = (folder / "model_index.json").is_file()
    if is_pipeline and folder.resolve() != Path(args.model).resolve():
        parser.error(f"--output_dir {folder} holds another pipeline, whose scheduler would be replaced")
    if args.output_dir is None and not is_pipeline:
        parser.error(f"{args.model} is not the folder of a pipeline: give --output_dir for a model of the Hub")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} cannot be written to: choose another --output_dir")
        pipe = load_pipeline(args.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        batch = {} if args.batch_size is None else {"batch_size": args.batch_size}
        calibration = calibrate_in_full(
            pipe,
            args.calls,
            effort=args.effort,
            stochasticity=args.stochasticity,
            images=real_images(pipe, args),
            **batch,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for n, levels in calibration.levels.items():
        print(f"{n} calls: {', '.join(f'{sigma:.3g}' for sigma in levels)}")
        if n in calibration.errors:
            fixed, found = (error**0.5 for error in calibration.errors[n])
            print(f"    distance to very many calls: {fixed:.4f} on the fixed grid, {found:.4f} now")
    if calibration.martingale_defect is not None:
        print(
            f"rho = {calibration.martingale_defect:.2f} (about 0 for an exact network, negative where it errs): "
            f"stochasticity {', '.join(dict.fromkeys(map(in_words, calibration.stochasticity.values())))}"
        )
    beside, network = calibration.seconds
    print(f"{calibration.network_calls} network calls, {network:.1f} s, and {beside:.1f} s beside them")
    picture = folder / "calibration.png"
    try:
        wrote = keep(calibration, folder)
        set_aside_measurements(folder, QUALITY_FILES)  # of the scheduler before; the picture is drawn anew
        with replacing(picture) as temporary:
            plot(calibration, temporary)
        wrote.append(picture)
    except ImportError:
        picture.unlink(missing_ok=True)  # that of the scheduler before
        print(f"no picture: {how_to_install('evaluation')}")
    except OSError as error:
        parser.exit(1, f"error: {error}\n")
    print("wrote", *wrote)


if __name__ == "__main__":
    main()
