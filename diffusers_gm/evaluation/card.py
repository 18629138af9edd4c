"""What a model card says of the quality of the samples."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..files import write_text
from ..pipelines.repository import BEST, QUALITY, QUALITY_FILES
from .report import WITH_RATIO, best, curve_table, curves, ratios, statistic, table
from .results import Cell, Results
from .scoring import SLICED_WASSERSTEIN

OF_DEMO = (
    "Sliced 2-Wasserstein distance of {n} samples to the training images, divided by that of held-out images "
    "({floor:.4f}): 1.00 is\nas good as real images by this measure, which sees projections of pixels and no content. "
    "Columns are network calls; `-`\nmeans that the sampler has no stable step with so few."
)


def add_quality(folder: Path) -> None:
    """Put what was measured of the model in `folder` into its card there, in words and as metadata.

    That is what `diffusers_gm.evaluation` (`results.json`) and the demo of version 0.1.0 (`quality.json`) have left
    beside it. Everything else in the card stays as it is; nothing happens where there is no card or no measurement.
    """
    if not (folder / "README.md").is_file():
        return
    results = _results_of(folder)
    of_results = _evaluation_quality(folder, results) if results else None
    found = [measured for measured in (_demo_quality(folder), of_results) if measured]
    if not found:
        return
    card = ModelCard.load(folder / "README.md")
    card.text = _between(QUALITY, card.text, "\n\n".join(words.strip() for words, _ in found))
    if results:
        card.text = _between(BEST, card.text, best(results))
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [result for _, results in found for result in results]
    write_text(folder / "README.md", str(card))


def _between(marks: tuple[str, str], text: str, words: str) -> str:
    """A text with other words between two marks, if it has them."""
    first, last = marks
    if first not in text or last not in text:
        return text
    before, _, rest = text.partition(first)
    return "\n".join((before + first, words, last + rest.partition(last)[2]))


def _results_of(folder: Path) -> Results | None:
    """What `diffusers_gm.evaluation` has measured of the model in `folder`."""
    path = folder / "results.json"
    # Results of another model, that somebody has put here, are not this model's.
    if not path.is_file() or (results := Results.read(path)).conditions["model"] != folder.resolve().name:
        return None
    return results


def forget_quality(folder: Path) -> None:
    """Remove measurements of a model that is about to be replaced."""
    for name in QUALITY_FILES:
        (folder / name).unlink(missing_ok=True)


def _demo_quality(folder: Path) -> tuple[str, list[EvalResult]] | None:
    """Of the demo of version 0.1.0: sliced W2, and a floor that is not called one."""
    path = folder / "quality.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    # The file may hold a second model, for comparison: the first is the one in the folder.
    results = Results(folder / "results of the demo", {})
    results.floor = [{SLICED_WASSERSTEIN: found["floor"]}]
    results.cells = [
        Cell(
            old["sampler"],
            old["calls"],
            0,
            {} if old["ratio"] is None else {SLICED_WASSERSTEIN: old["ratio"] * found["floor"]},
        )
        for old in next(cells for cells in found.values() if isinstance(cells, list))
    ]
    over_floor = ratios(results)
    return curve_table(OF_DEMO.format(**found), "sampler", over_floor).markdown(), [
        _eval_result(
            ("digits", "handwritten digits of scikit-learn"),
            "sliced-wasserstein-ratio",
            f"sliced W2 over the floor of held-out images, {sampler}, {calls} network calls",
            round(ratio.mean, 3),
        )
        for sampler, curve in over_floor.items()
        for calls, ratio in curve.items()
        if ratio
    ]


def _evaluation_quality(folder: Path, results: Results) -> tuple[str, list[EvalResult]]:
    conditions, data = results.conditions, results.conditions["data"]
    entries = []
    for metric in WITH_RATIO:
        floor = statistic(results.floor, metric)
        for scheduler, curve in curves(results, metric).items() if floor else ():
            for calls, value in curve.items():
                if floor and value:
                    name = f"{metric}, {scheduler}, {calls} network calls, n = {conditions['num_samples']}"
                    kind = metric.lower().replace(" ", "-")
                    name = f"{name} (real images: {floor.mean:.4g})"
                    entries.append(_eval_result((data, data), kind, name, round(value.mean, 4)))
    picture = "\n![quality against network calls](results.png)\n" if (folder / "results.png").is_file() else ""
    return table(results).markdown() + "\n" + picture, entries


def _eval_result(dataset: tuple[str, str], metric_type: str, metric_name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        metric_type=metric_type,
        metric_name=metric_name,
        metric_value=value,
    )
