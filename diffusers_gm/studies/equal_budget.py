"""The comparison that decides: our methods beside diffusers' DDPM on one network, one optimizer and equal steps.

    python -m diffusers_gm.studies.equal_budget --steps 1200 --seeds 2
    python -m diffusers_gm.studies.equal_budget --train_data_dir fashion/train --test_data_dir fashion/test

Every method is trained by `train_gm_sgm.py` with the same shape of network, batch, optimizer, average and steps, or
steps of equal CPU seconds (`--cpu_seconds`), in slices of `--max_train_minutes`; the CPU seconds are told beside. Every
network is sampled by as many samplers; the best of them is chosen on the first set of samples and judged on the others.
Distances are to images that no training saw, beside that of as many training images to them. What is finished is not
done again. The first of `--kinds` is what the others are compared with.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..calibration import calibrate
from ..cli import at_least
from ..data import examine, open_folder, split_digits
from ..evaluation.features import lite0
from ..evaluation.results import Results, Statistic
from ..evaluation.sampling import load_pipeline, num_steps_for, sample, scheduler_by_name
from ..evaluation.scoring import Reference, score
from ..evaluation.sources import MAX_ELEMENTS
from ..evaluation.table import Table
from ..files import write_json
from .command import need_held_out, parse, study_parser
from .digits import parts_of
from .report import Report, by_calls, table_of
from .throughput import CLOCKED, TRAINING_SCRIPT, Command, cpu_seconds, measure

# A way to train, and what it adds to the options that all share.
KINDS: dict[str, list[str]] = {
    "ddpm": ["--method", "ddpm"],
    "ncsnv2": ["--method", "ncsnv2"],
    "gm-sgm": ["--method", "gm-sgm"],
    "cld": ["--method", "cld"],
    "cld-paper": ["--method", "cld", "--config", "cld-paper"],
}
# The same with another parametrisation, other noise levels or weights than the default; asked for by name. The noisier
# see more noise, but none above 30, and have unit weights and the deviation of the data, unless they say more.
NOISIER, UNIT = "--p_mean -0.8 --sigma_max 29.9641", "--no_uncertainty_weighting"
VARIANTS: dict[str, list[str]] = {
    name: f"--method {name.split()[0]} {words}".split()
    for name, words in {
        "ncsnv2 unit weights": UNIT,
        "ncsnv2 noisier": f"{NOISIER} {UNIT} --sigma_data auto",
        "ncsnv2 noisier learned weights": f"{NOISIER} --sigma_data auto",
        "ncsnv2 noisier sigma_data 0.7": f"{NOISIER} {UNIT} --sigma_data 0.7",
        "ncsnv2 noisier sigma_data 1": f"{NOISIER} {UNIT} --sigma_data 1",
        "ncsnv2 noisier sigma_data 1 learned weights": f"{NOISIER} --sigma_data 1",
        "ncsnv2 noisier v_prediction": f"{NOISIER} --prediction_type v_prediction --timestep_sampling log_normal",
        "ncsnv2 noisier min-SNR": f"{NOISIER} --sigma_data auto --snr_gamma 5",
        "ncsnv2 log_uniform": f"{UNIT} --sigma_data auto --timestep_sampling log_uniform --sigma_max 30",
        "ncsnv2 epsilon": "--prediction_type epsilon",
        "gm-sgm noisier": f"{NOISIER} {UNIT} --sigma_data auto",
        "cld companion": "--cld_feed_companion",
    }.items()
}
# Of the conditions of a report.
SAME_NETWORK = (
    " cld trains the very network of ncsnv2, as it is not fed the companion noise unless told: where they share a "
    "sampler, their samples are the same."
)
NEAREST = (
    "Nearest training image: median distance of samples to the nearest training image, over that of unseen test "
    "images, so about 1 for real ones. Well below, samples are copies of training images, and then their FD is near "
    "the floor, or they are smoother than images, which brings them near to many, and then it is far above."
)
# A multiple of the floor from which on nothing is well trained.
UNTRAINED = 5
# Steps by which a kind is timed for `--cpu_seconds`.
TIMED_STEPS = 40
CALIBRATED = "calibrated"
MULTISTEP = [["CalibratedMultistepScheduler", f"stochasticity={tau}"] for tau in (0, 0.4, 1)]
# As many of each method: those of its paper, and the best known.
OWN: dict[str, list[list[str]]] = {
    "ddpm": [
        ["DDPMScheduler"],
        ["UniPCMultistepScheduler"],
        ["DPMSolverMultistepScheduler", "algorithm_type=sde-dpmsolver++", "use_karras_sigmas=true"],
    ],
    "ncsnv2": [
        ["AnnealedLangevinScheduler", "algorithm_type=consistent"],
        ["AnnealedLangevinScheduler", "network_level=chain"],
        ["CLDSSCSScheduler"],
    ],
    "gm-sgm": [["GMLangevinScheduler", f"algorithm_type={name}"] for name in ("ancestral", "ode", "exponential")],
    "cld": [["CLDSSCSScheduler", f"splitting_order={order}"] for order in (1, 2)]
    + [["CLDSSCSScheduler", "algorithm_type=probability_flow"]],
}


# --- Training ---


def command(kind: str, seed: int, options: Command, folder: Path, start: Command = ()) -> Command:
    """What trains a kind."""
    words = [sys.executable, *start, TRAINING_SCRIPT, *(KINDS | VARIANTS)[kind], "--seed", seed, *options]
    return [*words, "--validation_steps", 0, "--output_dir", folder.resolve()]


def lengths(args: argparse.Namespace, shared: Command, data: str) -> dict[str, int]:
    """Optimizer steps of each kind: as many as asked for, or as take the CPU seconds by a timing that is kept."""
    if args.cpu_seconds is None:
        return dict.fromkeys(args.kinds, args.steps)
    kept = parts_of(args.output) / f"equal-budget {data} {args.cpu_seconds} CPU seconds.json"
    steps = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    short = [*shared, "--max_train_steps", TIMED_STEPS, "--checkpointing_steps", 0]
    short += ["--validation_inference_steps", 4, "--num_validation_images", 1]

    def of(kind: str) -> Callable[[Path], Command]:
        return lambda clocks: command(kind, 0, short, clocks / "out", [*CLOCKED, clocks])

    with tempfile.TemporaryDirectory() as name:
        untimed = {kind: of(kind) for kind in args.kinds if kind not in steps}
        for kind, loop in measure(untimed, 1, Path(name)).items():
            steps[kind] = max(round(1000 * args.cpu_seconds / loop.step[0]), 1)
    write_json(kept, steps)
    return {kind: steps[kind] for kind in args.kinds}


def trained(kind: str, seed: int, options: Command, output: Path, data: str) -> tuple[Path, float]:
    """The folder of the pipeline of a kind, and the CPU seconds that its training took.

    Raises:
        RuntimeError: if the training fails.
    """
    folder = parts_of(output) / f"equal-budget {data} {kind} {seed}"
    kept = folder.with_name(f"{folder.name}.json")
    spent = json.loads(kept.read_text(encoding="utf-8"))["cpu_seconds"] if kept.is_file() else 0.0
    options = [*options, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest"]
    while not (folder / "model_index.json").is_file():
        spent += sum(cpu_seconds([command(kind, seed, options, folder)], Path.cwd()))
        write_json(kept, {"cpu_seconds": spent})
        print(f"{folder.name}: {spent:.0f} CPU seconds", flush=True)
    return folder, spent


# --- Samples ---


def samplers_of(kind: str, which: str = "all") -> list[list[str]]:
    if which == "multistep":
        return MULTISTEP
    return [[CALIBRATED], *MULTISTEP, *OWN["cld" if kind == "cld-paper" else kind.split(maxsplit=1)[0]]]


def draw(folder: Path, words: Sequence[str], calls: Sequence[int], n: int, num: int, seed: int) -> tuple[Tensor, int]:
    """Samples `(num, C, H, W)` at `n` of the `calls`, and the network calls that they took."""
    pipeline, scheduler = _sampler(folder, tuple(words), tuple(calls))
    return sample(pipeline, scheduler, num_steps_for(scheduler, n), num, 1000 + seed, 250)


@cache
def _sampler(folder: Path, words: tuple[str, ...], calls: tuple[int, ...]) -> tuple[Any, Any]:
    pipeline = load_pipeline(str(folder), torch.device("cpu"))
    if words == (CALIBRATED,):
        with torch.random.fork_rng():
            return pipeline, calibrate(pipeline, calls=calls, effort="fast", progress=False)
    return pipeline, scheduler_by_name(pipeline.scheduler, words)[1]


def images_for(args: argparse.Namespace, side: int, channels: int) -> tuple[Tensor, Tensor]:
    """Training images and images that no training saw, `(n, C, H, W)` in [-1, 1]."""
    if args.train_data_dir is None:
        return split_digits()
    training, test = (
        examine(open_folder(folder), 0, side, channels, args.num_reference, MAX_ELEMENTS).images
        for folder in (args.train_data_dir, args.test_data_dir)
    )
    return training, test


def nearest(images: Tensor, training: Tensor) -> float:
    """Median distance of an image to the nearest training image."""
    return float(torch.cdist(images.flatten(1), training.flatten(1)).amin(1).median())


def scores(samples: Tensor, reference: Reference, training: Tensor) -> dict[str, float]:
    """Those of `evaluation.score`, and how near the samples are to training images, over test images."""
    found = score(samples, reference)
    if not found["num_nan"]:
        own = nearest(samples.clamp(-1, 1), training)
        found["nearest training image"] = own / nearest(reference.images[: len(samples)], training)
    return found


# --- The study ---


def equal_budget(args: argparse.Namespace) -> Report:
    data = args.name or ("digits" if args.train_data_dir is None else args.train_data_dir.resolve().parent.name)
    shared = [*args.training, "--max_train_minutes", str(args.max_train_minutes)]
    if args.train_data_dir is not None:
        shared += ["--train_data_dir", str(args.train_data_dir.resolve())]
    steps = lengths(args, shared, data)
    folders, seconds = {}, {}
    for seed, kind in itertools.product(range(args.seeds), args.kinds):
        options = [*shared, "--max_train_steps", steps[kind]]
        folders[kind, seed], seconds[kind, seed] = trained(kind, seed, options, args.output, data)

    config = load_pipeline(str(folders[args.kinds[0], 0]), torch.device("cpu")).unet.config
    training, test = images_for(args, config["sample_size"], config["out_channels"])
    num, reference = args.num_samples, Reference(test, lite0())
    length = ["--cpu_seconds", args.cpu_seconds] if args.cpu_seconds else ["--max_train_steps", args.steps]
    training_of = [*args.training, *map(str, length), *shared[len(args.training) :]]
    conditions = {"study": "equal_budget", "data": data, "num_samples": num, "training": training_of}
    results = Results.open(parts_of(args.output) / f"equal-budget {data} n={num}.json", conditions)
    if not results.floor:
        results.floor = [scores(training[-num:], reference, training[:-num])]
    score_of = partial(scores, reference=reference, training=training)

    def cell(kind: str, words: list[str], n: int, drawn: int) -> None:
        for seed in range(args.seeds):
            samples = partial(draw, folders[kind, seed], words, args.calls, n, num, drawn)
            results.measure(f"{kind} {seed}: {' '.join(words)}", n, drawn, samples, score_of)

    for kind, n in itertools.product(args.kinds, args.calls):
        for words in samplers_of(kind, args.samplers):
            cell(kind, words, n, 0)
        for drawn in range(1, args.draws):
            cell(kind, best_sampler(results, args, kind, n), n, drawn)
    return report(args, data, results, seconds, steps)


def values(results: Results, kind: str, words: str, n: int, seeds: int, draws: range, metric: str) -> list[float]:
    cells = [results.find(f"{kind} {seed}: {words}", n, drawn) for seed in range(seeds) for drawn in draws]
    return [cell.scores.get(metric, math.inf) for cell in cells if cell is not None]


def best_sampler(results: Results, args: argparse.Namespace, kind: str, n: int) -> list[str]:
    """That of the smallest Frechet distance on the first draw, in the mean of the trainings."""

    def distance(words: list[str]) -> float:
        return mean(values(results, kind, " ".join(words), n, args.seeds, range(1), lite0().frechet_name))

    return min(samplers_of(kind, args.samplers), key=distance)


def report(
    args: argparse.Namespace,
    data: str,
    results: Results,
    seconds: dict[tuple[str, int], float],
    steps: dict[str, int],
) -> Report:
    """The best sampler of each kind is chosen by FD on the first draw; tables show the others."""
    judged = range(1, args.draws) if args.draws > 1 else range(1)
    metric = lite0().frechet_name
    floor = {name: value for name, value in results.floor[0].items() if name != "num_nan"}
    first, *others = args.kinds
    rows: list[list[Any]] = []
    means: dict[tuple[str, int], Tensor] = {}
    found: list[dict[str, float]] = []
    for kind, n in itertools.product(args.kinds, args.calls):
        best = " ".join(best_sampler(results, args, kind, n))
        of = partial(values, results, kind, best, n, args.seeds, judged)
        shown = {name: Statistic.of(of(metric=name)) for name in floor}
        rows.append([kind, n, best, *(format(s, ".3g") for s in shown.values())])
        found.append({name: s.mean for name, s in shown.items()})
        means[kind, n] = torch.tensor(of(metric=metric)).view(args.seeds, -1).mean(1)  # one a training
    every = [
        [kind, " ".join(words), *(format(Statistic.of(of_calls), ".3g") for of_calls in firsts)]
        for kind in args.kinds
        for words in samplers_of(kind, args.samplers)
        if (firsts := [values(results, kind, " ".join(words), n, args.seeds, range(1), metric) for n in args.calls])
    ]
    rows.append(["training images", "", "the floor", *(f"{value:.3g}" for value in floor.values())])
    seeds = range(args.seeds)
    cost = [[kind, steps[kind], *(f"{seconds[kind, seed]:.0f}" for seed in seeds)] for kind in args.kinds]
    ratios = {k: [float(means[k, n].mean() / means[first, n].mean()) for n in args.calls] for k in others}

    def by_training(kind: str, n: int) -> str:
        return ", ".join(f"{ratio:.2f}" for ratio in (means[kind, n] / means[first, n]).tolist())

    over = {
        k: [f"{ratio:.2f} ({by_training(k, n)})" for n, ratio in zip(args.calls, ratios[k], strict=True)]
        for k in others
    }
    baseline = "diffusers' DDPM" if first == "ddpm" else first
    length = f"{args.cpu_seconds} CPU seconds" if args.cpu_seconds else f"{args.steps} steps"
    verdict = far_from_trained(found, floor, metric) + comparison(ratios, metric, baseline)
    return Report(
        f"equal-budget-{data}",
        f"Equal budget: {'our methods' if first == 'ddpm' else 'ways of training'} beside {baseline}, {data}",
        f"One network, one optimizer, {length}: which way of training gives the best samples, by its best sampler?",
        verdict[0].upper() + verdict[1:],
        [
            table_of(f"{metric} (a squared distance) over that of {baseline} (by training).", over, args.calls),
            Table(
                "Distances to test images, mean and spread over trainings and draws.",
                ["trained as", "calls", "best sampler", *floor],
                rows,
            ),
            Table(
                f"{metric} of every sampler, on the draw by which the best one is chosen.",
                ["trained as", "sampler", *by_calls(args.calls)],
                every,
            ),
            Table("Steps and CPU seconds of the trainings, by seed.", ["", "steps", *map(str, seeds)], cost),
        ],
        conditions=(
            f"{data}; trainings of {length}, {' '.join(args.training) or 'default options'}, seeds of each kind: "
            f"{args.seeds}; {args.num_samples} samples; the sampler was chosen on draw 0 of {args.draws}."
            f"{SAME_NETWORK if {'ncsnv2', 'cld'} <= set(args.kinds) else ''} {NEAREST}"
        ),
    )


def comparison(ratios: Mapping[str, Sequence[float]], metric: str, baseline: str) -> str:
    """What the ratios of each kind, one a number of calls, come to."""
    found: dict[str, list[str]] = {}
    for kind, of_calls in ratios.items():
        lower = {ratio < 1 for ratio in of_calls}
        where = "lower at some numbers of calls only" if len(lower) > 1 else "lower" if lower.pop() else "not lower"
        span = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(of_calls), max(of_calls)))
        found.setdefault(where, []).append(f"{kind} ({' to '.join(span)} times)")
    words = "; ".join(f"{where} for {', '.join(kinds)}" for where, kinds in found.items())
    return f"each by its best sampler, {metric} beside that of {baseline} is {words or 'compared with no other'}."


def far_from_trained(found: Sequence[Mapping[str, float]], floor: Mapping[str, float], metric: str) -> str:
    """What is to be said first where even the best of the scores is far above the floor."""
    best = min(found, key=lambda scores: scores[metric])
    over = best[metric] / floor[metric]
    if over < UNTRAINED:
        return ""
    return (
        f"all are far from trained, the lowest {metric} {over:.1f} times the floor (recall {best['recall']:.2f} where "
        f"real images have {floor['recall']:.2f}), and more steps may change the order: "
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("equal_budget", __doc__, ["equal_budget"])
    add = parser.add_argument
    add("--kinds", nargs="+", choices=list(KINDS | VARIANTS), default=list(KINDS), help="what is trained")
    add("--calls", type=at_least(2), nargs="+", default=[10, 20, 50], help="network calls")
    add("--draws", type=at_least(1), default=3, help="sets of samples; the first chooses the sampler")
    add("--cpu_seconds", type=at_least(1), help="length of the steps of a training, in place of --steps")
    add("--samplers", choices=["all", "multistep"], default="all",
        help="multistep: one at three stochasticities, enough to compare trainings with each other")  # fmt: skip
    add("--train_data_dir", type=Path, help="training images, a folder [the digits]")
    add("--test_data_dir", type=Path, help="images that are kept from the training, a folder; needed beside the former")
    add("--name", help="of the data")
    add("--num_reference", type=at_least(2), default=10_000, help="images to compare with, at most")
    add("--max_train_minutes", type=float, default=9.0, help="length of a slice of a training")
    add("--training", nargs=argparse.REMAINDER, default=[], help="more options for train_gm_sgm.py; the last of all")
    args = parse(parser, arguments)
    if (args.train_data_dir is None) != (args.test_data_dir is None):
        parser.error("--train_data_dir and --test_data_dir go together")
    if args.train_data_dir is None:
        need_held_out(parser, args.num_samples)
    equal_budget(args).write(args.output)


if __name__ == "__main__":
    main()
