"""The output folder: checkpoints, logs, the finished pipeline. Nothing in it is ever half-written."""

import json
import logging
import re
import shutil
import uuid
import zipfile
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from .. import files
from ..data.latents import is_cache
from ..pipelines.measurements import hash_of_card
from .draws import DRAWS_VERSION
from .methods import METHODS, cld, gm_sgm
from .option import given
from .options import TrainingArguments, free_on_resume, of_the_model
from .training_data import STATE_FILE, TrainingData, read_state

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
ARGS_FILE = "training_args.json"
LOCK = ".training.lock"
LOG_FILE = "training_log.jsonl"
LATENTS, SAMPLES = "latents", "samples"
SUPERSEDED = "superseded-"
TRAINING_ID, CARD = "training_id", "card_hash"
# What a pipeline replaces, beside its card, which is set aside.
REPLACED = ("model_index.json", "pipeline.py", "unet", "scheduler", "vae", "samples.png", LOG_FILE)
UNFINISHED_PIPELINE = files.UNFINISHED + "pipeline"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: those called `checkpoint-<digits>` alone."""
    return [path for path in _numbered(folder) if (path / STATE_FILE).is_file()]


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob(f"{CHECKPOINT}*") if _step(path) >= 0), key=_step)


def _step(path: Path) -> int:
    """The step in the name of a checkpoint; -1 for another name."""
    match = re.fullmatch(rf"{CHECKPOINT}([0-9]+)", path.name)
    return int(match[1]) if match else -1


def find_checkpoint(args: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, if any; 'latest' is the newest whole one, none where there has been no training.

    Raises:
        ValueError: if there is none where the option says, or it is damaged.
    """
    resume = args.resume_from_checkpoint
    if resume is None:
        return None
    folder = Path(args.output_dir)
    if resume == "latest":
        return _newest_whole(folder)
    for path in (Path(resume), folder / resume):
        if (path / STATE_FILE).is_file() and not path.name.startswith(files.UNFINISHED):
            if wrong := checkpoint_damage(path):
                raise ValueError(
                    f"--resume_from_checkpoint {resume!r} is damaged: {wrong}; 'latest' takes the newest whole one"
                )
            return path
    raise ValueError(
        f"--resume_from_checkpoint {resume!r}: there is no complete checkpoint; --output_dir has "
        f"{[path.name for path in list_checkpoints(folder)] or 'none'}"
    )


def as_recorded(args: TrainingArguments, checkpoint: Path | None) -> TrainingArguments:
    """The options; those that were left open, or to what is measured, are as the training of the checkpoint had them.

    What `auto` comes to is not the same in every version.
    """
    if checkpoint is None:
        return args
    record = recorded_options(read_state(checkpoint)["arguments"], args.method)
    recorded: dict[str, Any] = {name: record.get(name) for name in args.left_open}
    if args.model_name_or_path is None or not args.keep_noise_levels:  # else they are the network's
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        recorded |= {name: str(value) for name, value in numbers.items() if getattr(args, name, None) == "auto"}
    else:  # what a network was to go on with, unless told
        goes_on = {"conditioning", *cld.DIFFUSION} | (set() if given(args, gm_sgm.OF_NOISE) else {*gm_sgm.LAW})
        goes_on &= set(METHODS[args.method].option_names)
        recorded |= {name: record[name] for name in goes_on if not given(args, (name,)) and record[name] is not None}
    if args.lr_warmup_steps is None:  # which follows from a length that may change
        recorded["lr_warmup_steps"] = record["lr_warmup_steps"]
    if args.lr_scheduler == "constant":
        recorded["lr_warmup_steps"] = 0  # also where a version that promised one was told of it
    resumed = replace(args, **recorded)  # what was named was checked by the version that began
    resumed.left_open |= args.left_open
    resumed.named_options = args.named_options
    return resumed


def recorded_options(written: dict[str, Any], method: str) -> dict[str, Any]:
    """The options of a training that were written down, and what those came to that were not there yet."""
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    record, formerly = defaults | written, METHODS[method].formerly
    if record["lr_scheduler"] == "constant":
        record["lr_warmup_steps"] = 0  # there was none, whatever was written down
    return record | {name: value for name, value in formerly.items() if record.get(name) is None}


def _newest_whole(folder: Path) -> Path | None:
    passed_over = []
    for path in reversed(_numbered(folder)):
        wrong = checkpoint_damage(path)
        if not wrong:
            return path
        passed_over.append(f"{path.name} ({wrong})")
        logger.warning(f"--resume_from_checkpoint latest passes over {passed_over[-1]}")
    if passed_over:
        raise ValueError(
            f"--resume_from_checkpoint latest: no checkpoint in {str(folder)!r} is whole: {', '.join(passed_over)}; "
            "start anew in another --output_dir"
        )
    return None


def checkpoint_damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint, in words; empty for a whole one."""
    try:
        content = json.loads((checkpoint / STATE_FILE).read_bytes())
        if content.keys() == {"state", "arguments"}:  # version 0.1.0 knew no checksums
            return _unreadable(checkpoint)
        seal = content.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{STATE_FILE} cannot be read: {error!r}"
    if seal != _seal(content):
        return f"{STATE_FILE} is not what was written"
    return ", ".join(files.damage(checkpoint, content["files"]))


def _unreadable(checkpoint: Path) -> str:
    """Files that are cut short, from what their formats say of their length."""
    wrong = [path.name for path in checkpoint.glob("*.bin") if not zipfile.is_zipfile(path)]
    for path in checkpoint.glob("*.safetensors"):
        try:
            safe_open(path, "pt")
        except (SafetensorError, OSError):
            wrong.append(path.name)
    return f"{', '.join(wrong)} cannot be read" if wrong else ""


def _seal(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check_output_dir(args: TrainingArguments, checkpoint: Path | None) -> None:
    """Raise a ValueError if training into `output_dir` would mix with or replace what it must not."""
    folder = Path(args.output_dir)
    for path in (folder, *folder.parents):
        if path.is_file():
            raise ValueError(f"--output_dir {args.output_dir!r}: {str(path)!r} is a file")
    if not folder.is_dir() or _inside(checkpoint, folder):
        return
    checkpoints = list_checkpoints(folder)
    if args.overwrite_output_dir:
        ours = checkpoints or any((folder / name).is_file() for name in ("model_index.json", ARGS_FILE))
        there = (path for name in REPLACED if (path := folder / name).exists())
        if not ours and (lost := [path.name for path in there if path.is_file() or any(path.iterdir())]):
            raise ValueError(
                f"--output_dir {args.output_dir!r} holds {', '.join(lost)}, not from a training, which a model would "
                "replace: choose another folder, or move them away"
            )
        return
    if checkpoints:
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds a training up to {checkpoints[-1].name}: continue "
            "with --resume_from_checkpoint latest, replace it with --overwrite_output_dir, or choose another"
        )
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds a model, and no checkpoint to go on from: replace it with "
            "--overwrite_output_dir, or choose another"
        )
    others = [path for path in folder.iterdir() if path.name != LOCK and (path.name != LATENTS or not is_cache(path))]
    if others and not (folder / ARGS_FILE).is_file():
        raise ValueError(
            f"--output_dir {args.output_dir!r} holds files that are not from a training: choose another, or "
            "add to it with --overwrite_output_dir"
        )


def is_published(args: TrainingArguments, record: dict[str, Any], state: "TrainingState") -> bool:
    """Whether the output folder has the pipeline that this training, of this record, makes of what it has seen."""
    folder = Path(args.output_dir)
    if not all((folder / name).is_file() for name in ("model_index.json", ARGS_FILE)):
        return False
    there = json.loads((folder / ARGS_FILE).read_bytes())
    if (there.get(TRAINING_ID), there.get("images_seen")) != (state.training_id, state.images_seen):
        return False
    made, wanted = recorded_options(there, args.method), json.loads(json.dumps(record))
    if made.get("step_size_criterion") == "fixed_point" and args.step_size_criterion is None:
        made["step_size_criterion"] = None  # once the default, and so written down where nobody had asked for it
    return all(made.get(name) == wanted[name] for name in of_the_model(args) & wanted.keys())


def set_aside_card(folder: Path) -> None:
    """Keep the card of a model that is replaced, unless it is as its training wrote it, but for measurements."""
    card, args = folder / "README.md", folder / ARGS_FILE
    if not card.is_file():
        return
    written = json.loads(args.read_bytes()).get(CARD) if args.is_file() else None
    with suppress(ValueError, YAMLError):  # metadata that cannot be read are nobody else's
        if hash_of_card(card.read_text(encoding="utf-8")) == written:
            return
    kept = files.free_name(folder / "README-before.md")
    shutil.copyfile(card, kept)
    unknown = "is not known to be as a training wrote it"  # those of version 0.1.0, for one
    said = unknown if written is None else "was not written by this training, or edited since"
    logger.warning(f"README.md {said}: it is now {kept.name}")


def _inside(checkpoint: Path | None, folder: Path) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def claim(folder: Path) -> FileLock:
    """A folder for one training, as long as what is returned is kept; a ValueError if it is another one's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--output_dir {str(folder)!r} is in use by another training: wait, or choose another"
        ) from None
    return lock


def start_output_dir(folder: Path, record: dict[str, Any], checkpoint: Path | None, step: int) -> None:
    """Prepare the folder for a training that starts, or resumes from a checkpoint at `step`.

    What killed trainings left unfinished goes, and at a start the checkpoints and samples of another. Later
    checkpoints (of a branch that this training leaves, or damaged) are set aside, so that 'latest' is always of the
    training that ran last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{files.UNFINISHED}*"):
        name = path.name.removeprefix(files.UNFINISHED)
        if path.is_dir() and (path.name == UNFINISHED_PIPELINE or _step(path.with_name(name)) >= 0):
            shutil.rmtree(path)
    if not _inside(checkpoint, folder):
        for old in list_checkpoints(folder):
            files.discard(old)
        for path in (folder / SAMPLES).glob("step-*.png"):
            if re.fullmatch(r"step-[0-9]+\.png", path.name):
                path.unlink()
    _set_aside([path for path in _numbered(folder) if _step(path) > step])
    if checkpoint is not None and _inside(checkpoint, folder) and _step(checkpoint) < 0:
        # One of another name: from now on 'latest' is this one, under a name that says how far it is.
        target = folder / f"{CHECKPOINT}{step}"
        _set_aside([target] if target.exists() else [])
        shutil.copytree(checkpoint, folder / f"{files.UNFINISHED}{target.name}")
        files.publish_folder(folder / f"{files.UNFINISHED}{target.name}", target)
    if not (folder / "model_index.json").is_file():  # else they are those of the model, until another one is there
        files.write_json(folder / ARGS_FILE, record)
    kept = "".join(json.dumps(entry) + "\n" for entry in read_log(folder) if entry["step"] <= step)
    files.write_text(folder / LOG_FILE, kept)


def _set_aside(checkpoints: list[Path]) -> None:
    """Rename checkpoints to `superseded-...`; each keeps the loss curve that led to it."""
    for path in checkpoints:
        target, number = path.with_name(SUPERSEDED + path.name), 1
        while target.exists():
            number += 1
            target = path.with_name(f"{SUPERSEDED}{path.name}-{number}")
        path.rename(target)
        if target.is_dir() and (path.parent / LOG_FILE).is_file():
            shutil.copyfile(path.parent / LOG_FILE, target / LOG_FILE)
        logger.warning(f"{path.name} is later than where this training goes on: it is now {target.name}")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the loss curve; one that was cut short by a kill is left out."""
    path = folder / LOG_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_log(folder: Path, entry: dict[str, Any]) -> None:
    with (folder / LOG_FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


# --- Checkpoints ---


@dataclass
class TrainingState:
    """How far a training is. The data seen decide the order of the data and the noise that come next; of a stream,
    `places` say where each process is, see `Batches`. The id is that of the training from its start on; None of one
    that was begun before there were any."""

    training_id: str | None = None
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    places: list[Any] | None = None

    @classmethod
    def of_a_new_training(cls) -> "TrainingState":
        return cls(training_id=uuid.uuid4().hex)


def save_checkpoint(
    accelerator: Accelerator, args: TrainingArguments, state: TrainingState, record: dict[str, Any], data: TrainingData
) -> None:
    """Save everything a training continues from to `checkpoint-<step>`; call it on all processes.

    The name appears when the checkpoint is complete and on disk, and only then do older ones beyond the limit go.
    """
    folder, limit = Path(args.output_dir), args.checkpoints_total_limit
    target = folder / f"{CHECKPOINT}{state.step}"
    temporary = folder / f"{files.UNFINISHED}{target.name}"
    if accelerator.is_main_process:
        files.fresh_folder(temporary)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = {
            "state": asdict(state),
            "arguments": record,
            "data": asdict(data),
            "draws": DRAWS_VERSION,
            "files": files.checksums(temporary),
        }
        content = json.loads(json.dumps(content))  # as it will be read
        files.write_json(temporary / STATE_FILE, content | {"seal": _seal(content)})
        if (folder / LOG_FILE).exists():
            files.sync(folder / LOG_FILE)  # the loss curve up to here
        files.publish_folder(temporary, target)
        if limit is not None:
            for old in list_checkpoints(folder)[:-limit]:
                files.discard(old)
    accelerator.wait_for_everyone()


def read_checkpoint(
    checkpoint: Path, args: TrainingArguments, record: dict[str, Any], data: TrainingData
) -> TrainingState:
    """How far the training of a checkpoint was.

    Raises:
        ValueError: if it was started with other options than `record`, or on other data.
    """
    content = read_state(checkpoint)
    free = free_on_resume(args)
    before, now = recorded_options(content["arguments"], args.method), json.loads(json.dumps(record))
    names = {Path(each["train_data_dir"] or "").name for each in (before, now)}
    if len(names) == 1 and names != {""}:
        before["train_data_dir"] = now["train_data_dir"]  # written in another way: the images are compared below
    changes = [
        f"--{name} was {before.get(name)!r} and is {now[name]!r}"
        for name in now
        if name not in free and before.get(name) != now[name]
    ]
    if changes:
        of_network = ("sigma_min", "sigma_max", "sigma_data", "num_train_timesteps", "objective", *cld.DIFFUSION)
        other_levels = any(change.split()[0].removeprefix("--") in of_network for change in changes)
        if other_levels and args.model_name_or_path is not None and args.keep_noise_levels:
            changes.append("(a fine-tuning that kept no levels goes on with --no_keep_noise_levels)")
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint.name} continues a training with other options: {'; '.join(changes)}"
        )
    state = TrainingState(**content["state"])
    if content.get("draws") != DRAWS_VERSION:
        logger.warning(
            f"{checkpoint.name} is of an earlier version, which drew noise for batches; from here on it is drawn for "
            "images, by the same law: the end will not be that of an uninterrupted training bit by bit"
        )
    data.check_against(TrainingData.of(content), checkpoint.name)
    if state.step > record["max_train_steps"]:
        raise ValueError(f"--max_train_steps {record['max_train_steps']} is over: {checkpoint.name} is later")
    return state
