"""Measure a pipeline, or images that someone else made, against real data.

    python -m diffusers_gm.evaluation outputs/demo --dataset_name digits --calls 10 20 50 --seeds 0 1 \
        --scheduler GMLangevinScheduler --scheduler GMLangevinScheduler algorithm_type=ode

    python -m diffusers_gm.evaluation --samples my/images --train_data_dir path/to/real/images

Writes results.json, results.md and results.png to --output_dir, and into the card of the model if that is its folder.
An interrupted run goes on where it was. Several processes share the work: `accelerate launch -m diffusers_gm.evaluation
...` (on CPUs: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m ...`).
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
from torch import Tensor

from .. import cards
from ..studies.report import command_line
from ..training.network import check_processes
from ..version import __version__
from . import report
from .distances import num_not_finite
from .features import EXTRACTORS, cached_features_of, features_of, fingerprint
from .options import build_parser, check_options
from .processes import from_main, process_state
from .results import Cell, Results
from .sampling import NoGridError
from .scoring import OF_FEATURES, Reference, check_metrics, score
from .sources import real_images
from .subject import Subject, name_of

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> Results:
    """Measure what is not measured yet."""
    check_options(args)
    state = process_state()
    check_processes(state)
    subject = Subject.open(args, state.device)
    real, floor, n = real_images(args, subject.shape, subject.num_samples)
    extractor = EXTRACTORS[args.features]() if set(args.metrics) & set(OF_FEATURES) else None
    check_metrics(args.metrics, n, len(real), extractor)

    conditions = {
        "model": subject.name,
        "content": subject.content,
        "shape": list(subject.shape),
        "num_samples": n,
        "data": args.dataset_name or name_of(args.train_data_dir),
        "num_reference": len(real),
        "reference": fingerprint(real),
        "floor": fingerprint(floor[:n]),
        "metrics": sorted(args.metrics),
        "features": f"{extractor.name}: {extractor.version}" if extractor else None,
        "versions": f"diffusers_gm {__version__}, diffusers {diffusers.__version__}",
    }
    results: Results = from_main(lambda: Results(args.output_dir / "results.json", conditions, command_line()))
    missing = [key for key in subject.cells(args.calls, args.seeds) if results.find(*key) is None]
    draws = floor.split(n)[len(results.floor) :]
    if not draws and not missing:
        logger.warning(f"everything is in {results.path} already")
        return results

    # Every process takes part in samples and features; the main one scores and writes.
    if extractor:
        extractor.network.to(state.device)
    reference = Reference(real, extractor, args.features_cache)

    def scores_of(images: Tensor, features: Tensor | None = None) -> dict[str, float]:
        if extractor and features is None and not num_not_finite(images):
            features = features_of(images, extractor)
        return from_main(lambda: score(images, reference, args.metrics, features))

    for draw in draws:
        features = cached_features_of(draw, extractor, args.features_cache) if extractor else None
        results.floor.append(scores_of(draw, features))
        from_main(results.save)
    for key in missing:
        start = time.perf_counter()
        try:
            images, network_calls = subject.images(*key, n, args.batch_size)
            sampled = time.perf_counter()
            scores = scores_of(images)
            cell = Cell(*key, scores, network_calls, sampled - start, time.perf_counter() - sampled)
        except NoGridError as error:
            cell = Cell(*key, reason=str(error))
        results.cells.append(cell)
        from_main(results.save)
        if state.is_main_process:
            print(line(cell), flush=True)
    return results


def subject_is_in(folder: Path, model: str | None) -> bool:
    """Whether the model is the one in `folder`, and has a card there."""
    return model is not None and Path(model).resolve() == folder.resolve() and (folder / "README.md").is_file()


def line(cell: Cell) -> str:
    """A finished cell in one line."""
    where = cell.scheduler if cell.calls is None else f"{cell.scheduler}, {cell.calls} calls, seed {cell.seed}"
    values = ", ".join(f"{name} {value:.4g}" for name, value in cell.scores.items())
    return (
        f"{where}: {cell.reason or values} "
        f"(sampled in {cell.sampling_seconds:.1f} s, scored in {cell.scoring_seconds:.1f} s)"
    )


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
    table = report.markdown(results)
    (args.output_dir / "results.md").write_text(table, encoding="utf-8")
    print("\n" + table)
    written = ["results.json", "results.md"]
    if any(cell.calls is not None for cell in results.cells):
        report.plot(results, args.output_dir / "results.png")
        written.append("results.png")
    if subject_is_in(args.output_dir, args.model):
        cards.add_quality(args.output_dir)
        written.append("README.md, the model's card")
    print("wrote", *(args.output_dir / name for name in written))
