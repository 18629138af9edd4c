"""Model cards: what was trained, how, and how good it is.

    python -m diffusers_gm.cards outputs/demo model_cards/gm-sgm-digits.md

copies the card of a trained pipeline, with its pictures, to where cards are kept without their weights.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .training.methods import METHODS
from .version import __version__

# What `diffusers_gm.demo` measures, and what `diffusers_gm.evaluation` does with the model's folder as --output_dir.
QUALITY_FILES = ("quality.json", "quality.md", "quality.png", "results.json", "results.md", "results.png")
CARD_FILES = ("README.md", "samples.png", "training_args.json", *QUALITY_FILES)

# The card of a model that was not pushed by its training loads it from its own folder.
HERE = 'from_pretrained(".")'
HERE_NOTE = "Run it in the folder of this file. "

# Between these, the card says how good the samples are, once that is measured.
QUALITY = ("<!-- quality -->", "<!-- end of quality -->")
NOT_MEASURED = "Not measured."


@dataclass(frozen=True)
class TrainingResult:
    """What a model card says that the options do not.

    Attributes:
        num_images: size of the training set.
        steps, images_seen, seconds: length of the training.
        log: the loss curve, dicts with `step` and `loss`.
        hardware: in words.
        command: the command line.
        versions: of the packages.
    """

    num_images: int
    num_parameters: int
    steps: int
    images_seen: int
    seconds: float
    log: list[dict[str, float]]
    hardware: str
    command: str
    versions: dict[str, str]

    @property
    def final_entries(self) -> list[dict[str, float]]:
        return self.log[-10:]

    @property
    def final_loss(self) -> float | None:
        entries = self.final_entries
        return sum(entry["loss"] for entry in entries) / len(entries) if entries else None

    def figures(self) -> dict[str, Any]:
        """What goes into `training_args.json` beside the options."""
        return {
            "num_images": self.num_images,
            "num_parameters": self.num_parameters,
            "images_seen": self.images_seen,
            "training_seconds": round(self.seconds, 1),
            "final_loss": self.final_loss,
            "hardware": self.hardware,
            "command": self.command,
        }


def training_card(options: dict[str, Any], pipeline_class: str, result: TrainingResult) -> ModelCard:
    """The card of a trained pipeline, from its resolved options (`training.training_record`)."""
    on_hub = options["push_to_hub"]
    name = options["hub_model_id"] if on_hub else Path(options["output_dir"]).name or options["method"]
    from_hub = options["train_data_dir"] is None and options["dataset_name"] != "digits"
    entries = result.final_entries
    method = METHODS[options["method"]]
    said = {"parameters": f"{result.num_parameters:,}", **method.card_values(options)}
    body = Template(_template("model_card")).substitute(
        title=name.split("/")[-1],
        resolution=options["resolution"],
        method_name=method.title,
        version=result.versions["diffusers_gm"],
        pipeline_class=pipeline_class,
        load=f'from_pretrained("{name}")' if on_hub else HERE,
        repository_note="" if on_hub else HERE_NOTE,
        num_inference_steps=options["validation_inference_steps"],
        method=Template(method.card).substitute(said),
        quality="\n".join((QUALITY[0], NOT_MEASURED, QUALITY[1])),
        data=_data(options, result.num_images),
        final_loss=f"{result.final_loss:.4g}" if entries else "not logged",
        final_steps=f"{entries[0]['step']} to {entries[-1]['step']}" if entries else "none",
        curve=_curve(result.log),
        steps=result.steps,
        images_seen=result.images_seen,
        duration=_duration(result.seconds),
        hardware=result.hardware,
        seed=options["seed"],
        weights=(
            f"an exponential moving average with decay {options['ema_decay']}"
            if options["use_ema"]
            else "the last ones"
        ),
        command=result.command,
        options="\n".join(f"| `{name}` | {_cell(value)} |" for name, value in options.items() if value is not None),
        versions=", ".join(f"{name} {version}" for name, version in result.versions.items()),
        citation=method.citation,
    )
    return _card([method.name], [options["dataset_name"]] if from_hub else None, body)


def short_card(repo_id: str, pipeline_class: str, num_inference_steps: int) -> ModelCard:
    """The card of a pipeline that nothing else is known of."""
    body = Template(_template("short_card")).substitute(
        title=repo_id.rpartition("/")[2],
        version=__version__,
        pipeline_class=pipeline_class,
        repository=repo_id,
        num_inference_steps=num_inference_steps,
    )
    return _card([], None, body)


def _template(name: str) -> str:
    return files("diffusers_gm").joinpath(f"templates/{name}.md").read_text(encoding="utf-8")


def _card(tags: list[str], datasets: list[str] | None, body: str) -> ModelCard:
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers_gm",  # the Hub would show diffusers' own snippet otherwise, which fails
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "score-based-generative-model", "langevin-dynamics", *tags],
        datasets=datasets,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def add_quality(folder: Path) -> None:
    """Put what was measured of the model in `folder` into its card there, in words and as metadata.

    That is what `diffusers_gm.demo` (`quality.json`) and `diffusers_gm.evaluation` (`results.json`) have left beside
    it. Everything else in the card stays as it is; nothing happens where there is no card or no measurement.
    """
    if not (folder / "README.md").is_file():
        return
    found = [measured for measured in (_demo_quality(folder), _evaluation_quality(folder)) if measured]
    if not found:
        return
    card = ModelCard.load(folder / "README.md")
    text = card.text
    if QUALITY[0] in text and QUALITY[1] in text:
        before, _, rest = text.partition(QUALITY[0])
        words = "\n\n".join(words.strip() for words, _ in found)
        card.text = "\n".join((before + QUALITY[0], words, QUALITY[1] + rest.partition(QUALITY[1])[2]))
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [result for _, results in found for result in results]
    card.save(folder / "README.md")


def _demo_quality(folder: Path) -> tuple[str, list[EvalResult]] | None:
    from .evaluation import Quality, markdown_table

    if not (folder / "quality.json").is_file():
        return None
    measured = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    lists = {name: cells for name, cells in measured.items() if isinstance(cells, list)}
    # The file may hold a second model, for comparison: the first is the one in the folder.
    cells = [Quality(**cell) for cell in next(iter(lists.values()))]
    words = Template(_template("quality")).substitute(
        floor=f"{measured['floor']:.4f}", n=measured["n"], table=markdown_table(cells)
    )
    return words, [
        _eval_result(
            ("digits", "handwritten digits of scikit-learn"),
            "sliced-wasserstein-ratio",
            f"sliced W2 over the floor of held-out images, {cell.sampler}, {cell.calls} network calls",
            round(cell.ratio, 3),
        )
        for cell in cells
        if cell.ratio is not None
    ]


def _evaluation_quality(folder: Path) -> tuple[str, list[EvalResult]] | None:
    from .evaluation.report import WITH_RATIO, groups, markdown, statistic
    from .evaluation.results import Results

    path = folder / "results.json"
    # Results of another model, that somebody has put here, are not this model's.
    if not path.is_file() or (results := Results.read(path)).conditions["model"] != folder.resolve().name:
        return None
    conditions, data = results.conditions, results.conditions["data"]
    entries = []
    for (scheduler, calls), cells in groups(results).items():
        for metric in WITH_RATIO:
            value, floor = (statistic(scores, metric) for scores in ([cell.scores for cell in cells], results.floor))
            if value and floor:
                name = f"{metric}, {scheduler}, {calls} network calls, n = {conditions['num_samples']}"
                kind = metric.lower().replace(" ", "-")
                entries.append(
                    _eval_result((data, data), kind, f"{name} (real images: {floor.mean:.4g})", round(value.mean, 4))
                )
    picture = "\n![quality against network calls](results.png)\n" if (folder / "results.png").is_file() else ""
    return markdown(results) + picture, entries


def _eval_result(dataset: tuple[str, str], metric_type: str, metric_name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        metric_type=metric_type,
        metric_name=metric_name,
        metric_value=value,
    )


def keep_card(folder: Path, path: Path) -> None:
    """Copy the card of the pipeline in `folder`, with its pictures, to `path`, `NAME.md`: there it is called NAME, and
    says that the model has to be trained first.

    Raises:
        ValueError: if there is no card in `folder`, or `path` is not that of a Markdown file.
    """
    if path.suffix != ".md":
        raise ValueError(f"{path} must be the card's new name, ending in .md")
    if not (folder / "README.md").is_file():
        raise ValueError(f"there is no card in {folder}: it has no README.md")
    card = ModelCard.load(folder / "README.md")
    name, text = path.stem, card.text
    heading = next(line for line in text.splitlines() if line.startswith("# "))
    text = text.replace(heading, f"# {name}", 1)
    text = text.replace(HERE, f'from_pretrained("{folder.as_posix()}")')
    text = text.replace(HERE_NOTE, "Train it first, with the command below. ")
    for picture in ("samples.png", "results.png"):
        if f"({picture})" in text:
            shutil.copyfile(folder / picture, path.with_name(f"{name}-{picture}"))
            text = text.replace(f"({picture})", f"({name}-{picture})")
    if card.data.eval_results:
        card.data.model_name = name
    card.text = text
    card.save(path)


def card_of_repository(text: str, repo_id: str) -> str:
    """A card with the name that its repository loads by, in place of the folder or another repository."""
    load = f'from_pretrained("{repo_id}")'
    if QUALITY[0] in text:  # one of ours
        text = re.sub(r'(?<=Pipeline\.)from_pretrained\("[^"]*"\)', load, text, count=1)
    return text.replace(HERE, load).replace(HERE_NOTE, "")


def forget_quality(folder: Path) -> None:
    """Remove measurements of a model that is about to be replaced."""
    for name in QUALITY_FILES:
        (folder / name).unlink(missing_ok=True)


def _curve(log: Sequence[dict[str, float]], rows: int = 8) -> str:
    """The loss curve as a table: means over equal parts of the training."""
    lines = ["| steps | mean loss |", "|---|---|"]
    for i in range(min(rows, len(log))):
        part = log[i * len(log) // min(rows, len(log)) : (i + 1) * len(log) // min(rows, len(log))]
        mean = sum(entry["loss"] for entry in part) / len(part)
        lines.append(f"| up to {part[-1]['step']} | {mean:.4g} |")
    return "\n".join(lines)


def _data(options: dict[str, Any], num_images: int) -> str:
    if options["train_data_dir"] is not None:
        name = f"a local folder, `{Path(options['train_data_dir']).resolve().name}`"
    elif options["dataset_name"] == "digits":
        name = "the handwritten digits of scikit-learn, its training part (80%)"
    else:
        name = f"`{options['dataset_name']}`"
    return f"{name}, {num_images} images"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_gm.cards", description="Copy a card to where cards are kept without their weights."
    )
    parser.add_argument("folder", type=Path, help="where the pipeline is, --output_dir of its training")
    parser.add_argument("card", type=Path, help="the card to write, NAME.md; its pictures go beside it")
    args = parser.parse_args(arguments)
    try:
        keep_card(args.folder, args.card)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {args.card}")


if __name__ == "__main__":
    main()
