"""Model cards, and the way to the Hub."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

# What belongs in a model repository: neither optimizer states nor logs.
UPLOADED = ("README.md", "model_index.json", "unet/*", "scheduler/*", "samples.png", "training_args.json")

METHOD_NAMES = {"gm-sgm": "a Gaussian-mixture score-based model (GM-SGM)", "ncsnv2": "NCSNv2"}

NCSNV2 = """@inproceedings{song2020improved,
  title = {Improved Techniques for Training Score-Based Generative Models},
  author = {Song, Yang and Ermon, Stefano},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020},
  note = {arXiv:2006.09011}
}"""

GM_SGM = """@misc{gmsgm,
  title = {Approximated Anomalous Diffusion: Gaussian Mixture Score-Based Generative Models}
}"""


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
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers_gm",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "score-based-generative-model", "langevin-dynamics", options["method"]],
        datasets=[options["dataset_name"]] if from_hub else None,
    )
    entries = result.final_entries
    template = Template(files("diffusers_gm").joinpath("templates/model_card.md").read_text(encoding="utf-8"))
    body = template.substitute(
        title=name.split("/")[-1],
        resolution=options["resolution"],
        method_name=METHOD_NAMES[options["method"]],
        version=result.versions["diffusers_gm"],
        pipeline_class=pipeline_class,
        repository=name if on_hub else ".",
        repository_note="" if on_hub else "Run it in the folder of this file. ",
        num_inference_steps=options["validation_inference_steps"],
        method=_method(options, result.num_parameters),
        data=_data(options, result.num_images),
        final_loss=f"{result.final_loss:.4g}" if entries else "not logged",
        final_steps=f"{entries[0]['step']} to {entries[-1]['step']}" if entries else "none",
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
        citations=NCSNV2 if options["method"] == "ncsnv2" else f"{NCSNV2}\n\n{GM_SGM}",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _method(options: dict[str, Any], num_parameters: int) -> str:
    if options["method"] == "ncsnv2":
        noise = "Gaussian noise"
    else:
        pairs = zip(options["mixture_weights"], options["mixture_scales"], strict=True)
        components = ", ".join(f"{weight:.3g} of scale {scale:.3g}" for weight, scale in pairs)
        per = "element" if options["mixture_per_element"] else "image"
        learns = {"denoiser": "the noise (the denoiser)", "score": "the score of the noisy images"}
        noise = (
            f"Gaussian-mixture noise (one component per {per}: {components}); it learns {learns[options['objective']]}"
        )
    told = (
        "is told the noise level" if options["conditioning"] == "sigma" else "is not told the noise level (Technique 3)"
    )
    return (
        f"A UNet of {num_parameters:,} parameters was trained to undo {noise}. Noise levels form a geometric "
        f"ladder of {options['num_train_timesteps']} levels from {options['sigma_min']:g} to "
        f"{options['sigma_max']:g}, for images in [-1, 1]. The network {told}."
    )


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


def push_to_hub(folder: Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a finished pipeline and return its address. Only `UPLOADED` goes, and private means private.

    Raises:
        ValueError: if `private` is asked for and the repository already exists and is public.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private first, or leave out --hub_private_repo")
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(UPLOADED))
    return f"{api.endpoint}/{repo_id}"


def push_command(folder: Path, repo_id: str, private: bool = False) -> str:
    """The command that does what `push_to_hub` does."""
    include = " ".join(f'--include "{pattern}"' for pattern in UPLOADED)
    return f"hf upload {repo_id} {folder} . {include}" + (" --private" if private else "")
