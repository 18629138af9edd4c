"""Options of a training: what is refused, what they come to, and the parts that they make."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from diffusers.training_utils import EMAModel
from training import ROOT, SMALL, TINY, arguments, plan_for, small_unet

from diffusers_gm import GMSGMPipeline, NCSNv2Pipeline, data
from diffusers_gm.launch import check_processes
from diffusers_gm.processes.annealed import ladder_ratio
from diffusers_gm.training.methods.gm_sgm import build_mixture
from diffusers_gm.training.network import fit_unet, new_unet
from diffusers_gm.training.objective import Objective, build_scheduler
from diffusers_gm.training.optimizer import averaged_weights, build_lr_scheduler
from diffusers_gm.training.options import TrainingArguments, without_effect
from diffusers_gm.training.parser import OptionParser

# --- Options ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset_name": "a", "train_data_dir": "b"}, "--dataset_name or --train_data_dir"),
        ({"model_config": "a", "dropout": 0.1}, r"\['--dropout'\] describe a new network"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"learning_rate": math.nan}, "--learning_rate must be finite, got nan"),
        ({"p_mean": math.nan}, "--p_mean must be finite, got nan"),
        ({"adam_weight_decay": math.inf}, "--adam_weight_decay must be finite, got inf"),
        ({"method": "cld", "beta_1": math.inf}, "--beta_1 must be finite, got inf"),
        ({"mixture_weights": [1.0], "mixture_scales": [math.inf]}, r"--mixture_scales must be finite, got \[inf\]"),
        ({"step_size": -1.0}, "--step_size must be positive, got -1.0"),
        ({"max_train_minutes": 0.0}, "--max_train_minutes must be positive, got 0"),
        ({"max_train_minutes": -1.0}, "--max_train_minutes must be positive, got -1"),
        ({"ema_decay": 1.5}, r"--ema_decay must be in \[0, 1\), got 1.5"),
        ({"sigma_max": "large"}, "--sigma_max must be a positive float or 'auto', got 'large'"),
        ({"num_train_timesteps": "1.5"}, "--num_train_timesteps must be a positive int or 'auto', got '1.5'"),
        ({"mixture_weights": [0.5, 0.4], "mixture_scales": [1.0, 2.0]}, "--mixture_weights.*sum to one"),
        ({"mixture_weights": [0.5, 0.5]}, "weights and scales go together"),
        ({"stable_alpha": 3.0}, "--stable_alpha.*alpha <= 2"),
        ({"stable_alpha": 1.5, "power_base": 2.0}, "do not go together"),
        ({"mixture_weights": [1.0], "mixture_scales": [1.0], "num_components": 3}, "do not go together"),
        ({"method": "ncsnv2", "stable_alpha": 1.5}, r"\['--stable_alpha'\] mean nothing for --method ncsnv2"),
        ({"method": "vdm"}, "--method must be one of gm-sgm, ncsnv2, cld, ddpm, got 'vdm'"),
        ({"push_to_hub": True, "hub_model_id": "name"}, "--hub_model_id <user>/<name>, got 'name'"),
        ({"report_to": "wandb"}, "--report_to wandb: the package is not installed; pip install wandb"),
    ],
)
def test_bad_options_are_named_with_what_would_be_right(options, said, monkeypatch):
    monkeypatch.setattr("diffusers_gm.training.options.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=said):
        arguments(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sigma_min": 90.0}, "--sigma_min 90.0 must be smaller than --sigma_max 80.0"),
        ({"sigma_min": 10.0, "prediction_type": "epsilon"}, "10.0 must be smaller than --sigma_max 9.6299"),
        ({"num_train_timesteps": "1"}, "--num_train_timesteps must be at least 2, got 1"),
        (
            {"max_train_steps": 10, "lr_warmup_steps": 10},
            "--lr_warmup_steps 10 must be smaller than the 10 steps",
        ),
    ],
)
def test_options_that_do_not_fit_the_data(options, said):
    with pytest.raises(ValueError, match=said):
        plan_for(arguments(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_out_channels": [8] * 5}, "--resolution 8 must be a multiple of 16"),
        ({"attention_resolutions": [8, 3]}, r"--attention_resolutions \[3\] .* any of \[8, 4\]"),
    ],
)
def test_networks_that_do_not_fit_the_images(options, said):
    args = arguments(**options)
    with torch.random.fork_rng(), pytest.raises(ValueError, match=said):
        fit_unet(new_unet(args, 8, 1), args, 8)


def test_names_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match="--train_data_dir .* is not UTF-8: rename it"):
        arguments(train_data_dir=os.fsdecode(b"photos-\xfc"))


def test_samplers_that_cannot_run_fail_before_the_training():
    args = arguments(algorithm_type="gibbs")
    with pytest.raises(ValueError, match="unknown algorithm_type 'gibbs'"):
        build_scheduler(args, plan_for(args))
    args = arguments(method="ncsnv2", validation_inference_steps=3, num_langevin_steps=5)
    with pytest.raises(ValueError, match="num_inference_steps"):
        build_scheduler(args, plan_for(args))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hub_model_id": "me/x", "hub_private_repo": True}, "--hub_model_id, --hub_private_repo: nothing is uploaded"),
        ({"num_langevin_steps": 5}, "--num_langevin_steps is for .*: ancestral has no use for it"),
        ({"method": "ncsnv2", "algorithm_type": "explore", "num_langevin_steps": 5}, "explore has no use for it"),
        ({"algorithm_type": "ode", "calibrate": "fast"}, "--algorithm_type: .* --calibrate saves another sampler"),
        ({"algorithm_type": "exponential", "num_langevin_steps": 5, "step_size": 0.1}, None),
        ({"method": "ddpm"}, None),
    ],
)
def test_options_without_effect_are_said(options, said):
    args = arguments(**options)
    found = without_effect(args, build_scheduler(args, plan_for(args)).config.get("algorithm_type"))
    assert re.search(said, *found) if said else not found


def test_identical_images_have_no_largest_distance():
    with pytest.raises(ValueError, match="measured: are all images the same"):
        plan_for(arguments(timestep_sampling="log_uniform", train_batch_size=2), torch.zeros(4, 1, 8, 8))


def test_defaults_for_digits():
    args = arguments()
    plan = plan_for(args)
    with torch.random.fork_rng():
        assert new_unet(args, 8, 1).num_parameters() == 651_041
    assert (args.dataset_name, args.train_batch_size, args.lr_scheduler) == ("digits", 128, "one_cycle")
    assert (plan.max_train_steps, plan.learning_rate, plan.validation_inference_steps) == (1500, 2e-3, 50)
    mixture = build_mixture(args)
    assert len(mixture) == 2
    assert mixture.moment(2) == pytest.approx(1)
    assert float(mixture.scales[1] / mixture.scales[0]) == pytest.approx(2)


def test_mixtures_from_options():
    explicit = build_mixture(arguments(mixture_weights=[0.5, 0.5], mixture_scales=[1.0, 3.0]))
    assert explicit.scales.tolist() == pytest.approx([5**-0.5, 3 / 5**0.5])
    stable = build_mixture(arguments(stable_alpha=1.5, num_components=4, mixture_per_element=True))
    assert (len(stable), stable.per_element) == (4, True)
    power = build_mixture(arguments(power_alpha=1.0, power_base=3.0, num_components=3))
    assert float(power.scales[2] / power.scales[0]) == pytest.approx(9)


def test_length_and_ladder_from_the_data():
    plan = plan_for(arguments(num_train_epochs=2, train_batch_size=100, gradient_accumulation_steps=2))
    assert plan.max_train_steps == math.ceil(2 * 1437 / 200)
    plan = plan_for(arguments(num_train_timesteps="auto", sigma_max="20", sigma_min=0.02))
    assert plan.sigma_max == 20
    assert plan.num_train_timesteps == 1 + round(math.log(1000) / math.log(ladder_ratio(64)))


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2"])
def test_the_saved_scheduler_describes_network_and_sampler(method):
    args = arguments(
        method=method,
        scale_input=False,
        algorithm_type="langevin",
        num_langevin_steps=2,
        step_size_criterion="prop3",
    )
    config = build_scheduler(args, plan_for(args)).config
    assert (config["sigma_min"], config["sigma_max"], config["num_train_timesteps"]) == (0.01, 9.6299, 1000)
    assert (config["noise_space"], config["scale_input"], config["prediction_type"]) == (
        "ve",
        False,
        "epsilon",
    )
    assert (config["algorithm_type"], config["num_langevin_steps"]) == ("langevin", 2)
    assert config["step_size_criterion"] == "prop3"
    args = arguments(method=method, algorithm_type="langevin", step_size=6e-6)
    assert build_scheduler(args, plan_for(args)).config["step_size"] == 6e-6


def test_a_new_network_is_that_of_the_options():
    options = {"block_out_channels": [8, 16], "layers_per_block": 3, "attention_resolutions": [4], "dropout": 0.3}
    args = arguments(**options, gradient_checkpointing=True, channels_last=True)
    with torch.random.fork_rng():
        unet = fit_unet(new_unet(args, 8, 1), args, 8)
        told, photos = new_unet(arguments(), 8, 1).config, new_unet(arguments(), [16, 64], 3).config
    assert (unet.config["layers_per_block"], unet.config["dropout"]) == (3, 0.3)
    assert unet.config["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D")
    assert unet.config["up_block_types"] == ("AttnUpBlock2D", "UpBlock2D")
    assert unet.is_gradient_checkpointing
    assert unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    # Of small images no attention, of larger ones where the shorter side is from 8 to 16: of 16, 8 and 4 at two.
    assert (told["layers_per_block"], told["down_block_types"]) == (1, ("DownBlock2D",) * 2)
    assert photos["layers_per_block"] == 2
    assert photos["down_block_types"] == ("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")


def test_every_option_has_a_help_text(train, capsys):
    with pytest.raises(SystemExit) as stop:
        train("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in fields(TrainingArguments):
        assert f"--{field.name}" in printed
        assert re.search(r"\.( \[[^]]+\])?$", field.metadata["help"])


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2"])
def test_velocity_networks_are_read_as_what_they_learned(train, tmp_path, method):
    """The loss of the saved pipeline's own denoiser, not of another reading of the same numbers."""
    words = f"--dataset_name digits --method {method} --prediction_type v_prediction --max_train_steps 1"
    train(SMALL, words, "--output_dir", tmp_path / "out")
    pipeline = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline}[method].from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert "it learns the velocity" in (tmp_path / "out" / "README.md").read_text()
    args = arguments(method=method, prediction_type="v_prediction", max_train_steps=1)
    images, space = data.split_digits()[0][:4], pipeline.scheduler.noise_space

    def perfect(model_input, t):
        sigma = space.sigma(t).float().view(-1, 1, 1, 1)
        y = model_input / space.alpha(sigma)
        return SimpleNamespace(sample=space.output(images, (y - images) / sigma, sigma, "v_prediction"))

    with torch.random.fork_rng():
        loss = Objective(args, plan_for(args), pipeline.scheduler)(perfect, images)
    assert float(loss.max()) < 1e-6
    with pytest.raises(ValueError, match="--objective score answers a score"):
        arguments(objective="score", prediction_type="v_prediction")


def test_unknown_names_are_refused(train, capsys):
    for option in ("--method vdm", "--objective x", "--lr_scheduler x", "--report_to x"):
        with pytest.raises(SystemExit) as stop:
            train(option)
        assert stop.value.code == 2
        assert option.split()[0] in capsys.readouterr().err


# --- Parts ---


def test_an_unconditional_network_ignores_the_timestep_wherever_it_runs(train, tmp_path, generator):
    options = TINY.replace("--max_train_steps 2", "--max_train_steps 4 --adam_weight_decay 0.1")
    train(options, "--method ncsnv2 --conditioning none --learning_rate 0.1 --output_dir", tmp_path / "out")
    pipeline = NCSNv2Pipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config["prediction_type"] == "epsilon"
    images = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        outputs = [pipeline.unet(images, t).sample for t in (0, 500, 999)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[0].abs().max() > 0
    conditional = small_unet()
    with torch.no_grad():
        assert not torch.equal(conditional(images, 0).sample, conditional(images, 999).sample)


def test_averaged_weights_are_used_inside_and_only_there():
    unet = small_unet().train()
    before = unet.conv_in.weight.detach().clone()
    ema = EMAModel(unet.parameters(), foreach=True)
    with torch.no_grad():
        ema.shadow_params[0].add_(1)
    with contextlib.suppress(KeyboardInterrupt), averaged_weights(unet, ema):
        assert torch.equal(unet.conv_in.weight, before + 1)
        assert not unet.training
        raise KeyboardInterrupt
    assert torch.equal(unet.conv_in.weight, before)
    assert unet.training


def rates_of(args):
    """Learning rates of all steps."""
    plan = plan_for(args)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    schedule, rates = build_lr_scheduler(args, plan, optimizer), []
    for _ in range(args.max_train_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", ["one_cycle", "cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_learning_rates_rise_to_the_peak_and_last_to_the_end(name, steps):
    rates = rates_of(arguments(lr_scheduler=name, max_train_steps=steps, learning_rate=0.5))
    assert all(0 <= rate <= 0.5 for rate in rates)
    if steps == 50:
        assert max(rates) == pytest.approx(0.5)
        assert rates.index(max(rates)) == {"one_cycle": 14}.get(name, 5)
        assert rates[-1] == 0.5 if name.startswith("constant") else rates[-1] < 0.03


def test_cycles_and_powers_of_learning_rates():
    options = {"max_train_steps": 40, "learning_rate": 0.5, "lr_warmup_steps": 0}
    once, twice = (rates_of(arguments(lr_scheduler="cosine_with_restarts", lr_num_cycles=n, **options)) for n in (1, 2))
    assert twice[:20] == pytest.approx(once[::2])
    assert twice[20:] == pytest.approx(once[::2])
    straight, bent = (rates_of(arguments(lr_scheduler="polynomial", lr_power=n, **options)) for n in (1.0, 2.0))
    assert bent == pytest.approx([0.5 * (rate / 0.5) ** 2 for rate in straight], abs=1e-5)


def test_processes_that_do_not_know_of_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but accelerate sees 1"):
        check_processes(type("Alone", (), {"num_processes": 1})())


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_networks_are_not_spread_over_processes(train, tmp_path, monkeypatch, kind):
    """Asked for by the launcher, and ignored by accelerate on CPUs."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"{kind}, which spreads a network .* launch with --multi_gpu"):
        train(TINY, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


CONFIGS = {
    "FSDP": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "NO_WRAP"}},
    "DEEPSPEED": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_files_that_spread_networks_are_refused_in_a_sentence(tmp_path, kind):
    """By a real launcher, of two processes; for DeepSpeed beside a package of that name, which it looks for."""
    config = {"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "machine_rank": 0, "num_machines": 1,
              "mixed_precision": "no", "use_cpu": True, "main_process_port": 29651} | CONFIGS[kind]  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    runner = tmp_path / "path" / "deepspeed" / "launcher" / "runner.py"
    runner.parent.mkdir(parents=True)
    runner.write_text("DEEPSPEED_ENVIRONMENT_NAME = 'environment'")
    (tmp_path / "path" / "deepspeed" / "__init__.py").write_text("__version__ = '0.18.0'")
    (tmp_path / "path" / "deepspeed-0.18.0.dist-info").mkdir()
    (tmp_path / "path" / "deepspeed-0.18.0.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.18.0\n")
    out = tmp_path / "out"
    words = ["launch", "--config_file", tmp_path / "config.yaml", ROOT / "train_gm_sgm.py", *TINY.split()]
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            *map(str, words),
            "--output_dir",
            tmp_path / "out",
        ],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert f"train_gm_sgm.py: error: accelerate is set up for {kind}, which spreads a network" in ended.stderr
    assert "exitcode  : 2" in ended.stderr, "no traceback of the training"
    assert not out.exists()


@pytest.mark.parametrize("words", ["--cld_loss hsm", "--cld_weighting ell", "--cld_mixed_score", "--cld_loss dsm"])
def test_naming_the_published_loss_of_cld_asks_for_it_whatever_its_default(words):
    assert OptionParser("").parse(f"--method cld {words}".split()).objective == "score"
    assert OptionParser("").parse(["--method", "cld"]).objective == "denoiser"


def test_a_constant_rate_has_no_warm_up():
    assert plan_for(arguments(lr_scheduler="constant", max_train_steps=100)).lr_warmup_steps == 0
    assert plan_for(arguments(lr_scheduler="constant_with_warmup", max_train_steps=100)).lr_warmup_steps == 10
    with pytest.raises(ValueError, match="--lr_scheduler constant has none, constant_with_warmup has"):
        plan_for(arguments(lr_scheduler="constant", lr_warmup_steps=3, max_train_steps=100))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr_num_cycles 2 --lr_scheduler cosine", "means nothing without --lr_scheduler cosine_with_restarts"),
        ("--lr_power 2", "--lr_power means nothing without --lr_scheduler polynomial"),
        ("--class_dropout 0.2", "--class_dropout means nothing without --class_conditional"),
        ("--shuffle_buffer_size 9", "--shuffle_buffer_size means nothing without --streaming"),
        ("--revision main", "--revision means nothing without --model_name_or_path or --vae"),
        ("--config digits --config=cld-paper", "--config: one recipe at a time"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        OptionParser("").parse(words.split())
    assert message in capsys.readouterr().err
