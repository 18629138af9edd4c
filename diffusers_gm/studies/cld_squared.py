"""SSCS against Euler-Maruyama in squared distances, as its paper has it: a study of `.cld`.

FID is squared: a factor of 2.6 there is one of 1.6 in the distance. On Gaussians both are exact; the digits have FD.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor

from ..data import split_digits
from ..evaluation.distances import frechet_distance
from ..evaluation.report import plot_curves
from ..evaluation.sampling import describe_model
from ..evaluation.table import Table
from ..pipelines import CLDPipeline
from ..schedulers import CalibratedMultistepScheduler, CLDSSCSScheduler
from .cld_digits import as_curves, results_of, train_cld
from .cld_training import exact_velocity_score
from .digits import images_of
from .exact import NetworkOf
from .pictures import save_picture
from .report import Report

# Euler-Maruyama's FID over that of SSCS, CIFAR-10 (arXiv 2112.07068, table 2), by network calls.
PUBLISHED = {50: 2.6, 150: 2.3, 275: 1.4}

# Variances of the directions of data: what SSCS is made for, narrower and wider data, and a spectrum as images have it.
SPECTRA = {
    "variance 1": [1.0],
    "variance 0.25": [0.25],
    "variance 0.04": [0.04],
    "variance 4": [4.0],
    "deviations 1 / k": [1 / k**2 for k in (1, 2, 4, 8, 16, 32)],
}

EM, SSCS = "euler_maruyama, quadratic", "sscs, quadratic"
# Of a network that sees a velocity; the last two leave the velocity out: its probability flow is that of y alone.
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    EM: (CLDSSCSScheduler, {"algorithm_type": "euler_maruyama", "timestep_spacing": "quadratic"}),
    SSCS: (CLDSSCSScheduler, {"timestep_spacing": "quadratic"}),
    "sscs, order 2, quadratic": (CLDSSCSScheduler, {"splitting_order": 2, "timestep_spacing": "quadratic"}),
    "probability_flow, quadratic": (
        CLDSSCSScheduler,
        {"algorithm_type": "probability_flow", "timestep_spacing": "quadratic"},
    ),
    "probability_flow, log_snr": (
        CLDSSCSScheduler,
        {"algorithm_type": "probability_flow", "timestep_spacing": "log_snr"},
    ),
    "multistep with corrector, log_snr": (CalibratedMultistepScheduler, {"grid": None, "timestep_spacing": "log_snr"}),
    "multistep with corrector": (CalibratedMultistepScheduler, {}),
}


def scheduler_of(name: str, config: Any) -> Any:
    """The sampler for the network of a `CLDSSCSScheduler`'s config."""
    cls, options = SAMPLERS[name]
    return cls.from_config(config, **({"algorithm_type": "sscs"} if cls is CLDSSCSScheduler else {}) | options)


def squared_w2(scheduler: Any, num_calls: int, spectrum: Sequence[float], final_variance: Callable) -> float:
    """W2^2, per direction, between Gaussian data and what a run with their exact score leaves."""
    left = [final_variance(scheduler, num_calls, variance) for variance in spectrum]
    return sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(left, spectrum, strict=True)) / len(spectrum)


def factor(over: float, under: float) -> str:
    """A factor of squared distances, and its root."""
    return f"{over / under:.3g} ({math.sqrt(over / under):.3g})"


# FD of 64 pixels needs more images than that.
FEWEST = 80


def fd_of_digits(images: Tensor) -> dict[str, float]:
    """FD of pixels to the training digits; nothing where samples are not finite."""
    if not images.isfinite().all():
        return {}
    return {"fd": frechet_distance(images.clamp(-1, 1).flatten(1), split_digits()[0].flatten(1))}


def on_digits(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """FD by network, sampler and number of calls; nan where samples are not finite."""
    unet, described = train_cld(args)
    exact = CLDSSCSScheduler.from_config(described.config, prediction_type="velocity_score")
    models = {
        "exact denoiser": (NetworkOf(exact_velocity_score(exact.process, split_digits()[0]), (1, 8, 8), 2), exact),
        "trained network": (unet, described),
    }
    results = results_of(args, "cld_squared", model=describe_model(CLDPipeline(unet, described)))

    def draw(network: Any, scheduler: Any, calls: int, seed: int) -> tuple[Tensor, int]:
        pipeline = CLDPipeline(network, scheduler)
        return images_of(pipeline, calls, max(args.num_samples, FEWEST), seed)

    found: dict[str, dict[str, list[float]]] = {}
    for model, (network, config_of) in models.items():
        found[model] = {}
        for name in SAMPLERS:
            make = partial(draw, network, scheduler_of(name, config_of.config))
            cells = [results.measure(f"{model}, {name}", n, 0, partial(make, n, 0), fd_of_digits) for n in args.calls]
            found[model][name] = [cell.scores.get("fd", math.nan) for cell in cells]
    return found


def squared(final_variance: Callable, args: argparse.Namespace) -> Report:
    """Euler-Maruyama over SSCS, squared and not, on Gaussians and on the digits."""
    described = CLDSSCSScheduler(prediction_type="velocity_score")
    gaussian = {
        spectrum: {
            name: [squared_w2(scheduler_of(name, described.config), n, of, final_variance) for n in args.calls]
            for name in SAMPLERS
        }
        for spectrum, of in SPECTRA.items()
    }
    digits = on_digits(args)
    rows = [["published, CIFAR-10, FID", *(f"{p:g} ({p**0.5:.3g})" if (p := PUBLISHED.get(n)) else "-" for n in args.calls)]]  # fmt: skip # noqa: E501
    for spectrum, by_name in gaussian.items():
        pairs = zip(by_name[EM], by_name[SSCS], strict=True)
        rows.append([f"Gaussian, {spectrum}, W2^2", *(factor(em, sscs) for em, sscs in pairs)])
    of_digits = [
        [f"digits, {model}, FD", *(factor(em, sscs) for em, sscs in zip(by_name[EM], by_name[SSCS], strict=True))]
        for model, by_name in digits.items()
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, (title, by_name, calls) in zip(
        axes,
        (("Gaussian of variance 0.25, W2^2", gaussian["variance 0.25"], args.calls),
         ("digits, trained network, FD", digits["trained network"], args.calls)),
        strict=True,
    ):  # fmt: skip
        plot_curves(axis, as_curves(by_name, calls))
        axis.set(title=title, yscale="log")
        axis.legend(fontsize=7)

    def best(by_name: dict[str, list[float]], i: int) -> str:
        name = min(by_name, key=lambda name: by_name[name][i])
        return f"{name} ({by_name[name][i]:.3g})"

    losing = [s for s, by in gaussian.items() if all(e < b for e, b in zip(by[EM], by[SSCS], strict=True))]
    nearest = ", ".join(f"{factor(gaussian['variance 0.25'][EM][i], gaussian['variance 0.25'][SSCS][i])} at {n}" for i, n in enumerate(args.calls) if n in PUBLISHED or not {*args.calls} & {*PUBLISHED})  # fmt: skip # noqa: E501
    return Report(
        name="cld_squared",
        title="CLD: SSCS and Euler-Maruyama in squared distances",
        question="Is SSCS ahead of Euler-Maruyama by the published factors, in a squared distance as FID is?",
        verdict=f"Euler-Maruyama over SSCS, squared (root), Gaussian data of variance 0.25: {nearest} calls; published "
        f"{', '.join(f'{p:g} at {n}' for n, p in PUBLISHED.items())}. SSCS is behind at every number of calls on: "
        f"{', '.join(losing) or 'none'}. On the digits: "
        + "; ".join(
            f"{model}, {', '.join(f'{factor(by[EM][i], by[SSCS][i])} at {n}' for i, n in enumerate(args.calls))}, the "
            f"least FD at {args.calls[0]} calls {best(by, 0)}, at {args.calls[-1]} {best(by, -1)}"
            for model, by in digits.items()
        )
        + ".",
        tables=[
            Table("Euler-Maruyama over SSCS, squared distances (their roots), quadratic grid.",
                  ["", *(f"{n} calls" for n in args.calls)], rows),
            Table("The same on the digits.", ["", *(f"{n} calls" for n in args.calls)], of_digits),
            *(Table(f"Gaussian, {spectrum}: W2^2 a direction.", ["", *(f"{n} calls" for n in args.calls)],
                    [[name, *(f"{v:.3g}" for v in values)] for name, values in by_name.items()])
              for spectrum, by_name in gaussian.items()),
            *(Table(f"Digits, {model}: FD of pixels to the training digits, n = {max(args.num_samples, FEWEST)}.",
                    ["", *(f"{n} calls" for n in args.calls)],
                    [[name, *(f"{v:.3g}" for v in values)] for name, values in by_name.items()])
              for model, by_name in digits.items()),
        ],
        pictures=[save_picture(figure, args.output / "cld_squared.png")],
        conditions=f"Gaussians: exact, no sampling. Digits, 8 x 8: a training of {args.steps} steps of {args.batch} "
        "images, seed 0; one seed of samples. The multistep sampler on a velocity network follows the probability flow "
        "of the noisy image alone, which the velocity does not enter, with a corrector.",
    )  # fmt: skip
