"""Recipes: YAML files of options, and `make cifar10`, one recipe for three methods."""

import os
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)
from diffusers_gm.evaluation.options import build_parser, check_options
from diffusers_gm.evaluation.sampling import scheduler_by_name
from diffusers_gm.training.methods import METHODS
from diffusers_gm.training.network import new_unet
from diffusers_gm.training.parser import OptionParser
from diffusers_gm.training.plan import command_line
from diffusers_gm.training.recipe import recipe_names

ROOT = Path(__file__).parents[1]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


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


@needs_make
@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_three_methods_differ_in_nothing_else(scale):
    options = {method: asdict(commands(METHOD=method, SCALE=scale)[0]) for method in ("gm-sgm", "ncsnv2", "cld")}
    for method, given in options.items():
        different = {name for name, value in given.items() if value != options["gm-sgm"][name]}
        assert different <= {"method", "output_dir", "prediction_type"}, "CLD has its own"
        assert given["timestep_sampling"] == "log_normal"
        assert given["output_dir"] == f"outputs/cifar10-{method}-{scale}"


@needs_make
@pytest.mark.parametrize(("scale", "parameters"), [("cpu", 1_113_955), ("gpu", 35_746_307)])
def test_the_network_has_the_size_that_is_said(scale, parameters):
    args, _ = commands(SCALE=scale)
    with torch.device("meta"):
        assert new_unet(args, 32, 3).num_parameters() == parameters


@needs_make
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


@needs_make
@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("gm-sgm", GMLangevinScheduler(mixture_weights=[0.7, 0.3], mixture_scales=[0.7, 1.5], model_noise="mixture")),
        ("ncsnv2", AnnealedLangevinScheduler(noise_space="edm", sigma_data=0.5)),
        ("cld", CLDSSCSScheduler(prediction_type="cld_edm")),
    ],
)
def test_the_samplers_that_a_model_is_measured_under_suit_it(method, own):
    schedulers = [scheduler_by_name(own, words)[1] for words in commands(METHOD=method)[1].scheduler]
    assert type(schedulers[0]) is type(own)
    assert type(schedulers[-1]) is CalibratedMultistepScheduler
    for scheduler in schedulers:
        scheduler.set_timesteps(50)


# --- Recipes as files ---


def parse(words):
    return OptionParser("").parse(words.split())


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "mine.yaml").write_text(text)
        return f"--config {tmp_path / 'mine.yaml'}"

    return write


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_suits_every_method(name, method):
    assert parse(f"--config {name} --method {method}").method == method


def test_the_recipes_of_the_package():
    assert recipe_names() == ["cifar10-cpu", "cifar10-gpu", "cld-paper", "digits", "latent-256"]
    words = (
        "--dataset_name digits --class_conditional --max_train_steps 1200 --num_validation_images 100 --calibrate fast"
    )
    assert asdict(parse("--config digits")) == asdict(parse(words))


def test_values_of_every_kind(recipe):
    args = parse(
        recipe(
            """
            seed: 3
            learning_rate: 2e-4
            sigma_max: 20
            block_out_channels: [8, 16]
            random_flip: yes
            use_ema: false
            lr_scheduler: cosine
            resolution: null
            methods: {ncsnv2: {conditioning: none}, cld: {mass: 1}}
            """
        )
    )
    assert (args.seed, args.learning_rate, args.sigma_max, args.block_out_channels) == (3, 2e-4, "20", [8, 16])
    assert (args.random_flip, args.use_ema, args.lr_scheduler, args.resolution) == (True, False, "cosine", None)
    assert (args.conditioning, args.mass) == ("sigma", 0.25)


def test_what_a_recipe_says_is_told_as_on_a_command_line(recipe, caplog):
    """Also what is the default; and a colour that YAML takes for a comment does not go unnoticed."""
    assert parse(recipe("{method: cld, cld_loss: hsm}")).objective == parse("--method cld --cld_loss hsm").objective
    assert parse(recipe("mixed_precision: no")).mixed_precision == "no"
    assert parse(recipe("{train_data_dir: a, background: '#808080'}")).background == "#808080"
    assert not caplog.records
    assert parse(recipe("train_data_dir: a\nbackground: #808080")).background is None
    assert "no value for background, left open" in caplog.text


def test_sections_are_for_their_method_alone(recipe):
    words = recipe("{methods: {ncsnv2: {conditioning: none}, cld: {mass: 1}, gm-sgm: }}")
    assert parse(f"{words} --method ncsnv2").conditioning == "none"
    assert parse(f"--method cld {words}").mass == 1
    assert parse(recipe("{method: cld, mass: 0.5, methods: {cld: {mass: 1}}}")).mass == 1


def test_options_of_the_command_line_go_first(recipe):
    words = recipe("{use_ema: false, max_train_steps: 5, block_out_channels: [8, 16]}")
    assert parse(f"--seed 4 {words} --use_ema").use_ema
    assert parse(f"--max_train_steps 7 {words}").max_train_steps == 7
    assert parse(f"{words} --max_train_steps 7").max_train_steps == 7
    assert parse(f"{words} --block_out_channels 4").block_out_channels == [4]


@pytest.mark.parametrize(
    ("recipe_says", "given", "left"),
    [
        ("dataset_name: a\ndataset_config_name: b", "--train_data_dir c", ("dataset_name", "dataset_config_name")),
        ("train_data_dir: a", "--dataset_name b", ("train_data_dir",)),
        ("max_train_steps: 5", "--num_epochs 2", ("max_train_steps",)),
        ("block_out_channels: [8]\ndropout: 0.1", "--model_config a.json", ("block_out_channels",)),
        ("model_config: a.json", "--layers_per_block 1", ("model_config",)),
        ("mixture_weights: [1]\nmixture_scales: [1]", "--stable_alpha 1.5", ("mixture_weights", "mixture_scales")),
        ("stable_alpha: 1.5\nnum_components: 3", "--mixture_weights 1 --mixture_scales 1", ("stable_alpha",)),
    ],
)
def test_what_means_nothing_beside_the_command_line_is_left_out(recipe, recipe_says, given, left):
    args = parse(f"{recipe(recipe_says)} {given}")
    assert [getattr(args, name) for name in left] == [None] * len(left)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learnig_rate: 1", "unknown ['learnig_rate']; options are named as in --help"),
        ("methods: {vdm: {seed: 1}, cld: {maas: 1}}", "unknown ['maas', 'vdm']"),
        ("config: digits", "unknown ['config']"),
        ("seed: one", "argument --seed: invalid int value: 'one'"),
        ("method: vdm", "argument --method: invalid choice: 'vdm'"),
        ("[1, 2]", "must map options to values"),
        ("methods: [cld]", "must map methods to options"),
        ("seed: {", "is no YAML file"),
        ("{method: cld, step_size: 3}", "['--step_size'] mean nothing for --method cld"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_in_one_line(recipe, text, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(recipe(text))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_what_is_recorded_holds_the_values_of_the_recipe(recipe):
    args = parse(recipe("{seed: 3, max_train_steps: 5}"))
    said = command_line(args, 1)
    assert "--config" not in said
    assert parse(said.partition("diffusers-gm-train")[2]) == args
