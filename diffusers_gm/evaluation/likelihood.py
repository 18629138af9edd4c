"""A bound on the likelihood that a CLD model of the digits gives to them, in bits per dimension.

python -m diffusers_gm.evaluation.likelihood outputs/digits-cld
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..cli import Parser, at_least
from ..data import check_levels, dequantized, split_digits
from ..likelihood import bits_per_dimension, cld_nll, mean_and_error
from ..pipelines import CLDPipeline
from ..readings import VelocityReading

HOW_TO_TRAIN = "train_gm_sgm.py --method cld --dequantize 17 --output_dir outputs/digits-cld"


def cld_bits_per_dimension(
    pipeline: Any,
    images: Tensor,
    num_levels: int = 256,
    num_steps: int = 50,
    num_velocities: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
) -> Tensor:
    """An upper bound on `-log2 P` of discrete images for a native `CLDPipeline`, per dimension, `(N,)`.

    `cld_nll` of the dequantised images, in the unit of `bits_per_dimension`. A network that was trained on images
    without noise (`--dequantize`) has learned points and not their surroundings, and the bound is far off.

    Args:
        pipeline: a `CLDPipeline` with a velocity network.
        images: `(N, C, H, W)` of `num_levels` equal levels from -1 to 1; they are dequantised here.
        num_levels: 256 for ordinary images, 17 for the digits of scikit-learn.
        num_steps, num_velocities, generator: see `cld_nll`.
        batch_size: images at once.

    Of a class-conditional network that of all classes together, by the class that stands for none.

    Raises:
        ValueError: for a pipeline whose scheduler does not describe a velocity network or whose network knows no images
            without a class, or images of other levels.
    """
    scheduler = pipeline.scheduler
    if not isinstance(getattr(scheduler, "reading", None), VelocityReading):
        raise ValueError(
            f"the likelihood needs a velocity network, and a {type(scheduler).__name__} of prediction_type "
            f"{scheduler.config.get('prediction_type')!r} does not describe one"
        )
    check_levels(images, num_levels)
    unet, config = pipeline.unet, scheduler.config
    null = pipeline.null_class
    if pipeline.num_classes is not None and null is None:
        raise ValueError("the likelihood needs a network that knows a class for none: it was trained to drop no labels")
    nats = [
        cld_nll(
            lambda u, t: unet(u.to(unet.dtype), t, None if null is None else u.new_full((len(u),), null).long()).sample,
            dequantized(batch.to(unet.device, torch.float32), num_levels, generator),
            scheduler.reading.process,
            config["prediction_type"],
            num_steps,
            num_velocities,
            generator,
            config["num_train_timesteps"],
        )
        for batch in images.split(batch_size)
    ]
    return bits_per_dimension(torch.cat(nats), images[0].numel(), num_levels)


def load_model(folder: Path) -> CLDPipeline:
    """The CLD model of the digits in a folder.

    Raises:
        ValueError: if it holds no pipeline, or another.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no trained model")
    name = DiffusionPipeline.load_config(folder)["_class_name"]
    name = name if isinstance(name, str) else name[-1]
    if name != CLDPipeline.__name__:
        raise ValueError(f"the model in {folder} is a {name}, and the bound is one for a CLDPipeline")
    pipeline = CLDPipeline.from_pretrained(folder)
    config = pipeline.unet.config
    if not isinstance(getattr(pipeline.scheduler, "reading", None), VelocityReading):
        raise ValueError(f"the network in {folder} predicts no velocities, and the bound is one for those that do")
    if (config["out_channels"], config["sample_size"]) != (1, 8):
        raise ValueError(
            f"the model in {folder} is one of {config['out_channels']}x{config['sample_size']}x{config['sample_size']} "
            "images, and not of the digits"
        )
    return pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("diffusers_gm.evaluation.likelihood", (__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help=f"a model made by {HOW_TO_TRAIN}")
    parser.add_argument(
        "--num_images", type=at_least(1), default=360, help="digits of either part, at most 360 held-out ones"
    )
    parser.add_argument(
        "--num_steps", type=at_least(1), default=50, help="steps of the solver, four network calls each"
    )
    args = parser.parse_args(arguments)
    try:
        pipeline = load_model(args.folder)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}; make one with {HOW_TO_TRAIN}\n")
    for name, images in zip(("training", "held-out"), split_digits(), strict=True):
        bits = cld_bits_per_dimension(
            pipeline, images[: args.num_images], 17, args.num_steps, generator=torch.Generator().manual_seed(0)
        )
        mean, deviation = mean_and_error(bits)
        print(f"{name} digits: at most {mean:.3f} +- {deviation:.3f} bits per dimension ({len(bits)} images)")


if __name__ == "__main__":
    main()
