"""Trainings in tests: the script run as users do, or in this process, and what tests look at."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from diffusers_gm import data
from diffusers_gm.training.network import fit_unet, new_unet
from diffusers_gm.training.options import TrainingArguments
from diffusers_gm.training.parser import OptionParser
from diffusers_gm.training.plan import make_plan
from diffusers_gm.training.stopping import Signals

ROOT = Path(__file__).parents[1]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SECRET = "hf_not_a_real_token"

# A network of 42,000 parameters and few steps: what is tested here does not depend on either.
SMALL = "--block_out_channels 8 16 --train_batch_size 16 --validation_inference_steps 4 --num_validation_images 4"
TINY = f"{SMALL} --max_train_steps 2 --checkpointing_steps 0 --validation_steps 0"
SHORT = (
    "--train_batch_size 8 --validation_inference_steps 4 --num_validation_images 4 --max_train_steps 3 "
    "--validation_steps 2 --checkpointing_steps 3"
)


def launch(*options, launcher=("launch", "--cpu", "--num_processes", "1"), env=None):
    """Run the script as users do, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        *launcher,
        str(ROOT / "train_gm_sgm.py"),
    ]
    result = subprocess.run(
        [*command, *" ".join(map(str, options)).split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run the script in this process, which saves the seconds that imports take."""
    spec = importlib.util.spec_from_file_location("train_gm_sgm", ROOT / "train_gm_sgm.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(*options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        words = " ".join(map(str, [*options, "--cache_dir", tmp_path / "cache"])).split()
        with torch.random.fork_rng():
            for _ in script.train(OptionParser("").parse(words), Signals()):
                pass

    return run


@pytest.fixture(autouse=True)
def no_accelerator_left_behind():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def arguments(**options):
    return TrainingArguments(**options)


def plan_for(args, images=None):
    images = data.split_digits()[0] if images is None else images
    return make_plan(args, data.Examination(images), len(images), num_processes=1)


def small_unet(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args = arguments(block_out_channels=[8, 16], **options)
        return fit_unet(new_unet(args, 8, 1), args, 8)


def same_state(one, other):
    """Whether two nested states (dicts, lists, tensors, numbers) are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


def load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
