"""Who samples a given network best, at equal network calls: `python -m diffusers_gm.studies.sampler_benchmark`.

Every scheduler of diffusers that fits, and ours, each at the best of its grids, on

- `exact`: the exact denoiser of images (each a Gaussian of width 0.1), a perfectly trained DDPM network; of the 8 x 8
  digits, or of other images with --dataset_name or --train_data_dir; `cifar10`: of those of --cifar10;
- `erring`, `erring-much`: that of the digits plus a smooth error, as a network has;
- `mixture-2`, `-16`, `-512`, `-3072`: the exact denoiser of a Gaussian mixture in so many dimensions;
- `ddpm`: a DDPM network of the digits, trained with diffusers' own objective at the budget of `make demo`;
- `ncsnv2`, `gm-sgm`, `cld`: our own digits networks of the same budget, under the samplers made for each; that of
  `ncsnv2` under those of diffusers too (`diffusers_config`);
- with --pipeline any saved networks, of this package or DDPMs of diffusers, beside the images of --train_data_dir.

Quality is sliced W2, a root, over the floor, what as many real images have (of networks of the digits at most the 360
held-out ones); means over seeds. FD of the pixels is measured too, a squared distance; of large images that of their
principal components, an eighth as many as samples. What the settings are worth one
by one, over all networks, is `.sampler_benchmark_settings`. With --first_look only what is not far behind for fewer
samples is measured. Every finished cell is kept in `OUTPUT/.parts`, and so is every calibration: an interrupted
benchmark goes on where it was.
"""

import argparse
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ..cli import Parser, at_least
from ..data import examine, open_source, split_digits
from ..evaluation.report import Curve, plot_curves
from ..evaluation.results import Results
from ..evaluation.table import Table
from .digits import kept_results
from .pictures import plot_behind, save_picture
from .report import Report, by_calls
from .sampler_benchmark_cells import ALL_GRIDS_UP_TO, CONTENDS, Bests, Which, contending, measure
from .sampler_benchmark_models import SHAPES, Model, ddpm_model, exact_model, mixture_model, own_model, saved_model
from .sampler_benchmark_schedulers import (
    MULTISTEP,
    PEERS,
    STOCHASTIC,
    Samplers,
)

TRAINED = ("ddpm", "ncsnv2", "gm-sgm", "cld")
MODELS = ("exact", "erring", "erring-much", *(f"mixture-{dimension}" for dimension in SHAPES), "cifar10", *TRAINED)

# The errors of D, relative to the deviation of the image given what the network sees.
ERRORS = {"erring": 0.2, "erring-much": 0.4}

# Optimizer steps of the trained networks, unless told.
STEPS = 1200


def benchmark(
    name: str, model: Model, args: argparse.Namespace, results: Results, among: Collection[Which] | None = None
) -> Report:
    """The report of a model; `among`: what a first look has left."""
    bests = measure(model, args.calls, args.seeds, results, among)
    ours = [s for s in model.samplers if s not in PEERS]
    peers = [s for s in model.samplers if s in PEERS]

    rows = [
        [
            f"**{sampler}**" if sampler in ours and peers else sampler,
            *(str(bests[sampler, calls] or "-") for calls in args.calls),
        ]
        for sampler in model.samplers
    ]
    spread = f"mean of {args.seeds} seeds ± standard deviation, " if args.seeds > 1 else ""
    behind = "" if among is None else ", or far behind at a first look"
    caption = (
        f"Sliced W2 over the floor, {spread}and the best grid; ours in bold; `-`: no run of that many calls{behind}."
    )
    tables = [Table(caption, ["sampler", *by_calls(args.calls)], rows)]
    if model.made is not None and (calibrations := model.made.table()):
        tables.append(calibrations)
    answers = [f"{calls} calls: {winner(bests, model.samplers, calls)[1]}" for calls in args.calls]
    verdict = f"Best of all: {', '.join(answers)}."
    if "CLD, sscs" in ours and {"DDPM", "Euler ancestral"} <= set(peers):
        verdict += " " + " ".join(against_peers(bests, calls, ours) for calls in args.calls)
    curves = {s: {c: b.ratio if (b := bests[s, c]) else None for c in args.calls} for s in model.samplers}
    gpu = f" On one {torch.cuda.get_device_name()}." if args.device == "cuda" else ""
    looked = f" What {args.first_look} samples put {CONTENDS} times behind is left out." if among is not None else ""
    # A comparison of some is no replacement for one of all.
    stem = f"samplers_{name}_n{args.num_samples}{'_selected' if args.samplers or args.grids else ''}"
    return Report(
        stem,
        f"Samplers at equal network calls: {model.title}",
        "Which scheduler gives the best samples of one and the same network at a number of network calls, each at the "
        "best of its grids?",
        verdict,
        tables,
        [plot(curves, model.title, args.output / f"{stem}.png")],
        f"{model.conditions} n = {args.num_samples}, {args.seeds} seed(s), the same for all.{looked} The best grid is "
        f"picked on the same samples; above {ALL_GRIDS_UP_TO} calls only the grid that was best before is run. What "
        f"has more than {CONTENDS} times the least error on the first seed need not have been measured on the others "
        f"(no ±).{gpu}",
    )


# What is so many times the floor is not drawn.
WORST = 30


def plot(curves: Mapping[str, Curve], title: str, path: Path) -> str:
    """Ours, by name, among thin lines of those of diffusers, of which the best one is drawn at each number of calls;
    the name of the file."""
    shown = {s: {n: v if v and v.mean < WORST else None for n, v in curve.items()} for s, curve in curves.items()}
    ours = {s: shown[s] for s in sorted(shown, key=lambda s: s != MULTISTEP) if s not in PEERS}
    peers = {s: shown[s] for s in shown if s in PEERS}
    figure, axis = plt.subplots(figsize=(10, 6.5), layout="constrained")
    if ours and peers:
        plot_behind(axis, peers.values(), "diffusers, each of them")
        values = {n: [v for curve in peers.values() if (v := curve[n])] for n in next(iter(peers.values()))}
        best = {n: min(of, key=lambda v: v.mean, default=None) for n, of in values.items()}
        plot_behind(axis, [best], "diffusers, the best one", color="black", linewidth=2)
    plot_curves(axis, ours or peers, 1)
    axis.set(ylabel="sliced W2 over the floor", title=title)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return save_picture(figure, path)


def winner(bests: Bests, samplers: Iterable[str], calls: int) -> tuple[float, str]:
    """The least error of these samplers at a number of calls, over the floor, and whose it is."""
    return min(((b.ratio.mean, s) for s in samplers if (b := bests.get((s, calls)))), default=(math.inf, "none"))


def against_peers(bests: Bests, calls: int, ours: Sequence[str]) -> str:
    """The SSCS sampler against what people use, at one number of calls, in a sentence."""
    sscs, mine = bests["CLD, sscs", calls], winner(bests, ours, calls)
    if sscs is None:
        return f"At {calls} calls SSCS has no run."
    classic, stochastic, any_peer = (
        winner(bests, peers, calls) for peers in (("DDPM", "Euler ancestral"), STOCHASTIC, PEERS)
    )
    return (
        f"At {calls} calls SSCS has {sscs.ratio.mean / classic[0]:.2f} times the error of {classic[1]}, "
        f"{sscs.ratio.mean / stochastic[0]:.2f} times that of the best stochastic peer ({stochastic[1]}), and our best "
        f"({mine[1]}) {mine[0] / any_peer[0]:.2f} times that of the best peer ({any_peer[1]})."
    )


def check_options(parser: Parser, args: argparse.Namespace) -> None:
    """End the program for what does not go together."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here, or torch cannot use it; leave it out")
    if args.first_look is not None and args.first_look >= args.num_samples:
        parser.error(f"--first_look {args.first_look}: must be fewer than --num_samples {args.num_samples}")
    if args.pipeline:
        if args.train_data_dir is None:
            parser.error("--pipeline needs --train_data_dir, real images that its samples are compared with")
        return
    if args.compile:
        parser.error("--compile: networks of --pipeline are compiled, and none is given")
    if "cifar10" in args.models and args.cifar10 is None:
        parser.error("--models cifar10 needs --cifar10, the folder of its parquet files")
    if "cifar10" in args.models and not args.cifar10.is_dir():
        parser.error(
            f"--cifar10 {args.cifar10}: no such folder; leave the model out, or say where the parquet files are"
        )
    of_images = {"dataset_name", "train_data_dir", "resolution", "num_images"}
    of_images -= {"num_images"} if "cifar10" in args.models else set()
    given = [f"--{name}" for name in sorted(of_images) if getattr(args, name) not in (None, "digits")]
    if given and "exact" not in args.models:
        parser.error(f"{', '.join(given)}: what model 'exact' is made of, which is not among --models")


def model_of(name: str, args: argparse.Namespace) -> tuple[str, Model]:
    """The model called `name`, and the stem of its files."""
    n, output = args.num_samples, args.output
    if name in TRAINED:
        make = ddpm_model if name == "ddpm" else partial(own_model, name)
        model = make(n, args.steps, args.training_seed, output)
        stem, title = name, model.title
        if args.steps != STEPS:
            stem, title = f"{stem}-{args.steps}", f"{title}, {args.steps} steps"
        if args.training_seed:
            stem, title = f"{stem}-s{args.training_seed}", f"{title}, seed {args.training_seed}"
        return stem, replace(model, title=title)
    if name.startswith("mixture"):
        return name, mixture_model(int(name.removeprefix("mixture-")), n, output)
    if name == "cifar10":
        source = open_source("", train_data_dir=str(args.cifar10))
        points = examine(source, 0, None, num_images=args.num_images or 2000).images
        return name, exact_model(points, f"{len(points)} images of CIFAR-10", n, output)
    given = args.train_data_dir or args.resolution or args.num_images or args.dataset_name != "digits"
    if name in ERRORS or not given:
        return name, exact_model(split_digits()[0], "the digits", n, output, ERRORS.get(name, 0.0))
    source = open_source(args.dataset_name, train_data_dir=args.train_data_dir)
    points = examine(source, 0, args.resolution, num_images=args.num_images or 2000).images
    data = Path(args.train_data_dir).resolve().name if args.train_data_dir else args.dataset_name.rpartition("/")[2]
    size = "x".join(map(str, points.shape[1:]))
    words = f"{len(points)} images of {data}, {size}"
    return f"{name}_{data}_{size}_{len(points)}", exact_model(points, words, n, output)


def saved_models(args: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """The networks of --pipeline, and the stems of their files."""
    source = open_source("", train_data_dir=args.train_data_dir)
    images = examine(source, 0, args.resolution, num_images=args.num_images or source.num_images).images
    for path in args.pipeline:
        stem = Path(path).resolve().name if Path(path).exists() else path.replace("/", "-")
        model = saved_model(path, images, args.num_samples, args.output)
        if args.compile:
            unet = model.pipeline.unet
            unet.forward = torch.compile(unet.forward)  # not what is around it, where calls are counted
        yield stem.replace(" ", "-"), model


def selected(stem: str, samplers: Samplers, args: argparse.Namespace) -> Samplers:
    """The samplers and the grids that are asked for alone.

    Raises:
        ValueError: for one that there is not.
    """
    if unknown := [name for name in args.samplers or () if name not in samplers]:
        raise ValueError(f"--samplers {unknown}: {stem} has {', '.join(samplers)}")
    samplers = {name: samplers[name] for name in args.samplers or samplers}
    grids = dict.fromkeys(grid for by_grid in samplers.values() for grid in by_grid)
    if unknown := [grid for grid in args.grids or () if grid not in grids]:
        raise ValueError(f"--grids {unknown}: there are {', '.join(grids)}")
    wanted = args.grids or grids
    chosen = {name: {g: s for g, s in by_grid.items() if g in wanted} for name, by_grid in samplers.items()}
    return {name: by_grid for name, by_grid in chosen.items() if by_grid}


def models_of(args: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """The models that are asked for, with the samplers that are, and the stems of their files."""
    models = saved_models(args) if args.pipeline else (model_of(name, args) for name in args.models)
    for stem, model in models:
        model.pipeline.to(args.device)
        yield stem, replace(model, samplers=selected(stem, model.samplers, args))


def first_look(args: argparse.Namespace) -> argparse.Namespace:
    """The same with fewer samples."""
    return argparse.Namespace(**{**vars(args), "num_samples": args.first_look})


def kept_cells(stem: str, model: Model, args: argparse.Namespace) -> Results:
    """What has been measured of a model."""
    settings = {"steps": args.steps, "content": model.content, "default": model.default, "title": model.title}
    return kept_results(f"samplers {stem}", args.num_samples, args.output, **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(f"{__package__}.sampler_benchmark", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["exact"], help="what is sampled, see above")
    add("--pipeline", nargs="+", metavar="PATH", help="in place of --models: saved pipelines, folders or of the Hub")
    add("--calls", type=at_least(3), nargs="+", default=[5, 10, 20, 50, 200], help="numbers of network calls")
    add("--num_samples", type=at_least(2), default=1000, help="images per cell")
    add("--first_look", type=at_least(2), metavar="N", help="samples by which what is far behind is left out [no look]")
    add("--seeds", type=at_least(1), default=3, help="runs of each cell")
    add("--steps", type=at_least(1), default=STEPS, help="optimizer steps of the trained networks")
    add("--training_seed", type=at_least(0), default=0, help="of their trainings")
    add("--compile", action="store_true", help="--pipeline: with compiled networks, which are faster [as they are]")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where networks run; their noise is the same")
    add("--samplers", nargs="+", metavar="NAME", help="only these, as named in the table [all]")
    add("--grids", nargs="+", metavar="NAME", help="only these, as named in the table [all]")
    add("--dataset_name", default="digits", help="exact: 'digits' or a data set of the Hub")
    add("--train_data_dir", help="exact: a folder of images or of parquet files; --pipeline: what it is compared with")
    add("--resolution", type=at_least(1), help="side to which these images are resized [their own]")
    add(
        "--num_images",
        type=at_least(2),
        help="of these, or of CIFAR-10, at most [2000, of the digits and with --pipeline all]",
    )
    add("--cifar10", type=Path, help="cifar10: folder of its parquet files")
    add("--output", type=Path, default=Path("outputs/studies"), help="folder of the reports")
    args = parser.parse_args(arguments)
    args.calls.sort()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    check_options(parser, args)
    try:
        looks = repeat(None) if args.first_look is None else models_of(first_look(args))
        for (stem, model), look in zip(models_of(args), looks, strict=False):
            among = None
            if look is not None:
                kept = kept_cells(*look, first_look(args))
                measure(look[1], args.calls, 1, kept)
                among = contending(kept)
            benchmark(stem, model, args, kept_cells(stem, model, args), among).write(args.output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
