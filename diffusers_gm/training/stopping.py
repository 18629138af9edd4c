"""Ending before the last step, with a checkpoint: time is up, or a signal came. All processes at the same step."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

# Exit code of a training that a signal ended: its checkpoint is written, run it again (EX_TEMPFAIL of sysexits.h).
INTERRUPTED = 75

# What may end a training, in the order of what goes first.
NOTHING, TIME, SIGNAL = range(3)


class Signals:
    """Inside, SIGTERM and SIGINT are noted. A second SIGINT ends the process at once.

    Also noted is the end of the launcher that started the process: it passes on no signals, and may end by one.

    Attributes:
        received: what came first, by its name; empty: nothing.
    """

    NOTED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = os.getppid() if is_launcher(os.getppid()) else None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other may listen
            self._before = {number: signal.signal(number, self._note) for number in self.NOTED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, they interrupt, as Ctrl-C does any program: for work without steps. One that was noted does so at
        once.

        Raises:
            KeyboardInterrupt: now, or when one comes.
        """
        for number in self._before:
            signal.signal(number, signal.default_int_handler)
        if self._before and self.received:
            raise KeyboardInterrupt
        yield
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self._say(signal.Signals(number).name)

    def _say(self, what: str) -> None:
        if not self.received:
            self.received = what
            with suppress(OSError):  # not by print: a signal may come while that writes
                os.write(2, f"\n{what}: the training ends with a checkpoint after this step\n".encode())

    def look(self) -> bool:
        """Whether there is a reason to end."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._say("the end of the launcher")
        return bool(self.received)


def is_launcher(process: int) -> bool:
    """Whether it is `accelerate launch`: the variables that it sets may be exported in a shell, too."""
    try:
        words = psutil.Process(process).cmdline()
    except psutil.Error:
        return False
    return any(Path(word).stem.startswith("accelerate") for word in words[:4])


def ignore_signals(worker: int) -> None:
    """In the processes that load data: the training needs them for its last step, and ends them itself."""
    for number in Signals.NOTED:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End the processes that load data at exit, where an error left them: Python would do it by a signal that they
    ignore, and wait for ever."""
    if workers := [process for process in multiprocessing.active_children() if process.daemon]:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each as one that failed
        for worker in workers:
            worker.kill()
