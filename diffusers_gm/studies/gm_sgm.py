"""GM-SGM's claims, measured: each command writes a table, a picture and a verdict.

    python -m diffusers_gm.studies.gm_sgm claim        a network that works out its own noise level, and what for
    python -m diffusers_gm.studies.gm_sgm increments   tails of mixture noise against the alpha-stable law
    python -m diffusers_gm.studies.gm_sgm rare_modes   rare and far modes: jumps, or steps on the first level

Finished trainings and measurements are kept in the folder `.parts` of `--output`: a second run takes up where the first
ended.
"""

import argparse
import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import levy_stable
from torch import Tensor

from ..cli import at_least
from ..evaluation.table import Table
from ..processes.mixture import GaussianMixtureNoise
from .command import parse, study_parser
from .own_level import claim
from .pictures import save_picture
from .rare_modes import rare_modes
from .report import Report

# --- Tails of mixture noise against the alpha-stable law that it stands in for ---

ALPHAS = (1.2, 1.5, 1.8)
COMPONENTS = (1, 2, 3, 5, 8)
# The range of the tail, in units of the stable law's scale.
FROM, TO = 2.0, 20.0


def survival(mixture: GaussianMixtureNoise, t: Tensor) -> Tensor:
    """`P(|eta| > t)` of one element of the noise, for t >= 0 of any shape; float64."""
    return 2 * (mixture.weights * torch.special.log_ndtr(-t.double()[..., None] / mixture.scales).exp()).sum(-1)


def median(mixture: GaussianMixtureNoise) -> float:
    """The t with `P(|eta| > t) = 1/2`."""
    return brentq(lambda t: float(survival(mixture, torch.tensor(t))) - 0.5, 0.0, float(mixture.scales.max()))


def tail_exponent(t: Tensor, probability: Tensor) -> float:
    """The p of `P(|x| > t) ~ t^-p`: least squares on logarithms, over the t given, `(n,)` each."""
    return -float(np.polyfit(t.double().log(), probability.double().log(), 1)[0])


def increments(args: argparse.Namespace) -> Report:
    t = torch.logspace(math.log10(0.3), math.log10(50), 40, dtype=torch.float64)
    tail = (t >= FROM) & (t <= TO)
    figure, axes = plt.subplots(1, len(ALPHAS), figsize=(12, 4.3), layout="constrained", sharey=True)
    rows: list[list[Any]] = []
    errors, exponents = {}, {}  # by alpha and number of components; of the law itself under 0
    for axis, alpha in zip(axes, ALPHAS, strict=True):
        law = torch.from_numpy(2 * np.asarray(levy_stable.sf(t.numpy(), alpha, 0)))
        half = float(levy_stable.ppf(0.75, alpha, 0))
        axis.loglog(t, law, "k", linewidth=2.5, label="alpha-stable")
        exponents[alpha, 0] = tail_exponent(t[tail], law[tail])
        rows.append([alpha, "stable law", exponents[alpha, 0], "", "", ""])
        for count in COMPONENTS:
            mixture = GaussianMixtureNoise.from_stable(alpha, count)
            values = survival(mixture, t * median(mixture) / half)
            errors[alpha, count] = float((values[tail] / law[tail]).log().abs().max().exp())
            exponents[alpha, count] = tail_exponent(t[tail], values[tail])
            kurtosis = 3 * mixture.moment(4)
            row = [f"K = {count}", exponents[alpha, count], errors[alpha, count], kurtosis, math.ceil(kurtosis - 3)]
            rows.append([alpha, *row])
            axis.loglog(t, values, label=f"K = {count}" + (", Gaussian" if count == 1 else ""), linewidth=1)
        axis.axvspan(FROM, TO, color="gray", alpha=0.1)
        axis.set(title=f"alpha = {alpha:g}", xlabel="t, in scales of the stable law", ylim=(1e-6, 1.1))
    axes[0].set_ylabel("P(|x| > t), one element")
    axes[0].legend(fontsize=8)
    picture = save_picture(figure, args.output / "gm_sgm_increments.png")
    worst = {count: max(errors[alpha, count] for alpha in ALPHAS) for count in COMPONENTS}
    near = next((f"{c} components are" for c, f in worst.items() if f < 1.25), "No number of components tried is")
    off = {count: max(abs(exponents[a, count] - exponents[a, 0]) for a in ALPHAS) for count in COMPONENTS}
    return Report(
        "gm_sgm_increments",
        "GM-SGM: tails of mixture noise against the alpha-stable law",
        "How many Gaussian components does it take to imitate the heavy tails of Levy increments?",
        f"{near} within 25% of the stable law's tail for every alpha; the largest factor between the tails is "
        + ", ".join(f"{f'{f:.2f}' if f < 1000 else 'over 1000'} at K = {c}" for c, f in worst.items())
        + f". The tail exponents at K = 5 and 8 are within {off[5]:.2f} and {off[8]:.2f} of the law's own. "
        "**Mixtures of 2 or 3 components, which is what trains well, are not heavy-tailed "
        "in this sense**: their tails are those of their widest Gaussian. And every finite mixture has a variance, so "
        "sums of increments become Gaussian (last column), which sums of stable ones never do.",
        [Table(f"One element; scales matched at the median of |x|; tails from {FROM:g} to {TO:g} scales.",
               ["alpha", "law", "tail exponent", "largest factor off", "kurtosis", "steps until the sum's excess "
                "kurtosis is below 1"], rows)],
        [picture],
        "Exact distribution functions, no sampling: the quantised stable law of `GaussianMixtureNoise.from_stable` "
        "and `scipy.stats.levy_stable`.",
    )  # fmt: skip


# --- The command ---

STUDIES = {f.__name__: f for f in (claim, increments, rare_modes)}


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("gm_sgm", __doc__, STUDIES)
    parser.add_argument("--calls", type=at_least(2), nargs="+", help="numbers of network calls")
    parser.add_argument(
        "--trainings", type=at_least(1), default=1, help="claim: trainings that the seeds take turns with"
    )
    args = parse(parser, argv, over_floor=("claim",))
    if args.study == "rare_modes" and args.calls and min(args.calls) < 12:
        parser.error(f"--calls {args.calls}: rare_modes needs at least 12")
    STUDIES[args.study](args).write(args.output)


if __name__ == "__main__":
    main()
