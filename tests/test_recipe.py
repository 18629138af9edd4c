"""`make cifar10`: one recipe for three methods."""

import os
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from diffusers_gm import AnnealedLangevinScheduler, CLDSSCSScheduler, GMLangevinScheduler
from diffusers_gm.evaluation.options import build_parser, check_options
from diffusers_gm.evaluation.sampling import build_scheduler
from diffusers_gm.training.network import new_unet
from diffusers_gm.training.parser import OptionParser

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def commands(**variables):
    """The options of training and evaluation that `make cifar10` would run with."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    command = ["make", "-n", "cifar10", *(f"{name}={value}" for name, value in variables.items())]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    lines = printed.replace("\\\n", " ").splitlines()
    training = next(line for line in lines if "train_gm_sgm.py" in line).partition("train_gm_sgm.py")[2]
    evaluation = next(line for line in lines if "evaluation" in line).partition("-m diffusers_gm.evaluation")[2]
    parsed = OptionParser("").parse(shlex.split(training))
    return parsed, build_parser("").parse_args(shlex.split(evaluation))


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_three_methods_differ_in_nothing_else(scale):
    options = {method: asdict(commands(METHOD=method, SCALE=scale)[0]) for method in ("gm-sgm", "ncsnv2", "cld")}
    for method, given in options.items():
        different = {name for name, value in given.items() if value != options["gm-sgm"][name]}
        names = {"gm-sgm": set(), "ncsnv2": {"method", "output_dir"}}
        assert different == names.get(method, {"method", "output_dir", "prediction_type"})
        assert given["output_dir"] == f"outputs/cifar10-{method}-{scale}"


@pytest.mark.parametrize(("scale", "parameters"), [("cpu", 1_113_955), ("gpu", 35_746_307)])
def test_the_network_has_the_size_that_is_said(scale, parameters):
    args, _ = commands(SCALE=scale)
    with torch.device("meta"):
        assert new_unet(args, 32, 3).num_parameters() == parameters


def test_a_slice_goes_on_by_itself_and_the_evaluation_is_of_the_same_model_and_data(tmp_path):
    training, evaluation = commands(DATA=tmp_path, MINUTES=4, STEPS=150, CALLS="20 50")
    assert (training.max_train_minutes, training.resume_from_checkpoint) == (4, "latest")
    assert (training.max_train_steps, evaluation.calls) == (150, [20, 50])
    assert (training.train_data_dir, training.dataset_name) == (str(tmp_path), None)
    assert (evaluation.train_data_dir, evaluation.model) == (str(tmp_path), training.output_dir)
    check_options(evaluation)

    training, evaluation = commands()
    assert training.dataset_name == evaluation.dataset_name == "uoft-cs/cifar10"
    assert evaluation.calls == [10, 20, 50, 200]


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("gm-sgm", GMLangevinScheduler(mixture_weights=[0.7, 0.3], mixture_scales=[0.7, 1.5], model_noise="mixture")),
        ("ncsnv2", AnnealedLangevinScheduler()),
        ("cld", CLDSSCSScheduler(prediction_type="cld_mixed")),
    ],
)
def test_the_samplers_that_a_model_is_measured_under_suit_it(method, own):
    schedulers = [build_scheduler(own, words)[1] for words in commands(METHOD=method)[1].scheduler]
    assert type(schedulers[0]) is type(own)
    for scheduler in schedulers:
        scheduler.set_timesteps(50)
