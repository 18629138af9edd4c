"""NCSNv2 (arXiv 2006.09011): Gaussian noise on a ladder of levels."""

from typing import Any

from torch import Tensor

from ...pipelines import NCSNv2Pipeline
from ...processes.mixture import GAUSSIAN
from ...schedulers import AnnealedLangevinScheduler
from .ladder import (
    CITATION,
    FORMERLY,
    LadderOptions,
    check_ladder,
    choose_ladder,
    ladder_config,
    ladder_in_words,
    ladder_labels,
    ladder_loss,
    ladder_noise,
    ladder_on_card,
)
from .method import Batch, Method, Noise


def scheduler(args: LadderOptions, noise: Noise, sampler: dict[str, Any]) -> AnnealedLangevinScheduler:
    return AnnealedLangevinScheduler(**ladder_config(args, noise, sampler))


def loss(args: LadderOptions, noise: Noise, scheduler: Any, batch: Batch) -> Tensor:
    return ladder_loss(args, GAUSSIAN, scheduler, batch)


METHOD = Method(
    name="ncsnv2",
    title="NCSNv2",
    pipeline=NCSNv2Pipeline,
    options=(LadderOptions,),
    choose=choose_ladder,
    check=check_ladder,
    noise=ladder_noise,
    scheduler=scheduler,
    labels=ladder_labels,
    loss=loss,
    noise_in_words=lambda args, noise: f"{GAUSSIAN}, {ladder_in_words(args, noise)}",
    card="""\
A network of $parameters parameters was trained to undo Gaussian noise; it learns $learns. It was
trained at $levels, for images in [-1, 1]. The network $told.

Images are drawn by annealed Langevin dynamics: `algorithm_type="langevin"`, with step sizes by Technique 4, or
`"consistent"`, which keeps the variance of every level exact.""",
    card_values=ladder_on_card,
    citation=CITATION,
    formerly=FORMERLY,
)
