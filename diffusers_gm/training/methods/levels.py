"""At which noise levels a training sees the images, and how much each level counts."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..option import given, noise, number_or_auto, trained
from .method import LargestDistance, TimeOptions

# The noise levels of EDM (arXiv 2206.00364): ln sigma of this mean and deviation, and where a run starts. Few images of
# a training are that noisy; but from a lower start images come out too much alike in what is large in them.
P_MEAN, P_STD, SIGMA_MAX = -1.2, 1.2, 80.0

# A log-normal training has next to no images beyond so many deviations.
REACH = 3.5

# EDM preconditions for the deviation of the data, about 0.5; with 1, where its answer is the velocity of DDPM networks,
# images were better.
SIGMA_DATA = "1"


@dataclass
class LevelOptions(TimeOptions):
    """What is asked of every method that trains at noise levels. None: chosen by the method, see `Method.choose`."""

    objective: Literal["denoiser", "score"] | None = trained(
        None,
        "What the network learns: the clean image in some form, or the score of the noisy one: under mixture noise "
        "another function, for cld the score of the velocity as published. [denoiser]",
    )
    sigma_min: float = noise(0.01, "Smallest noise level, for images in [-1, 1].", positive=True)
    sigma_max: str = noise(
        "auto",
        f"Largest noise level; 'auto': of log_normal {SIGMA_MAX:g}, or more where it reaches more, of other levels "
        "measured on the data (Technique 1 of NCSNv2).",
    )
    sigma_data: str | None = noise(
        None,
        "Deviation of a pixel that an edm network is preconditioned for; 'auto': measured, about its mean over images. "
        f"[{SIGMA_DATA}]",
    )
    timestep_sampling: Literal["uniform", "log_uniform", "log_normal"] | None = noise(
        None,
        "How the noise levels of the training are drawn: uniform among the --num_train_timesteps (for cld with "
        "--objective score in time), log_uniform, or log_normal with --p_mean and --p_std. [log_normal of "
        "preconditioned networks, else uniform]",
    )
    p_mean: float | None = noise(None, f"log_normal: mean of ln sigma. [{P_MEAN}]")
    p_std: float | None = noise(None, f"log_normal: deviation of ln sigma. [{P_STD}]", positive=True)
    snr_gamma: float | None = noise(
        None,
        "Weights min(SNR, gamma) of the error of the image (arXiv 2303.09556). [1 of what the network answers]",
        positive=True,
    )


def choose(args: LevelOptions, preconditioned: bool) -> dict[str, Any]:
    """What is chosen where the options of the levels say nothing."""
    sampling = args.timestep_sampling or ("log_normal" if preconditioned else "uniform")
    normal = (P_MEAN, P_STD) if sampling == "log_normal" else (None, None)
    return {
        "timestep_sampling": sampling,
        "p_mean": normal[0],
        "p_std": normal[1],
        "sigma_data": SIGMA_DATA if preconditioned else None,
        "uncertainty_weighting": preconditioned and args.snr_gamma is None,
    }


def check(args: LevelOptions) -> None:
    if args.timestep_sampling != "log_normal" and (law := given(args, ("p_mean", "p_std"))):
        raise ValueError(f"{law} are for --timestep_sampling log_normal, not {args.timestep_sampling}")
    if args.uncertainty_weighting and args.snr_gamma is not None:
        raise ValueError("--uncertainty_weighting learns weights that undo those of --snr_gamma: leave out one of them")
    number_or_auto("sigma_max", args.sigma_max, float)
    number_or_auto("num_train_timesteps", args.num_train_timesteps, int)
    if args.sigma_data is not None:
        number_or_auto("sigma_data", args.sigma_data, float)


def largest(args: Any, images: Tensor, largest_distance: LargestDistance) -> float:
    """The last level of the training: given, that of EDM or as far as `log_normal` reaches, or measured on the images.

    Raises:
        ValueError: if it is not above the first.
    """
    sigma_max = number_or_auto("sigma_max", args.sigma_max, float)
    measured = sigma_max is None and args.timestep_sampling != "log_normal"
    if measured:
        sigma_max = round(largest_distance(images), 4)
    elif sigma_max is None:
        sigma_max = round(max(SIGMA_MAX, math.exp(args.p_mean + REACH * args.p_std)), 4)
    if not args.sigma_min < sigma_max:
        raise ValueError(
            f"--sigma_min {args.sigma_min} must be smaller than --sigma_max {sigma_max}"
            + (" (measured: are all images the same?)" if measured else "")
        )
    return sigma_max


def size_of_data(args: Any, images: Tensor) -> float:
    """`sigma_data`: given, or how far a pixel is from its mean over the images, root mean square: what noise hides."""
    if (sigma_data := number_or_auto("sigma_data", args.sigma_data, float)) is not None:
        return sigma_data
    images = images.float()
    return max(round(float((images - images.mean(0)).square().mean().sqrt()), 3), args.sigma_min)


def drawn(args: Any, noise: Any, uniform: Tensor) -> Tensor:
    """Noise levels, `(B,)` float64, from numbers that are uniform in [0, 1).

    `log_normal` and `log_uniform` are laws of sigma; what the first has beyond the ends is at the ends.
    """
    low, high = math.log(noise.sigma_min), math.log(noise.sigma_max)
    if args.timestep_sampling == "log_normal":
        return (args.p_mean + args.p_std * torch.special.ndtri(uniform)).clamp(low, high).exp()
    n = noise.num_train_timesteps
    share = uniform if args.timestep_sampling == "log_uniform" else (uniform * n).floor() / (n - 1)
    return (low + (high - low) * share).exp()


def in_words(record: Any) -> str:
    """Of the options as recorded, or of anything with `sigma_min` and the like by name."""
    ends = f"from {record['sigma_min']:g} to {record['sigma_max']:g}"
    if record["timestep_sampling"] == "log_normal":
        law = f"ln sigma of mean {record['p_mean']:g} and deviation {record['p_std']:g}"
        return f"log-normal noise levels {ends} ({law})"
    if record["timestep_sampling"] == "log_uniform":
        return f"log-uniform noise levels {ends}"
    # A network that was trained before may have brought those of a beta schedule.
    brought = record["model_name_or_path"] is not None and record["keep_noise_levels"]
    return f"{record['num_train_timesteps']} noise levels {ends}" + ("" if brought else " on a geometric ladder")
