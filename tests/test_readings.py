import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers_gm.processes.noise_space import MAX_SIGMA, PREDICTION_TYPES, NoiseSpace, level_grid

from diffusers_gm import AnnealedLangevinScheduler

SPACES = {
    "vp": NoiseSpace.vp(DDPMScheduler().alphas_cumprod),
    "vp-cosine": NoiseSpace.vp(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod),
    "ve": NoiseSpace.ve(0.01, 50.0, 232),
    "ve-unscaled": NoiseSpace.ve(0.01, 50.0, 232, scale_input=False),
    "flow": NoiseSpace.flow(1000),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_timestep_and_sigma_are_inverse_also_between_integers(space):
    first, last = space.timestep_range
    labels = torch.linspace(first, last - 1.5, 301, dtype=torch.float64)
    sigmas = space.sigma(labels)
    assert (sigmas.diff() > 0).all()
    torch.testing.assert_close(space.timestep(sigmas), labels, rtol=1e-9, atol=1e-8)


def test_ve_ladder_is_geometric_with_the_smallest_level_first():
    ladder = SPACES["ve"].sigma(torch.arange(232))
    torch.testing.assert_close(ladder[[0, -1]], torch.tensor([0.01, 50.0], dtype=torch.float64))
    torch.testing.assert_close(ladder[1:] / ladder[:-1], (ladder[1] / ladder[0]).expand(231))


@pytest.mark.parametrize("name", ["vp", "ve", "ve-unscaled", "flow"])
def test_every_prediction_type_gives_the_denoiser_back(name, generator):
    space = SPACES[name]
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=generator)
    for label in (5.0, 100.5, 200.0):
        sigma = space.sigma(torch.tensor(label))
        y = x0 + sigma * noise
        outputs = {
            "epsilon": noise,
            "sample": x0,
            "score": -noise / sigma,
            "scaled_score": noise,
            # x_t = alpha x0 + alpha sigma n; v is what diffusers' get_velocity returns for vp
            "v_prediction": torch.rsqrt(1 + sigma**2) * (noise - sigma * x0),
            "flow_prediction": noise - x0,
        }
        for prediction_type in PREDICTION_TYPES[space.kind]:
            denoised = space.denoised(outputs[prediction_type], y, sigma, prediction_type)
            torch.testing.assert_close(denoised, x0, rtol=1e-9, atol=1e-9)


def test_vp_agrees_with_diffusers_forward_process(generator):
    ours = AnnealedLangevinScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise = torch.randn(2, 5, 3, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, timesteps), theirs.add_noise(x0, noise, timesteps))


@pytest.mark.parametrize("name", ["vp", "vp-cosine", "ve"])
def test_betas_are_those_of_the_ddpm_network_that_it_is(name):
    space = SPACES[name]
    abar = (1 - space.betas()).cumprod(0)
    torch.testing.assert_close(abar, 1 / (1 + (2 * space.log_sigmas).exp()), rtol=1e-9, atol=0)
    if name == "vp":
        torch.testing.assert_close(space.betas().float(), DDPMScheduler().betas, rtol=1e-3, atol=0)  # float32 there
    for other in ("flow", "ve-unscaled"):
        with pytest.raises(ValueError, match="scale_input=True"):
            SPACES[other].betas()


def test_flow_agrees_with_diffusers_forward_process_and_grid(generator):
    ours = AnnealedLangevinScheduler(shift=1.0, prediction_type="flow_prediction", timestep_spacing="linspace")
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(9)
    ours.set_timesteps(10)  # nine levels, and the last one twice
    torch.testing.assert_close(ours.timesteps[:-1].float(), theirs.timesteps)
    x0, noise = torch.randn(2, 2, 3, 8, 8, generator=generator)
    timestep = theirs.timesteps[4:5].expand(2)
    torch.testing.assert_close(ours.add_noise(x0, noise, timestep), theirs.scale_noise(x0, timestep, noise))
    # The shift acts on s = t / 1000, and on the grid alone.
    s = level_grid(SPACES["flow"], 9, "linspace") / 1000
    shifted = level_grid(SPACES["flow"], 9, "linspace", shift=3.0) / 1000
    torch.testing.assert_close(shifted, 3 * s / (1 + 2 * s))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_grids_are_those_of_diffusers(spacing):
    theirs = DDPMScheduler(timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    theirs.set_timesteps(7)
    grid = level_grid(SPACES["vp"], 7, spacing, theirs.config.steps_offset)
    assert grid.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_grids_in_sigma_span_the_trained_range(name, spacing):
    space = SPACES[name]
    grid = level_grid(space, 11, spacing)
    assert grid[[-1, 0]].tolist() == list(space.timestep_range)
    sigmas = space.sigma(grid)
    transformed = sigmas.log() if spacing == "log_snr" else sigmas ** (1 / 7)
    torch.testing.assert_close(transformed.diff(), transformed.diff().mean().expand(10), rtol=1e-6, atol=1e-8)


def test_infinite_noise_levels_start_at_a_large_finite_one():
    space = NoiseSpace.vp(DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod)
    sigma = space.sigma(torch.tensor([999.0]))
    torch.testing.assert_close(sigma, torch.tensor([MAX_SIGMA], dtype=torch.float64))
    assert SPACES["flow"].sigma(torch.tensor(1000)) == MAX_SIGMA
    assert SPACES["flow"].timestep(torch.tensor(MAX_SIGMA)) == 1000


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        NoiseSpace.ve(1.0, 0.5, 10)
    with pytest.raises(ValueError, match="timestep_spacing 'sqrt'"):
        level_grid(SPACES["ve"], 5, "sqrt")
    with pytest.raises(ValueError, match="flow_prediction.*not offered"):
        AnnealedLangevinScheduler(noise_space="ve", prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="noise_space 'edm'"):
        AnnealedLangevinScheduler(noise_space="edm")
