"""What lies in a repository of the Hub beside the weights: the files that belong there, and the model card."""

import json
import logging
import re
from collections.abc import Collection
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import filter_repo_objects

from ..version import __version__

HOMEPAGE = "https://github.com/diffusers-gm/diffusers-gm"

# What `diffusers_gm.evaluation` measures, with the model's folder as --output_dir; version 0.1.0 had `quality` too.
QUALITY_FILES = ("quality.json", "quality.md", "quality.png", "results.json", "results.md", "results.png")
CARD_FILES = ("README.md", "samples.png", "training_args.json", *QUALITY_FILES)

# The card of a model that was not pushed by its training loads it from its own folder.
HERE = 'from_pretrained(".")'
HERE_NOTE = "Run it in the folder of this file. "
# Between these, the card says how good the samples are, once that is measured.
QUALITY = ("<!-- quality -->", "<!-- end of quality -->")
# And between these, which sampler was the best.
BEST = ("<!-- best -->", "<!-- end of best -->")


def model_card(tags: list[str], datasets: list[str] | None, template: Traversable, **values: Any) -> ModelCard:
    """A card of a template, with the metadata that all our models share."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers_gm",  # the Hub would show diffusers' own snippet otherwise, which fails
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "score-based-generative-model", "langevin-dynamics", *tags],
        datasets=datasets,
    )
    return ModelCard.from_template(
        data, template_str=template.read_text(encoding="utf-8"), version=__version__, homepage=HOMEPAGE, **values
    )


def short_card(repo_id: str, pipeline_class: str, num_inference_steps: int) -> ModelCard:
    """The card of a pipeline that nothing else is known of."""
    return model_card(
        [],
        None,
        files(__package__).joinpath("templates/short_card.md"),
        title=repo_id.rpartition("/")[2],
        pipeline_class=pipeline_class,
        repository=repo_id,
        num_inference_steps=num_inference_steps,
    )


def card_of_repository(text: str, repo_id: str) -> str:
    """A card with the name that its repository loads by, in place of the folder or another repository."""
    load = f'from_pretrained("{repo_id}")'
    if QUALITY[0] in text:  # one of ours
        text = re.sub(r'(?<=Pipeline\.)from_pretrained\("[^"]*"\)', load, text, count=1)
    return text.replace(HERE, load).replace(HERE_NOTE, "")


logger = logging.getLogger(__name__)

# Weights as models of diffusers save them, whole or in parts, and the index of these.
WEIGHTS = re.compile(
    r"(?P<stem>.*/(?:diffusion_pytorch_)?model)(?P<variant>\.[^./]+?)?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"(?:\.index(?P<of_index>\.[^./]+)?\.json)?"
)


def weights_before(there: Collection[str], content: Collection[str]) -> list[str]:
    """The files of a repository that hold weights which `content` has in other files: of what is split into parts, and
    of what is whole, diffusers reads the parts first. So are variants, unless `content` is one itself: they are of the
    weights before."""

    def stem(name: str, variants: bool) -> str | None:
        found = WEIGHTS.fullmatch(name)
        return found["stem"] if found and (variants or not (found["variant"] or found["of_index"])) else None

    replaced = {stem(name, variants=False) for name in content} - {None}
    return [name for name in there if stem(name, variants=True) in replaced and name not in content]


def files_of(folder: Path) -> list[str]:
    """What belongs in the repository of the pipeline in `folder`: neither optimizer states nor logs."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    patterns = [f"{name}/*" for name, value in index.items() if isinstance(value, list)]
    patterns += ["model_index.json", "pipeline.py", *CARD_FILES]
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return list(filter_repo_objects(names, allow_patterns=patterns))


def upload(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    card: ModelCard | None = None,
) -> str:
    """Upload a finished pipeline and return its address. Only `files_of` it go, and private means private.

    The README.md of the folder becomes that of the repository, with the name to load it by. Without one, `card` is
    written, unless the repository has its own.

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
    content: dict[str, Path | bytes] = {name: folder / name for name in files_of(folder)}
    if "README.md" in content:
        # The folder keeps its card as it is: it may be uploaded elsewhere, too.
        content["README.md"] = card_of_repository((folder / "README.md").read_text(encoding="utf-8"), repo_id).encode()
    elif card is not None and not api.file_exists(repo_id, "README.md"):
        content["README.md"] = str(card).encode()
    # Measurements of another model, whose card is replaced.
    stale = [name for name in QUALITY_FILES if "README.md" in content and name not in content]
    there = api.list_repo_files(repo_id)
    if before := weights_before(there, content):
        logger.warning(f"the weights of before leave {repo_id}, but for its history: {', '.join(before)}")
    stale += before
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, data) for name, data in content.items()),
        *(CommitOperationDelete(name) for name in stale if name in there),
    ]
    api.create_commit(
        repo_id,
        changes,
        commit_message=message or "Upload a pipeline of diffusers_gm",
        create_pr=create_pr,
    )
    return f"{api.endpoint}/{repo_id}"
