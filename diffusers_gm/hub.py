"""Model cards, and the way to the Hub.

    python -m diffusers_gm.hub outputs/digits me/digits --private

uploads a trained pipeline with its card, which is also how to repeat an upload that failed.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HfHubHTTPError

from .version import __version__

# What belongs in a model repository: neither optimizer states nor logs.
QUALITY_FILES = ("quality.json", "quality.md", "quality.png")
CARD_FILES = ("README.md", "samples.png", "training_args.json", *QUALITY_FILES)
UPLOADED = ("model_index.json", "pipeline.py", "unet/*", "scheduler/*", *CARD_FILES)

METHOD_NAMES = {
    "gm-sgm": "a Gaussian-mixture score-based model (GM-SGM)",
    "ncsnv2": "NCSNv2",
    "cld": "critically-damped Langevin diffusion (CLD)",
}

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
    method, citation = _template(options["method"]).split("## Citation\n")
    body = Template(_template("model_card")).substitute(
        title=name.split("/")[-1],
        resolution=options["resolution"],
        method_name=METHOD_NAMES[options["method"]],
        version=result.versions["diffusers_gm"],
        pipeline_class=pipeline_class,
        load=f'from_pretrained("{name}")' if on_hub else HERE,
        repository_note="" if on_hub else HERE_NOTE,
        num_inference_steps=options["validation_inference_steps"],
        method=Template(method).substitute(_method(options, result.num_parameters)).strip(),
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
        citation=citation.strip(),
    )
    return _card([options["method"]], [options["dataset_name"]] if from_hub else None, body)


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
    """Put what `diffusers_gm.demo` measured (`quality.json`) into the card in `folder`, in words and as metadata.

    Everything else in the card stays as it is; nothing happens where there is no card or no measurement.
    """
    from .evaluation import Quality, markdown_table

    path = folder / "README.md"
    if not (path.is_file() and (folder / "quality.json").is_file()):
        return
    measured = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    lists = {name: cells for name, cells in measured.items() if isinstance(cells, list)}
    # The file may hold a second model, for comparison: the first is the one in the folder.
    cells = [Quality(**cell) for cell in next(iter(lists.values()))]
    card = ModelCard.load(path)
    text = card.text
    if QUALITY[0] in text and QUALITY[1] in text:
        before, _, rest = text.partition(QUALITY[0])
        words = Template(_template("quality")).substitute(
            floor=f"{measured['floor']:.4f}", n=measured["n"], table=markdown_table(cells)
        )
        card.text = "\n".join((before + QUALITY[0], words.strip(), QUALITY[1] + rest.partition(QUALITY[1])[2]))
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type="digits",
            dataset_name="handwritten digits of scikit-learn",
            metric_type="sliced-wasserstein-ratio",
            metric_name=f"sliced W2 over the floor of held-out images, {cell.sampler}, {cell.calls} network calls",
            metric_value=round(cell.ratio, 3),
        )
        for cell in cells
        if cell.ratio is not None
    ]
    card.save(path)


def forget_quality(folder: Path) -> None:
    """Remove measurements of a model that is about to be replaced."""
    for name in QUALITY_FILES:
        (folder / name).unlink(missing_ok=True)


def _method(options: dict[str, Any], num_parameters: int) -> dict[str, Any]:
    """What the templates of the methods may say."""
    if options["method"] == "cld":
        return {
            "parameters": f"{num_parameters:,}",
            "mass": f"{options['mass']:g}",
            "gamma": f"{options['gamma']:g}",
            "initial": f"{options['gamma'] * options['mass']:g}",
        }
    told = (
        "is not told the noise level (Technique 3)"
        if options.get("conditioning") == "none"
        else "is told the noise level"
    )
    learns = {"denoiser": "the noise (the denoiser)", "score": "the score of the noisy images"}
    pairs = zip(options.get("mixture_weights") or (), options.get("mixture_scales") or (), strict=True)
    return {
        "parameters": f"{num_parameters:,}",
        "levels": options["num_train_timesteps"],
        "sigma_min": f"{options['sigma_min']:g}",
        "sigma_max": f"{options['sigma_max']:g}",
        "told": told,
        "per": "element" if options.get("mixture_per_element") else "image",
        "components": ", ".join(f"{weight:.3g} of scale {scale:.3g}" for weight, scale in pairs),
        "learns": learns.get(options["objective"], options["objective"]),
    }


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
        name = f"a local folder, `{options['train_data_dir']}`"
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


def push_to_hub(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    card: ModelCard | None = None,
) -> str:
    """Upload a finished pipeline and return its address. Only `UPLOADED` goes, and private means private.

    The README.md of the folder becomes that of the repository, with what was measured and the name to load it by.
    Without one, `card` is written, unless the repository has its own.

    Raises:
        FileNotFoundError: if there is no pipeline in `folder`.
        ValueError: if `private` is asked for and the repository already exists and is public.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"there is no pipeline in {folder}: it has no model_index.json")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private first, or do not ask for a private one")
    readme = folder / "README.md"
    if readme.is_file():
        add_quality(folder)
        text = readme.read_text(encoding="utf-8")
        readme.write_text(text.replace(HERE, f'from_pretrained("{repo_id}")').replace(HERE_NOTE, ""), encoding="utf-8")
    elif card is not None and not api.file_exists(repo_id, "README.md"):
        card.save(readme)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(UPLOADED),
        commit_message=message or "Upload a pipeline of diffusers_gm",
        create_pr=create_pr,
    )
    return f"{api.endpoint}/{repo_id}"


def push_command(folder: Path, repo_id: str, private: bool | None = False) -> str:
    """The command that does what `push_to_hub` does."""
    words = ["python", "-m", "diffusers_gm.hub", str(folder), repo_id, *(["--private"] if private else [])]
    return shlex.join(words)


# What the answers of the Hub mean to whoever uploads.
STATUS = {
    401: "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN",
    403: "your token may not write to this repository: log in with one that may (`hf auth login`)",
    404: "there is no such user, organisation or repository, or your token may not see it",
    409: "somebody else is changing the repository",
    429: "too many requests, wait a while",
}


def explain(error: Exception) -> str:
    """Why an upload failed, in one line where the Hub answered."""
    if isinstance(error, ValueError):
        return str(error)
    if not isinstance(error, HfHubHTTPError):
        return f"no connection to the Hub ({type(error).__name__}: {error})"
    status = error.response.status_code
    reason = STATUS.get(status, "the Hub has a problem, try again later" if status >= 500 else str(error))
    return f"{reason} (HTTP {status})"


def failure(error: Exception, folder: Path, repo_id: str, private: bool | None = False) -> str:
    """What to say when an upload failed: why, that nothing is lost, and what repeats it."""
    return (
        f"the upload failed: {explain(error)}\nThe model is complete in {folder}. To upload it:\n"
        f"{push_command(folder, repo_id, private)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusers_gm.hub", description="Upload a trained pipeline.")
    parser.add_argument("folder", type=Path, help="where the pipeline is, --output_dir of its training")
    parser.add_argument("repo_id", help="repository to upload to, <user>/<name>; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="upload to a private repository")
    args = parser.parse_args()
    try:
        print(f"uploaded to {push_to_hub(args.folder, args.repo_id, args.private)}")
    except FileNotFoundError as error:
        parser.error(str(error))
    except Exception as error:
        sys.exit(failure(error, args.folder, args.repo_id, args.private))


if __name__ == "__main__":
    main()
