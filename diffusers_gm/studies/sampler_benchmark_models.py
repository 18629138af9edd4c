"""What `.sampler_benchmark` samples: networks, exact or trained, with every scheduler that fits each of them; and how
samples are scored."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ot
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..data import split_digits
from ..evaluation.distances import frechet_distance, num_not_finite
from ..evaluation.features import fingerprint
from ..evaluation.sampling import describe_model, image_shape, load_pipeline
from ..evaluation.scoring import SLICED_WASSERSTEIN
from ..schedulers import CalibratedMultistepScheduler
from .demo import OF_PIPELINES
from .digits import parts_of, pipeline_of, trained
from .exact import Denoiser, Erring, ExactDenoiser, GaussianMixture, NetworkOf, exact_network
from .sampler_benchmark_calibration import Calibrations
from .sampler_benchmark_schedulers import OWN, SOURCE, Samplers, Setting, compatible, own_samplers

WIDTH = 0.1
REFERENCE = 5  # times as many images as there are samples
# Of the mixtures, by their dimension.
SHAPES = {2: (1, 1, 2), 16: (1, 4, 4), 512: (2, 16, 16), 3072: (3, 32, 32)}

FRECHET = "FD of pixels"

# Samples to a dimension that FD needs: with fewer it is mostly bias.
ENOUGH = 8

NUM_PROJECTIONS = 512


class Scores:
    """Sliced W2 of samples to a reference, and the Frechet distance of their pixels; of images of more than an eighth
    as many pixels as there are samples, that of so many principal components of the reference.

    Sliced W2 is that of `evaluation`, on the same directions, but the projections of the reference are sorted once,
    which is thirty times faster, and on the device of the network.
    """

    def __init__(self, reference: Tensor, device: torch.device | str = "cpu"):
        self.reference, self.device = reference, device
        size = reference[0].numel()
        self.directions = torch.from_numpy(ot.sliced.get_random_projections(size, NUM_PROJECTIONS, seed=0)).to(device)
        self.sorted = self._projected(reference)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """`num_nan`, the number of samples that are not finite, alone where there are any, and the distances."""
        if num_nan := num_not_finite(samples):
            return {"num_nan": num_nan}
        samples = samples.clamp(-1, 1)
        scores: dict[str, float] = {"num_nan": 0, SLICED_WASSERSTEIN: self._sliced(samples)}
        if dimension := min(len(samples), len(self.reference)) // ENOUGH:
            components = self.components[:, :dimension]
            scores[FRECHET] = frechet_distance(*(x.flatten(1).double() @ components for x in (samples, self.reference)))
        return scores

    @cached_property
    def components(self) -> Tensor:
        """Principal components of the reference, `(pixels, pixels)`, the largest first."""
        return torch.linalg.eigh(self.reference.flatten(1).double().T.cov()).eigenvectors.flip(1)

    def _sliced(self, samples: Tensor) -> float:
        """The quantile functions of both are steps: between two of all the places where one of them steps, both are
        constant."""
        n, m = len(samples), len(self.reference)
        places = torch.cat([m * torch.arange(n + 1), n * torch.arange(m + 1)]).unique().to(self.device)
        start, shares = places[:-1], places.diff().double() / (n * m)
        apart = self._projected(samples)[:, start // m] - self.sorted[:, start // n]
        return float((apart.square() @ shares).mean().sqrt())

    def _projected(self, images: Tensor) -> Tensor:
        """`(projections, n)`, sorted."""
        return (images.to(self.device).flatten(1).double() @ self.directions).T.contiguous().sort(1).values


@dataclass(frozen=True)
class Model:
    """What is sampled.

    Attributes:
        title: in words.
        pipeline: runs the network with any of the schedulers.
        samplers: schedulers by sampler and grid.
        reference: images that samples are compared with, `(m, C, H, W)`.
        floor: draws of as many real images as there are samples, one after another.
        conditions: in words.
        content: a hash of the network.
        made: the calibrations of the network.
        default: the setting that the pipeline comes with, whichever samplers are asked for.
    """

    title: str
    pipeline: Any
    samplers: Samplers
    reference: Tensor
    floor: Tensor
    conditions: str
    content: str
    made: Calibrations | None = None
    default: Setting = ("DDPM", "default")

    @cached_property
    def score(self) -> Scores:
        return Scores(self.reference, self.pipeline.device)


def _model(
    title: str,
    pipeline: Any,
    samplers: Callable[[Calibrations], Samplers],
    images: tuple[Tensor, Tensor],
    conditions: str,
    output: Path,
    content: str = "",
) -> Model:
    """A model with its calibrations; `images` are the reference and the floor, by which calibrations may choose."""
    content = content or describe_model(pipeline)
    made = Calibrations(pipeline, parts_of(output), content, images[1])
    offered = samplers(made)
    default = OWN if OWN in offered else "DDPM"
    return Model(title, pipeline, offered, *images, conditions, content, made, (default, "default"))


# --- Networks ---


def exact_model(
    points: Tensor, name: str, num_samples: int, output: Path, error: float = 0.0, source: Any = SOURCE
) -> Model:
    """The exact denoiser of Gaussians of width `WIDTH` around images `(m, C, H, W)`, as a network that `source`
    describes would be; with an `error`, see `Erring`."""
    denoiser: Denoiser = ExactDenoiser(points, WIDTH)
    title = f"the exact denoiser of {name}"
    conditions = f"Each of the {len(points)} images is a Gaussian of width {WIDTH}"
    if error:
        denoiser = Erring(denoiser, math.hypot(float(points.std()), WIDTH), error)
        title += f" plus a score error of {error:g}"
        conditions += f"; D is off by a smooth random field of {error} of its deviation, see `Erring`"

    def data(n: int, generator: torch.Generator) -> Tensor:
        chosen = points[torch.randint(len(points), (n,), generator=generator)]
        return chosen + WIDTH * torch.randn(chosen.shape, generator=generator)

    content = f"{fingerprint(points)} {error}"
    return known_model(denoiser, data, title, conditions, content, num_samples, output, source)


def mixture_model(dimension: int, num_samples: int, output: Path) -> Model:
    """The exact denoiser of a Gaussian mixture in 2, 16, 512 or 3072 dimensions."""
    mixture = GaussianMixture.drawn(SHAPES[dimension], seed=dimension)
    title = f"the exact denoiser of a Gaussian mixture in {dimension} dimensions"
    conditions = f"{len(mixture.points)} components of unequal weight, with a deviation of its own in every direction"
    content = fingerprint(torch.cat([mixture.points, mixture.deviations]))
    return known_model(mixture, mixture.draw, title, conditions, content, num_samples, output)


def known_model(
    denoiser: Denoiser,
    data: Callable[[int, torch.Generator], Tensor],
    title: str,
    conditions: str,
    content: str,
    num_samples: int,
    output: Path,
    source: Any = SOURCE,
) -> Model:
    """A denoiser that is known, of data that can be drawn, as a network of the scheduler `source` would be."""
    described, generator = CalibratedMultistepScheduler.from_config(source.config), torch.Generator().manual_seed(1)
    # Samples are pictures, and so are clipped; what they are compared with has to be.
    reference, floor = (data(n * num_samples, generator).clamp(-1, 1) for n in (REFERENCE, 8))
    network, shape = exact_network(denoiser, described), reference.shape[1:]
    sees_velocity = described.noise_space is None
    pipeline = pipeline_of(NetworkOf(network, shape, 2 * shape[0] if sees_velocity else None), source)
    conditions += f"; reference {len(reference)} draws, floor of 8 times {num_samples} others, all clipped."
    content = hashlib.sha256(f"{content} {REFERENCE} clipped".encode()).hexdigest()
    if source is SOURCE:
        samplers = partial(compatible, SOURCE.config)
    else:
        content, samplers = f"{content} {described.config}", partial(as_it_comes, source)
    return _model(title, pipeline, samplers, (reference, floor), conditions, output, content)


def as_it_comes(source: Any, made: Calibrations) -> Samplers:
    """The scheduler that a network is described by, alone."""
    return {OWN: {"default": source}}


def images_of_digits(num_samples: int) -> tuple[Tensor, Tensor]:
    """Reference and floor of networks of the digits."""
    train, held_out = split_digits()
    return train, held_out[:num_samples]


def ddpm_model(num_samples: int, steps: int, seed: int, output: Path) -> Model:
    """A network that diffusers' own recipe trained on the digits."""
    unet, source = trained(output, method="ddpm", max_train_steps=steps, seed=seed)
    pipeline = pipeline_of(unet, DDPMScheduler.from_config(source.config, clip_sample=False))
    samplers = partial(compatible, pipeline.scheduler.config)
    conditions = f"Trained with diffusers' objective for {steps} steps, seed {seed}."
    images = images_of_digits(num_samples)
    return _model("a DDPM network of the digits", pipeline, samplers, images, conditions, output)


def own_model(method: str, num_samples: int, steps: int, seed: int, output: Path) -> Model:
    """A network of the digits that we trained, in the pipeline of its method."""
    # Of what networks of ours answer, that which all solvers of diffusers read.
    options = {"prediction_type": "v_prediction", "timestep_sampling": "log_normal"} if method == "ncsnv2" else {}
    pipeline = pipeline_of(*trained(output, method=method, max_train_steps=steps, seed=seed, **options))
    words = "".join(f" --{name} {value}" for name, value in ({"seed": seed} | options).items())
    conditions = f"`train_gm_sgm.py --method {method} --dataset_name digits --max_train_steps {steps}{words}`."
    samplers, images = partial(own_samplers, pipeline.scheduler), images_of_digits(num_samples)
    return _model(f"our {method} network of the digits", pipeline, samplers, images, conditions, output)


def saved_model(name_or_path: str, images: Tensor, num_samples: int, output: Path) -> Model:
    """A saved pipeline, ours or a DDPM of diffusers, beside real images `(m, C, H, W)`, in any order: of the first as
    many as there are samples the floor is made, of the others the reference.

    Raises:
        ValueError: if there are too few images, they are not of the size that the pipeline makes, or its network is
            neither one of ours nor one of DDPM.
    """
    pipeline = load_pipeline(name_or_path, torch.device("cpu"))
    if image_shape(pipeline) != tuple(images.shape[1:]):
        raise ValueError(f"{name_or_path} makes images of {image_shape(pipeline)}, the real ones are of {images.shape}")
    if len(images) < 2 * num_samples:
        raise ValueError(f"--num_samples {num_samples}: {len(images)} real images are too few, two for each are needed")
    floor, reference = images[:num_samples], images[num_samples : len(images) // num_samples * num_samples]
    scheduler = pipeline.scheduler
    cls = OF_PIPELINES.get(type(pipeline).__name__)
    if not cls and CalibratedMultistepScheduler.from_config(scheduler.config).noise_space.kind != "vp":
        raise ValueError(
            f"{name_or_path} has a {type(scheduler).__name__}: a network of DDPM, or one of ours, is needed"
        )

    def samplers(made: Calibrations) -> Samplers:
        if not cls:
            return compatible(scheduler.config, made)
        # Whatever it was saved with: that may be calibrated.
        return own_samplers(cls.from_config(scheduler.config), made) | {OWN: {"default": scheduler}}

    title = f"the network {Path(name_or_path).name}"
    conditions = f"Reference {len(reference)} real images, floor {num_samples} others."
    return _model(title, pipeline, samplers, (reference, floor), conditions, output)
