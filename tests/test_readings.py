"""How networks see noise: labels, levels, grids, and what is read from an output."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from networks import output_of

from diffusers_gm import AnnealedLangevinScheduler
from diffusers_gm.processes.cld import CLD, lift
from diffusers_gm.readings import ImageReading, NoiseSpace, VelocityReading
from diffusers_gm.readings.grids import distinct_labels, level_grid, shift_flow
from diffusers_gm.readings.noise_space import MAX_SIGMA, PREDICTION_TYPES
from diffusers_gm.readings.velocity import VELOCITY_PREDICTION_TYPES, score_coefficients

SPACES = {
    "vp": NoiseSpace.vp(DDPMScheduler().alphas_cumprod),
    "vp-cosine": NoiseSpace.vp(DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod),
    "ve": NoiseSpace.ve(0.01, 50.0, 232),
    "ve-unscaled": NoiseSpace.ve(0.01, 50.0, 232, scale_input=False),
    "flow": NoiseSpace.flow(1000),
    "edm": NoiseSpace.edm(0.002, 80.0, 1000, sigma_data=0.5),
    "svd": NoiseSpace.edm(0.002, 700.0, 1000),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_timestep_and_sigma_are_inverse_also_between_integers(space):
    first, last = space.timestep_range
    last = last - 1.5 if space.kind != "edm" else last
    labels = torch.linspace(first, last, 301, dtype=torch.float64)
    sigmas = space.sigma(labels)
    assert (sigmas.diff() > 0).all()
    torch.testing.assert_close(space.timestep(sigmas), labels, rtol=1e-9, atol=1e-8)


def test_ve_ladder_is_geometric_with_the_smallest_level_first():
    ladder = SPACES["ve"].sigma(torch.arange(232))
    torch.testing.assert_close(ladder[[0, -1]], torch.tensor([0.01, 50.0], dtype=torch.float64))
    torch.testing.assert_close(ladder[1:] / ladder[:-1], (ladder[1] / ladder[0]).expand(231))


@pytest.mark.parametrize("name", ["vp", "ve", "ve-unscaled", "flow", "edm", "svd"])
def test_every_prediction_type_gives_the_denoiser_back(name, generator):
    space = SPACES[name]
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=generator)
    labels = (5.0, 100.5, 200.0) if space.kind != "edm" else (-1.5, 0.0, 1.0)
    for label in labels:
        sigma, s = space.sigma(torch.tensor(label)), space.sigma_data
        y = x0 + sigma * noise
        outputs = {
            "epsilon": noise,
            "sample": x0,
            "score": -noise / sigma,
            "scaled_score": noise,
            # x_t = alpha x0 + alpha sigma n; v is what diffusers' get_velocity returns for vp
            "v_prediction": torch.rsqrt(s**2 + sigma**2) * (s * noise - sigma / s * x0),
            # EDM's F = (D - c_skip y) / c_out
            "edm": (x0 - s**2 / (s**2 + sigma**2) * y) * (s**2 + sigma**2).sqrt() / (s * sigma),
            "flow_prediction": noise - x0,
        }
        for prediction_type in PREDICTION_TYPES[space.kind]:
            denoised = space.denoised(outputs[prediction_type], y, sigma, prediction_type)
            torch.testing.assert_close(denoised, x0, rtol=1e-9, atol=1e-9)
            if "score" not in prediction_type:
                back = space.output(x0, noise, sigma, prediction_type)
                torch.testing.assert_close(back, outputs[prediction_type], rtol=1e-9, atol=1e-9)


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
    for other in ("flow", "edm", "ve-unscaled"):
        with pytest.raises(ValueError, match="scale_input=True"):
            SPACES[other].betas()


def test_flow_agrees_with_diffusers_forward_process_and_grid(generator):
    ours = AnnealedLangevinScheduler(
        shift=1.0, prediction_type="flow_prediction", timestep_spacing="linspace", network_level="ladder"
    )
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
@pytest.mark.parametrize("name", ["vp", "ve", "flow", "edm"])
def test_grids_in_sigma_span_the_trained_range(name, spacing):
    space = SPACES[name]
    grid = level_grid(space, 11, spacing)
    assert grid[[-1, 0]].tolist() == pytest.approx(space.timestep_range, abs=1e-12)
    of = grid if (name, spacing) == ("flow", "karras") else space.sigma(grid)
    transformed = of.log() if spacing == "log_snr" else of ** (1 / 7)
    torch.testing.assert_close(transformed.diff(), transformed.diff().mean().expand(10), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize(("shifts", "mu"), [({}, None), ({"use_dynamic_shifting": True}, 0.7)], ids=["plain", "shift"])
def test_spacings_of_rectified_flow_are_of_s_as_in_diffusers(flag, shifts, mu):
    theirs = FlowMatchEulerDiscreteScheduler(**shifts, **{flag: True})
    ours = AnnealedLangevinScheduler.from_config(theirs.config, algorithm_type="consistent")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8, mu=mu)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["vp", "ve", "flow", "edm", "velocity"])
def test_equal_labels_have_equal_levels(kind):
    """Samplers compare them; what a matrix product makes of equal numbers may differ in the last bit."""
    reading = VelocityReading(CLD(gamma=0.1), "velocity_score", 1000) if kind == "velocity" else SPACES[kind]
    first, last = reading.timestep_range
    for label in torch.linspace(first, last, 40, dtype=torch.float64).tolist():
        assert len(reading.sigma(torch.full((45,), label, dtype=torch.float64)).unique()) == 1


def test_labels_of_dense_levels_are_the_next_ones_down():
    labels = torch.tensor([999.0, 998.8, 998.6, 10.0], dtype=torch.float64)
    assert distinct_labels(labels, 999.0).tolist() == [999, 998, 997, 10]


def test_all_levels_of_a_ladder_are_its_labels():
    """Exactly: learned embeddings take whole numbers alone. And an offset leads to none above the last."""
    for name in ("ve", "vp"):
        n = SPACES[name].num_train_timesteps
        spacing = "log_snr" if name == "ve" else "leading"
        assert level_grid(SPACES[name], n, spacing).tolist() == list(range(n - 1, -1, -1))
    assert float(level_grid(SPACES["vp"], 1000, "leading", 1)[0]) == 999


def test_coefficients_at_the_ends_of_what_the_network_sees():
    """Pure noise is exactly that, and there is nothing beyond."""
    zero_snr = NoiseSpace.vp(DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod)
    for space, last in ((zero_snr, 999.0), (zero_snr, 1200.0), (SPACES["flow"], 1000.0), (SPACES["flow"], 1200.0)):
        assert space.coefficients(torch.tensor(last)) == (0, 1)
    assert SPACES["flow"].coefficients(torch.tensor(-1.0)) == (1, 0)


def test_a_single_level_is_not_stretched():
    """It would have to be both ends of the grid."""
    assert shift_flow(torch.tensor([1.0]), 3.0, shift_terminal=0.1).tolist() == [1.0]


def test_infinite_noise_levels_start_at_a_large_finite_one():
    space = NoiseSpace.vp(DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod)
    sigma = space.sigma(torch.tensor([999.0]))
    torch.testing.assert_close(sigma, torch.tensor([MAX_SIGMA], dtype=torch.float64))
    assert SPACES["flow"].sigma(torch.tensor(1000)) == MAX_SIGMA
    assert SPACES["flow"].timestep(torch.tensor(MAX_SIGMA)) == 1000


def test_bad_arguments_are_named():
    for betas in ({"beta_start": 0.0}, {"trained_betas": [0.0, 0.1, 0.2], "num_train_timesteps": 3}):
        with pytest.raises(ValueError, match="the betas begin with 0, a level without noise: the first beta"):
            NoiseSpace.vp(DDPMScheduler(**betas).alphas_cumprod)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        NoiseSpace.ve(1.0, 0.5, 10)
    with pytest.raises(ValueError, match="timestep_spacing 'sqrt'"):
        level_grid(SPACES["ve"], 5, "sqrt")
    with pytest.raises(ValueError, match="flow_prediction.*not offered"):
        AnnealedLangevinScheduler(noise_space="ve", prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="unknown noise_space 'vq': use 'vp', 've', 'flow', 'edm' or None"):
        AnnealedLangevinScheduler(noise_space="vq")
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        NoiseSpace.edm(0.1, 1.0, 10, sigma_data=0.0)
    with pytest.raises(ValueError, match="'leading' is not offered in edm space: use one of .*karras"):
        level_grid(SPACES["edm"], 5, "leading")
    with pytest.raises(ValueError, match="unknown prediction_type 'score': use 'epsilon'"):
        SPACES["vp"].output(torch.zeros(1), torch.zeros(1), 1.0, "score")
    with pytest.raises(ValueError, match="'uniform', 'quadratic', 'even', 'log_snr' or 'karras'"):
        VelocityReading(CLD(), "cld_mixed", 1000).grid(5, "leading")


# --- Readings ---


def every_reading():
    for name, space in SPACES.items():
        for prediction_type in PREDICTION_TYPES[space.kind]:
            yield pytest.param(ImageReading(space, prediction_type), id=f"{name} {prediction_type}")
    for prediction_type in VELOCITY_PREDICTION_TYPES:
        yield pytest.param(VelocityReading(CLD(), prediction_type, 1000), id=prediction_type)


@pytest.mark.parametrize("reading", every_reading())
def test_a_reading_goes_to_the_noisy_image_and_back(reading, generator):
    """Sample to (y, c) and back; D of the output that says D; the last call is the end of the run, where y is x0."""
    first, last = reading.timestep_range
    calls = reading.calls(torch.linspace(last, first, 4, dtype=torch.float64))
    channels = 2 if isinstance(reading, VelocityReading) else 1
    for call in calls[:-1]:
        sample = torch.randn(2, channels, 3, 3, generator=generator, dtype=torch.float64)
        y, companion = reading.coordinates(sample, call)
        torch.testing.assert_close(reading.visible(y, companion, call), sample, rtol=1e-9, atol=1e-9)
        denoised = torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64)
        output = output_of(reading, denoised, sample, call)
        torch.testing.assert_close(reading.denoised(output, sample, call), denoised, rtol=1e-6, atol=1e-6)
    assert calls[-1].sigma == 0
    image, noise = torch.randn(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    end = reading.visible(image, noise, calls[-1])
    assert torch.equal(reading.image(end), image)
    if isinstance(reading, VelocityReading):  # the velocity there is `N(0, gamma M)`
        torch.testing.assert_close(end.chunk(2, 1)[1], math.sqrt(reading.process.gamma * reading.process.mass) * noise)


@pytest.mark.parametrize("reading", every_reading())
def test_noised_images_are_noisy_images_of_their_level(reading, generator):
    """`add_noise` and `coordinates` agree: y is the image plus noise of the level, independent of the companion."""
    first, last = reading.timestep_range
    label = torch.tensor((first + last) / 2, dtype=torch.float64)
    call = reading.calls(label.reshape(1))[0]
    n, velocity = 20_000, isinstance(reading, VelocityReading)
    images = torch.full((n, 1), 0.5, dtype=torch.float64)
    noise = torch.randn(n, 2 if velocity else 1, generator=generator, dtype=torch.float64)
    y, companion = reading.coordinates(reading.add_noise(images, noise, label), call)
    eta = (y - 0.5) / call.sigma
    assert float(eta.mean()) == pytest.approx(0, abs=5 / n**0.5)
    assert float(eta.var()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    if velocity:
        assert float(companion.var()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
        assert float((eta * companion).mean()) == pytest.approx(0, abs=5 / n**0.5)
    else:
        torch.testing.assert_close(eta, noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reading", every_reading())
def test_noise_is_added_to_half_precision_in_single(reading, generator):
    first, last = reading.timestep_range
    labels = torch.linspace(first, last, 6, dtype=torch.float64)
    images = torch.randn(6, 1, 4, 4, generator=generator).bfloat16()
    noise = torch.randn(6, 2 if isinstance(reading, VelocityReading) else 1, 4, 4, generator=generator).bfloat16()
    single = reading.add_noise(images.float(), noise.float(), labels)
    assert torch.equal(reading.add_noise(images, noise, labels), single.bfloat16())


@pytest.mark.parametrize("name", SPACES)
def test_velocities_are_what_a_velocity_network_answers(name, generator):
    space = SPACES[name]
    reading = ImageReading(space, "flow_prediction" if space.kind == "flow" else "v_prediction")
    labels = torch.linspace(*space.timestep_range, 6, dtype=torch.float64)
    images, noise = torch.randn(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigmas = space.sigma(labels)[:, None, None, None]
    answer = space.output(images, noise, sigmas, reading.prediction_type)
    torch.testing.assert_close(reading.velocity(images, noise, labels), answer, rtol=1e-6, atol=1e-6)


def test_score_coefficients():
    marginal = CLD().marginal(torch.tensor(1.0))
    ell = 1 / marginal.root[1, 1]
    assert score_coefficients(marginal, "velocity_score") == (0, 1)
    assert score_coefficients(marginal, "scaled_velocity_score") == (0, -ell)
    assert score_coefficients(marginal, "cld_mixed") == (-1 / marginal.covariance[1, 1], -ell)
    with pytest.raises(ValueError, match="prediction_type"):
        score_coefficients(marginal, "epsilon")


def test_velocity_networks_are_read_by_the_lift(generator):
    """D of a velocity score has that score, by `Lift.velocity_score`; levels and labels are inverse."""
    reading = VelocityReading(CLD(beta_1=2.0, mass=0.5), "velocity_score", 1000)
    labels = torch.tensor([1000.0, 300.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(reading.timestep(reading.sigma(labels)), labels)
    x, v, score = torch.randn(3, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    for label, call in zip(labels, reading.calls(labels), strict=False):
        at = lift(reading.process.marginal(reading.process.clock(label / 1000)))
        denoised = reading.denoised(score, torch.cat([x, v], 1), call)
        torch.testing.assert_close(at.velocity_score(x, v, denoised), score)
        assert call.sigma == pytest.approx(float(at.sigma))


def test_even_labels_of_a_beta_schedule_are_whole_and_distinct():
    """For every number of calls that there are timesteps for: networks with learned embeddings take nothing else."""
    space = NoiseSpace.vp(DDPMScheduler(num_train_timesteps=100).alphas_cumprod)
    for n in (1, 2, 5, 20, 50, 99, 100):
        grid = level_grid(space, n, "even")
        assert torch.equal(grid, grid.round())
        assert (grid.diff() <= -1).all()
        assert grid[0] == 99
        assert grid[-1] >= 0
