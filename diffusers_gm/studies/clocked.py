"""Run a script and note when its optimizer steps, in CPU seconds: for `.throughput`.

    python -m diffusers_gm.studies.clocked FOLDER SCRIPT [ARGUMENTS ...]

In the folder is a file `warm` once there were `WARM_UP` steps, so that others can be waited for. At its end each
process leaves a JSON file: its `seconds` after every step, after the first with those of its children, such as
compilers, and the most bytes of `memory`.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

WARM_UP = 10
WARM = "warm"

if __name__ == "__main__":
    folder, *sys.argv = sys.argv[1:]
    seconds: list[float] = []

    def note(*_: Any) -> None:
        now = os.times()
        seconds.append(time.process_time() + (0 if seconds else now.children_user + now.children_system))
        if len(seconds) == WARM_UP:
            (Path(folder) / WARM).touch()

    register_optimizer_step_post_hook(note)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        from diffusers_gm.training.rehearsal import peak_memory  # now, as it takes memory

        found = {"seconds": seconds, "memory": peak_memory(torch.device("cpu"))}
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(found))
