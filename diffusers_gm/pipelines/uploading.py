"""Uploads of finished pipelines to the Hub: the files that belong there, and what of before leaves."""

import json
import logging
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from yaml import YAMLError

from .measurements import hash_of_card
from .repository import CARD_FILES, QUALITY_FILES, card_of_repository

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


def differ(card: str, other: str) -> bool:
    """Whether two cards say something else but measurements; those that cannot be parsed, if they are not the same."""
    if card == other:
        return False
    try:
        return hash_of_card(card) != hash_of_card(other)
    except (ValueError, YAMLError):
        return True


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
    written, unless the repository has its own. What is replaced or leaves is named in a warning.

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
    there, text = api.list_repo_files(repo_id), None
    if "README.md" in content:
        # The folder keeps its card as it is: it may be uploaded elsewhere, too.
        text = card_of_repository((folder / "README.md").read_text(encoding="utf-8"), repo_id)
    elif card is not None and "README.md" not in there:
        text = str(card)
    if text is not None:
        content["README.md"] = text.encode()
    # Measurements of another model, whose card is replaced.
    stale = [name for name in QUALITY_FILES if text is not None and name not in content]
    stale = [name for name in [*stale, *weights_before(there, content)] if name in there]
    if stale:
        logger.warning(f"what was there before leaves {repo_id}, but for its history: {', '.join(stale)}")
    if text is not None and "README.md" in there:
        before = Path(api.hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8", errors="replace")
        if differ(before, text):
            kept = f"{api.endpoint}/{repo_id}/blob/{api.model_info(repo_id).sha}/README.md"
            logger.warning(
                f"the card of the folder takes the place of the README.md of {repo_id}, which may have been edited "
                f"there, and which stays in its history: {kept}"
            )
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, data) for name, data in content.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    api.create_commit(
        repo_id,
        changes,
        commit_message=message or "Upload a pipeline of diffusers_gm",
        create_pr=create_pr,
    )
    return f"{api.endpoint}/{repo_id}"
