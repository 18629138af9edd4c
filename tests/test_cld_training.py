"""Critically-damped Langevin diffusion from the options to the card, the demo and the studies."""
# ruff: noqa: F401, F811 - fixtures of the other file

import json
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_training import SMALL, WEIGHTS, arguments, load, no_accelerator_left_behind, plan_for, same_state, train

from diffusers_gm import CLDPipeline, CLDSSCSScheduler, data, demo, hub
from diffusers_gm import training as tr
from diffusers_gm.processes.cld import CLD
from diffusers_gm.studies import cld as studies

FOUR_STEPS = f"{SMALL} --method cld --max_train_steps 4 --checkpointing_steps 2 --validation_steps 0 --logging_steps 1"


@pytest.mark.parametrize("options", ["--dropout 0.1 --random_flip", "--cld_loss dsm --no_cld_mixed_score"])
def test_resumed_equals_uninterrupted(options, train, tmp_path):
    train(FOUR_STEPS, options, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    train(FOUR_STEPS, options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert same_state(load(tmp_path / "whole" / WEIGHTS), load(tmp_path / "resumed" / WEIGHTS))
    losses = [[entry["loss"] for entry in tr.read_log(tmp_path / name)] for name in ("whole", "resumed")]
    assert losses[1] == losses[0][2:]
    with pytest.raises(ValueError, match=r"--gamma was 0.04 and is 0.25"):
        train(FOUR_STEPS, options, "--gamma 0.25 --output_dir", tmp_path / "x", "--resume_from_checkpoint", checkpoint)


@pytest.fixture
def digits_model(train, tmp_path):
    folder = tmp_path / "digits"
    options = FOUR_STEPS.replace("--checkpointing_steps 2", "--checkpointing_steps 0")
    train(options, "--mass 1 --beta_0 8 --splitting_order 2 --timestep_spacing quadratic --output_dir", folder)
    return folder


def test_the_saved_pipeline_says_what_was_trained(digits_model):
    pipeline = CLDPipeline.from_pretrained(digits_model)
    config = pipeline.scheduler.config
    assert isinstance(pipeline.scheduler, CLDSSCSScheduler)
    assert (pipeline.unet.config["in_channels"], pipeline.unet.config["out_channels"]) == (2, 1)
    assert (config["prediction_type"], config["mass"], config["beta_0"]) == ("cld_mixed", 1.0, 8.0)
    assert (config["splitting_order"], config["timestep_spacing"]) == (2, "quadratic")
    train, _ = data.split_digits()
    assert config["data_variance"] == pytest.approx(train.var(0).mean().item(), abs=1e-4)
    grid = tr.image_grid(tr.sample_images(pipeline, 4, batch_size=3, num_inference_steps=4, seed=0))
    assert grid.tobytes() == Image.open(digits_model / "samples.png").tobytes()

    record = json.loads((digits_model / "training_args.json").read_text())
    card = ModelCard.load(digits_model / "README.md")
    assert (record["cld_loss"], record["mass"]) == ("hsm", 1.0)
    for name in ("sigma_max", "mixture_weights", "objective", "conditioning"):
        assert record[name] is None, "CLD has none"
        assert f"`{name}`" not in card.text
    assert "CLDPipeline.from_pretrained" in card.text
    assert "critically-damped" in card.text
    assert "$" not in card.text


def test_the_demo_draws_and_measures(digits_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", str(digits_model), "--num_samples", "4"])
    monkeypatch.setattr(demo, "CALLS", (5, 10))
    monkeypatch.setattr(demo, "GRID", 2)
    monkeypatch.setattr("diffusers_gm.pictures.GRID", 2)
    demo.main()
    for name in ("digits.png", "forward_noise.png", "quality.png"):
        assert Image.open(digits_model / name).width > 300
    cells = json.loads((digits_model / "quality.json").read_text())["digits"]
    assert {cell["sampler"] for cell in cells} == {"sscs", "sscs, order 2", "euler_maruyama", "probability_flow"}
    assert all(cell["ratio"] > 0 for cell in cells)
    assert "| sscs, order 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("scheduler", list(demo.SAMPLERS), ids=lambda cls: cls.__name__)
def test_every_sampler_of_the_demo_is_one_of_the_scheduler(scheduler):
    for name, changed in demo.samplers(scheduler()).items():
        changed.set_timesteps(50)
        assert len(changed.timesteps) == 50, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "cld", "sigma_max": "5"}, r"\['--sigma_max'\] mean nothing for --method cld"),
        (
            {"method": "cld", "stable_alpha": 1.5, "objective": "score"},
            r"--objective', '--stable_alpha'\] mean nothing",
        ),
        ({"method": "cld", "conditioning": "none"}, "--conditioning"),
        ({"method": "cld", "num_train_timesteps": "auto"}, "cld needs a number"),
        ({"method": "cld", "mass": 0.0}, "mass must be positive and finite, got 0.0"),
        ({"method": "cld", "beta_1": -5.0}, r"must be positive on \[0, 1\]"),
        ({"mass": 1.0}, r"\['--mass'\] mean nothing for --method gm-sgm"),
        ({"method": "ncsnv2", "cld_loss": "dsm"}, r"\['--cld_loss'\] mean nothing for --method ncsnv2"),
    ],
)
def test_options_of_other_methods_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        arguments(**options)


def test_the_default_grid_is_the_best_for_trained_networks():
    args = arguments(method="cld")
    assert tr.build_scheduler(args, plan_for(args)).config["timestep_spacing"] == "quadratic"


def test_samplers_that_cannot_run_fail_before_the_training():
    for options, said in (
        ({"algorithm_type": "langevin"}, "unknown algorithm_type 'langevin'"),
        ({"splitting_order": 3}, "splitting_order must be 1 or 2"),
        ({"timestep_spacing": "karras"}, "'uniform', 'quadratic' or 'log_snr'"),
    ):
        args = arguments(method="cld", **options)
        with pytest.raises(ValueError, match=said):
            tr.build_scheduler(args, plan_for(args))


def test_every_excluded_option_exists():
    names = {f.name for f in fields(tr.TrainingArguments)} | {f.name for f in fields(tr.Plan)}
    for excluded in tr.options.NOT_FOR.values():
        assert excluded <= names


def test_networks_need_twice_the_channels():
    args = arguments(method="cld", block_out_channels=[8, 16])
    with torch.random.fork_rng():
        unet = tr.new_unet(args, 8, 3)
    assert tr.native_shape(unet, "cld") == (8, 3)
    with pytest.raises(ValueError, match="--method gm-sgm needs a network .* goes from 6 to 3"):
        tr.native_shape(unet, "gm-sgm")
    with torch.random.fork_rng():
        ordinary = tr.new_unet(arguments(block_out_channels=[8, 16]), 8, 1)
    with pytest.raises(ValueError, match="--method cld needs a network from 2 or 6 channels"):
        tr.native_shape(ordinary, "cld")


@pytest.mark.parametrize(
    "options", [{}, {"cld_loss": "dsm"}, {"cld_mixed_score": False}, {"cld_weighting": "likelihood"}]
)
def test_the_objective_takes_times_of_the_whole_interval(options):
    args = arguments(method="cld", **options)
    plan = plan_for(args)
    seen = []

    def network(model_input, labels):
        seen.append(labels)
        return SimpleNamespace(sample=torch.zeros_like(model_input[:, :1]))

    images = data.split_digits()[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = tr.build_objective(args, plan, tr.build_scheduler(args, plan))(network, images)
    assert loss.shape == (len(images),)
    assert loss.isfinite().all()
    # Uniform on [1e-5, 1], labels in units of 1 / 1000.
    (labels,) = seen
    assert 0.01 <= labels.min() < labels.max() <= 1000
    assert abs(labels.mean() - 500) < 5 * 1000 / (12 * len(images)) ** 0.5


def test_hub_knows_the_method():
    assert "cld" in hub.METHOD_NAMES


# --- Studies ---


@pytest.mark.parametrize(
    ("algorithm", "spacing", "expected"),
    [
        ("euler_maruyama", "uniform", 0.2801),
        ("euler_maruyama", "quadratic", 0.2662),
        ("sscs", "uniform", 0.2280),
        ("sscs", "quadratic", 0.2410),
    ],
)
def test_terminal_variance_of_the_study(algorithm, spacing, expected):
    scheduler = CLDSSCSScheduler(prediction_type="velocity_score", algorithm_type=algorithm, timestep_spacing=spacing)
    assert studies.terminal_variance(scheduler, 50) == pytest.approx(expected, abs=5.1e-5)


def test_critical_damping_is_the_fastest():
    clocks = torch.tensor([3.0, 4.0], dtype=torch.float64)
    distances = {d: studies.distance_to_equilibrium(CLD(damping=d), clocks)[-1] for d in (0.25, 0.5, 1.0, 2.0, 4.0)}
    assert min(distances, key=distances.get) == 1.0


@pytest.mark.parametrize("mass", [1 / 16, 1.0])
def test_mass_acts_through_beta_over_its_root_alone(mass):
    times = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    scaled, default = CLD(beta_0=8 * mass**0.5, mass=mass), CLD()
    torch.testing.assert_close(scaled.sigma(scaled.clock(times)), default.sigma(default.clock(times)))


def test_vp_states_keep_the_variance_of_unit_data(generator):
    times = torch.rand(64, generator=generator, dtype=torch.float64)
    zero, one = torch.zeros(64, 1, 1, 1), torch.ones(64, 1, 1, 1)
    (alpha, s), (noise, _) = studies.vp_state(one, times, zero), studies.vp_state(zero, times, one)
    torch.testing.assert_close(alpha**2 + s**2, one)
    assert torch.equal(noise, s)


def test_jacobian_norm_of_a_linear_map(generator):
    """`E |A^T e|^2 = |A|^2`, to five standard errors."""
    matrix = torch.randn(3, 6, generator=generator)
    squares = studies.jacobian_norm(lambda x: x @ matrix.T, torch.zeros(4000, 6), generator) ** 2
    assert abs(squares.mean() - matrix.square().sum() / 3) < 5 * squares.std() / 4000**0.5


@pytest.mark.parametrize("study", list(studies.STUDIES))
def test_studies_run_and_leave_a_picture(study, tmp_path, capsys):
    tiny = ["--steps", "2", "--batch", "8", "--num_samples", "4", "--calls", "5", "--grids", "log_snr"]
    studies.main([study, *tiny, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(rf"{study}: .* torch {re.escape(torch.__version__)}", printed)
    assert "|---|" in printed
    assert Image.open(tmp_path / f"cld_{study}.png").width > 300
