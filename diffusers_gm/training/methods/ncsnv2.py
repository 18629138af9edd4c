"""NCSNv2 (arXiv 2006.09011): Gaussian noise on a ladder of levels."""

from ...pipelines import NCSNv2Pipeline
from ...processes.mixture import GAUSSIAN
from ...schedulers import AnnealedLangevinScheduler
from . import ladder, levels
from .ladder import LadderOptions
from .method import Advice, Method

METHOD = Method(
    name="ncsnv2",
    short_title="NCSNv2",
    title="NCSNv2",
    pipeline=NCSNv2Pipeline,
    options=LadderOptions,
    choose=ladder.choose,
    check=ladder.check,
    noise=ladder.noise,
    scheduler=lambda args, noise, sampler: AnnealedLangevinScheduler(**ladder.config(args, noise, sampler)),
    labels=ladder.labels,
    loss=lambda args, scheduler, batch: ladder.loss(args, GAUSSIAN, scheduler, batch),
    noise_in_words=lambda args, noise: f"{GAUSSIAN}, {levels.in_words(vars(args) | vars(noise))}",
    card="""\
A network of $parameters parameters was trained to undo Gaussian noise; it learns $learns. It was
trained at $levels, for images in [-1, 1]. The network $told.

Images are drawn down a ladder of descending noise levels. Samplers, values of the `algorithm_type` of
`AnnealedLangevinScheduler`:

- `langevin`: annealed Langevin dynamics, `num_langevin_steps` steps a level (T), their size by Technique 4. The network
  is told the level where the chain of steps really is; as `langevin, ladder` (`network_level="ladder"`) that of the
  ladder, as published. `langevin, T = 3` makes three steps a level.
- `consistent`: consistent annealed sampling, which keeps the variance of every level exact.

Both extrapolate the denoised image from two calls to the middle of a step (`step_order=2`), but on a ladder.""",
    card_values=ladder.on_card,
    advice=Advice(
        "AnnealedLangevinScheduler",
        'algorithm_type="consistent"',
        "It serves few calls, too. Where the network allows it, so do schedulers of diffusers: of "
        "`pipeline.scheduler.diffusers_config()`.",
    ),
    citation=ladder.CITATION,
    formerly=ladder.FORMERLY,
)
