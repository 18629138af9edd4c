"""Networks that are told `log(sigma) / 4`: EDM, Playground, Cosmos, Stable Video Diffusion."""

import math

import diffusers
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from networks import CPU, check_four_points, four_points, samples_of
from schedulers import every_scheduler, every_spaced_scheduler, told_its_levels

from diffusers_gm import AnnealedLangevinScheduler

SVD = EulerDiscreteScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    interpolation_type="linear",
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    sigma_max=700.0,
    sigma_min=0.002,
    steps_offset=1,
    timestep_spacing="leading",
    timestep_type="continuous",
    use_karras_sigmas=True,
)
SOURCES = {
    "edm": EDMEulerScheduler(),
    "edm v": EDMEulerScheduler(prediction_type="v_prediction"),
    "playground": EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="zero", solver_order=2
    ),
    "playground v": EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "cosmos": EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"),
    "exponential": EDMEulerScheduler(sigma_schedule="exponential"),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def calls_of(cls, n):
    """As many calls as make `n` levels."""
    return n + 1 if cls is AnnealedLangevinScheduler else n


def on_their_levels(cls, source):
    """The default is another grid, but for a schedule that somebody chose."""
    chosen = source.config.sigma_schedule == "exponential"
    return cls.from_config(source.config, **told_its_levels(cls), **({} if chosen else {"timestep_spacing": "karras"}))


@every_spaced_scheduler
@every_source
def test_levels_and_labels_are_those_of_diffusers(cls, source):
    ours = on_their_levels(cls, source)
    assert ours.noise_space.kind == "edm"
    ours.set_timesteps(calls_of(cls, 10))
    source.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas[:10], source.sigmas[:10], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.timesteps[:10], source.timesteps.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.timesteps, ours.sigmas[:-1].log() / 4, rtol=1e-5, atol=1e-5)


@every_spaced_scheduler
def test_a_continuous_config_without_a_range_has_that_of_its_betas(cls):
    source = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True)
    ours = cls.from_config(source.config, **told_its_levels(cls))
    ours.set_timesteps(calls_of(cls, 10))
    source.set_timesteps(10)
    torch.testing.assert_close(ours.sigmas[:10], source.sigmas[:10], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.timesteps[:10], source.timesteps.float(), rtol=1e-5, atol=1e-5)


@every_spaced_scheduler
@every_source
def test_one_network_is_read_alike(cls, source, generator):
    """Input and denoised image of the same network output: `precondition_inputs` and `precondition_outputs`."""
    ours = on_their_levels(cls, source)
    ours.set_timesteps(calls_of(cls, 10))
    source.set_timesteps(10)
    sample = torch.randn(2, 3, 4, 4, generator=generator)
    output = torch.randn(sample.shape, generator=generator)
    for i in (0, 4, 8):
        sigma = float(source.sigmas[i])
        scaled = sigma * sample
        t = ours.timesteps[i]
        expected = source.precondition_inputs(scaled, sigma)
        torch.testing.assert_close(ours.scale_model_input(scaled, t), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.scale_model_input(scaled, float(t)), expected, rtol=1e-5, atol=1e-6)
        ours.set_timesteps(calls_of(cls, 10))
        ours.set_begin_index(i)
        denoised = ours.step(output, ours.timesteps[i], scaled, generator=generator).pred_original_sample
        torch.testing.assert_close(denoised, source.precondition_outputs(scaled, output, sigma), rtol=1e-5, atol=1e-5)


@every_scheduler
@every_source
def test_configs_survive_there_and_back(cls, source, tmp_path):
    """In memory and through the disk, ours and theirs; and another scheduler of ours in between."""
    source.save_pretrained(tmp_path / "theirs")
    from_disk = type(source).load_config(tmp_path / "theirs")
    ours = [cls.from_config(config) for config in (source.config, from_disk)]
    assert public(ours[0].config) == public(ours[1].config)
    ours[0].save_pretrained(tmp_path / "ours")
    loaded = cls.from_pretrained(tmp_path / "ours")
    assert public(loaded.config) == public(ours[0].config)
    between = AnnealedLangevinScheduler.from_config(loaded.config)
    for scheduler in (*ours, loaded, between):
        assert scheduler.noise_space.sigma_data == source.config.sigma_data
        for config in (scheduler.config, scheduler.diffusers_config()):
            back = type(source).from_config(config)
            assert {key: back.config[key] for key in public(source.config)} == public(source.config)
    back = type(source).from_pretrained(tmp_path / "ours")
    assert back.config.sigma_data == source.config.sigma_data
    assert back.config.prediction_type == source.config.prediction_type
    back.set_timesteps(10)
    source.set_timesteps(10)
    torch.testing.assert_close(back.sigmas, source.sigmas)


@every_scheduler
@pytest.mark.parametrize("name", ["edm", "edm v", "playground", "cosmos", "exponential", "svd"])
def test_the_law_of_an_exact_denoiser(cls, name, generator):
    source = SVD if name == "svd" else SOURCES[name]
    scheduler = cls.from_config(source.config)
    check_four_points(samples_of(scheduler, four_points(), 150, (1000, 1, 1, 2), generator))


# --- Stable Video Diffusion ---


@every_spaced_scheduler
def test_video_diffusion_is_told_the_logarithm(cls, tmp_path, generator):
    SVD.save_pretrained(tmp_path / "theirs")
    for config in (SVD.config, EulerDiscreteScheduler.load_config(tmp_path / "theirs")):
        ours = cls.from_config(config, **told_its_levels(cls))
        ours.set_timesteps(calls_of(cls, 25))
        SVD.set_timesteps(25)
        assert ours.timesteps.dtype == torch.float32
        torch.testing.assert_close(ours.timesteps[:25], SVD.timesteps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.timesteps, ours.sigmas[:-1].log() / 4, rtol=1e-4, atol=1e-5)
        assert float(ours.timesteps[0]) == pytest.approx(math.log(700) / 4, rel=1e-5)
        sample = 3 * torch.randn(1, 2, 4, 4, 4, generator=generator)
        SVD.scale_model_input(sample, SVD.timesteps[7])
        sigma = float(SVD.sigmas[7])
        expected = sample / (sigma**2 + 1) ** 0.5
        torch.testing.assert_close(ours.scale_model_input(sample, ours.timesteps[7]), expected, rtol=1e-4, atol=1e-5)
        back = EulerDiscreteScheduler.from_config(ours.config)
        assert {key: back.config[key] for key in public(SVD.config)} == public(SVD.config)
    start = ours.initial_sample((2, 1, 8, 8), generator, CPU, torch.float32)
    assert float(start.std()) == pytest.approx(700, rel=0.3)


@every_scheduler
def test_the_default_grid_of_a_swap_is_ours_unless_a_flag_chose_another(cls):
    """EDM's own levels, ten calls of which are few for our samplers, are the default of its schedulers."""
    unflagged = EulerDiscreteScheduler.from_config(SVD.config, use_karras_sigmas=False)
    for source in (SOURCES["edm"], SOURCES["cosmos"], unflagged):
        ours, even = cls.from_config(source.config), cls.from_config(source.config, timestep_spacing="even")
        for scheduler in (ours, even):
            scheduler.set_timesteps(12)
        assert torch.equal(ours.timesteps, even.timesteps)
        assert float(ours.sigmas[-2]) > 2 * float(ours.config.sigma_min)


# --- What cannot be read ---


# Stable Audio's; the class needs torchsde.
COSINE = {
    "_class_name": "CosineDPMSolverMultistepScheduler",
    "sigma_min": 0.3,
    "sigma_max": 500.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "prediction_type": "v_prediction",
    "rho": 7.0,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
}


@every_scheduler
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (COSINE, "CosineDPMSolverMultistepScheduler tells its network the arc tangent of sigma"),
        (dict(diffusers.CMStochasticIterativeScheduler().config), "a consistency model answers the end"),
        (dict(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config), "flow time backwards"),
        ({**diffusers.FlowMatchEulerDiscreteScheduler().config, "sigma_data": 1.0, "sigma_max": 80.0}, "Cosmos 2"),
        (dict(diffusers.LTXEulerAncestralRFScheduler().config), "pass .*noise_space='flow' with shift"),
    ],
    ids=["cosine", "consistency model", "mochi", "cosmos 2", "ancestral flow"],
)
def test_networks_with_other_words_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls.from_config(config)
