"""Critically-damped Langevin diffusion from the options to the card, the demo and the studies."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from training import SMALL, WEIGHTS, arguments, load, plan_for, same_state

from diffusers_gm import CalibratedMultistepScheduler, CLDPipeline, CLDSSCSScheduler, data
from diffusers_gm.pictures import image_grid
from diffusers_gm.processes.cld import CLD
from diffusers_gm.studies import cld, cld_likelihood, cld_squared, cld_target, cld_training, demo
from diffusers_gm.studies.report import Report
from diffusers_gm.training.draws import Draws
from diffusers_gm.training.folder import read_log
from diffusers_gm.training.network import native_shape, new_unet
from diffusers_gm.training.objective import Objective, build_scheduler
from diffusers_gm.training.samples import sample_images

FOUR_STEPS = f"{SMALL} --method cld --max_train_steps 4 --checkpointing_steps 2 --validation_steps 0 --logging_steps 1"


@pytest.mark.parametrize(
    "options",
    ["--dropout 0.1 --random_flip --dequantize 17", "--cld_feed_companion", "--cld_loss dsm --no_cld_mixed_score"],
)
def test_resumed_equals_uninterrupted(options, train, tmp_path):
    train(FOUR_STEPS, options, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    train(FOUR_STEPS, options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert same_state(load(tmp_path / "whole" / WEIGHTS), load(tmp_path / "resumed" / WEIGHTS))
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("whole", "resumed")]
    assert losses[1] == losses[0][2:]
    with pytest.raises(ValueError, match=r"--gamma was 0.04 and is 0.25"):
        train(FOUR_STEPS, options, "--gamma 0.25 --output_dir", tmp_path / "x", "--resume_from_checkpoint", checkpoint)


@pytest.fixture
def digits_model(train, tmp_path):
    folder = tmp_path / "digits"
    options = FOUR_STEPS.replace("--checkpointing_steps 2", "--checkpointing_steps 0")
    train(
        options,
        "--mass 1 --beta_0 8 --splitting_order 2 --timestep_spacing quadratic --cld_feed_companion --output_dir",
        folder,
    )
    return folder


def test_the_saved_pipeline_says_what_was_trained(digits_model):
    pipeline = CLDPipeline.from_pretrained(digits_model)
    config = pipeline.scheduler.config
    assert isinstance(pipeline.scheduler, CLDSSCSScheduler)
    assert (pipeline.unet.config["in_channels"], pipeline.unet.config["out_channels"]) == (2, 1)
    assert (config["prediction_type"], config["mass"], config["beta_0"]) == ("cld_edm", 1.0, 8.0)
    assert (config["splitting_order"], config["timestep_spacing"]) == (2, "quadratic")
    grid = image_grid(sample_images(pipeline, 4, batch_size=3, num_inference_steps=4, seed=0))
    assert grid.tobytes() == Image.open(digits_model / "samples.png").tobytes()

    record = json.loads((digits_model / "training_args.json").read_text())
    card = ModelCard.load(digits_model / "README.md")
    assert (record["cld_loss"], record["mass"]) == ("hsm", 1.0)
    assert (record["objective"], record["cld_feed_companion"], record["timestep_sampling"]) == (
        "denoiser",
        True,
        "log_normal",
    )
    assert (config["sigma_data"], config["sigma_max"]) == (record["sigma_data"], record["sigma_max"]) == (1, 80)
    for name in ("mixture_weights", "prediction_type", "conditioning"):
        assert record[name] is None, "CLD has none"
        assert f"`{name}`" not in card.text
    assert "CLDPipeline.from_pretrained" in card.text
    assert "critically-damped" in card.text
    assert "the mass M is 1 and gamma 0.04, so variances 0.04 and 1." in card.text
    assert "`cat([x, v], 1)`" in card.text
    assert "log-normal noise levels from 0.01 to 80" in card.text.replace("\n", " ")
    assert "$" not in card.text


def test_the_demo_draws_and_measures(digits_model, capsys):
    words = [str(digits_model), "--num_samples", "4", "--calls", "5", "10"]
    demo.main(words)
    for name in ("digits.png", "forward_noise.png", "results.png"):
        assert Image.open(digits_model / name).width > 300
    cells = json.loads((digits_model / "results.json").read_text())["cells"]
    assert {cell["scheduler"] for cell in cells} == {"sscs", "sscs, order 2", "euler_maruyama", "probability_flow"}
    assert all(cell["scores"]["sliced W2"] > 0 for cell in cells)
    said = capsys.readouterr().out
    assert "| sscs, order 2 |" in said
    card = ModelCard.load(digits_model / "README.md")
    assert "| sscs, order 2 | 10 |" in card.text
    assert len(card.data.eval_results) == 8

    # Again draws and measures nothing that is there; but what is not.
    record = json.loads((digits_model / "results.json").read_text())
    record["cells"].pop(3)
    (digits_model / "results.json").write_text(json.dumps(record))
    demo.main(words)
    assert capsys.readouterr().out.count("sampled in") == 1


@pytest.mark.parametrize("pipeline", ["GMSGMPipeline", "NCSNv2Pipeline", "CLDPipeline"])
def test_every_sampler_of_the_demo_is_one_of_the_network(pipeline):
    """Also where its own scheduler is calibrated, which is then one of them."""
    own = demo.OF_PIPELINES[pipeline]()
    for scheduler in (own, CalibratedMultistepScheduler.from_config(own.config)):
        found = demo.samplers(type(pipeline, (), {"scheduler": scheduler})())
        assert set(found) - {"calibrated"} == set(demo.SAMPLERS[type(own)])
        assert ("calibrated" in found) == (scheduler is not own)
        for name, changed in found.items():
            changed.set_timesteps(50)
            assert len(changed.timesteps) == 50, name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"method": "cld", "objective": "score", "sigma_max": "5"},
            r"\['--sigma_max'\] mean nothing for --objective score",
        ),
        ({"method": "cld", "objective": "denoiser", "cld_loss": "dsm"}, "describe the published loss"),
        ({"method": "cld", "objective": "score", "timestep_sampling": "log_normal"}, "uniform times"),
        ({"method": "cld", "sigma_max": "0.001"}, "must be smaller than --sigma_max"),
        ({"timestep_sampling": "uniform", "p_mean": 1.0}, "are for --timestep_sampling log_normal"),
        ({"prediction_type": "epsilon", "sigma_data": 1.0}, "is for --prediction_type edm"),
        ({"prediction_type": "edm", "scale_input": False}, "leave out --no_scale_input"),
        (
            {"method": "cld", "stable_alpha": 1.5, "prediction_type": "edm"},
            r"--prediction_type', '--stable_alpha'\] mean nothing",
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
        plan_for(arguments(**options))


def test_the_default_grid_is_the_best_for_trained_networks():
    for objective, grid in (("score", "quadratic"), ("denoiser", "even")):
        args = arguments(method="cld", objective=objective)
        assert build_scheduler(args, plan_for(args)).config["timestep_spacing"] == grid


def test_samplers_that_cannot_run_fail_before_the_training():
    for options, said in (
        ({"algorithm_type": "langevin"}, "unknown algorithm_type 'langevin'"),
        ({"splitting_order": 3}, "splitting_order must be 1, 2 or None"),
        ({"timestep_spacing": "trailing"}, "'uniform', 'quadratic', 'even', 'log_snr' or 'karras'"),
    ):
        args = arguments(method="cld", cld_feed_companion=True, **options)
        with pytest.raises(ValueError, match=said):
            build_scheduler(args, plan_for(args))


def test_networks_need_twice_the_channels():
    args = arguments(method="cld", cld_feed_companion=True, block_out_channels=[8, 16])
    with torch.random.fork_rng():
        unet = new_unet(args, 8, 3)
    assert native_shape(unet, args) == (8, 3)
    with pytest.raises(ValueError, match="--method cld needs a network from .* this one goes from 6 to 3"):
        native_shape(unet, arguments(method="cld"))
    with pytest.raises(ValueError, match="--method gm-sgm needs a network .* goes from 6 to 3"):
        native_shape(unet, arguments())
    with torch.random.fork_rng():
        ordinary = new_unet(arguments(block_out_channels=[8, 16]), 8, 1)
    with pytest.raises(ValueError, match="--method cld needs a network from 2 channels to 1 or 6"):
        native_shape(ordinary, args)


@pytest.mark.parametrize(
    "options",
    [{}, {"cld_loss": "dsm"}, {"cld_mixed_score": False}, {"cld_weighting": "likelihood"}, {"dequantize": 17}],
)
def test_the_objective_takes_times_of_the_whole_interval(options):
    args = arguments(method="cld", objective="score", **options)
    plan = plan_for(args)
    seen = []

    def network(model_input, labels):
        seen.append(labels)
        return SimpleNamespace(sample=torch.zeros_like(model_input[:, :1]))

    images = data.split_digits()[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = Objective(args, plan, build_scheduler(args, plan))(network, images)
    assert loss.shape == (len(images),)
    assert loss.isfinite().all()
    # Uniform on [1e-5, 1], labels in units of 1 / 1000.
    (labels,) = seen
    assert 0.01 <= labels.min() < labels.max() <= 1000
    assert abs(labels.mean() - 500) < 5 * 1000 / (12 * len(images)) ** 0.5


@pytest.mark.parametrize("options", [{}, {"cld_loss": "dsm"}, {"cld_weighting": "likelihood"}])
def test_the_published_loss_is_that_of_the_options(options, monkeypatch):
    args = arguments(method="cld", objective="score", gamma=0.09, mass=0.5, **options)
    plan, seen = plan_for(args), []
    monkeypatch.setattr("diffusers_gm.training.methods.cld.cld_loss", lambda *given: seen.append(given))
    images = data.split_digits()[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Objective(args, plan, build_scheduler(args, plan))(lambda *_: None, images)
    *_, prediction_type, velocity, weighting, unit = seen[0]
    assert (prediction_type, weighting, unit) == ("cld_mixed", args.cld_weighting, 1000)
    assert (velocity is None) == (args.cld_loss == "hsm")
    if velocity is not None:  # of variance gamma M: five standard errors
        assert velocity.shape == images.shape
        assert abs(float(velocity.square().mean()) / 0.045 - 1) < 5 * (2 / images.numel()) ** 0.5


def test_snr_weights_reach_a_network_that_sees_the_companion(monkeypatch):
    args = arguments(method="cld", cld_feed_companion=True, snr_gamma=5.0)
    plan, seen = plan_for(args), []
    monkeypatch.setattr("diffusers_gm.training.methods.cld.denoising_loss", lambda *given: seen.append(given[-1]))
    images = data.split_digits()[0][:4]
    Objective(args, plan, build_scheduler(args, plan))(lambda *_: None, images, Draws.always_the_same(images))
    assert seen == [5.0]


@pytest.mark.parametrize("method", ["cld", "gm-sgm", "ncsnv2"])
def test_dequantised_training_sees_the_images_with_noise_of_a_level(method, monkeypatch):
    args = arguments(method=method, dequantize=17)
    images = data.split_digits()[0]
    seen = []
    for name in ("cld.denoising_loss", "ladder.denoising_loss"):
        monkeypatch.setattr(f"diffusers_gm.training.methods.{name}", lambda network, images, *_: seen.append(images))
    plan = plan_for(args)
    objective = Objective(args, plan, build_scheduler(args, plan))
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            objective(lambda *_: None, images)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    # Uniform on [-1/16, 1/16): five standard errors of mean and mean square.
    noise, n = (seen[0] - images) * 16, images.numel()
    assert -1.001 <= noise.min() < -0.999 < 0.999 < noise.max() <= 1.001
    assert abs(noise.mean()) < 5 * (1 / 3 / n) ** 0.5
    assert abs(noise.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5


def test_only_images_of_the_levels_are_dequantised():
    for levels, said in ((16, "--dequantize 16: the images hold .* none of 16 equal levels"), (1, "at least 2")):
        with pytest.raises(ValueError, match=said):
            plan_for(arguments(dequantize=levels))
    plan_for(arguments(dequantize=33))  # every second level


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
    assert cld_squared.terminal_variance(scheduler, 50) == pytest.approx(expected, abs=5.1e-5)


def test_critical_damping_is_the_fastest():
    clocks = torch.tensor([3.0, 4.0], dtype=torch.float64)
    distances = {d: cld.distance_to_equilibrium(CLD(damping=d), clocks)[-1] for d in (0.25, 0.5, 1.0, 2.0, 4.0)}
    assert min(distances, key=distances.get) == 1.0


@pytest.mark.parametrize("mass", [1 / 16, 1.0])
def test_mass_acts_through_beta_over_its_root_alone(mass):
    times = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    scaled, default = CLD(beta_0=8 * mass**0.5, mass=mass), CLD()
    torch.testing.assert_close(scaled.sigma(scaled.clock(times)), default.sigma(default.clock(times)))


def test_vp_states_keep_the_variance_of_unit_data(generator):
    times = torch.rand(64, generator=generator, dtype=torch.float64)
    zero, one = torch.zeros(64, 1, 1, 1), torch.ones(64, 1, 1, 1)
    (alpha, s), (noise, _) = cld_target.vp_state(one, times, zero), cld_target.vp_state(zero, times, one)
    torch.testing.assert_close(alpha**2 + s**2, one)
    assert torch.equal(noise, s)


def test_jacobian_norm_of_a_linear_map(generator):
    """`E |A^T e|^2 = |A|^2`, to five standard errors."""
    matrix = torch.randn(3, 6, generator=generator)
    squares = cld_target.jacobian_norm(lambda x: x @ matrix.T, torch.zeros(4000, 6), generator) ** 2
    assert abs(squares.mean() - matrix.square().sum() / 3) < 5 * squares.std() / 4000**0.5


@pytest.mark.parametrize("study", sorted(cld.STUDIES.keys() - {"squared"}))  # which has a test of its own
def test_studies_leave_a_report_with_a_picture_and_a_verdict(study, tmp_path, capsys):
    tiny = ["--steps", "2", "--batch", "8", "--num_samples", "4", "--calls", "5"]
    cld.main([study, *tiny, "--solver_steps", "2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(rf"{study}: .* torch {re.escape(torch.__version__)}", printed)
    report = Report.read(tmp_path / f"cld_{study}.json")
    assert report.verdict in printed
    assert all(len(row) == len(t.header) for t in report.tables for row in t.rows)
    (picture,) = report.pictures
    assert Image.open(tmp_path / picture).width > 250


def test_a_study_that_was_interrupted_goes_on(tmp_path, capsys):
    """Killed where its third training has ended: the fourth is left, and the cells of two."""
    tiny = ["--steps", "2", "--batch", "8", "--num_samples", "4", "--calls", "5", "--output", str(tmp_path)]
    command = [sys.executable, "-u", "-m", "diffusers_gm.studies.cld", "losses", *tiny]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as study:
        trainings = 0
        for line in study.stdout:
            trainings += "trained cld" in line
            if trainings == 3:
                study.kill()
                break
    assert not (tmp_path / "cld_losses.json").exists()
    cld.main(["losses", *tiny])
    said = capsys.readouterr().out
    assert 1 <= said.count("trained cld") <= 2, "the third may not have been written"
    assert said.count("sampled in") == 2
    assert (tmp_path / "cld_losses.json").exists()


def test_verdicts_follow_the_figures():
    errors = {"a": [1.0, 2.0, 1.0], "b": [2.0, 1.0, 1.1]}
    said = cld_training.against("a", "b", errors, [5, 10, 20])
    assert said == "b over a: 2.00 at 5, 0.50 at 10, 1.10 at 20; a is better at 5 calls and worse at 10 calls."
    assert "no difference" in cld_training.against("a", "a", errors, [5, 10, 20])
    ratios = torch.full((1, 3, 3), 1.5)
    assert "does not matter" in cld_training.verdict_on_robustness(ratios, [10])
    ratios[0, 2, 0] = 3.0
    said = cld_training.verdict_on_robustness(ratios, [10])
    assert "to 3.00 (gamma 1, mass 0.0625)" in said
    assert "still matters" in said
    row = [0.5, 1.0, 1.0, 0.30, 0.1, 0.35, 0.1, 1.0, 1.1]
    said = cld_target.verdict_on_target([row, row])
    assert "as smooth, and closer to the best" in said
    bits = {"plain": (2.0, 0.1), "other": (2.35, 0.1), "third": (3.0, 0.1)}
    said = cld_likelihood.verdict_on_likelihood(bits, {"line": 2.5}, dict.fromkeys(bits, 1.0))
    assert "2.000 +- 0.100 bits, better than line" in said
    assert said.count("not shown to be better than line") == 2


def test_independent_pixels_know_what_they_have_seen():
    """17 images, all levels once: (1 + 1) / 34 each is uniform. One level only: 18 / 34 for it."""
    levels = torch.linspace(-1, 1, 17).view(17, 1, 1, 1)
    bits = cld_likelihood.independent_pixels(levels, levels)
    torch.testing.assert_close(bits, torch.full((17,), math.log2(17), dtype=torch.float64))
    same = cld_likelihood.independent_pixels(levels[:1].expand(17, 1, 1, 1), levels[:1])
    assert float(same) == pytest.approx(-math.log2(18 / 34))


def test_squared_distances_of_gaussians():
    """SSCS is ahead by about the published factor (2.6 at 50 calls) where data are narrower than the prior, and behind
    where they are wider; the multistep sampler is ahead of both."""
    described = CLDSSCSScheduler(prediction_type="velocity_score")

    def error(name, variance):
        scheduler = cld_squared.scheduler_of(name, described.config)
        return cld_squared.squared_w2(scheduler, 50, [variance])

    assert 2.5 < error(cld_squared.EM, 0.25) / error(cld_squared.SSCS, 0.25) < 3.5
    assert error(cld_squared.EM, 4.0) < error(cld_squared.SSCS, 4.0) / 10
    assert error("multistep with corrector", 0.25) < error(cld_squared.SSCS, 0.25) / 100
    assert cld_squared.with_root(4.0) == "4 (2)"


def test_squared_distances_on_the_digits(tmp_path):
    words = ["squared", "--steps", "1", "--batch", "4", "--num_samples", "80", "--calls", "10"]
    cld.main([*words, "--output", str(tmp_path)])
    report = Report.read(tmp_path / "cld_squared.json")
    assert [len(table.rows) for table in report.tables[-2:]] == [len(cld_squared.SAMPLERS)] * 2
    assert "variance 4" in report.verdict
    assert (tmp_path / report.pictures[0]).is_file()


def test_the_study_of_likelihood_takes_up_what_it_has_measured(tmp_path):
    words = ["likelihood", "--steps", "1", "--batch", "4", "--num_samples", "4", "--solver_steps", "2"]
    reports = []
    for _ in range(2):
        cld.main([*words, "--output", str(tmp_path)])
        reports.append(Report.read(tmp_path / "cld_likelihood.json"))
    assert reports[0] == reports[1]
    assert [row[0] for row in reports[0].tables[0].rows][: len(cld_likelihood.TRAININGS)] == list(
        cld_likelihood.TRAININGS
    )
