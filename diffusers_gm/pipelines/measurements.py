"""What was measured of a model: files beside it, and figures in its card, of that model and its scheduler alone."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard

from ..files import free_name, write_text
from .repository import BEST, QUALITY, QUALITY_FILES

logger = logging.getLogger(__name__)

# What belongs to one model and its scheduler.
MEASURED = (*QUALITY_FILES, "calibration.png")

# How the metadata of a card says what we have measured, see `evaluation.card`.
TASK, OF_CALLS = "unconditional-image-generation", re.compile(r", \d+ network calls")

# What a card says before.
NOT_MEASURED = "Not measured."


def between(marks: tuple[str, str], text: str, words: str) -> str:
    """A text with other words between two marks, if it has them."""
    first, last = marks
    if first not in text or last not in text:
        return text
    before, _, rest = text.partition(first)
    return "\n".join((before + first, words, last + rest.partition(last)[2]))


def forget_quality(folder: Path) -> None:
    """Remove measurements of a model, or of a scheduler, that is replaced, also from the card."""
    there = [folder / name for name in QUALITY_FILES if (folder / name).is_file()]
    for measured in there:
        measured.unlink()
    path = folder / "README.md"
    if there and path.is_file():
        write_text(path, str(not_measured(ModelCard.load(path))))


def set_aside_measurements(folder: Path, names: Sequence[str] = MEASURED) -> None:
    """Of a model, or of a scheduler, that is replaced: keep what was measured of it, which may have taken long, under
    names that end in `-before`; what comes next has none of it."""
    there, kept = [path for name in names if (path := folder / name).is_file()], []
    for path in there:
        kept.append(free_name(path.with_stem(f"{path.stem}-before")))
        shutil.copyfile(path, kept[-1])
    forget_quality(folder)
    for path in there:
        path.unlink(missing_ok=True)
    if kept:
        said = ", ".join(path.name for path in kept)
        logger.warning(
            f"measured before: now in {said}; `python -m diffusers_gm.evaluation` measures what is there now"
        )


def not_measured(card: Any) -> Any:
    """A `ModelCard` without any measurement of ours; what others have measured stays."""
    card.text = between(BEST, between(QUALITY, card.text, NOT_MEASURED), "")
    card.data.eval_results = results_of_others(card) or None
    return card


def results_of_others(card: Any) -> list[EvalResult]:
    """The results in the metadata of a `ModelCard` that we have not measured: all of ours name the network calls."""

    def is_ours(result: EvalResult) -> bool:
        return result.task_type == TASK and bool(OF_CALLS.search(result.metric_name or ""))

    return [result for result in card.data.eval_results or [] if not is_ours(result)]


def scheduler_of(folder: Path) -> str | None:
    """A hash of the options of the scheduler that a pipeline was saved with; None without one."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    told = {name: value for name, value in config.items() if name == "_class_name" or not name.startswith("_")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def hash_of_card(text: str) -> str:
    """Of what a card says but for measurements, which come and go."""
    card = not_measured(ModelCard(text))
    card.data.model_name = None
    return hashlib.sha256(str(card).strip().encode()).hexdigest()


def same_model(one: Any, other: Any) -> bool:
    """Whether two pipelines draw the same samples, but for the precision of the weights of `one`."""

    def options(pipeline: Any) -> str:
        own = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
        configs = [own, {"class": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}]
        public = [{name: value for name, value in config.items() if name[0] != "_"} for config in configs]
        return json.dumps(public, sort_keys=True, default=str)

    def weights(pipeline: Any) -> dict[str, torch.Tensor]:
        modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}

    mine, theirs = weights(one), weights(other)
    return (
        options(one) == options(other)
        and mine.keys() == theirs.keys()
        and all(torch.equal(value.cpu(), theirs[key].to("cpu", value.dtype)) for key, value in mine.items())
    )
