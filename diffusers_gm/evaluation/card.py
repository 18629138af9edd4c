"""What a model card says of the quality of the samples."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files import write_text
from ..pipelines.measurements import TASK, between, not_measured, results_of_others, scheduler_of
from ..pipelines.repository import BEST, QUALITY
from .report import WITH_RATIO, best, curve_table, curves, statistic, table
from .results import Results, Statistic

OF_DEMO = (
    "Sliced 2-Wasserstein distance of {n} samples to the training images, divided by that of held-out images "
    "({floor:.4f}): 1.00 is\nas good as real images by this measure, which sees projections of pixels and no content. "
    "Columns are network calls; `-`\nmeans that the sampler has no stable step with so few."
)


def add_quality(folder: Path) -> None:
    """Put what was measured of the model in `folder` into its card there, in words and as metadata.

    That is what `diffusers_gm.evaluation` (`results.json`) and the demo of version 0.1.0 (`quality.json`) have left
    beside it, with the scheduler that is there. Everything else in the card stays as it is; nothing happens where there
    is no card or no measurement.
    """
    path, of_demo, measured = (folder / name for name in ("README.md", "quality.json", "results.json"))
    if not path.is_file():
        return
    card, found = ModelCard.load(path), []
    if of_demo.is_file():
        found.append(_demo_quality(json.loads(of_demo.read_text(encoding="utf-8"))))
    # Results of another model, that somebody has put here, are not this model's.
    if measured.is_file() and (results := Results.read(measured)).conditions["model"] == folder.resolve().name:
        if results.conditions.get("scheduler") not in (None, scheduler_of(folder)):  # calibrated since, for one
            write_text(path, str(not_measured(card)))
            return
        found.append(_evaluation_quality(results))
        card.text = between(BEST, card.text, best(results))
    if not found:
        return
    card.text = between(QUALITY, card.text, "\n\n".join(words for words, _ in found))
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [*results_of_others(card), *(result for _, results in found for result in results)]
    write_text(path, str(card))


def _demo_quality(found: dict[str, Any]) -> tuple[str, list[EvalResult]]:
    """Of the demo of version 0.1.0: sliced W2, and a floor that is not called one."""
    # There may be a second model, for comparison: the first is the one in the folder.
    cells = next(cells for cells in found.values() if isinstance(cells, list))
    curves: dict[str, dict[int, Statistic | None]] = {}
    for cell in cells:
        ratio = cell["ratio"]
        curves.setdefault(cell["sampler"], {})[cell["calls"]] = None if ratio is None else Statistic.of([ratio])
    return curve_table(OF_DEMO.format(**found), "sampler", curves).markdown(), [
        _eval_result(
            ("digits", "handwritten digits of scikit-learn"),
            "sliced-wasserstein-ratio",
            f"sliced W2 over the floor of held-out images, {cell['sampler']}, {cell['calls']} network calls",
            round(cell["ratio"], 3),
        )
        for cell in cells
        if cell["ratio"] is not None
    ]


def _evaluation_quality(results: Results) -> tuple[str, list[EvalResult]]:
    conditions, data = results.conditions, results.conditions["data"]
    of = f", of the classes {', '.join(conditions['classes'])} alone" if "classes" in conditions else ""
    entries = [
        _eval_result(
            (data, data),
            metric.lower().replace(" ", "-"),
            f"{metric}, {scheduler}, {calls} network calls{of}, n = {conditions['num_samples']} "
            f"(real images: {floor.mean:.4g})",
            round(value.mean, 4),
        )
        for metric in WITH_RATIO
        if (floor := statistic(results.floor, metric))
        for scheduler, curve in curves(results, metric).items()
        for calls, value in curve.items()
        if value
    ]
    is_drawn = results.path.with_suffix(".png").is_file()
    picture = "\n\n![quality against network calls](results.png)" if is_drawn else ""
    return table(results).markdown() + picture, entries


def _eval_result(dataset: tuple[str, str], metric_type: str, metric_name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        metric_type=metric_type,
        metric_name=metric_name,
        metric_value=value,
    )
