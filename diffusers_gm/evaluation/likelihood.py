"""Bits per dimension of the digits under a CLD model.

    python -m diffusers_gm.evaluation.likelihood outputs/digits-cld

prints an upper bound for the training and the held-out digits.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data import split_digits
from ..likelihood import cld_bits_per_dimension
from ..pipelines import CLDPipeline
from .results import Statistic


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_gm.evaluation.likelihood", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="a model trained by train_gm_sgm.py --method cld on the digits")
    parser.add_argument("--num_images", type=int, default=360, help="digits of each part, at most 360")
    parser.add_argument("--num_steps", type=int, default=50, help="steps of the solver, four network calls each")
    args = parser.parse_args(arguments)
    index = args.folder / "model_index.json"
    if not index.is_file():
        parser.error(f"{args.folder} holds no trained pipeline: train one with train_gm_sgm.py --method cld")
    name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    name = name if isinstance(name, str) else name[-1]
    if name != "CLDPipeline":
        parser.error(f"{args.folder} is a {name}, and only a CLDPipeline has a likelihood: train with --method cld")
    if not 2 <= args.num_images <= len(split_digits()[1]):
        parser.error(f"--num_images must be in [2, {len(split_digits()[1])}], got {args.num_images}")
    if args.num_steps < 1:
        parser.error(f"--num_steps must be at least 1, got {args.num_steps}")
    pipeline = CLDPipeline.from_pretrained(args.folder)
    for part, images in zip(("training", "held-out"), split_digits(), strict=True):
        generator = torch.Generator().manual_seed(0)
        used = images[: args.num_images]
        try:
            values = cld_bits_per_dimension(pipeline, used, 17, args.num_steps, generator=generator)
        except ValueError as error:  # a network that was not trained on velocities, say
            parser.error(str(error))
        bits = Statistic.of(values.tolist())
        print(f"{part} digits: at most {bits.mean:.3f} ± {bits.error:.3f} bits per dimension ({len(used)} images)")


if __name__ == "__main__":
    main()
