"""Networks that were trained before: what a training goes on with, and what it says it does not keep."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hub_client import Client
from hub_server import FakeHub
from networks import seeded, tiny_network
from training import SHORT, plan_for

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GaussianMixtureNoise,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    UnconditionalPipeline,
    data,
)
from diffusers_gm.losses import cld_loss
from diffusers_gm.training.draws import Draws
from diffusers_gm.training.methods import levels
from diffusers_gm.training.network import (
    given_unet,
    make_unconditional,
    native_shape,
    with_velocities,
)
from diffusers_gm.training.objective import Objective, build_scheduler, levels_of_network
from diffusers_gm.training.options import TrainingArguments
from diffusers_gm.training.parser import OptionParser

PIPELINES = {"gm-sgm": GMSGMPipeline, "ncsnv2": NCSNv2Pipeline, "cld": CLDPipeline}


def save_ddpm(folder, channels=1, **config):
    network = tiny_network(channels, channels)
    DDPMPipeline(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2", **config)).save_pretrained(folder)
    return network


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_ddpm_network_goes_on_with_its_own_loss(tmp_path, prediction_type):
    """Under Gaussian noise, the loss is that of DDPM: same levels, same labels, same input, same answer."""
    network = save_ddpm(tmp_path, prediction_type=prediction_type)
    ddpm = DDPMPipeline.from_pretrained(tmp_path).scheduler
    args, of_network = levels_of_network(TrainingArguments(method="ncsnv2", model_name_or_path=str(tmp_path)), network)
    plan = plan_for(args)
    scheduler = build_scheduler(args, plan, of_network)
    assert (scheduler.noise_space.kind, plan.num_train_timesteps) == ("vp", 1000)
    assert torch.allclose(scheduler.alphas_cumprod, ddpm.alphas_cumprod)
    images = data.split_digits()[0][:16]
    inputs = []

    def seen(sample, timesteps):
        inputs.append((sample, timesteps))
        return network(sample, timesteps)

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        losses = Objective(args, plan, scheduler, network)(seen, images)
    (sample, timesteps), alphas = inputs[0], ddpm.alphas_cumprod
    root, rest = (alphas[timesteps].sqrt()[:, None, None, None], (1 - alphas[timesteps]).sqrt()[:, None, None, None])
    noise = (sample - root * images) / rest
    assert torch.allclose(ddpm.add_noise(images, noise, timesteps), sample, atol=1e-5)
    velocity = ddpm.get_velocity(images, noise, timesteps)
    target = {"epsilon": noise, "sample": images, "v_prediction": velocity}[prediction_type]
    with torch.no_grad():
        expected = (network(sample, timesteps).sample - target).square().flatten(1).mean(1)
    assert torch.allclose(losses, expected, rtol=1e-3)


BETAS = {
    "short": {"num_train_timesteps": 400, "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0, "variance_type": "fixed_large"},
    "by hand": {"trained_betas": [0.01 * i for i in range(1, 51)]},
    "to pure noise": {"rescale_betas_zero_snr": True},
    "sigmoid": {"beta_schedule": "sigmoid"},
}


@pytest.mark.parametrize("config", BETAS.values(), ids=BETAS)
def test_a_ddpm_network_that_stays_one_keeps_its_betas_and_what_is_clipped(train, tmp_path, config):
    source = DDPMScheduler(**config)
    DDPMPipeline(tiny_network(), source).save_pretrained(tmp_path / "ddpm")
    options = f"{SHORT} --method ddpm --model_name_or_path {tmp_path / 'ddpm'} --output_dir {tmp_path / 'out'}"
    train(options, "--max_train_minutes 1e-9")
    train(options, "--resume_from_checkpoint latest")
    made = DDPMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert torch.equal(made.alphas_cumprod, source.alphas_cumprod)
    for name in ("clip_sample", "clip_sample_range", "variance_type", "prediction_type"):
        assert made.config[name] == source.config[name], name
    record = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert record["num_train_timesteps"] == len(source.alphas_cumprod)
    assert record["ddpm_beta_schedule"] == source.config["beta_schedule"]


@pytest.mark.parametrize(
    "source",
    [PNDMScheduler(skip_prk_steps=True), DPMSolverMultistepScheduler(variance_type="learned_range")],
    ids=["PNDM", "DPM-Solver"],
)
def test_what_the_scheduler_of_a_ddpm_network_does_not_say_is_the_method_s_own(tmp_path, source):
    DDPMPipeline(tiny_network(), source).save_pretrained(tmp_path)
    args = OptionParser("").parse(["--method", "ddpm", "--model_name_or_path", str(tmp_path)])
    args, of_network = levels_of_network(args, tiny_network())
    config = build_scheduler(args, plan_for(args), of_network).config
    assert config["clip_sample"] is True
    assert config["variance_type"] == "fixed_small"


def test_a_network_without_a_name_for_its_betas_has_linear_ones(tmp_path):
    UnconditionalPipeline(tiny_network(), GMLangevinScheduler(noise_space="vp")).save_pretrained(tmp_path)
    args = OptionParser("").parse(["--method", "ddpm", "--model_name_or_path", str(tmp_path)])
    args, of_network = levels_of_network(args, tiny_network())
    assert build_scheduler(args, plan_for(args), of_network).config["beta_schedule"] == "linear"


def test_other_levels_of_a_ddpm_network_are_those_that_were_asked_for(tmp_path, caplog):
    DDPMPipeline(tiny_network(), DDPMScheduler(400, beta_end=0.012)).save_pretrained(tmp_path)
    for words, kept in {
        "--ddpm_beta_schedule linear": True,
        "--ddpm_num_steps 400": True,
        "--ddpm_num_steps 1000": False,
        "--ddpm_beta_schedule squaredcos_cap_v2": False,
        "--no_keep_noise_levels": False,
    }.items():
        args = OptionParser("").parse([*f"--method ddpm {words} --model_name_or_path".split(), str(tmp_path)])
        args, of_network = levels_of_network(args, tiny_network())
        config = build_scheduler(args, plan_for(args), of_network).config
        assert (config["beta_end"] == 0.012) is (config["num_train_timesteps"] == 400) is kept, words
        assert ("is not kept by --method ddpm" in caplog.text) is (not kept and "keep" not in words), words
        caplog.clear()


@pytest.mark.parametrize("method", PIPELINES)
def test_a_ddpm_network_becomes_one_of_each_method(train, tmp_path, method):
    before = save_ddpm(tmp_path / "ddpm")
    words = "cld --cld_feed_companion" if method == "cld" else method
    options = f"{SHORT} --learning_rate 1e-12 --method {words} --model_name_or_path {tmp_path / 'ddpm'}"
    train(options, "--output_dir", tmp_path / "out")
    pipeline = PIPELINES[method].from_pretrained(tmp_path / "out")
    images = torch.randn(1, 1, 8, 8, generator=seeded(0)[0])
    seen = images if method != "cld" else torch.cat([images, torch.randn(1, 1, 8, 8, generator=seeded(1)[0])], 1)
    with torch.no_grad():
        assert torch.allclose(pipeline.unet(seen, 7).sample, before(images, 7).sample, atol=1e-6)
    assert pipeline(1, 4, seeded(0), output_type="pt").images.shape == (1, 1, 8, 8)
    config = pipeline.scheduler.config
    if method == "cld":
        assert config["prediction_type"] == "cld_edm"
    else:
        assert (config["noise_space"], config["beta_schedule"]) == ("vp", "squaredcos_cap_v2")
        record = json.loads((tmp_path / "out" / "training_args.json").read_text())
        assert record["sigma_min"] == pytest.approx(float(pipeline.scheduler.noise_space.sigma(torch.tensor(0))), 1e-4)
    if method == "gm-sgm":
        assert (config["model_noise"], len(config["mixture_weights"])) == ("mixture", 2)
    train(options, "--resume_from_checkpoint latest --output_dir", tmp_path / "out")
    if method != "cld":
        with pytest.raises(ValueError, match=r"\['--sigma_max'\]: the network .* has the noise levels, labels and"):
            train(options, "--sigma_max 5 --output_dir", tmp_path / "other")
        train(options, "--no_keep_noise_levels --sigma_max 5 --output_dir", tmp_path / "other")
        assert PIPELINES[method].from_pretrained(tmp_path / "other").scheduler.config["sigma_max"] == 5


def test_a_network_of_a_ladder_keeps_its_ladder(tmp_path):
    mixture = GaussianMixtureNoise([0.5, 0.5], [0.6, 1.3]).normalized()
    scheduler = GMLangevinScheduler(
        num_train_timesteps=200,
        sigma_max=7.0,
        prediction_type="scaled_score",
        mixture_weights=mixture.weights.tolist(),
        mixture_scales=mixture.scales.tolist(),
        model_noise="mixture",
    )
    GMSGMPipeline(tiny_network(), scheduler).save_pretrained(tmp_path)
    args, of_network = levels_of_network(TrainingArguments(model_name_or_path=str(tmp_path)), tiny_network())
    assert (args.sigma_max, args.num_train_timesteps, args.objective, of_network) == ("7", "200", "score", {})
    args, _ = levels_of_network(TrainingArguments(method="ncsnv2", model_name_or_path=str(tmp_path)), tiny_network())
    assert isinstance(build_scheduler(args, plan_for(args)), AnnealedLangevinScheduler)
    assert (args.objective, args.prediction_type) == ("denoiser", "epsilon")


def test_a_network_keeps_its_noise_and_its_conditioning(tmp_path, caplog):
    mixture = GaussianMixtureNoise([0.9, 0.1], [1.0, 6.0]).normalized()
    law = {"mixture_weights": mixture.weights.tolist(), "mixture_scales": mixture.scales.tolist()}
    network = tiny_network()
    make_unconditional(network)
    scheduler = GMLangevinScheduler(**law, mixture_per_element=True, model_noise="mixture")
    GMSGMPipeline(network, scheduler).save_pretrained(tmp_path)
    args, _ = levels_of_network(TrainingArguments(model_name_or_path=str(tmp_path)), network)
    assert {name: getattr(args, name) for name in law} == law
    assert (args.mixture_per_element, args.conditioning) == (True, "none")
    assert "goes on with its noise: --mixture_weights [0.9" in caplog.text
    assert "--conditioning none" in caplog.text
    words = ["--power_alpha", "1.5", "--conditioning", "sigma", "--model_name_or_path"]
    args, _ = levels_of_network(OptionParser("").parse([*words, str(tmp_path)]), network)
    assert (args.mixture_weights, args.mixture_per_element, args.conditioning) == (None, False, "sigma")


def test_a_preconditioned_network_keeps_what_it_is_preconditioned_for(tmp_path):
    scheduler = GMLangevinScheduler(noise_space="edm", sigma_data=0.4, sigma_min=0.02, sigma_max=40.0)
    GMSGMPipeline(tiny_network(), scheduler).save_pretrained(tmp_path)
    args, of_network = levels_of_network(TrainingArguments(model_name_or_path=str(tmp_path)), tiny_network())
    made = build_scheduler(args, plan_for(args), of_network)
    assert made.reading.prediction_type == "edm"
    assert [made.config[name] for name in ("sigma_data", "sigma_min", "sigma_max")] == [0.4, 0.02, 40.0]
    assert (args.timestep_sampling, args.p_mean) == ("log_normal", -1.2)


@pytest.mark.parametrize("sampling", ["log_normal", "log_uniform"])
def test_a_network_of_betas_sees_the_levels_that_are_asked_for(tmp_path, sampling):
    """By its own labels, which count other levels than a ladder's."""
    network = save_ddpm(tmp_path)
    options = TrainingArguments(method="ncsnv2", model_name_or_path=str(tmp_path), timestep_sampling=sampling)
    args, of_network = levels_of_network(options, network)
    plan = plan_for(args)
    uniform = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    seen = Objective(args, plan, build_scheduler(args, plan, of_network), network).sigma(uniform)
    assert torch.allclose(seen, levels.drawn(args, plan, uniform), rtol=1e-3)


def test_cld_goes_on_with_a_preconditioned_network_as_the_others_do(tmp_path):
    """The network is the same: what it is preconditioned for, and its levels."""
    scheduler = GMLangevinScheduler(noise_space="edm", sigma_data=0.4, sigma_min=0.02, sigma_max=40.0)
    GMSGMPipeline(tiny_network(), scheduler).save_pretrained(tmp_path)
    args, of_network = levels_of_network(
        TrainingArguments(method="cld", model_name_or_path=str(tmp_path)), tiny_network()
    )
    config = build_scheduler(args, plan_for(args), of_network).config
    assert [config[name] for name in ("sigma_data", "sigma_min", "sigma_max")] == [0.4, 0.02, 40.0]
    with pytest.raises(ValueError, match=r"\['--sigma_max'\]: the network .* has the noise levels"):
        levels_of_network(TrainingArguments(method="cld", model_name_or_path=str(tmp_path), sigma_max="5"), None)


@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2", "cld"])
def test_levels_and_answers_that_are_not_kept_are_told(tmp_path, method, caplog):
    DDPMPipeline(tiny_network(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    options = TrainingArguments(method=method, model_name_or_path=str(tmp_path))
    assert levels_of_network(options, tiny_network())[0].sigma_max == "auto"
    assert f"(flow, flow_prediction) is not kept by --method {method}" in caplog.text


def test_what_is_not_kept_of_a_network_alone_of_cld_and_of_what_we_cannot_read_is_told(tmp_path, caplog):
    tiny_network().save_pretrained(tmp_path / "alone")
    CLDPipeline(tiny_network(2), CLDSSCSScheduler(beta_0=8.0, prediction_type="cld_mixed")).save_pretrained(
        tmp_path / "cld"
    )
    DDPMPipeline(tiny_network(), LCMScheduler()).save_pretrained(tmp_path / "lcm")
    for name, said in (
        ("alone", "has no scheduler that says what it has learned"),
        ("cld", "its diffusion (beta_0 8.0, beta_1 0.0, mass 0.25"),
        ("lcm", "cannot be read"),
    ):
        caplog.clear()
        levels_of_network(TrainingArguments(method="ncsnv2", model_name_or_path=str(tmp_path / name)), None)
        assert said in caplog.text


ANSWERS = {
    "cld_mixed": {},
    "scaled_velocity_score": {},
    "velocity_score": {},
    "cld_edm": {"sigma_min": 0.02, "sigma_max": 40.0, "sigma_data": 0.4},
}
DIFFUSION = {"beta_0": 8.0, "beta_1": 0.5, "mass": 0.5, "gamma": 0.09, "num_train_timesteps": 200}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_network_of_cld_goes_on_with_its_diffusion(tmp_path, kind):
    """What it learned is what it is asked: its loss is that of the diffusion that it was saved with."""
    source = CLDSSCSScheduler(prediction_type=kind, **DIFFUSION, **ANSWERS[kind])
    network = with_velocities(tiny_network())
    CLDPipeline(network, source).save_pretrained(tmp_path)
    before = OptionParser("").parse(["--method", "cld", "--model_name_or_path", str(tmp_path)])
    args, of_network = levels_of_network(before, network)
    made = build_scheduler(args, plan_for(args), of_network)
    for name, value in {"prediction_type": kind, **DIFFUSION, **ANSWERS[kind]}.items():
        assert made.config[name] == value, name
    preconditioned = kind == "cld_edm"
    assert (args.objective, args.cld_feed_companion) == (("score", "denoiser")[preconditioned], preconditioned)
    assert (args.timestep_sampling, args.sigma_data) == (("log_normal", "0.4") if preconditioned else ("uniform", None))
    if not preconditioned:
        images = torch.rand(4, 1, 8, 8, generator=seeded(0)[0]) * 2 - 1
        objective = Objective(args, plan_for(args), made, network)
        loss = objective(network, images, Draws.always_the_same(images))
        draws = Draws.always_the_same(images)
        times, noise = objective.labels(draws.levels) / 200, draws.noise.normal((4, 2, 8, 8))
        learned = cld_loss(
            lambda u, t: network(u, t).sample, images, times, noise, source.process, kind, None, "ell", 200
        )
        assert torch.equal(loss, learned)


def test_options_of_another_diffusion_than_a_network_has(tmp_path):
    CLDPipeline(
        with_velocities(tiny_network()), CLDSSCSScheduler(prediction_type="cld_mixed", mass=0.5)
    ).save_pretrained(tmp_path)
    words = f"--method cld --model_name_or_path {tmp_path} "
    for same in ("--mass 0.5 --objective score", "--cld_loss dsm --beta_0 4"):
        assert levels_of_network(OptionParser("").parse((words + same).split()), None)[0].mass == 0.5
    for other in ("--mass 0.25", "--objective denoiser", "--no_cld_mixed_score", "--num_train_timesteps 10"):
        with pytest.raises(ValueError, match=rf"\['{other.split()[0].replace('no_', '')}'\]: the network .* mass 0.5"):
            levels_of_network(OptionParser("").parse((words + other).split()), None)
        free = OptionParser("").parse((words + other + " --no_keep_noise_levels").split())
        assert levels_of_network(free, None) == (free, {})


def test_a_fine_tuned_network_of_cld_is_resumed_and_sampled_as_it_was(train, tmp_path):
    source = CLDSSCSScheduler(prediction_type="cld_mixed", **DIFFUSION)
    CLDPipeline(with_velocities(tiny_network()), source).save_pretrained(tmp_path / "before")
    words = f"{SHORT} --method cld --lr_scheduler constant --model_name_or_path {tmp_path / 'before'}"
    train(words, f"--output_dir {tmp_path / 'out'}")
    train(words, f"--output_dir {tmp_path / 'out'} --max_train_steps 4 --resume_from_checkpoint latest")
    config = CLDPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert {name: config[name] for name in DIFFUSION} == DIFFUSION
    assert "the mass M is 0.5 and gamma 0.09" in " ".join((tmp_path / "out" / "README.md").read_text().split())


def test_the_sampler_of_an_image_network_keeps_its_mass(train, tmp_path):
    source = CLDSSCSScheduler(noise_space="edm", sigma_data=0.4, sigma_max=40.0, mass=0.5)
    CLDPipeline(tiny_network(), source).save_pretrained(tmp_path / "before")
    options = f"{SHORT} --method cld --model_name_or_path {tmp_path / 'before'} --output_dir"
    train(options, tmp_path / "out")
    train(options, tmp_path / "out", "--resume_from_checkpoint latest")
    train(options, tmp_path / "lighter", "--mass 0.125")
    for folder, mass in (("out", 0.5), ("lighter", 0.125)):
        assert CLDPipeline.from_pretrained(tmp_path / folder).scheduler.config["mass"] == mass


LEVELS = """
import sys
from diffusers_gm.training.objective import levels_of_network
from diffusers_gm.training.options import TrainingArguments
for name in sys.argv[1:]:
    print(levels_of_network(TrainingArguments(method="ncsnv2", model_name_or_path=name), None)[0].sigma_max)
"""


def test_networks_of_the_hub_keep_their_levels(tmp_path):
    """Also where they lie beside their scheduler, as those of DDPM do; and they are not taken for networks without
    one where the Hub does not answer."""
    DDPMPipeline(tiny_network(), DDPMScheduler()).save_pretrained(tmp_path / "nested")
    for part in ("unet", "scheduler"):
        shutil.copytree(tmp_path / "nested" / part, tmp_path / "flat", dirs_exist_ok=True)
    with FakeHub({"hf_mine": "me"}) as hub:
        for name in ("nested", "flat"):
            folder = tmp_path / name
            files = (path for path in folder.rglob("*") if path.is_file())
            hub.add(f"me/{name}", {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
        client = Client(hub, tmp_path / "home")
        assert client.run(LEVELS, "me/nested", "me/flat").stdout.split() == ["157.407", "157.407"]
        for method in ("HEAD", "GET"):
            hub.fail(method, "scheduler_config", status=503, times=99)
        failed = Client(hub, tmp_path / "other").run(LEVELS, "me/nested", check=False)
        assert "--model_name_or_path me/nested: its scheduler_config.json cannot be read" in failed.stderr


@pytest.mark.parametrize("words", ["--sigma_min 0.01", "--num_train_timesteps 1000", "--sigma_max auto"])
def test_levels_that_are_named_by_their_default_are_named(tmp_path, words):
    GMSGMPipeline(tiny_network(), GMLangevinScheduler(sigma_max=7.0, num_train_timesteps=200)).save_pretrained(tmp_path)
    args = OptionParser("").parse([*f"--method ncsnv2 {words} --model_name_or_path".split(), str(tmp_path)])
    with pytest.raises(ValueError, match=rf"\['{words.split()[0]}'\]: the network"):
        levels_of_network(args, tiny_network())


def test_a_fine_tuning_goes_on_by_the_defaults_that_it_began_with(train, tmp_path):
    scheduler = AnnealedLangevinScheduler(noise_space="edm", sigma_data=0.5, sigma_max=40.0)
    NCSNv2Pipeline(tiny_network(), scheduler).save_pretrained(tmp_path / "before")
    options = f"{SHORT} --method ncsnv2 --model_name_or_path {tmp_path / 'before'} --output_dir {tmp_path / 'out'}"
    steps = "--lr_scheduler constant --checkpointing_steps 1 --max_train_steps"
    train(options, steps, 1, "--timestep_sampling uniform --no_uncertainty_weighting")
    train(options, steps, 2, "--resume_from_checkpoint latest")
    record = json.loads((tmp_path / "out" / "training_args.json").read_text())
    assert (record["timestep_sampling"], record["uncertainty_weighting"]) == ("uniform", False)


def test_velocities_are_added_to_ordinary_networks_alone():
    network = tiny_network(2, 1)
    assert with_velocities(network) is network
    assert network.conv_in.in_channels == 2
    assert native_shape(with_velocities(tiny_network()), TrainingArguments(method="cld", cld_feed_companion=True)) == (
        8,
        1,
    )


def test_weights_of_a_variant(tmp_path):
    tiny_network().save_pretrained(tmp_path, variant="fp16")
    args = TrainingArguments(model_name_or_path=str(tmp_path), variant="fp16")
    assert torch.equal(given_unet(args).conv_in.weight, tiny_network().conv_in.weight)
    with pytest.raises(ValueError, match="cannot be loaded"):
        given_unet(TrainingArguments(model_name_or_path=str(tmp_path)))
