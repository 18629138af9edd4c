"""The way to the Hub.

    python -m diffusers_gm.hub outputs/digits me/digits --private

uploads a trained pipeline with its card, which is also how to repeat an upload that failed.
"""

import shlex
import sys
from pathlib import Path

from huggingface_hub.utils import HfHubHTTPError

from ..cli import Parser
from ..evaluation.card import add_quality
from ..pipelines.uploading import upload


def push_to_hub(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload a finished pipeline with its card, and what was measured of it, and return its address.

    Raises:
        FileNotFoundError: if there is no pipeline in `folder`.
        ValueError: if `private` is asked for and the repository already exists and is public.
    """
    add_quality(folder)
    return upload(folder, repo_id, private, token)


# What the answers of the Hub mean to whoever uploads.
STATUS = {
    401: "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN",
    403: "your token may not write to this repository: log in with one that may (`hf auth login`)",
    404: "there is no such user, organisation or repository, or your token may not see it",
    409: "somebody else is changing the repository",
    429: "too many requests, wait a while",
}

# What networks raise, whichever library the Hub's client is built on.
OF_NETWORKS = {"ConnectionError", "TimeoutError", "TransportError", "RequestException"}


def explain(error: Exception) -> str:
    """Why an upload failed, in one line where the Hub answered."""
    if isinstance(error, ValueError):
        return str(error)
    if not isinstance(error, HfHubHTTPError):
        named = f"{type(error).__name__}: {error}"
        of_network = any(cls.__name__ in OF_NETWORKS for cls in type(error).__mro__)
        return f"no connection to the Hub ({named})" if of_network else named
    status = error.response.status_code
    reason = STATUS.get(status, "the Hub has a problem, try again later" if status >= 500 else str(error))
    return f"{reason} (HTTP {status})"


def failure(error: Exception, folder: Path, repo_id: str, private: bool | None = False) -> str:
    """What to say when an upload failed: why, that nothing is lost, and what repeats it."""
    command = ["python", "-m", "diffusers_gm.hub", str(folder), repo_id, *(["--private"] if private else [])]
    return (
        f"the upload failed: {explain(error)}\nThe model is complete in {folder}. To upload it:\n{shlex.join(command)}"
    )


def main() -> None:
    parser = Parser("diffusers_gm.hub", "Upload a trained pipeline.")
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
