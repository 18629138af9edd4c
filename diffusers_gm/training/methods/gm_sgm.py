"""GM-SGM: Gaussian-mixture noise, the tractable stand-in for heavy-tailed noise, on a ladder of levels."""

from dataclasses import dataclass
from typing import Any

from ...pipelines import GMSGMPipeline
from ...processes.mixture import GaussianMixtureNoise
from ...schedulers import GMLangevinScheduler
from ..option import given
from ..option import noise as option
from . import ladder, levels
from .ladder import LadderOptions
from .method import Advice, Method, Noise

EXPLICIT, STABLE, POWER = ("mixture_weights", "mixture_scales"), ("stable_alpha",), ("power_alpha", "power_base")
COUNT = ("num_components",)
# Every option of the noise, and those that say all of it.
OF_NOISE = (*EXPLICIT, *STABLE, *POWER, *COUNT, "mixture_per_element")
LAW = (*EXPLICIT, "mixture_per_element")


@dataclass
class GMSGMOptions(LadderOptions):
    mixture_weights: list[float] | None = option(
        None, "Probabilities of the components.", in_place_of=STABLE + POWER + COUNT
    )
    mixture_scales: list[float] | None = option(
        None, "Their scales, which are normalised to E[c^2] = 1.", in_place_of=STABLE + POWER + COUNT
    )
    stable_alpha: float | None = option(
        None, "Use the quantised alpha-stable law of this index instead.", in_place_of=EXPLICIT + POWER
    )
    power_alpha: float | None = option(
        None, "Tail index of the power-law mixture, the kind of noise unless told. [1.5]", in_place_of=EXPLICIT + STABLE
    )
    power_base: float | None = option(
        None, "Ratio of neighbouring scales of the power-law mixture. [2]", in_place_of=EXPLICIT + STABLE
    )
    num_components: int | None = option(
        None, "Components of the stable or power-law mixture. [2]", at_least=1, in_place_of=EXPLICIT
    )
    mixture_per_element: bool = option(False, "Draw the component per element instead of per image.")


def build_mixture(args: GMSGMOptions) -> GaussianMixtureNoise:
    """The noise law that the options describe, with `E[c^2] = 1`.

    Raises:
        ValueError: for options that describe none, or more than one.
    """
    kinds = [kind for kind in (EXPLICIT, STABLE, POWER) if any(getattr(args, name) is not None for name in kind)]
    if len(kinds) > 1 or (EXPLICIT in kinds and args.num_components is not None):
        raise ValueError(
            f"{given(args, EXPLICIT + STABLE + POWER + COUNT)} do not go together: describe the mixture in one way"
        )
    per_element, num_components = args.mixture_per_element, args.num_components or 2
    try:
        if EXPLICIT in kinds:
            if args.mixture_weights is None or args.mixture_scales is None:
                raise ValueError("weights and scales go together")
            return GaussianMixtureNoise(args.mixture_weights, args.mixture_scales, per_element).normalized()
        if args.stable_alpha is not None:
            return GaussianMixtureNoise.from_stable(args.stable_alpha, num_components, per_element)
        alpha = 1.5 if args.power_alpha is None else args.power_alpha
        base = 2.0 if args.power_base is None else args.power_base
        return GaussianMixtureNoise.from_power_law(alpha, num_components, base, per_element)
    except ValueError as error:
        raise ValueError(
            f"{given(args, EXPLICIT + STABLE + POWER + COUNT) or ['--num_components']}: {error}"
        ) from error


def mixture_of(args: GMSGMOptions, config: dict[str, Any]) -> dict[str, Any]:
    """The options of the noise that a network was trained with, by the config of its scheduler; none where there are
    options of another, or the network knows Gaussian noise."""
    if config.get("model_noise") != "mixture" or given(args, OF_NOISE):
        return {}
    known = {name: config.get(name) for name in LAW}
    return {} if None in known.values() else known


def check(args: GMSGMOptions) -> None:
    ladder.check(args)
    build_mixture(args)


def scheduler(args: GMSGMOptions, noise: Noise, sampler: dict[str, Any]) -> GMLangevinScheduler:
    config = ladder.config(args, noise, sampler)
    return GMLangevinScheduler(
        **config | ({"prediction_type": "scaled_score"} if args.objective == "score" else {}),
        mixture_weights=noise.mixture_weights,
        mixture_scales=noise.mixture_scales,
        mixture_per_element=args.mixture_per_element,
        model_noise="mixture",
    )


def on_card(record: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(record["mixture_weights"], record["mixture_scales"], strict=True)
    return ladder.on_card(record) | {
        "per": "element" if record["mixture_per_element"] else "image",
        "components": ", ".join(f"{weight:.3g} of scale {scale:.3g}" for weight, scale in pairs),
    }


METHOD = Method(
    name="gm-sgm",
    short_title="GM-SGM",
    title="a Gaussian-mixture score-based model (GM-SGM)",
    pipeline=GMSGMPipeline,
    options=GMSGMOptions,
    choose=ladder.choose,
    check=check,
    noise=lambda args, images, largest_distance: ladder.noise(args, images, largest_distance, build_mixture(args)),
    scheduler=scheduler,
    labels=ladder.labels,
    loss=lambda args, scheduler, batch: ladder.loss(args, build_mixture(args), scheduler, batch),
    noise_in_words=lambda args, noise: f"{build_mixture(args)}, {levels.in_words(vars(args) | vars(noise))}",
    card="""\
A network of $parameters parameters was trained to undo Gaussian-mixture noise, the tractable stand-in for heavy-tailed
noise (one component per $per: $components); it learns $learns. It was trained at $levels, for
images in [-1, 1]. The network $told.

Images are drawn down a ladder of descending noise levels. Samplers, values of the `algorithm_type` of
`GMLangevinScheduler`, which knows the mixture:

- `langevin`: annealed Langevin dynamics. The network is told the level where the chain of steps really is; as
  `langevin, ladder` (`network_level="ladder"`) that of the ladder, as published.
- `jump`: the same with steps of random size, mostly small, now and then large, as the mixture is; at few calls it falls
  too far behind.
- `exponential`: the same random sizes in steps that are exact for a fixed denoised image, and stable for any size.
- `ancestral`: the reverse of the diffusion, which draws the component of the mixture at every step, of order 2
  (`step_order`).
- `ode`: its probability flow, without noise after the start.""",
    card_values=on_card,
    advice=Advice(
        "GMLangevinScheduler",
        'algorithm_type="ancestral"',
        '`algorithm_type="ode"` serves the fewest calls.',
    ),
    citation="""\
```bibtex
@misc{gmsgm,
  title = {Approximated Anomalous Diffusion: Gaussian Mixture Score-Based Generative Models},
  author = {Anonymous},
  year = {2022},
  note = {Submitted to ICLR 2023, under double-blind review},
  url = {https://openreview.net/forum?id=yc9xen7EAzd}
}
```

"""
    + ladder.CITATION,
    formerly=ladder.FORMERLY,
)
