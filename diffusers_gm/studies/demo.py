"""Look at a model trained on the digits: pictures, and its quality under every sampler.

    python -m diffusers_gm.studies.demo outputs/demo [--compare outputs/demo-k1]

`make demo` runs it on the digits model that it has trained. Writes into the model's folder `digits.png` (samples beside
real digits, a row a class), `forward_noise.png` (what the noise of the method does), `trajectories.png` (the way of one
image under every sampler) and what `diffusers_gm.evaluation` writes: `results.json`, `results.md`, `results.png` and
its section of the card. With --compare, `comparison.md` and `comparison.png` hold both models. What is measured already
is not measured again.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..app.models import CALIBRATED, Model, Sampler
from ..app.runs import Run, Settings, advance
from ..cli import Parser, at_least
from ..data import split_digit_labels, split_digits
from ..evaluation import report
from ..evaluation.command import measure, write_report
from ..evaluation.options import build_parser as evaluation_parser
from ..evaluation.results import Results
from ..evaluation.sampling import load_pipeline
from ..evaluation.subject import Subject
from ..files import write_text
from ..hub.cards import FEW_CALLS
from ..processes.mixture import GaussianMixtureNoise
from ..schedulers import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMLangevinScheduler
from .pictures import plot_forward_cld, plot_forward_noise, plot_samples, plot_trajectories

CALLS = (10, 20, 50, 100)
FEW = 10  # calls that a picture has room for
GRID = 10


def sampler(algorithm_type: str, **changes: Any) -> dict[str, Any]:
    """What to change in the config of a network, whose step size may be one for another sampler."""
    return {"algorithm_type": algorithm_type, "step_size": None, "denoise": True, **changes}


# The samplers of each scheduler for its own networks, by name: what to change in the config of the network.
SAMPLERS: dict[Any, dict[str, dict[str, Any]]] = {
    GMLangevinScheduler: {
        "langevin": sampler("langevin", network_level="chain"),
        "langevin, ladder": sampler("langevin", network_level="ladder"),
        **{name: sampler(name) for name in ("jump", "exponential", "ancestral", "ode")},
    },
    AnnealedLangevinScheduler: {
        "langevin": sampler("langevin", num_langevin_steps=1, network_level="chain"),
        "langevin, ladder": sampler("langevin", num_langevin_steps=1, network_level="ladder"),
        "langevin, T = 3": sampler("langevin", num_langevin_steps=3),
        "consistent": sampler("consistent"),
    },
    CLDSSCSScheduler: {
        "sscs": {"algorithm_type": "sscs", "splitting_order": 1},
        "sscs, order 2": {"algorithm_type": "sscs", "splitting_order": 2},
        "euler_maruyama": {"algorithm_type": "euler_maruyama"},
        "probability_flow": {"algorithm_type": "probability_flow"},
    },
}


# Whose samplers are measured on a network whose own scheduler is calibrated.
OF_PIPELINES = {
    "GMSGMPipeline": GMLangevinScheduler,
    "NCSNv2Pipeline": AnnealedLangevinScheduler,
    "CLDPipeline": CLDSSCSScheduler,
}


def samplers(pipeline: Any) -> dict[str, Any]:
    """Every sampler for the network of a pipeline (of a DDPM those of `AnnealedLangevinScheduler`), each with its
    default step size, and its own, if it is another."""
    scheduler, own = pipeline.scheduler, type(pipeline.scheduler)
    cls = own if own in SAMPLERS else OF_PIPELINES.get(type(pipeline).__name__, AnnealedLangevinScheduler)
    found = {name: cls.from_config(scheduler.config, **changes) for name, changes in SAMPLERS[cls].items()}
    return found if cls is own else found | {name_of(scheduler): scheduler}


def name_of(scheduler: Any) -> str:
    """What a scheduler is called that is the pipeline's own."""
    if isinstance(scheduler, CalibratedMultistepScheduler):
        return CALIBRATED
    return scheduler.config.get("algorithm_type") or type(scheduler).__name__


def evaluate(folder: Path, calls: Sequence[int], num_samples: int) -> Results:
    """Sliced W2 of one digits model under all its samplers; table, picture and card in its folder."""
    words = f"--dataset_name digits --metrics sw --num_samples {num_samples} --batch_size {num_samples}"
    options = evaluation_parser("").parse_args([str(folder), *words.split(), "--output_dir", str(folder)])
    options.calls = list(calls)
    subject = Subject.open(options, torch.device("cpu"))
    runs: dict[str, Any] = {name: (scheduler, {}) for name, scheduler in samplers(subject.pipeline).items()}
    results = measure(replace(subject, runs=runs), options)
    write_report(results, str(folder), folder)
    return results


def draw_pictures(folder: Path, seed: int) -> None:
    """Samples beside real digits, a row a class, the noise that the model was trained with, and the ways from there."""
    _, held_out = split_digits()
    pipeline = load_pipeline(str(folder), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    labels = pipeline.labels_in_turn(GRID * GRID)
    shown = held_out[: GRID * GRID]
    if labels:
        digits = split_digit_labels()[1]
        shown = torch.cat([held_out[digits == digit][:GRID] for digit in range(10)])
    found = samplers(pipeline)
    name = name_of(pipeline.scheduler)
    calls = FEW_CALLS if name == CALIBRATED else pipeline.default_num_inference_steps
    images = pipeline(GRID * GRID, calls, generator, output_type="pt", class_labels=labels).images * 2 - 1
    title = f"{type(pipeline).__name__}, {name}, {calls} network calls"
    plot_samples(images, shown, title, folder / "digits.png", GRID, pipeline.class_names or ())
    of_method = next(iter(found.values()))
    if isinstance(of_method, CLDSSCSScheduler):
        plot_forward_cld(held_out[0], of_method.process, folder / "forward_noise.png")
    else:
        mixture = getattr(of_method, "mixture", GaussianMixtureNoise([1.0], [1.0]))
        plot_forward_noise(held_out[0], mixture, 0.5, folder / "forward_noise.png")
    model, runs = Model.of(str(folder), pipeline), []
    for name, scheduler in found.items():
        *_, run = advance(model, Run(Sampler(name, scheduler), FEW), Settings(seed, 1))
        runs.append(run)
    plot_trajectories(runs, folder / "trajectories.png")


def together(models: dict[str, Results]) -> Results:
    """The results of several models, measured alike, as those of one."""
    first = next(iter(models.values()))
    cells = [
        replace(cell, scheduler=f"{name}: {cell.scheduler}")
        for name, results in models.items()
        for cell in results.cells
    ]
    conditions = first.conditions | {"model": " and ".join(models)}
    return replace(first, path=first.path.with_name("comparison"), conditions=conditions, cells=cells)


def main(arguments: Sequence[str] | None = None) -> None:
    held_out = len(split_digits()[1])
    parser = Parser(f"{__package__}.demo", (__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path, help="a model trained by train_gm_sgm.py --dataset_name digits")
    add(
        "--compare",
        type=Path,
        help="a second model, for a table of both: the same trained on Gaussian noise, as `make compare` does",
    )
    add("--calls", type=at_least(2), nargs="+", default=list(CALLS), help="numbers of network calls")
    add("--num_samples", type=int, default=256, help=f"images per cell of the table, at most {held_out}")
    add("--seed", type=int, default=0, help="decides the samples of the grid")
    args = parser.parse_args(arguments)
    folders = [folder for folder in (args.folder, args.compare) if folder]
    for folder in folders:
        if not (folder / "model_index.json").is_file():
            parser.error(f"{folder} holds no trained pipeline: run make demo, or train_gm_sgm.py --dataset_name digits")
    names = {folder.resolve().name: folder for folder in folders}
    if len(names) < len(folders):
        parser.error(f"--compare {args.compare} needs another name than {args.folder}: the table tells them by it")
    if not 2 <= args.num_samples <= held_out:
        parser.error(f"--num_samples must be in [2, {held_out}], the number of held-out digits, got {args.num_samples}")
    logging.getLogger("diffusers").setLevel(logging.ERROR)

    draw_pictures(args.folder, args.seed)
    try:
        models = {name: evaluate(folder, args.calls, args.num_samples) for name, folder in names.items()}
    except ValueError as error:
        parser.error(str(error))
    results = next(iter(models.values()))
    stem = "results"
    if args.compare:
        results, stem = together(models), "comparison"
        report.plot(results, args.folder / "comparison.png")
    caption = f"Sliced W2 to the training digits over that of held-out digits, n = {args.num_samples}."
    text = report.curve_table(caption, "sampler", report.ratios(results)).markdown()
    if args.compare:
        write_text(args.folder / "comparison.md", text + "\n")
    print(f"\n{text}\n\nLook at:")
    for name in ("digits.png", "forward_noise.png", "trajectories.png", f"{stem}.png", f"{stem}.md", "README.md"):
        print(f"  {args.folder / name}")


if __name__ == "__main__":
    main()
