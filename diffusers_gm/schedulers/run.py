"""One run of a scheduler: its calls, and where it is. All that changes while sampling is in here."""

import itertools
import math
import threading
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..samplers import Memory

ONE_RUN = (
    "a scheduler serves one run at a time; call set_timesteps before another one, or give each its own copy "
    "(copy.deepcopy(pipe.scheduler))"
)

# Threads that share a scheduler take turns at what says where its runs are.
TURN = threading.Lock()


class _Token:
    """Lives as long as its thread."""


_MINE, _NUMBERS = threading.local(), itertools.count()
_LIVING: "weakref.WeakValueDictionary[int, _Token]" = weakref.WeakValueDictionary()


def this_thread() -> int:
    """The number of the thread; identifiers of Python's go to another one when a thread ends."""
    if not hasattr(_MINE, "number"):
        _MINE.number, _MINE.token = next(_NUMBERS), _Token()
        _LIVING[_MINE.number] = _MINE.token
    return _MINE.number


def living(by_thread: "dict[int, Run]") -> "dict[int, Run]":
    """What belongs to threads that have not ended."""
    return {number: run for number, run in by_thread.items() if number in _LIVING}


@dataclass
class Run:
    """Attributes:
    calls: of the network, and the end of the run, `n + 1` in all.
    plan: of the sampler.
    timesteps: the labels, on the device of the run.
    own_labels: those of its noise levels, where the network is told others.
    memory: of the sampler.
    index: the call that is expected next; None before the first.
    shape: of the sample.
    former: the timesteps of the last runs before, to know a step that belongs to one of them.
    stopped_at: the label at which the run before was left unfinished.
    """

    calls: list[Any]
    plan: Any
    timesteps: Tensor
    own_labels: Tensor | None = None
    memory: Memory = field(default_factory=Memory)
    index: int | None = None
    shape: torch.Size | None = None
    former: list[Tensor] = field(default_factory=list)
    stopped_at: float | None = None

    def __len__(self) -> int:
        """The number of network calls."""
        return len(self.calls) - 1

    def after(self, previous: "Run | None") -> "Run":
        """This run as the one that takes the place of `previous`."""
        if previous is not None:
            self.former = [*previous.former, previous.timesteps][-8:]
            if previous.index is not None and previous.index < len(previous):
                self.stopped_at = previous.calls[previous.index].label
        return self

    def claim(self, timestep: Tensor | float, begin_index: int | None, shape: torch.Size) -> "tuple[int, Run]":
        """The index of the call that a step at `timestep` makes, and the run whose next step makes the next one. This
        one stays where it is: panoramas keep one for all their views.

        Tensors are told by their place in memory, without waiting for the device.

        Raises:
            ValueError: if the step cannot be the next of this run.
        """
        position = position_in(timestep, self.timesteps)
        if position is None and any(position_in(timestep, timesteps) is not None for timesteps in self.former):
            raise ValueError(f"this step belongs to a run that set_timesteps has ended since: {ONE_RUN}")
        index = self.index
        if index is None:
            index = self._first(timestep) if begin_index is None else begin_index
        self._check_left(index)
        at = f"step {index} of this run is at timestep {self.calls[index].label:g}, not"
        if position is not None and position != index:
            raise ValueError(f"{at} step {position}: {ONE_RUN}")
        # Several values, or one that only waiting for the device would tell, are taken on trust.
        tells = not isinstance(timestep, Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu")
        if position is None and tells and not _same_label(float(timestep), self.calls[index].label):
            raise ValueError(f"{at} {float(timestep):g}: {ONE_RUN}")
        return index, self._past(index, shape)

    def claim_compiled(self, timestep: Tensor | float, begin_index: int | None, shape: torch.Size) -> "tuple[int, Run]":
        """`claim` for `torch.compile`, to which places in memory and values are unknown: the next call, or the first
        one, and where the label is another an error of the device's own, which nobody waits for."""
        index = self.index if self.index is not None else begin_index or 0
        self._check_left(index)
        given, label = torch.as_tensor(timestep), self.calls[index].label
        near = (given - label).abs() <= 0.01 * max(abs(label), 1)
        same = near | (given == int(label)) | (given == round(label))
        torch._assert_async(same.all(), f"the next step of this run is at another timestep: {ONE_RUN}")
        return index, self._past(index, shape)

    def _past(self, index: int, shape: torch.Size) -> "Run":
        """The run, when the call at `index` has been made."""
        if self.shape is not None and shape != self.shape:
            raise ValueError(f"the sample has shape {tuple(shape)}, this run began with {tuple(self.shape)}: {ONE_RUN}")
        return replace(self, index=index + 1, shape=shape)

    def _check_left(self, index: int) -> None:
        if index >= len(self):
            raise ValueError(
                f"all {len(self)} steps of this run have been taken: call set_timesteps before the next run"
            )

    def call_at(self, timestep: Any) -> Any | None:
        """The call of an element of `timesteps`; None for anything else."""
        position = position_in(timestep, self.timesteps)
        return None if position is None else self.calls[position]

    def _first(self, timestep: Tensor | float) -> int:
        """The call that a run begins with; of repeated labels the first, unless its position tells."""
        position = position_in(timestep, self.timesteps)
        if position is not None:
            return position
        value = float(torch.as_tensor(timestep).flatten()[0])
        labels = [call.label for call in self.calls[:-1]]
        for same in (lambda label: math.isclose(value, label, rel_tol=1e-6), lambda label: _same_label(value, label)):
            found = next((i for i, label in enumerate(labels) if same(label)), None)
            if found is None:
                continue
            if found and self.stopped_at is not None and _same_label(value, self.stopped_at):
                raise ValueError(
                    f"timestep {value:g} goes on with a run that set_timesteps has ended since: {ONE_RUN}; to begin "
                    "a new one there, call set_begin_index"
                )
            return found
        hint = "call set_timesteps first" if self.stopped_at is None else ONE_RUN
        raise ValueError(f"timestep {timestep} is not one of scheduler.timesteps: {hint}")


def position_in(timestep: Any, timesteps: Tensor) -> int | None:
    """The index of an element of `timesteps` itself, as in any pipeline's loop."""
    if isinstance(timestep, Tensor) and timestep.ndim == 0:
        storages = (timestep.untyped_storage().data_ptr(), timesteps.untyped_storage().data_ptr())
        if storages[0] == storages[1]:
            index = int(timestep.storage_offset() - timesteps.storage_offset())
            return index if 0 <= index < len(timesteps) else None
    return None


def _same_label(given: float, label: float) -> bool:
    """Whether a number stands for a label: rounded, or cut to an integer as users do."""
    integral = given == round(given) and given in (int(label), round(label))
    return integral or math.isclose(given, label, rel_tol=0.01, abs_tol=0.01)
