"""The likelihood that a model of the digits gives to them, in bits per dimension.

python -m diffusers_gm.evaluation.likelihood outputs/digits
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cli import Parser, at_least
from ..data import check_levels, dequantized, split_digits
from ..extra import check_extra
from ..likelihood import bits_per_dimension, flow_nll
from ..processes.random import Draw
from ..readings import level_range
from ..schedulers import GMLangevinScheduler
from ..schedulers.base import SamplerScheduler
from .results import Statistic
from .sampling import image_shape, load_pipeline

HOW_TO_TRAIN = "train_gm_sgm.py --dequantize 17 --output_dir outputs/digits"


def bits_of_images(
    pipeline: Any,
    images: Tensor,
    num_levels: int = 256,
    num_steps: int = 50,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
) -> Tensor:
    """An upper bound on `-log2 P` of discrete images under an unconditional pipeline, per dimension, `(N,)`.

    `flow_nll` of the dequantised images, in the unit of `bits_per_dimension`, with one companion noise per image where
    the network was trained on CLD. A network that was trained on images without noise (`--dequantize`) has learned
    points and not their surroundings, and the bound is far off. Of a class-conditional network that of all classes
    together, by the class that stands for none. What clips the denoised image in samples is left out.

    Args:
        pipeline: one of ours, whose scheduler is ours or one of diffusers that ours can be swapped for.
        images: `(N, C, H, W)` of `num_levels` equal levels from -1 to 1; they are dequantised here.
        num_levels: 256 for ordinary images, 17 for the digits of scikit-learn.
        num_steps, generator: see `flow_nll`.
        batch_size: images at once.

    Raises:
        ValueError: for a network of latents or one that knows no images without a class, images of other levels, or a
            scheduler that describes no noise levels.
    """
    if pipeline.vae is not None:
        raise ValueError("the likelihood of images is none of their latents: this needs a pipeline without vae")
    check_levels(images, num_levels)
    if pipeline.num_classes is not None and pipeline.null_class is None:
        raise ValueError("the likelihood needs a network that knows a class for none: it was trained to drop no labels")
    scheduler = pipeline.scheduler
    cls = type(scheduler) if isinstance(scheduler, SamplerScheduler) else GMLangevinScheduler
    scheduler = cls.from_config(scheduler.config, clip_sample=False, thresholding=False)
    low, high = level_range(scheduler.reading)
    space = scheduler.noise_space
    # Where the sample is alpha * y, a run starts from unit noise, and not from that of the largest level.
    scale = high if space is None else scheduler.reading.start_deviation(high)
    null, nats = pipeline.null_class, []

    def denoised(network: Any, companion: Tensor | None, y: Tensor, sigma: float) -> Tensor:
        return scheduler.denoise(network, y, companion, torch.tensor(sigma, dtype=torch.float64))

    for batch in images.split(batch_size):
        noisy = dequantized(batch.to(pipeline.unet.device, torch.float32), num_levels, generator)
        companion = Draw.like(noisy, generator).normal(noisy.shape) if space is None else None
        labels = None if null is None else torch.full((len(batch),), null, device=noisy.device)
        denoiser = partial(denoised, partial(pipeline._network, labels=labels), companion)
        nats.append(flow_nll(denoiser, noisy, (low, high), num_steps, generator, scheduler.model_mixture, scale))
    return bits_per_dimension(torch.cat(nats), images[0].numel(), num_levels)


def load_model(folder: Path) -> Any:
    """The pipeline of the digits in a folder.

    Raises:
        ValueError: if it holds no pipeline, or one of other images.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds no trained model")
    pipeline = load_pipeline(str(folder), torch.device("cpu"))
    shape = image_shape(pipeline)
    if shape != (1, 8, 8):
        raise ValueError(f"the model in {folder} is one of {'x'.join(map(str, shape))} images, and not of the digits")
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
        check_extra("ode", "torchdiffeq")
        check_extra("evaluation", "sklearn")
        pipeline = load_model(args.folder)
    except ImportError as error:
        parser.exit(2, f"error: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}; make one with {HOW_TO_TRAIN}\n")
    for name, images in zip(("training", "held-out"), split_digits(), strict=True):
        generator = torch.Generator().manual_seed(0)
        bits = bits_of_images(pipeline, images[: args.num_images], 17, args.num_steps, generator)
        found = Statistic.of(bits.tolist())
        print(f"{name} digits: at most {found.mean:.3f} +- {found.error:.3f} bits per dimension ({len(bits)} images)")


if __name__ == "__main__":
    main()
