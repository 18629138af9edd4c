"""What a training is told: options, their names in diffusers, and what is said where they cannot be had."""

import ast
import json
import math
import re
from dataclasses import fields, replace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from images import save_images
from training import ROOT, TINY, arguments, plan_for

from diffusers_gm import data
from diffusers_gm.training.methods import METHODS, options_of_others
from diffusers_gm.training.objective import Objective, build_scheduler
from diffusers_gm.training.options import TrainingArguments, free_on_resume
from diffusers_gm.training.parser import OptionParser
from diffusers_gm.training.plan import command_line, make_plan, training_record
from diffusers_gm.training.training_data import STATE_FILE

# Every option of examples/unconditional_image_generation/train_unconditional.py of diffusers 0.42, with a value.
OF_DIFFUSERS = """
--dataset_name digits
--dataset_config_name plain
--model_config_name_or_path config.json
--train_data_dir photos
--output_dir out
--overwrite_output_dir
--cache_dir cache
--resolution 64
--center_crop
--random_flip
--train_batch_size 16
--eval_batch_size 16
--dataloader_num_workers 0
--num_epochs 100
--save_images_epochs 10
--save_model_epochs 10
--gradient_accumulation_steps 1
--learning_rate 1e-4
--lr_scheduler cosine
--lr_warmup_steps 500
--adam_beta1 0.95
--adam_beta2 0.999
--adam_weight_decay 1e-6
--adam_epsilon 1e-08
--use_ema
--ema_inv_gamma 1.0
--ema_power 0.75
--ema_max_decay 0.9999
--push_to_hub
--hub_token hf_x
--hub_model_id me/model
--hub_private_repo
--logger tensorboard
--logging_dir logs
--local_rank -1
--mixed_precision no
--prediction_type sample
--ddpm_num_steps 1000
--ddpm_num_inference_steps 1000
--ddpm_beta_schedule linear
--checkpointing_steps 500
--checkpoints_total_limit 2
--resume_from_checkpoint latest
--enable_xformers_memory_efficient_attention
--preserve_input_precision
"""

# Those that are not ours, and what is said of them.
REMEDIES = {
    "--save_images_epochs": "--validation_steps",
    "--save_model_epochs": "--checkpointing_steps",
    "--local_rank": "leave it out: `accelerate launch`",
    "--enable_xformers_memory_efficient_attention": "leave it out: PyTorch",
}

ALIASES = {
    "--num_epochs": ("num_train_epochs", 100),
    "--logger": ("report_to", "tensorboard"),
    "--ema_max_decay": ("ema_decay", 0.9999),
    "--model_config_name_or_path": ("model_config", "config.json"),
    "--ddpm_num_steps": ("num_train_timesteps", "1000"),
    "--ddpm_num_inference_steps": ("validation_inference_steps", 1000),
}


def parse(words):
    return OptionParser("").parse(words.split())


def refused(words, capsys):
    """The one line that is said before the program ends with 2."""
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("words", OF_DIFFUSERS.strip().splitlines(), ids=lambda words: words.split()[0])
def test_options_of_diffusers_are_understood(words, capsys):
    name, _, value = words.partition(" ")
    if name in REMEDIES:
        assert re.search(f": error: {name}: .*{re.escape(REMEDIES[name])}", refused(words, capsys))
        return
    beside = "--dataset_name a" if name == "--dataset_config_name" else ""
    args = parse(f"{words} {beside} --hub_model_id me/model")
    if name in ALIASES:
        ours, expected = ALIASES[name]
        assert getattr(args, ours) == expected
    elif name != "--preserve_input_precision":  # what we always do
        assert str(getattr(args, name[2:])) == ((value and str(type(getattr(args, name[2:]))(value))) or "True")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learnig_rate 1", "unknown option --learnig_rate: is it --learning_rate?"),
        ("--learnig_rate=1", "unknown option --learnig_rate: is it --learning_rate?"),
        ("photos", "unknown option photos, see --help"),
        ("--seed 1 2", "unknown option 2, see --help"),  # and not --adam_beta2
        ("--learn 1", "unknown option --learn: is it --learning_rate?"),
        ("--batch_size 4", "unknown option --batch_size: is it --train_batch_size or --eval_batch_size?"),
        ("--image_size 32", "unknown option --image_size, see --help"),  # nearest in letters: --step_size
        ("--n_steps 9", "unknown option --n_steps, see --help"),  # --logging_steps
        ("--method vdm", "argument --method: invalid choice: 'vdm'"),
        ("--seed one", "argument --seed: invalid int value: 'one'"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--use_ema maybe", "'maybe' is neither 'true' nor 'false'"),
        ("--no_use_ema true", "neither"),
        ("--mass 1", "['--mass'] mean nothing for --method gm-sgm: leave them out"),
        ("--config cifar11", "no recipe but cifar10-cpu, cifar10-gpu, cld-paper, digits"),
    ],
)
def test_option_errors_are_one_line(words, said, capsys):
    assert said in refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--no_use_ema --ema_inv_gamma 2", "--ema_inv_gamma means nothing without --use_ema"),
        ("--no_use_ema --ema_power 0.6", "--ema_power means nothing without --use_ema"),
        ("--image_column img", "--image_column means nothing without a --dataset_name of the Hub or --train_data_dir"),
        ("--background black", "--background means nothing without a --dataset_name of the Hub or --train_data_dir"),
        ("--dataset_config_name plain", "--dataset_config_name means nothing without a --dataset_name of the Hub"),
        ("--train_data_dir a --dataset_config_name plain", "--dataset_config_name means nothing without"),
        ("--no_keep_noise_levels", "--no_keep_noise_levels means nothing without --model_name_or_path"),
        ("--checkpointing_steps 0 --hub_strategy every_save", "--hub_strategy means nothing without --checkpointing_s"),
        ("--logging_dir mine", "--logging_dir means nothing without --report_to"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, said, capsys):
    line = refused(words, capsys)
    assert said in line
    assert line.endswith(": leave it out")


@pytest.mark.parametrize(
    "words",
    [
        "--no_use_ema --ema_inv_gamma 1.0 --ema_power 0.75 --ema_max_decay 0.999",
        "--dataset_name digits --keep_noise_levels",
        "--checkpointing_steps 0 --hub_strategy end",
        "--checkpointing_steps 0 --max_train_minutes 9 --hub_strategy every_save",
        "--logging_dir logs",
        "--train_data_dir a --image_column img",
        "--dataset_name a --image_column img --dataset_config_name plain",
        "--model_name_or_path a --no_keep_noise_levels",
    ],
)
def test_options_that_are_named_by_what_they_are_or_do_something_are_taken(words):
    parse(words)


def test_a_training_that_was_told_of_what_means_nothing_goes_on(train, tmp_path):
    """As versions took such options; now without them."""
    options = f"{TINY} --no_use_ema --checkpointing_steps 1 --output_dir {tmp_path / 'out'}"
    train(options, "--max_train_minutes 1e-9")
    path = tmp_path / "out" / "checkpoint-1" / STATE_FILE
    content = json.loads(path.read_text())
    content["arguments"] |= {"ema_power": 0.6, "dataset_config_name": "plain"}
    path.write_text(json.dumps({name: content[name] for name in ("state", "arguments")}))
    train(options, "--resume_from_checkpoint latest")
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("words", "expected"),
    [("--use_ema", True), ("--no_use_ema", False), ("--use_ema false", False), ("--use_ema=True", True), ("", True)],
)
def test_switches(words, expected):
    assert parse(words).use_ema is expected


def test_help_has_groups_and_says_everything_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    headings = re.findall(r"^(\S.*):$", printed, re.MULTILINE)
    assert headings == [
        *("options", "What is trained", "Data", "Network", "Noise", "Sampler, as saved with the model"),
        *("Optimisation", "Checkpoints, samples and logs", "Hub"),
    ]
    shown = re.findall(r"^  (--\w+)", printed, re.MULTILINE)
    assert sorted(shown) == sorted(["--config", *(f"--{f.name}" for f in fields(TrainingArguments))])
    flat = " ".join(printed.split())
    assert "--method {gm-sgm,ncsnv2,cld,ddpm} Gaussian-mixture noise" in flat
    assert "--mass X (cld) Mass M; the damping is critical, Gamma = 2 sqrt(M). [0.25]" in flat
    assert "--use_ema {true,false} Average the weights" in flat
    assert "--random_flip Flip" in flat
    assert "--no_" not in flat
    assert max(map(len, printed.splitlines())) <= 120
    assert "--num_epochs" not in flat
    assert "default" not in flat.lower()


@pytest.mark.parametrize(
    "words",
    [
        "--train_data_dir {tmp}/nowhere",
        "--train_data_dir {tmp}/few --resolution 6 --block_out_channels 8 16 32",
        "--model_config {tmp}/nothing.json",
        "--resume_from_checkpoint checkpoint-7",
        "--max_train_steps 10 --lr_warmup_steps 10",
    ],
)
def test_options_that_do_not_fit_end_the_script_with_one_line(words, script, tmp_path, capsys):
    save_images(tmp_path / "few", 4)
    words = words.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as stop, torch.random.fork_rng():
        script(*words, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache")
    assert stop.value.code == 2
    assert re.match(r"train_gm_sgm.py: error: .*--\w+", capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def script(monkeypatch):
    """`main` of the script, given the words of a command line."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_gm_sgm", ROOT / "train_gm_sgm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(*words):
        monkeypatch.setattr("sys.argv", ["train_gm_sgm.py", *map(str, words)])
        module.main()

    return run


# --- Batches larger than the data ---


def test_the_largest_batch_that_fits_is_taken(train, tmp_path, capsys):
    folder = save_images(tmp_path / "images", 61)
    options = TINY.replace("--train_batch_size 16", "--train_batch_size 128").replace("--checkpointing_steps 0", "")
    options = f"{options} --train_data_dir {folder} --checkpointing_steps 1 --output_dir {tmp_path / 'out'}"
    train(options, "--max_train_minutes 1e-9")
    printed = capsys.readouterr().out
    assert "--train_batch_size 128 is more than the 61 training images have for 1 process(es): it is 61" in printed
    assert "0 to 2 of 61 images" in printed
    train(options, "--resume_from_checkpoint latest")
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["train_batch_size"] == 61


def test_several_processes_share_the_images():
    images = data.split_digits()[0][:61]
    examination = data.Examination(images)
    plan = make_plan(arguments(num_train_epochs=2), examination, 61, num_processes=2)
    assert plan.train_batch_size == 30
    assert plan.max_train_steps == 3, "2 epochs of 61 images by 60"
    with pytest.raises(ValueError, match="62 processes for 61 training images"):
        make_plan(arguments(), examination, 61, num_processes=62)


# --- Networks that need more than we have ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_class_embeds": 10}, "needs a class for every image (num_class_embeds = 10)"),
        ({"class_embed_type": "timestep"}, "needs a class for every image (class_embed_type = 'timestep')"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "time_embedding_type = 'learned'"),
    ],
)
@pytest.mark.parametrize("option", ["--model_config", "--model_name_or_path"])
def test_networks_that_need_more_are_refused_before_anything_is_written(
    option,
    changes,
    said,
    tiny_unet,
    train,
    tmp_path,
):
    config = {name: value for name, value in tiny_unet.config.items() if not name.startswith("_")}
    with torch.random.fork_rng():
        UNet2DModel(**config | changes).save_pretrained(tmp_path / "model" / "unet")
    name = tmp_path / "model" / ("unet" if option == "--model_config" else "")
    for dry in ("", "--dry_run"):
        with pytest.raises(ValueError, match=f"{option} {name}.*{re.escape(said)}"):
            train(
                TINY.replace("--block_out_channels 8 16", f"{option} {name}"), dry, f"--output_dir {tmp_path / 'out'}"
            )
    assert not (tmp_path / "out").exists()


def test_networks_of_prompts_are_refused(train, tmp_path):
    with torch.random.fork_rng():
        unet = UNet2DConditionModel(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="this one goes from 4 to 4: for latents, give their autoencoder with --vae"):
        train("--model_config", tmp_path / "unet", "--output_dir", tmp_path / "out")


# --- What the options come to ---


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_answer_the_image_learn_it(method):
    if method in ("cld", "ddpm"):
        with pytest.raises(ValueError, match=r"\['--prediction_type'\] mean nothing for "):
            arguments(method=method, prediction_type="sample")
        return
    args = arguments(method=method, prediction_type="sample")
    images, plan = data.split_digits()[0][:8], plan_for(args)
    scheduler = build_scheduler(args, plan)
    assert scheduler.config["prediction_type"] == "sample"

    class Perfect:
        sample = images

    with torch.random.fork_rng():
        assert Objective(args, plan, scheduler)(lambda *_: Perfect, images).max() == 0
        assert Objective(args, plan, scheduler)(lambda *_: Perfect, images.flip(0)).min() > 0


def test_a_model_that_answers_the_image_is_trained_and_says_so(train, tmp_path):
    train(TINY, "--prediction_type sample --output_dir", tmp_path)
    assert "it learns the image (the denoiser)" in (tmp_path / "README.md").read_text().replace("\n", " ")


def test_records_hold_what_the_method_has():
    records = {}
    for method in METHODS:
        args = arguments(method=method, output_dir="/somewhere/out", cache_dir="/home/me", hub_token="hf_x")
        records[method] = training_record(args, plan_for(args))
        assert "/somewhere" not in command_line(args, 1)
        assert "hf_x" not in command_line(args, 1)
        assert records[method]["output_dir"] == "out"
        assert not {"cache_dir", "hub_token", "logging_dir"} & set(records[method])
        assert {name for name in options_of_others(method) if records[method][name] is not None} == set()
    assert records["gm-sgm"]["mixture_weights"] == pytest.approx([0.739, 0.261], abs=1e-3)
    assert records["ncsnv2"]["sigma_max"] == records["cld"]["sigma_max"] == 80
    assert records["ncsnv2"]["sigma_data"] == records["cld"]["sigma_data"] == 1
    assert records["cld"]["mass"] == 0.25
    args = arguments(method="ncsnv2", timestep_sampling="uniform")
    assert training_record(args, plan_for(args))["sigma_max"] == 9.6299
    args = arguments(method="ncsnv2", sigma_data="auto")
    assert training_record(args, plan_for(args))["sigma_data"] == 0.541
    args = arguments(method="ncsnv2", p_mean=3.0, p_std=1.0)
    assert training_record(args, plan_for(args))["sigma_max"] == pytest.approx(math.exp(6.5), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({"method": "ncsnv2"}, True),
        ({"method": "cld"}, True),
        ({"method": "gm-sgm", "snr_gamma": 5.0}, False),
        ({"method": "gm-sgm", "prediction_type": "epsilon"}, False),
        ({"method": "cld", "objective": "score"}, False),
        ({"method": "ddpm"}, False),
        ({"method": "ddpm", "uncertainty_weighting": True}, True),
        ({"method": "ncsnv2", "uncertainty_weighting": False}, False),
    ],
)
def test_weights_are_learned_for_preconditioned_networks(options, learned):
    args = arguments(**options)
    assert args.uncertainty_weighting is learned
    assert training_record(args, plan_for(args))["uncertainty_weighting"] is learned


def test_what_a_command_line_says_is_what_it_was(tmp_path):
    args = parse(
        "--method cld --no_use_ema --block_out_channels 8 16 --random_flip --num_epochs 3 --cld_loss dsm --seed 5"
    )
    assert parse(command_line(args, 1).partition("diffusers-gm-train")[2]) == args
    assert command_line(args, 2).startswith("accelerate launch --num_processes 2 -m train_gm_sgm --")
    on_cpus = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m train_gm_sgm --"
    assert command_line(args, 2, device="cpu").startswith(on_cpus), "without these words it is one process"
    told = "diffusers-gm-train --dataset_name digits --model_name_or_path mine --conditioning sigma"
    assert command_line(parse(told.partition(" ")[2]), 1) == told, "which is the default of other networks alone"


def test_data_are_measured_for_ladders_only(monkeypatch):
    """Distances take long on large images: a method without a ladder does without."""
    images = torch.zeros(4, 1, 8, 8)  # their largest distance is zero, which no ladder can have
    for options in ({}, {"method": "cld"}, {"method": "ncsnv2", "timestep_sampling": "uniform", "sigma_max": "9"}):
        assert plan_for(arguments(train_batch_size=2, **options), images).sigma_max > 8
    assert plan_for(arguments(method="cld", objective="score", train_batch_size=2), images).sigma_max is None
    with pytest.raises(ValueError, match="are all images the same"):
        plan_for(arguments(method="ncsnv2", prediction_type="epsilon", train_batch_size=2), images)


def test_what_is_free_on_resume():
    args = arguments()
    free = free_on_resume(args)
    assert {"output_dir", "dataloader_num_workers", "algorithm_type", "train_batch_size", "mass"} <= free
    assert not {"method", "seed", "sigma_min", "num_train_timesteps", "learning_rate"} & free
    assert "max_train_steps" not in free
    assert "max_train_steps" in free_on_resume(replace(args, lr_scheduler="constant"))
    assert "mixture_weights" in free_on_resume(arguments(method="ncsnv2")), "version 0.1.0 wrote [1.0] there"


def test_methods_are_told_apart_in_their_own_files_alone():
    """A fourth method is a file in `training/methods`, and the line that lists it."""
    package = ROOT / "diffusers_gm"
    paths = [ROOT / "train_gm_sgm.py", *package.glob("cards.py"), *package.glob("hub*/*.py"), *package.glob("hub.py")]
    paths += [path for path in (package / "training").rglob("*.py") if path.parent.name != "methods"]
    said = {
        (path.name, node.value)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in METHODS
    }
    assert said == {("options.py", "gm-sgm")}, "the default of --method"
