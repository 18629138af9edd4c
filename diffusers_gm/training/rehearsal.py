"""What a training would be and cost, from a few steps of it: `--dry_run`."""

import time
from collections.abc import Callable

import torch

from ..launch import largest
from .memory import peak_memory

# So many steps after the first, which is slower, or as many as there is time for.
MOST_STEPS, MOST_SECONDS = 5, 20.0


def rehearse(take_step: Callable[[], None], num_steps: int, device: torch.device) -> str:
    """Take some of `num_steps` steps; say how long one lasts, how long all would, and the memory that they need."""
    times, enough = [time.monotonic()], 0
    while len(times) <= num_steps and not enough:
        take_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic())
        out_of_time = len(times) > 2 and times[-1] - times[0] > MOST_SECONDS
        enough = largest(out_of_time or len(times) > 1 + MOST_STEPS)  # the same for all processes
    first, measured = times[1] - times[0], max(len(times) - 2, 1)
    each = (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else first
    return (
        f"time: {first:.3g} s for the first step, then {each:.3g} s a step ({measured} measured): {num_steps} "
        f"steps last {duration(first + each * (num_steps - 1))}, beside samples and checkpoints\n"
        f"memory: at most {peak_memory(device) / 2**30:.3g} GiB of the {'GPU' if device.type == 'cuda' else 'process'}"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
