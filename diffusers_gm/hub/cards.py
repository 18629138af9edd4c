"""Model cards: what was trained, how, and how good it is.

    python -m diffusers_gm.hub.cards outputs/demo model_cards/gm-sgm-digits.md

copies the card of a trained pipeline, with its pictures, to where cards are kept without their weights.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard

from ..cli import Parser
from ..data import sides
from ..evaluation.table import Table
from ..files import write_text
from ..pipelines.repository import HERE, HERE_NOTE, model_card
from ..training.folder import ARGS_FILE
from ..training.methods import METHODS
from ..training.rehearsal import duration

# Network calls that a calibrated scheduler is for.
FEW_CALLS = 20


@dataclass(frozen=True)
class TrainingResult:
    """What a model card says that the options do not.

    Attributes:
        num_images: size of the training set.
        steps, images_seen, seconds: length of the training.
        log: the loss curve, dicts with `step`, `loss` and `loss_by_level`.
        levels: what the bands of noise levels are called.
        hardware: in words.
        command: the command line.
        versions: of the packages.
        class_names: of a conditional network.
    """

    num_images: int
    num_parameters: int
    steps: int
    images_seen: int
    seconds: float
    log: list[dict[str, Any]]
    levels: list[str]
    hardware: str
    command: str
    versions: dict[str, str]
    class_names: list[str] | None = None

    @property
    def final_loss(self) -> float | None:
        entries = self.log[-10:]
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
    on_hub, names = options["push_to_hub"], result.class_names
    name = options["hub_model_id"] if on_hub else Path(options["output_dir"]).name or options["method"]
    folder, dataset = options["train_data_dir"], options["dataset_name"]
    if folder is None and dataset != "digits" and Path(dataset).is_dir():  # as `datasets` takes it, too
        folder = dataset
    from_hub = folder is None and dataset != "digits"
    data = f"`{dataset}`" if from_hub else "handwritten digits"
    if folder is not None:
        data = f"the folder `{Path(folder).resolve().name}`"
    method = METHODS[options["method"]]
    said = {"parameters": f"{result.num_parameters:,}", **method.card_values(options)}
    height, width = sides(options["resolution"])
    extras = {"evaluation": dataset == "digits", "trackers": options["report_to"] == "tensorboard"}
    rows = [[f"`{option}`", _cell(value)] for option, value in options.items() if value is not None]
    return model_card(
        [method.name],
        [dataset] if from_hub else None,
        files(__package__).joinpath("templates/model_card.md"),
        method=method,
        options=options,
        result=result,
        size=f"{height}x{width}",
        few_calls=FEW_CALLS,
        extras=",".join(extra for extra, is_needed in extras.items() if is_needed),
        pipeline_class=pipeline_class,
        load=f'from_pretrained("{name}")' if on_hub else HERE,
        repository_note="" if on_hub else HERE_NOTE,
        asked=f"class_labels=[{json.dumps(names[0], ensure_ascii=False)}] * 4" if names else "batch_size=4",
        description=Template(method.card).substitute(said),
        data=data,
        final_loss="not logged" if result.final_loss is None else f"{result.final_loss:.4g}",
        curve=_curve(result.log) + _by_level(result.log[-10:], result.levels),
        duration=duration(result.seconds),
        all_options=Table("", ["option", "value"], rows).markdown(),
    )


def keep_card(folder: Path, path: Path) -> None:
    """Copy the card of the pipeline in `folder`, with its pictures, to `path`, `NAME.md`: there it says that the model
    has to be trained first, and loads it from where its command puts it.

    Raises:
        ValueError: if there is no card of a training in `folder`, or `path` is not that of a Markdown file.
    """
    if path.suffix != ".md":
        raise ValueError(f"{path} must be the card's new name, ending in .md")
    for file in ("README.md", ARGS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"there is no card of a training in {folder}: it has no {file}")
    card = ModelCard.load(folder / "README.md")
    trained_into = json.loads((folder / ARGS_FILE).read_text(encoding="utf-8")).get("output_dir")
    if trained_into is None:
        raise ValueError(f"{folder / ARGS_FILE} does not say where the training went: it has no output_dir")
    trained_into = Path(trained_into).as_posix()
    name, text = path.stem, card.text
    text = text.replace(HERE, f'from_pretrained("{trained_into}")')
    text = text.replace(HERE_NOTE, f"Train the model first, into `{trained_into}`, with the command below. ")
    for picture in ("samples.png", "results.png"):
        if f"({picture})" in text:
            shutil.copyfile(folder / picture, path.with_name(f"{name}-{picture}"))
            text = text.replace(f"({picture})", f"({name}-{picture})")
    if card.data.eval_results:
        card.data.model_name = name
    card.text = text
    write_text(path, str(card))


def _curve(log: Sequence[dict[str, Any]], rows: int = 8) -> str:
    """The loss curve as a table: means over equal parts of the training."""
    places = [len(log) * i // rows for i in range(rows + 1)]
    parts = [part for start, end in pairwise(places) if (part := log[start:end])]
    means = [[f"up to {part[-1]['step']}", sum(entry["loss"] for entry in part) / len(part)] for part in parts]
    return Table("", ["steps", "mean loss"], means).markdown()


def _by_level(entries: Sequence[dict[str, Any]], levels: Sequence[str]) -> str:
    """The final loss of each band of noise levels, as a table; empty where a training of old did not log it."""
    columns = zip(*(entry["loss_by_level"] for entry in entries if "loss_by_level" in entry), strict=True)
    rows = []
    for name, column in zip(levels, columns, strict=False):
        known = [loss for loss in column if loss is not None]
        rows.append([name, sum(known) / len(known) if known else "none"])
    return "\n\n" + Table("", ["noise level sigma", "final loss"], rows).markdown() if rows else ""


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("diffusers_gm.hub.cards", "Copy a card to where cards are kept without their weights.")
    parser.add_argument("folder", type=Path, help="where the pipeline is, --output_dir of its training")
    parser.add_argument("card", type=Path, help="the card to write, NAME.md; its pictures go beside it")
    args = parser.parse_args(arguments)
    try:
        keep_card(args.folder, args.card)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {args.card}")


if __name__ == "__main__":
    main()
