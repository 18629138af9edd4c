"""What is saved is read again: models of 0.1.0 by this version, our configs by ours and by schedulers of diffusers."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from networks import CPU, POINTS, WEIGHTS, perfect_network, run, seeded, tiny_network
from safetensors.torch import load_file

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
)
from diffusers_gm.studies.exact import ExactDenoiser

BY_0_1_0 = Path(__file__).parent / "saved_by_0_1_0"
PIPELINES = {
    "cld": CLDPipeline,
    "cld_lifted": CLDPipeline,
    "gm_sgm": GMSGMPipeline,
    "gm_sgm_score": GMSGMPipeline,
    "ncsnv2": NCSNv2Pipeline,
}
OURS = [AnnealedLangevinScheduler, GMLangevinScheduler, CLDSSCSScheduler]
MIX = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62]}


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


# --- By 0.1.0 ---


@pytest.mark.parametrize("name", PIPELINES)
def test_models_of_0_1_0_load_and_give_the_same_images(name):
    pipeline = PIPELINES[name].from_pretrained(BY_0_1_0 / name)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, 13, seeded(0, 1), output_type="pt").images
    torch.testing.assert_close(images, load_file(BY_0_1_0 / "images.safetensors")[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_models_of_0_1_0_are_saved_again(name, tmp_path):
    pipeline = PIPELINES[name].from_pretrained(BY_0_1_0 / name)
    pipeline.save_pretrained(tmp_path)
    again = PIPELINES[name].from_pretrained(tmp_path)
    assert public(again.scheduler.config) == public(pipeline.scheduler.config)
    old = json.loads((BY_0_1_0 / name / "scheduler" / "scheduler_config.json").read_text())
    for key, value in public(old).items():
        assert again.scheduler.config[key] == value, key


def test_the_order_of_0_1_0_is_of_what_it_saved_alone(tmp_path):
    """Its samplers had one order, and said nothing of it."""
    classes = {"gm_sgm": GMLangevinScheduler, "ncsnv2": AnnealedLangevinScheduler}
    old = [cls.from_pretrained(BY_0_1_0 / name, subfolder="scheduler") for name, cls in classes.items()]
    new = [GMLangevinScheduler(), AnnealedLangevinScheduler()]
    for order, source in [*((1, source) for source in old), *((2, source) for source in new)]:
        assert source.config.step_order == order
        assert type(source).from_config(source.config, step_order=2).config.step_order == 2
        for cls, algorithm in ((GMLangevinScheduler, "ancestral"), (AnnealedLangevinScheduler, "langevin")):
            if source.config.get("model_noise") == "mixture" and not cls.reads_mixtures:
                continue
            ours = cls.from_config(source.config, algorithm_type=algorithm)
            ours.save_pretrained(tmp_path)
            for again in (ours, cls.from_pretrained(tmp_path), copy.deepcopy(ours)):
                assert (again.config.step_order, again.sampler.order) == (order, order)


# --- By us, read by ours ---


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear", "timestep_spacing": "karras", "clip_sample": True},
        {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
        {"noise_space": "ve", "sigma_min": 0.02, "sigma_max": 7.0, "timestep_spacing": "linspace"},
        {"noise_space": "ve", "scale_input": False, "prediction_type": "score"},
        {"shift": 3.0, "prediction_type": "flow_prediction", "use_dynamic_shifting": True, "shift_terminal": 0.1},
        {"noise_space": "flow", "prediction_type": "epsilon"},
        {"noise_space": "edm", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
        {"noise_space": "edm", "sigma_min": 0.002, "sigma_max": 700.0, "prediction_type": "v_prediction"},
        {"prediction_type": "cld_mixed", "beta_0": 3.0, "mass": 0.5},
    ],
    ids=lambda config: " ".join(str(value) for value in config.values())[:40],
)
def test_every_field_comes_back(cls, config, tmp_path):
    """For every algorithm, twice through the disk: no field is lost, none is added, and the run is the same."""
    for algorithm in cls.algorithms:
        own = {"algorithm_type": algorithm} | (MIX if cls is GMLangevinScheduler else {})
        scheduler = cls(**config, **own)
        scheduler.save_pretrained(tmp_path)
        once = cls.from_pretrained(tmp_path)
        once.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path)
        assert public(again.config) == public(once.config) == public(scheduler.config)
        calls = {"num_inference_steps": 3} if "trained_betas" in config else {"num_inference_steps": 400}
        if algorithm == "jump" and ("trained_betas" in config or config.get("timestep_spacing") == "leading"):
            continue  # no stable step follows levels so far apart
        calls |= {"mu": 0.5} if "use_dynamic_shifting" in config else {}
        for one in (scheduler, again):
            one.set_timesteps(**calls)
        assert torch.equal(scheduler.timesteps, again.timesteps)
        assert scheduler.sampler == again.sampler or algorithm in ("jump", "exponential")


# --- By us, read by diffusers ---


VP_READERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
]
FLOW_READERS = [
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
]
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
SAVED = {
    "vp": (lambda cls: cls(beta_schedule="linear"), VP_READERS),
    "vp from ddpm": (lambda cls: cls.from_config(DDPMScheduler(clip_sample=False).config), VP_READERS),
    "vp from euler": (
        lambda cls: cls.from_config(EulerDiscreteScheduler(beta_schedule="scaled_linear").config),
        VP_READERS,
    ),
    "ve": (lambda cls: cls(noise_space="ve", sigma_min=0.02, sigma_max=20.0), VP_READERS),
    "flow": (lambda cls: cls(shift=3.0, prediction_type="flow_prediction"), FLOW_READERS),
    "flow from flow-match": (lambda cls: cls.from_config(FLOW.config), FLOW_READERS),
}


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize(
    ("saved", "reader"), [(saved, reader) for saved, (_, readers) in SAVED.items() for reader in readers]
)
def test_schedulers_of_diffusers_read_what_we_save(cls, saved, reader, tmp_path, generator):
    """Loaded from our file, each samples the exact denoiser's law: mean and variance of known data."""
    ours = SAVED[saved][0](cls)
    ours.save_pretrained(tmp_path)
    theirs = getattr(diffusers, reader).from_pretrained(tmp_path)
    assert theirs.config.num_train_timesteps == 1000
    assert theirs.config.prediction_type == ours.config.prediction_type or reader.startswith("FlowMatch")
    theirs.set_timesteps(5)
    assert len(theirs.timesteps) >= 5

    n, width = 2000, 0.5
    denoiser = ExactDenoiser(POINTS.double(), width=width, weights=WEIGHTS)
    network = perfect_network(ours, denoiser)
    theirs.set_timesteps(100)
    start = getattr(theirs, "init_noise_sigma", 1.0)  # FlowMatchEuler has none
    sample = start * torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():  # not all of them take a generator
        torch.manual_seed(0)
        for t in theirs.timesteps:
            model_input = sample if reader.startswith("FlowMatch") else theirs.scale_model_input(sample, t)
            output = network(model_input, t)
            sample = theirs.step(output, t, sample).prev_sample
    points, weights = POINTS.flatten(1).double(), WEIGHTS.double()
    mean = weights @ points
    variance = weights @ (points - mean) ** 2 + width**2
    found = sample.flatten(1)
    assert ((found.mean(0) - mean).abs() < 5 * (variance / n).sqrt() + 0.02).all()
    # The variance of a variance is at most that of a Gaussian here; the rest is for the solvers.
    assert ((found.var(0) / variance - 1).abs() < 5 * (2 / n) ** 0.5 + 0.03).all()
    # And back: nothing of ours was lost on the way through their file.
    theirs.save_pretrained(tmp_path / "theirs")
    assert (
        public(cls.from_pretrained(tmp_path / "theirs").config).items()
        >= {key: value for key, value in public(ours.config).items() if key not in ("timestep_spacing", "grid")}.items()
    )


@pytest.mark.parametrize("cls", OURS)
def test_a_pipeline_of_diffusers_with_our_scheduler_is_saved_and_loaded(cls, tmp_path):
    pipeline = DDPMPipeline(tiny_network(), DDPMScheduler(clip_sample=False))
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    expected = None
    for loaded in (pipeline, DDPMPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is cls
        images = loaded(2, seeded(0)[0], num_inference_steps=9, output_type="np").images
        expected = images if expected is None else expected
        assert (images == expected).all()


# --- What no scheduler of diffusers reads ---


@pytest.mark.parametrize("noise_space", [None, "ve", "vp"])
def test_networks_of_velocities_are_nobody_else_s(noise_space, generator):
    """Whatever noise space the config names besides: it is not that of the network."""
    scheduler = CLDSSCSScheduler(prediction_type="cld_mixed", noise_space=noise_space)
    assert scheduler.noise_space is None
    with pytest.raises(ValueError, match="no scheduler of diffusers reads a network that sees a velocity"):
        scheduler.diffusers_config()
    images, noise = torch.randn(2, 1, 2, 4, 4, generator=generator)
    with pytest.raises(ValueError, match="answers a velocity score, .* training target is .*cld_loss"):
        scheduler.get_velocity(images, noise, torch.tensor([10.0]))


def test_runs_of_a_loaded_scheduler_are_those_of_the_saved_one(tmp_path, generator):
    scheduler = GMLangevinScheduler(sigma_max=8.0, model_noise="mixture", algorithm_type="langevin", **MIX)
    scheduler.save_pretrained(tmp_path)
    results = []
    for one in (scheduler, GMLangevinScheduler.from_pretrained(tmp_path)):
        denoiser = ExactDenoiser(torch.ones(1, 1, 2, 2), noise=one.model_mixture)
        one.set_timesteps(60)
        start = one.initial_sample((2, 1, 2, 2), torch.Generator().manual_seed(0), CPU, torch.float32)
        results.append(run(one, perfect_network(one, denoiser), start, torch.Generator().manual_seed(1)))
    assert torch.equal(*results)
