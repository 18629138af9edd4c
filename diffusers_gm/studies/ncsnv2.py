"""NCSNv2's claims (arXiv 2006.09011), measured: each command writes a table, a picture and a verdict.

    python -m diffusers_gm.studies.ncsnv2 diversity      Technique 1: a largest noise level that joins the modes
    python -m diffusers_gm.studies.ncsnv2 noise_scales   Techniques 1, 2 and 4 against the published settings
    python -m diffusers_gm.studies.ncsnv2 denoise        with and without the final denoising
    python -m diffusers_gm.studies.ncsnv2 techniques     Techniques 1 to 5 switched off one at a time, trained

Finished trainings and measurements are kept in the folder `.parts` of `--output`: a second run takes up where the first
ended.
"""

import argparse
import itertools
import math
from functools import partial
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from ..cli import at_least
from ..data import split_digits
from ..evaluation.table import Table
from ..pictures import COLORS, curve_style
from ..processes.annealed import PRESETS, ladder_length, ladder_ratio, max_pairwise_distance, optimal_step_size
from ..schedulers import AnnealedLangevinScheduler
from .command import parse, study_parser
from .digits import kept_results, over_seeds
from .exact import ExactDenoiser, exact_network, run
from .ncsnv2_trained import SIGMA_MIN, TOO_SMALL, denoise, techniques
from .pictures import save_picture, show_rows
from .report import Report

# --- Technique 1: diversity ---


def mean_pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance of two different samples of `(n, ...)`, n >= 2."""
    return float(torch.pdist(samples.flatten(1)).mean())


def coverage(samples: Tensor, modes: Tensor) -> float:
    """Distinct nearest modes of samples `(n, ...)` over the number that independent draws have on average.

    `modes` are `(m, ...)`, equally likely: n draws hit `m (1 - (1 - 1/m)^n)` of them.
    """
    nearest = torch.cdist(samples.flatten(1), modes.flatten(1)).argmin(1)
    m = len(modes)
    return len(nearest.unique()) / (m * (1 - (1 - 1 / m) ** len(samples)))


def diversity(args: argparse.Namespace) -> Report:
    train, _ = split_digits()
    width, calls, n = 0.1, args.calls or 200, args.num_samples
    technique_1 = max_pairwise_distance(train)
    too_small = TOO_SMALL * technique_1
    denoiser = ExactDenoiser(train, width)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((n, *train.shape[1:]), generator=generator) * 2 - 1
    starts = {"one point": noise[:1].expand_as(noise), "noise": noise}

    def samples(sigma_max: float, start: str, seed: int) -> Tensor:
        scheduler = AnnealedLangevinScheduler(
            num_train_timesteps=1000, noise_space="ve", sigma_min=SIGMA_MIN, sigma_max=sigma_max, num_langevin_steps=5
        )
        scheduler.set_timesteps(calls)
        draws = torch.Generator().manual_seed(seed)
        return run(exact_network(denoiser, scheduler), scheduler, starts[start], draws)

    def measure(factor: float, start: str, seed: int) -> dict[str, float]:
        drawn = samples(factor * technique_1, start, seed)
        return {"distance": mean_pairwise_distance(drawn), "coverage": coverage(drawn, train)}

    real = train[torch.randint(len(train), (n,), generator=generator)]
    real = real + width * torch.randn(real.shape, generator=generator)
    results = kept_results("diversity", n, args.output)
    factors = [TOO_SMALL, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    table: dict[tuple[float, str], tuple[float, float]] = {}
    rows: list[list[Any]] = []
    for factor, start in itertools.product(factors, starts):
        name = f"{factor:g} x Technique 1, from {start}"
        found = over_seeds(results, name, calls, args.seeds, partial(measure, factor, start))
        table[factor, start] = found["distance"].mean, found["coverage"].mean
        rows.append([f"{factor * technique_1:.3g}", f"{factor:g}", start, *table[factor, start]])
    of_data = [mean_pairwise_distance(real), coverage(real, train)]
    rows.append(["exact draws", "", "", *of_data])

    figure = plt.figure(figsize=(11, 6), layout="constrained")
    top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=(1, 1.9)))
    show_rows(
        top.subplots(),
        {
            "exact draws": real,
            f"sigma_1 = {too_small:.2f}, one start": samples(too_small, "one point", 0),
            f"sigma_1 = {too_small:.2f}, noise": samples(too_small, "noise", 0),
            f"sigma_1 = {technique_1:.2f}, one start": samples(technique_1, "one point", 0),
        },
    )
    names = ("mean pairwise distance", "mode coverage")
    for column, (axis, name) in enumerate(zip(bottom.subplots(1, 2), names, strict=True)):
        for i, start in enumerate(starts):
            values = [table[f, start][column] for f in factors]
            axis.semilogx([f * technique_1 for f in factors], values, label=f"from {start}", **curve_style(i))
        axis.axhline(of_data[column], color="gray", linestyle=":", label="exact draws")
        axis.axvline(technique_1, color=COLORS[3], linewidth=0.8, label="Technique 1")
        axis.set(xlabel="largest noise level sigma_1", ylabel=name, ylim=(0, None))
        axis.legend(fontsize=8)
    picture = save_picture(figure, args.output / "ncsnv2_diversity.png")

    small, large = ([table[f, start][i] / of_data[i] for start in starts for i in (0, 1)] for f in (TOO_SMALL, 1.0))
    enough = min(f for f in factors if all(v > 0.95 * r for v, r in zip(table[f, "one point"], of_data, strict=True)))
    agrees = large[0] > 0.9 and large[1] > 0.9 and small[0] < 0.5
    return Report(
        "ncsnv2_diversity",
        "NCSNv2, Technique 1: the largest noise level decides the diversity",
        "Does annealed Langevin dynamics forget where it started, with the exact score of a mixture of Gaussians "
        "centred at images, when the largest noise level is the largest distance in the data, and not when it is the "
        "1 of NCSN?",
        f"{'Confirmed' if agrees else 'Not confirmed'}. From one point, the samples' mean pairwise distance is "
        f"{small[0]:.2f} of the data's and their mode coverage {small[1]:.2f} of exact draws' with the small level, "
        f"{large[0]:.2f} and {large[1]:.2f} with Technique 1's. From independent noise they are {small[2]:.2f} and "
        f"{small[3]:.2f} with the small level, {large[2]:.2f} and {large[3]:.2f} with Technique 1's: a start that is "
        f"itself diverse {'hides much' if small[2] > 0.75 else 'does not make up for much'} of the loss in distance, "
        f"and {'hides' if small[3] > 0.75 else 'does not hide'} the loss in modes. Technique 1 is on the safe side: "
        f"with these data {enough:g} of it is enough for 95% of both, from one point.",
        [Table(f"{n} chains of {calls} calls, T = 5, step by Technique 4; means of {args.seeds} seeds.",
               ["sigma_1", "over Technique 1", "start", "mean pairwise distance", "mode coverage"], rows)],
        [picture],
        f"Data: the {len(train)} training digits in [-1, 1], each a Gaussian of width {width:g}. Technique 1 gives "
        f"{technique_1:.3g} (CIFAR-10 in [0, 1]: 50); NCSN's 1 is {TOO_SMALL:g} of that, here {too_small:.3g}. Starts "
        "are uniform in the pixel range. Both ladders have the same number of levels and calls; the final denoising is "
        "on.",
    )  # fmt: skip


# --- Techniques 1, 2, 4: the published settings ---

# Elements of one image, and Langevin steps, of the published models (arXiv 2006.09011, appendix B).
PUBLISHED = {
    "CIFAR-10": ("ncsnv2-cifar10", 32),
    "CelebA 64": ("ncsnv2-celeba", 64),
    "LSUN bedroom, tower 128": ("ncsnv2-lsun", 128),
    "FFHQ 256": ("ncsnv2-ffhq", 256),
}


def published_rows() -> list[list[Any]]:
    """One row per published model: its settings, and what the library's functions give for them.

    Columns: name, d, sigma_1, published L, L at overlap 0.5, overlap that the published L has, T, published eps, eps
    of Technique 4 on the published ladder.
    """
    rows: list[list[Any]] = []
    for name, (preset, side) in PUBLISHED.items():
        p, dim = PRESETS[preset], 3 * side**2
        ratio = (p.sigma_max / p.sigma_min) ** (1 / (p.num_levels - 1))
        step = optimal_step_size(torch.tensor([ratio]), p.num_langevin_steps, "prop3")
        rows.append([
            name, dim, p.sigma_max, p.num_levels, ladder_length(p.sigma_max, p.sigma_min, dim), overlap_of(ratio, dim),
            p.num_langevin_steps, p.step_size, float(step[0]) * p.sigma_min**2,
        ])  # fmt: skip
    return rows


def overlap_of(ratio: float, dim: int) -> float:
    """The overlap of neighbouring levels (Technique 2) of a ladder of this ratio, the inverse of `ladder_ratio`."""
    return brentq(lambda overlap: ladder_ratio(dim, overlap) - ratio, 1e-6, 0.989)


def noise_scales(args: argparse.Namespace) -> Report:
    rows = published_rows()
    header = ["data", "d", "sigma_1", "L, published", "L, Technique 2", "overlap of the published L", "T",
              "eps, published", "eps, Technique 4"]  # fmt: skip
    train, _ = split_digits()
    measured = max_pairwise_distance(train) / 2
    digits = [measured, ladder_length(measured, SIGMA_MIN, train[0].numel())]

    sides = [8, 16, 32, 64, 128, 256]
    # sigma_1 of the published models against the side, as a power law.
    points = np.log([(side, PRESETS[preset].sigma_max) for preset, side in PUBLISHED.values()])
    slope, at_1 = np.polyfit(points[:, 0], points[:, 1], 1)
    sigma_1 = {side: math.exp(at_1) * side**slope for side in sides}
    lengths = {side: ladder_length(sigma_1[side], SIGMA_MIN, 3 * side**2) for side in sides}
    growth = [[side, sigma_1[side], lengths[side], lengths[side] / side, ladder_ratio(3 * side**2)] for side in sides]

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.loglog(sides, list(lengths.values()), "-o", label=f"Technique 2, sigma_1 ~ side^{slope:.2f}")
    of_fifty = [ladder_length(50, SIGMA_MIN, 3 * side**2) for side in sides]
    left.loglog(sides, of_fifty, "--s", label="Technique 2, sigma_1 = 50")
    left.loglog([s for _, s in PUBLISHED.values()], [r[3] for r in rows], "kx", markersize=9, label="published L")
    left.axhline(PRESETS["ncsn"].num_levels, color="gray", linestyle=":", label="NCSN: L = 10")
    left.set(xlabel="side of the image", ylabel="noise levels L", title="levels against resolution (colour images)")
    left.set_xticks(sides, [str(s) for s in sides])
    left.legend(fontsize=8)
    right.loglog([r[7] for r in rows], [r[8] for r in rows], "o")
    ends = [min(r[7] for r in rows) / 1.3, max(r[7] for r in rows) * 1.3]
    right.loglog(ends, ends, ":", color="gray")
    for row in rows:
        right.annotate(row[0], (row[7], row[8]), xytext=(6, -10), textcoords="offset points", fontsize=8)
    right.set(xlabel="published eps", ylabel="eps of Technique 4", title="step size", xlim=(ends[0], 2 * ends[1]))
    picture = save_picture(figure, args.output / "ncsnv2_noise_scales.png")

    error = max(abs(row[8] / row[7] - 1) for row in rows)
    short = [row[4] / row[3] for row in rows]
    overlaps = [row[5] for row in rows]
    exponent = math.log(lengths[256] / lengths[32]) / math.log(8)
    return Report(
        "ncsnv2_noise_scales",
        "NCSNv2, Techniques 1, 2 and 4: the published noise scales and step sizes",
        "Do the formulas of the paper give the settings that it published, and how do they grow with the resolution?",
        f"Step sizes: {'confirmed' if error < 0.02 else 'not confirmed'}, Technique 4 is within "
        f"{error:.1%} of every published eps, which has two digits. Levels: not to the letter. An overlap of 0.5 "
        f"gives {min(short):.1%} to {max(short):.1%} of the published L; the published ladders overlap by "
        f"{min(overlaps):.3f} to {max(overlaps):.3f}, all alike. L grows as side^{exponent:.2f} between 32 and 256 "
        "pixels: the logarithm of sigma_1 grows slowly, and neighbouring levels must be closer as 1 / sqrt(d). sigma_1 "
        "itself is the paper's measurement of its data, and is taken from it.",
        [
            Table("Images in [0, 1], sigma_L = 0.01.", header, rows),
            Table(f"Technique 2 against the resolution; sigma_1 by a power law through the published values, "
                  f"side^{slope:.2f}.", ["side", "sigma_1", "L", "L / side", "ratio of levels"], growth),
            Table("The digits, measured (Technique 1) in units of [0, 1], sigma_L = 0.01.", ["sigma_1", "L"], [digits]),
        ],
        [picture],
        "Published values: those of the library's presets, appendix B of the paper. No data were used but for the "
        "digits.",
    )  # fmt: skip


STUDIES = {f.__name__: f for f in (diversity, noise_scales, denoise, techniques)}


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("ncsnv2", __doc__, STUDIES)
    parser.add_argument("--calls", type=at_least(3), help="one number of network calls, in place of several")
    args = parse(parser, argv, over_floor=("denoise", "techniques"))
    if args.study == "diversity" and args.calls and args.calls < 11:
        parser.error(f"--calls {args.calls}: diversity takes 5 Langevin steps a level, and needs at least 11")
    STUDIES[args.study](args).write(args.output)


if __name__ == "__main__":
    main()
