"""NCSNv2 (arXiv 2006.09011): Gaussian noise on a ladder of levels."""

from typing import Any

from torch import Tensor

from ...pipelines import NCSNv2Pipeline
from ...processes.mixture import GAUSSIAN
from ...schedulers import AnnealedLangevinScheduler
from . import ladder
from .ladder import LadderOptions
from .method import Batch, Method, Noise


def scheduler(args: LadderOptions, noise: Noise, sampler: dict[str, Any]) -> AnnealedLangevinScheduler:
    return AnnealedLangevinScheduler(**ladder.config(args, noise, sampler))


def loss(args: LadderOptions, noise: Noise, scheduler: Any, batch: Batch) -> Tensor:
    return ladder.loss(args, GAUSSIAN, scheduler, batch)


METHOD = Method(
    name="ncsnv2",
    title="NCSNv2",
    pipeline=NCSNv2Pipeline,
    options=(LadderOptions,),
    choose=ladder.choose,
    check=ladder.check,
    noise=ladder.noise,
    scheduler=scheduler,
    labels=ladder.labels,
    loss=loss,
    noise_in_words=lambda args, noise: f"{GAUSSIAN}, {ladder.in_words(args, noise)}",
    card="""\
A network of $parameters parameters was trained to undo Gaussian noise; it learns $learns. It was
trained at $levels, for images in [-1, 1]. The network $told.

Images are drawn by annealed Langevin dynamics: `algorithm_type="langevin"`, with step sizes by Technique 4, or
`"consistent"`, which keeps the variance of every level exact.""",
    card_values=ladder.on_card,
    citation=ladder.CITATION,
    formerly=ladder.FORMERLY,
)
