"""The noise level of an image, measured by a denoiser; images whose noise is removed from their own level down."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from networks import perfect_network, seeded, tiny_autoencoder, tiny_network

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GaussianMixtureNoise,
    GMLangevinScheduler,
    GMSGMPipeline,
    UnconditionalPipeline,
)
from diffusers_gm.data import split_digits
from diffusers_gm.pipelines.guidance import Guidance
from diffusers_gm.processes.noise_level import estimate_noise_level
from diffusers_gm.readings.velocity import COMPANION_PREDICTION_TYPE
from diffusers_gm.studies.exact import ExactDenoiser, NetworkOf, exact_network

# Few points, so that the level can be told: the images' own differences are not like noise.
POINTS = split_digits()[0][:40]
WIDTH = 0.05
MIXTURE = GaussianMixtureNoise.from_power_law(1.5, 2)


def noisy_digits(n, sigma, seed=0, points=POINTS):
    draws = torch.Generator().manual_seed(seed)
    chosen = points[torch.randint(len(points), (n,), generator=draws)]
    clean = chosen + WIDTH * torch.randn(chosen.shape, generator=draws)
    return clean, clean + sigma * torch.randn(chosen.shape, generator=draws)


def pipeline(scheduler, denoiser=None, cls=UnconditionalPipeline):
    noise = getattr(scheduler, "model_mixture", None)
    network = exact_network(denoiser or ExactDenoiser(POINTS, WIDTH, noise), scheduler)
    made = cls(NetworkOf(network, (1, 8, 8)), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


# --- The mathematics ---


@pytest.mark.parametrize("sigma", [0.6, 2.0, 9.0])
def test_the_level_of_gaussian_data_is_that_of_greatest_likelihood(sigma, generator):
    """Where y is normal of variance v + sigma^2 that is `|y|^2 / d - v`, and the error follows from the information."""
    v, shape = 0.25, (5, 3, 8, 8)
    y = (v + sigma**2) ** 0.5 * torch.randn(shape, dtype=torch.float64, generator=generator)
    found = estimate_noise_level(lambda y, s: v / (v + s[:, None, None, None] ** 2) * y, y, 0.01, 50.0, 12, generator)
    exact = (y.flatten(1).square().mean(1) - v).sqrt()
    torch.testing.assert_close(found.sigma, exact, rtol=1e-6, atol=0)
    error = (v + exact**2) / exact**2 / (2 * y[0].numel()) ** 0.5
    torch.testing.assert_close(found.error, error, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.6])
def test_levels_are_unbiased_and_as_uncertain_as_they_say(sigma):
    """... where the length of `y - D`, which lacks the posterior variance, is too short."""
    n, denoiser = 300, ExactDenoiser(split_digits()[0], WIDTH)
    _, y = noisy_digits(n, sigma, points=split_digits()[0])
    found = estimate_noise_level(denoiser, y, 0.01, 10.0, generator=torch.Generator().manual_seed(1))
    off = (found.sigma / sigma).log()
    assert abs(float(off.mean())) < 4 * float(off.std()) / n**0.5 + 0.01
    assert float(off.std()) == pytest.approx(float(found.error.median()), rel=0.25)
    alone = (y - denoiser(y, sigma)).flatten(1).square().mean(1).sqrt() / sigma
    assert float(alone.log().mean()) < -abs(float(off.mean()))


def test_each_image_has_its_own_level():
    y = torch.cat([noisy_digits(1, sigma, i)[1] for i, sigma in enumerate((0.1, 0.5, 2.0))])
    together = estimate_noise_level(ExactDenoiser(POINTS, WIDTH), y, 0.01, 10.0, generator=seeded(0, 1, 2))
    assert [round(math.log2(s / t)) for s, t in zip(together.sigma.tolist(), (0.1, 0.5, 2.0), strict=True)] == [0, 0, 0]
    for i in range(3):
        alone = estimate_noise_level(ExactDenoiser(POINTS, WIDTH), y[i : i + 1], 0.01, 10.0, generator=seeded(i))
        torch.testing.assert_close(alone.sigma, together.sigma[i : i + 1])


def test_a_level_beyond_the_range_is_no_measurement():
    y = torch.cat([noisy_digits(1, sigma, i)[1] for i, sigma in enumerate((0.1, 0.9, 3.0))])
    found = estimate_noise_level(ExactDenoiser(POINTS, WIDTH), y, 0.02, 1.0, generator=seeded(0, 1, 2))
    assert found.error.isfinite().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 2.0}, "need 0 < low < high"),
        ({"low": 0.0}, "need 0 < low < high"),
        ({"num_looks": 0}, "num_looks must be at least 1, got 0"),
        ({"y": torch.full((1, 1, 2, 2), torch.nan)}, "not finite"),
        ({"y": torch.zeros(1, 1, 2, 2, dtype=torch.float16)}, "float32 or float64, got torch.float16"),
    ],
)
def test_bad_arguments_are_refused_before_a_call(arguments, message):
    def denoiser(y, sigma):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=message):
        estimate_noise_level(denoiser, **{"y": torch.zeros(1, 1, 2, 2), "low": 0.1, "high": 1.0} | arguments)


# --- Pipelines ---

SCHEDULERS = {
    "ve": AnnealedLangevinScheduler(sigma_max=10.0),
    "mixture": GMLangevinScheduler(
        sigma_max=10.0,
        mixture_weights=MIXTURE.weights.tolist(),
        mixture_scales=MIXTURE.scales.tolist(),
        model_noise="mixture",
        algorithm_type="ode",
    ),
    "mixture, score": GMLangevinScheduler(
        sigma_max=10.0,
        mixture_weights=MIXTURE.weights.tolist(),
        mixture_scales=MIXTURE.scales.tolist(),
        model_noise="mixture",
        prediction_type="scaled_score",
    ),
    "vp, of diffusers": DDPMScheduler(),
    "flow": GMLangevinScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, algorithm_type="ode"),
    "edm": GMLangevinScheduler(noise_space="edm", sigma_data=0.5, prediction_type="edm", sigma_max=10.0),
}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "of diffusers" not in name])
def test_pipelines_measure_levels_in_every_noise_space(name):
    pipe = pipeline(SCHEDULERS[name])
    for sigma in (0.3, 1.5):
        _, y = noisy_digits(64, sigma)
        off = (pipe.estimate_noise_level(y / 2 + 0.5, torch.Generator().manual_seed(0)).sigma / sigma).log()
        assert abs(float(off.mean())) < 0.06
        assert float(off.std()) < 0.2


def test_networks_of_diffusers_schedulers_are_read_too():
    ours = GMLangevinScheduler.from_config(DDPMScheduler().config)
    network = exact_network(ExactDenoiser(POINTS, WIDTH), ours)
    pipe = UnconditionalPipeline(NetworkOf(network, (1, 8, 8)), DDPMScheduler())
    _, y = noisy_digits(64, 0.5)
    off = (pipe.estimate_noise_level(y / 2 + 0.5, torch.Generator().manual_seed(0)).sigma / 0.5).log()
    assert abs(float(off.mean())) < 0.06


@pytest.mark.parametrize(
    "scheduler", [CLDSSCSScheduler(prediction_type=kind) for kind in ("cld_mixed", COMPANION_PREDICTION_TYPE)]
)
def test_networks_of_cld_measure_levels(scheduler):
    network = perfect_network(scheduler, ExactDenoiser(POINTS, WIDTH))

    def by_label(model_input, labels):
        pairs = zip(model_input.split(1), labels.reshape(-1), strict=True)
        return torch.cat([network(one.double(), label).float() for one, label in pairs])

    pipe = CLDPipeline(NetworkOf(by_label, (1, 8, 8), in_channels=2), scheduler)
    _, y = noisy_digits(16, 0.5)
    off = (pipe.estimate_noise_level(y / 2 + 0.5, torch.Generator().manual_seed(0)).sigma / 0.5).log()
    assert abs(float(off.mean())) < 0.1


def test_blind_denoising_is_as_good_as_knowing_the_level():
    pipe = pipeline(SCHEDULERS["mixture"], cls=GMSGMPipeline)
    clean, y = noisy_digits(64, 0.7)

    def error(**arguments):
        images = pipe.denoise(y / 2 + 0.5, output_type="pt", generator=torch.Generator().manual_seed(0), **arguments)
        return float((2 * images.images - 1 - clean.clamp(-1, 1)).square().mean())

    known, blind = error(noise_level=0.7), error()
    assert blind < 1.05 * known < 0.2 * 0.7**2
    assert error(noise_level=0.35) > 1.02 * known or error(noise_level=1.4) > 1.02 * known
    # A run to one of the images that may be behind the noise errs more than their mean, but by a factor of 2 at most.
    assert known < error(noise_level=0.7, num_inference_steps=8) < 2.2 * known


def test_one_answer_is_that_of_the_denoiser():
    """A mixture network is told where the image's level is that of its commonest component."""
    scheduler = SCHEDULERS["mixture"]
    _, y = noisy_digits(8, 0.4)
    images = pipeline(scheduler).denoise(y / 2 + 0.5, 0.4, output_type="pt").images
    exact = ExactDenoiser(POINTS, WIDTH, MIXTURE)(y, 0.4 / MIXTURE.commonest_scale)
    torch.testing.assert_close(images, (exact / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


def test_every_image_of_a_batch_is_run_from_its_own_level():
    pipe = pipeline(SCHEDULERS["mixture"])
    y = torch.cat([noisy_digits(1, sigma)[1] for sigma in (0.2, 1.5)]) / 2 + 0.5
    together = pipe.denoise(y, None, 6, seeded(0, 1), output_type="pt").images
    for i in range(2):
        alone = pipe.denoise(y[i : i + 1], None, 6, seeded(i), output_type="pt").images
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)
    again = pipe.denoise(y, None, 6, seeded(0, 1), output_type="np").images
    assert again.shape == (2, 8, 8, 1)
    assert (again[..., 0] == together[:, 0].numpy()).all()


def test_a_run_is_of_its_own_length_whatever_ran_before():
    """A calibration has its noise for a number of calls."""
    levels = {str(n): torch.logspace(1, -1, n).tolist() for n in (5, 20)}
    calibration = levels | {"stochasticity": {"5": 0.0, "20": 1.0}}
    scheduler = CalibratedMultistepScheduler(sigma_max=10.0, calibration=calibration)
    pipe = pipeline(scheduler)
    _, y = noisy_digits(2, 0.7)

    def denoised(num_calls):
        return pipe.denoise(y / 2 + 0.5, 0.7, num_calls, seeded(0, 1), output_type="pt").images

    before = [denoised(5), denoised(20)]
    pipe(1, 20, seeded(0))
    assert torch.equal(denoised(5), before[0])
    pipe(1, 5, seeded(0))
    assert torch.equal(denoised(20), before[1])
    scheduler.register_to_config(stochasticity=0.0)
    assert torch.equal(denoised(5), before[0])
    assert not torch.equal(denoised(20), before[1]), "with noise, as calibrated"


def test_class_conditional_networks_are_told_the_class():
    unet = tiny_network(num_class_embeds=4)
    pipe = UnconditionalPipeline(unet, AnnealedLangevinScheduler(sigma_max=10.0))
    y = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    of = [
        pipe.denoise(y, num_inference_steps=3, generator=seeded(0, 1), class_labels=labels, output_type="np").images
        for labels in ([0, 1], [0, 2])
    ]
    assert (of[0][0] == of[1][0]).all()
    assert (of[0][1] != of[1][1]).any()
    copies = Guidance(torch.tensor([0, 2])).copied(2).labels.tolist()
    assert copies == [0, 2, 0, 2], "one batch after the other"
    # The last class of a network of which nothing is known may be one like all.
    with pytest.raises(ValueError, match="class-conditional"):
        pipe.estimate_noise_level(y)
    pipe.register_to_config(class_names=["a", "b", "c"])
    found = [pipe.estimate_noise_level(y, seeded(0, 1), labels).sigma for labels in (None, 3)]
    assert torch.equal(*found)


def test_noise_of_images_is_none_of_latents():
    pipe = UnconditionalPipeline(tiny_network(in_channels=4, out_channels=4), SCHEDULERS["ve"], vae=tiny_autoencoder())
    with pytest.raises(ValueError, match="needs a network in pixel space"):
        pipe.denoise(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be .* of at least 3, got 0"),
        ({"num_inference_steps": 2}, "num_inference_steps must be .* of at least 3, got 2"),
        ({"noise_level": 99.0}, r"noise_level must be in \[0.01, 10\], got 99"),
        ({"output_type": "jpg"}, "unknown output_type"),
        ({"image": torch.zeros(1, 3, 8, 8)}, "image must be one image or several, of 1 x any x any"),
        ({"generator": seeded(0)}, "generator is a list of 1"),
    ],
)
def test_what_cannot_be_denoised_is_refused(arguments, message):
    def network(model_input, label):
        raise AssertionError("called")

    pipe = UnconditionalPipeline(NetworkOf(network, (1, 8, 8)), SCHEDULERS["ve"])
    with pytest.raises(ValueError, match=message):
        pipe.denoise(**{"image": torch.zeros(2, 1, 8, 8)} | arguments)
