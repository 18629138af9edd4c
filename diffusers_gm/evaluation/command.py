r"""Measure a pipeline, or images that someone else made, against real data.

    python -m diffusers_gm.evaluation outputs/demo --dataset_name digits --calls 10 20 50 --seeds 0 1 \
        --scheduler GMLangevinScheduler --scheduler GMLangevinScheduler algorithm_type=ode

    python -m diffusers_gm.evaluation --samples my/images --train_data_dir path/to/real/images

Writes results.json, results.md and results.png to --output_dir, and into the card of the model if that is its folder.
An interrupted run goes on where it was. Several processes share the work: `accelerate launch --num_processes 2 -m
diffusers_gm.evaluation ...` (on CPUs: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`).
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import diffusers
from torch import Tensor

from ..extra import check_extra
from ..files import write_text
from ..launch import check_processes, from_main, process_state
from ..pipelines.measurements import scheduler_of
from ..version import __version__
from . import report
from .card import add_quality
from .distances import num_not_finite
from .features import EXTRACTORS, cached_features_of, features_of, fingerprint
from .options import build_parser, check_options
from .results import Results
from .scoring import OF_FEATURES, Reference, check_metrics, score
from .sources import real_images
from .subject import Subject, name_of
from .table import this_command

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> Results:
    """Measure what is not measured yet."""
    check_options(args)
    if args.samples is None:
        check_extra("evaluation", "matplotlib")  # draws the results at the end
    state = process_state()
    check_processes(state)
    return measure(Subject.open(args, state.device), args)


def measure(subject: Subject, args: argparse.Namespace) -> Results:
    """Measure what is not measured yet of a subject, under the options of the command."""
    real, floor, n = real_images(args, subject.shape, subject.num_samples, subject.classes)
    extractor = EXTRACTORS[args.features]() if set(args.metrics) & set(OF_FEATURES) else None
    check_metrics(args.metrics, n, len(real), extractor)

    conditions = {
        "model": subject.name,
        "content": subject.content,
        "shape": list(subject.shape),
        "num_samples": n,
        "data": name_of(args.dataset_name or args.train_data_dir),
        "num_reference": len(real),
        "reference": fingerprint(real),
        "floor": fingerprint(floor[:n]),
        "metrics": sorted(args.metrics),
        "features": f"{extractor.name}: {extractor.version}" if extractor else None,
        "versions": f"diffusers_gm {__version__}, diffusers {diffusers.__version__}",
    }
    if args.model is not None and (scheduler := scheduler_of(Path(args.model))) is not None:
        conditions["scheduler"] = scheduler
    if subject.configs is not None:
        conditions["configs"] = subject.configs
    if subject.classes is not None:
        conditions["classes"] = sorted(map(str, subject.classes))
    results: Results = from_main(lambda: Results.open(args.output_dir / "results.json", conditions, this_command()))
    missing = [key for key in subject.cells(args.calls, args.seeds) if results.find(*key) is None]
    draws = floor.split(n)[len(results.floor) :]
    if not draws and not missing:
        logger.warning(f"everything is in {results.path} already")
        return results

    # Every process takes part in samples and features; the main one scores and writes.
    if extractor:
        extractor.network.to(process_state().device)
    reference = Reference(real, extractor, args.features_cache)

    def scores_of(images: Tensor, features: Tensor | None = None) -> dict[str, float]:
        if extractor and features is None and not num_not_finite(images):
            features = features_of(images, extractor)
        return from_main(lambda: score(images, reference, args.metrics, features))

    for draw in draws:
        features = cached_features_of(draw, extractor, args.features_cache) if extractor else None
        results.floor.append(scores_of(draw, features))
        results.save()
    for key in missing:
        results.measure(*key, partial(subject.images, *key, n, args.batch_size), scores_of)
    return results


def write_report(results: Results, model: str | None, output_dir: Path) -> list[Path]:
    """Table and picture beside the results, and both in the card of the model where `output_dir` is its folder; of all
    that the file has by now, of runs that went on beside this one too."""
    with results.lock():
        results = Results.read(results.path)
        write_text(output_dir / "results.md", report.table(results).markdown() + "\n")
        written = ["results.json", "results.md"]
        if any(cell.calls is not None for cell in results.cells):
            report.plot(results, output_dir / "results.png")
            written.append("results.png")
        if model is not None and Path(model).resolve() == output_dir.resolve() and (output_dir / "README.md").is_file():
            add_quality(output_dir)
            written.append("README.md")
    return [output_dir / name for name in written]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser(__doc__ or "")
    args = parser.parse_args(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        results = run(args)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
    state = process_state()
    # All leave together: a process that goes first takes the store of the others with it, and they abort.
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    print("\n" + report.table(results).markdown() + "\n")
    print("wrote", *write_report(results, args.model, args.output_dir))
