"""Run a script and note when its optimizer steps, in CPU seconds: for `.throughput`.

    python -m diffusers_gm.studies.clocked FOLDER SCRIPT [ARGUMENTS ...]

In the folder is a file `warm` once there were `WARM_UP` steps, so that others can be waited for. At its end each
process leaves a JSON file: its `seconds` after every step, after the first with those of its children, such as
compilers, and the most bytes of `memory`.
"""

import argparse
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
    # Not `..cli.Parser`, whose imports would count as memory of the script.
    parser = argparse.ArgumentParser(prog="python -m diffusers_gm.studies.clocked", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="where the JSON files go; it must be there")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="and its arguments")
    args = parser.parse_args()
    sys.argv = args.script
    seconds: list[float] = []

    def note(*_: Any) -> None:
        now = os.times()
        seconds.append(time.process_time() + (0 if seconds else now.children_user + now.children_system))
        if len(seconds) == WARM_UP:
            (args.folder / WARM).touch()

    register_optimizer_step_post_hook(note)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        from diffusers_gm.training.memory import peak_memory  # now, as it takes memory

        found = {"seconds": seconds, "memory": peak_memory(torch.device("cpu"))}
        (args.folder / f"{os.getpid()}.json").write_text(json.dumps(found))
