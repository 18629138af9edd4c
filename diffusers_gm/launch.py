"""Work shared by the processes that `accelerate launch` started."""

import math
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, parse_flag_from_env
from torch import Tensor, distributed
from tqdm.auto import tqdm

# How long a process waits for the others, as in diffusers' scripts: one may be sampling, or uploading a model.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(seconds=7200))


def process_state() -> PartialState:
    """Which of the processes this is. `PartialState` alone does not look whether it is told to use CPUs."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def check_processes(state: Any) -> None:
    """Raise a RuntimeError if processes that were launched together do not know of each other by their `state`, an
    `Accelerator` or a `PartialState`."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}: on CPUs, set "
            "ACCELERATE_USE_CPU=true"
        )


def check_parallelism() -> None:
    """Raise a ValueError for a launch that would spread the network over processes: here each holds all of it. To be
    called before there is an `Accelerator`, which would start doing so, or on CPUs ignores what it is told."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise ValueError(
                f"accelerate is set up for {kind}, which spreads a network over processes, and here every process "
                "holds all of it: launch with --multi_gpu, or choose that in `accelerate config`"
            )


def over_processes(work: Callable[[Tensor], Any], items: Tensor, batch_size: int, description: str) -> list:
    """`[work(batch), ...]` for the batches of `items`, in order, each done by one process and given to all. They are
    the same whatever the number of processes."""
    state, batches = process_state(), items.split(batch_size)
    # Not by accelerate, which in its older versions gives a process without a batch that of another.
    share = math.ceil(len(batches) / state.num_processes)
    mine = batches[state.process_index * share :][:share]
    bar = tqdm(mine, desc=description, unit="batch", leave=False, disable=not state.is_main_process or len(mine) < 2)
    return gather_object([work(batch) for batch in bar])


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns on the main process, which alone calls it, given to all."""
    return broadcast_object_list([make() if process_state().is_main_process else None])[0]


def largest(value: int) -> int:
    """The largest of the values that the processes give, for all of them. Does not wait for a GPU."""
    if process_state().num_processes == 1:
        return value
    values = torch.tensor([value])
    distributed.all_reduce(values, distributed.ReduceOp.MAX, group=_cpu_group())
    return int(values)


@cache
def _cpu_group() -> Any:
    return distributed.new_group(backend="gloo", timeout=PATIENCE.timeout)
