"""The output folder: checkpoints, logs, the finished pipeline. Nothing in it is ever half-written."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .options import TrainingArguments, free_on_resume

CHECKPOINT = "checkpoint-"
STATE_FILE = "training_state.json"
ARGS_FILE = "training_args.json"
LOG_FILE = "training_log.jsonl"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [path.parent for path in folder.glob(f"{CHECKPOINT}*/{STATE_FILE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def find_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, if any; 'latest' is none where no training has written one yet.

    Raises:
        ValueError: if there is none where the option says.
    """
    resume = args.resume_from_checkpoint
    if resume is None:
        return None
    available = list_checkpoints(Path(args.output_dir))
    if resume == "latest":
        return available[-1] if available else None
    for path in (Path(resume), Path(args.output_dir, resume)):
        if (path / STATE_FILE).is_file():
            return path
    raise ValueError(
        f"--resume_from_checkpoint {resume!r}: there is no complete checkpoint; --output_dir has "
        f"{[path.name for path in available] or 'none'}"
    )


def check_output_dir(args: TrainingArguments, checkpoint: Path | None) -> None:
    """Raise a ValueError if training into `output_dir` would mix with or replace what it must not."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {args.output_dir!r} is a file")
    if not folder.is_dir() or args.overwrite_output_dir or _inside(checkpoint, folder):
        return
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds a training up to {checkpoints[-1].name}: continue "
            "with --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or choose another"
        )
    if any(folder.iterdir()) and not (folder / ARGS_FILE).is_file():
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds files that are not from a training: choose another, or "
            "add to it with --overwrite_output_dir"
        )


def _inside(checkpoint: Path | None, folder: Path) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def start_output_dir(folder: Path, record: dict[str, Any], checkpoint: Path | None, step: int) -> None:
    """Prepare the folder for a training that starts, or resumes from a checkpoint at `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _inside(checkpoint, folder):
        for old in list_checkpoints(folder):
            shutil.rmtree(old)
    write_json(folder / ARGS_FILE, record)
    log = read_log(folder)
    (folder / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in log if entry["step"] <= step))


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of the loss curve; one that was cut short by a kill is left out."""
    path = folder / LOG_FILE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_log(folder: Path, entry: dict[str, float]) -> None:
    with (folder / LOG_FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def fresh_folder(path: Path) -> Path:
    """An empty folder; what a killed training left there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def publish(source: Path, folder: Path) -> None:
    """Move everything in `source` to `folder`, replacing what has the same name. Same file system.

    `model_index.json` goes first and comes last, so that a pipeline which loads is whole.
    """
    index = "model_index.json"
    (folder / index).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == index):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    source.rmdir()


# --- Checkpoints ---


@dataclass
class TrainingState:
    """How far a training is. The data seen decide the order of the data and the noise that come next."""

    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: TrainingState, record: dict[str, Any], limit: int | None
) -> None:
    """Save everything a training continues from to `folder/checkpoint-<step>`; call it on all processes.

    The name appears when the checkpoint is complete, and only then do older ones beyond `limit` go.
    """
    target = folder / f"{CHECKPOINT}{state.step}"
    temporary = folder / f"tmp-{target.name}"
    if accelerator.is_main_process:
        fresh_folder(temporary)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, {"state": asdict(state), "arguments": record})
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        if limit is not None:
            for old in list_checkpoints(folder)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read_checkpoint(checkpoint: Path, args: TrainingArguments, record: dict[str, Any]) -> TrainingState:
    """How far the training of a checkpoint was.

    Raises:
        ValueError: if it was started with other options than `record`.
    """
    content = json.loads((checkpoint / STATE_FILE).read_text())
    free = free_on_resume(args)
    before, now = content["arguments"], json.loads(json.dumps(record))
    changes = [
        f"--{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if name not in free and before.get(name) != now[name]
    ]
    if changes:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint.name} continues a training with other options: {'; '.join(changes)}"
        )
    state = TrainingState(**content["state"])
    if state.step > record["max_train_steps"]:
        raise ValueError(f"--max_train_steps {record['max_train_steps']} is over: {checkpoint.name} is later")
    return state
