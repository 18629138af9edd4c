"""The way to the Hub.

    python -m diffusers_gm.hub outputs/digits me/digits --private

uploads a trained pipeline with its card, which is also how to repeat an upload that failed.
"""

import argparse
import shlex
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import HfHubHTTPError, filter_repo_objects

from .cards import CARD_FILES, add_quality, card_of_repository

# What belongs in a model repository: neither optimizer states nor logs.
UPLOADED = ("model_index.json", "pipeline.py", "unet/*", "scheduler/*", *CARD_FILES)


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
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    content: dict[str, Path | bytes] = {
        name: folder / name for name in filter_repo_objects(names, allow_patterns=list(UPLOADED))
    }
    if "README.md" in content:
        add_quality(folder)
        # The folder keeps its card as it is: it may be uploaded elsewhere, too.
        content["README.md"] = card_of_repository((folder / "README.md").read_text(encoding="utf-8"), repo_id).encode()
    elif card is not None and not api.file_exists(repo_id, "README.md"):
        content["README.md"] = str(card).encode()
    api.create_commit(
        repo_id,
        [CommitOperationAdd(name, data) for name, data in content.items()],
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
