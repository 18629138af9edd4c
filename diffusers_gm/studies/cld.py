"""Critically-damped Langevin diffusion, measured: each command leaves a report with a picture and a verdict.

    python -m diffusers_gm.studies.cld squared        SSCS, Euler-Maruyama and others in squared distances, on Gaussians
                                                      and the digits, exact and trained, beside the published factors
    python -m diffusers_gm.studies.cld damping        distance to equilibrium, under-, critically and over-damped
    python -m diffusers_gm.studies.cld target         is the velocity's score easier to learn? loss and Jacobian
    python -m diffusers_gm.studies.cld robustness     nine masses and initial velocities
    python -m diffusers_gm.studies.cld losses         hybrid or denoising score matching, mixed score or not
    python -m diffusers_gm.studies.cld likelihood     bits per dimension: plain, dequantised, likelihood weights

Trained networks are kept in `.parts` beside the reports: a study that was interrupted goes on, and studies share the
trainings that they have in common.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ..cli import at_least
from ..evaluation.table import Table, machine
from ..processes.cld import CLD
from .cld_likelihood import likelihood
from .cld_squared import squared
from .cld_target import target
from .cld_training import losses, robustness
from .command import parse, study_parser
from .pictures import save_picture
from .report import Report

CALLS = (10, 20, 50, 100, 200)


def distance_to_equilibrium(process: CLD, clocks: Tensor, x0: float = 1.0) -> Tensor:
    """W2 between `(x, v / sqrt(M))` given x0 and the unit normal, at clocks `(n,)`: `(n,)`.

    Gaussians: squared distance of the means, plus `sum (sqrt(lambda_i) - 1)^2` over the eigenvalues of the covariance.
    """
    marginal = process.marginal(clocks)
    unit = torch.tensor([1.0, 1 / process.velocity_scale], dtype=torch.float64)
    mean = x0 * marginal.transition[..., 0] * unit
    values = torch.linalg.eigvalsh(marginal.covariance * unit[:, None] * unit).clamp(min=0)
    return (mean.square().sum(-1) + (values.sqrt() - 1).square().sum(-1)).sqrt()


def damping(args: argparse.Namespace) -> Report:
    """How long diffusions of different friction take to equilibrium."""
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    times, rows, last = torch.linspace(1e-4, 1, 2000, dtype=torch.float64), [], {}
    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        process = CLD(damping=ratio)
        distances = distance_to_equilibrium(process, process.clock(times))
        kind = "critical" if ratio == 1 else "under-damped" if ratio < 1 else "over-damped"
        axis.semilogy(
            times, distances, label=f"Gamma = {ratio:g} x 2 sqrt(M), {kind}", linewidth=2.5 if ratio == 1 else 1
        )
        # The last time the distance is above: under-damped diffusions come back.
        reached = [float(times[distances > level].max()) for level in (0.1, 0.01)]
        words = ["not by t = 1" if t > 0.999 else f"{t:.3f}" for t in reached]
        last[ratio] = float(distances[-1])
        rows.append([f"{ratio:g} ({kind})", *words, last[ratio]])
    axis.set(xlabel="t", ylabel="W2 to equilibrium", title="from x0 = 1, M = 1/4, beta = 4")
    axis.legend(fontsize=8)
    fastest = min(last, key=lambda ratio: last[ratio])
    return Report(
        name="cld_damping",
        title="CLD: why critical damping",
        question="Which friction Gamma takes data to equilibrium fastest?",
        verdict=f"Gamma = {fastest:g} x 2 sqrt(M) is nearest to equilibrium at t = 1, W2 {last[fastest]:.4f}; critical "
        f"damping is at {last[1.0]:.4f}, half of its friction at {last[0.5]:.4f}, twice at {last[2.0]:.4f}.",
        tables=[
            Table("From x0 = 1.", ["Gamma / (2 sqrt(M))", "t until W2 < 0.1", "t until W2 < 0.01", "W2 at t = 1"], rows)
        ],
        pictures=[save_picture(figure, args.output / "cld_damping.png")],
        conditions="Exact: W2 between the Gaussians (x, v / sqrt(M)) given x0 = 1 and N(0, I); M = 1/4, beta = 4.",
    )


STUDIES = {f.__name__: f for f in (squared, damping, target, robustness, losses, likelihood)}


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser("cld", __doc__, STUDIES, steps=600, seeds=False)
    add = parser.add_argument
    add("--batch", type=at_least(1), default=128, help="images per step")
    add("--calls", type=at_least(2), nargs="+", default=list(CALLS), help="numbers of network calls")
    add("--solver_steps", type=at_least(1), default=50, help="likelihood: steps of the solver, four calls each")
    add("--model", type=Path, help="squared: a trained CLD pipeline, in place of a training")
    args = parse(parser, arguments, over_floor=("robustness", "losses", "likelihood"))
    print(f"{args.study}: {machine()}", flush=True)
    STUDIES[args.study](args).write(args.output)


if __name__ == "__main__":
    main()
