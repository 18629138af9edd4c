"""Memory of the process that trains."""

import sys
from pathlib import Path

import torch

# The largest block that glibc takes from a mapping of its own: 32 MiB, with what is round it.
LARGEST_MAPPING = 32 * 2**20 - 2**16


def peak_memory(device: torch.device) -> float:
    """The most bytes in use so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")
    if status.is_file():  # of Linux, where the other figure has that of the process that started this one in it
        return 1024 * float(status.read_text().partition("VmHWM:")[2].split()[0])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def keep_freed_memory() -> None:
    """Keep what a step frees for the next one, up to 64 MiB.

    glibc gives free memory back above twice the largest mapped block that was freed so far, and the next step has its
    pages made again, which takes small networks long. So the largest block that counts is freed here."""
    torch.empty(LARGEST_MAPPING, dtype=torch.uint8)
