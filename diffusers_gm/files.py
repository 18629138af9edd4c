"""Files and folders that are whole or not there: also after a kill, also after a power cut."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

UNFINISHED = "tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, a temporary path of the same suffix to write to; what is there afterwards replaces `path` at once."""
    temporary = path.with_name(UNFINISHED + path.name)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old content or all of the new."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def fresh_folder(path: Path) -> Path:
    """An empty folder; what a killed run left there is removed."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def publish_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name; the contents are on disk before the name is. Same file system.

    What had that name before is removed, after the new folder has taken its place.
    """
    sync_tree(source)
    old = target.with_name(UNFINISHED + "old-" + target.name)
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def publish_contents(source: Path, folder: Path, last: str) -> None:
    """Move everything in the folder `source` to `folder`, replacing what has the same name. Same file system.

    The file `last` goes first and comes last: where it is, everything is whole and of one making.
    """
    sync_tree(source)
    (folder / last).unlink(missing_ok=True)
    sync(folder)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        target = folder / path.name
        if path.name == last:
            sync(folder)
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    sync(folder)
    source.rmdir()


def free_name(path: Path) -> Path:
    """A path that is not there: this one, or the first of `name-2.suffix`, `name-3.suffix`, ..."""
    names = (path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(1))
    return next(name for name in names if not name.exists())


def discard(folder: Path) -> None:
    """Remove a folder, which loses its name before its contents."""
    nameless = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(nameless, ignore_errors=True)
    folder.rename(nameless)
    sync(folder.parent)
    shutil.rmtree(nameless)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and keeps their names by itself
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` a folder with everything in it."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(sync, [*folder.rglob("*"), folder]))


# --- Checksums ---


def checksums(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and CRC-32 of all files in `folder`, by their paths relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_checksum, paths), strict=True))


def damage(folder: Path, expected: dict[str, list[int]]) -> list[str]:
    """What is wrong with the files of `folder`, in words, where they are not as `checksums` saw them."""

    found, wrong = checksums(folder), []
    for name, sums in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name][0] != sums[0]:
            wrong.append(f"{name} has {found[name][0]} of {sums[0]} bytes")
        elif found[name] != sums:
            wrong.append(f"{name} is not what was written")
    return wrong


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]
