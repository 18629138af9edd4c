"""The likelihood by the probability flow, against densities that are known."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from networks import normal_denoiser, perfect_network, seeded, tiny_autoencoder, tiny_network
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
)
from diffusers_gm.data import check_levels, dequantized
from diffusers_gm.evaluation.likelihood import bits_of_images, main
from diffusers_gm.likelihood import bits_per_dimension, flow_nll
from diffusers_gm.pipelines import UnconditionalPipeline
from diffusers_gm.processes.mixture import GaussianMixtureNoise

VARIANCES = torch.tensor([0.05, 0.25, 1.0, 2.0], dtype=torch.float64).view(1, 2, 2)
SCHEDULERS = {
    "vp": GMLangevinScheduler(beta_schedule="linear"),
    "ve": AnnealedLangevinScheduler(sigma_min=0.005, sigma_max=100.0),
    "edm": GMLangevinScheduler(noise_space="edm", sigma_min=0.005, sigma_max=100.0, sigma_data=0.5),
    "flow": GMLangevinScheduler(shift=1.0, prediction_type="flow_prediction"),
    "cld mixed": CLDSSCSScheduler(prediction_type="cld_mixed"),
    "velocity score": CLDSSCSScheduler(prediction_type="velocity_score", mass=1.0, gamma=0.25, beta_0=6.0, beta_1=4.0),
    "cld edm": CLDSSCSScheduler(prediction_type="cld_edm", sigma_min=0.005, sigma_max=100.0, sigma_data=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_exact_on_gaussian_data(name, generator):
    """In nats per dimension, for every image and any network: the density at the smallest level is known."""
    scheduler = SCHEDULERS[name]
    network = perfect_network(scheduler, normal_denoiser(VARIANCES))
    low, high = scheduler.reading.sigma(torch.tensor(scheduler.reading.timestep_range).double()).tolist()
    images = VARIANCES.sqrt() * torch.randn(16, 1, 2, 2, generator=generator, dtype=torch.float64)
    companion = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    denoiser = lambda y, sigma: scheduler.denoise(network, y, companion, torch.tensor(sigma).double())
    found = flow_nll(denoiser, images, (low, min(high, 200.0)), 100, generator)
    variances = VARIANCES + low**2
    exact = 0.5 * (images**2 / variances + (2 * math.pi * variances).log()).sum((1, 2, 3))
    assert (found - exact).abs().max() / 4 < 1e-3


def test_exact_under_mixture_noise(generator):
    """An image that is a point under noise of several components: the noise's own law, at every level."""
    mixture = GaussianMixtureNoise([0.7, 0.3], [0.8, 1.4])
    y = 0.1 * mixture.sample((64, 1, 2, 2), generator, dtype=torch.float64)
    found = flow_nll(lambda y, sigma: 0 * y, y, (0.1, 50.0), 100, generator, mixture)
    torch.testing.assert_close(found, -mixture.log_prob(y, 0.1), rtol=1e-4, atol=1e-4)


def test_a_wrong_model_is_bounded_from_above(generator):
    """The network that takes pixels for N(0, 1) gives its own density's value on average, not the data's."""
    images = 0.5 * torch.randn(256, 1, 2, 2, generator=generator, dtype=torch.float64)
    wrong = normal_denoiser(torch.ones(1, 2, 2))
    found = flow_nll(wrong, images, (0.001, 100.0), 100, generator)
    own, true = (torch.distributions.Normal(0, s).log_prob(images).sum((1, 2, 3)) for s in (1.0, 0.5))
    assert torch.allclose(found, -own, atol=5e-3)
    assert found.mean() > -true.mean()


def test_the_probe_is_unbiased(generator):
    """Pixels that depend on each other: `dD / dy` is no diagonal, and probes differ; their mean does not."""
    n, rotation = 4000, torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    plain = normal_denoiser(torch.tensor([0.05, 1.0], dtype=torch.float64).view(1, 1, 2))
    rotated = lambda y, sigma: plain(y @ rotation, sigma) @ rotation.T
    image = torch.tensor([0.3, -0.5], dtype=torch.float64).view(1, 1, 1, 2)
    found = flow_nll(rotated, image.expand(n, -1, -1, -1), (0.01, 50.0), 25, generator)
    exact = flow_nll(plain, image @ rotation, (0.01, 50.0), 25, generator)
    assert found.std() > 1e-3
    assert abs(found.mean() - exact) < 5 * found.std() / n**0.5 + 1e-3


def test_a_denoiser_that_listens_to_its_companion_is_bounded_from_above(generator):
    """Its density is the mean over companions; the mean of `-log p(y | c)` is above `-log` of that (Jensen)."""
    n = 2000
    image = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64).expand(n, 1, 1, 1)
    companion = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    means = 1.5 * companion  # D of data N(1.5 c, 1)
    denoiser = lambda y, sigma: means + (y - means) / (1 + sigma**2)
    found = flow_nll(denoiser, image, (0.001, 1000.0), 100, generator)
    each = torch.distributions.Normal(means, 1.0).log_prob(image).flatten()
    torch.testing.assert_close(found, -each, rtol=0, atol=0.05)
    marginal = torch.distributions.Normal(0.0, 3.25**0.5).log_prob(image[0]).item()
    assert found.mean() > -marginal + 5 * found.std() / n**0.5


def test_bits_of_uniform_noise_are_those_of_its_levels():
    """A density of 1/2 on [-1, 1], dequantised: every level of 2^b has about b bits."""
    nats = torch.tensor([10 * math.log(2.0)])
    assert bits_per_dimension(nats, 10, 257).item() == pytest.approx(8)


def test_the_bound_is_one_on_the_probability_of_levels(generator):
    """Pixels N(0, s^2): the mean over dequantisations is above `-log2 P`, P the mass of a level's bin, and near it."""
    levels, deviation, n = 17, 0.5, 20000
    images = (torch.arange(levels) / 8 - 1).view(levels, 1, 1, 1)
    density = torch.distributions.Normal(0, torch.tensor(deviation, dtype=torch.float64))
    mass = density.cdf(images.flatten() + 1 / 16) - density.cdf(images.flatten() - 1 / 16)
    noisy = dequantized(images.double().expand(-1, n, 1, 1), levels, generator)
    bits = bits_per_dimension(-density.log_prob(noisy), 1, levels).view(levels, n)
    mean, error = bits.mean(1), bits.std(1) / n**0.5
    assert (mean + mass.log2() > -5 * error).all()
    # The gap is half the variance of log p in a bin, (u x / s^2)^2 / 2 at most.
    assert (mean + mass.log2() < 0.06).all()


def test_images_of_other_levels_are_refused(tiny_velocity_unet):
    check_levels(torch.arange(256) / 127.5 - 1, 256)
    with pytest.raises(ValueError, match="the images hold -0.992.*none of 17 equal levels"):
        check_levels(torch.tensor([-1.0, 1 / 127.5 - 1]), 17)
    with pytest.raises(ValueError, match="hold 1.125"):
        check_levels(torch.tensor([0.0, 1.125]), 17)
    pipeline = CLDPipeline(tiny_velocity_unet, CLDSSCSScheduler(prediction_type="cld_mixed"))
    with pytest.raises(ValueError, match="none of 256 equal levels"):
        bits_of_images(pipeline, torch.full((1, 1, 8, 8), 0.125))


def test_pixels_are_no_latents():
    pipeline = GMSGMPipeline(tiny_network(4, 4), GMLangevinScheduler(), vae=tiny_autoencoder())
    with pytest.raises(ValueError, match="none of their latents"):
        bits_of_images(pipeline, torch.ones(1, 4, 8, 8))


def test_dequantised_images_stay_in_their_bins(generator):
    images = torch.randint(0, 17, (8, 1, 8, 8), generator=generator) / 8 - 1
    noisy = dequantized(images, 17, generator)
    assert torch.equal((((noisy + 1) * 8).round()) / 8 - 1, images)
    # Uniform on [-1/16, 1/16]: variance (1/8)^2 / 12, its square estimated from 512 draws.
    difference = noisy - images
    assert difference.var() == pytest.approx(1 / 768, rel=5 * (0.8 / 512) ** 0.5)


@pytest.mark.parametrize(
    "scheduler",
    [
        CLDSSCSScheduler(prediction_type="cld_mixed"),
        CLDSSCSScheduler(prediction_type="cld_edm", sigma_max=30.0),
        CLDSSCSScheduler(noise_space="edm", sigma_data=0.5, sigma_max=30.0),
        GMLangevinScheduler(mixture_weights=[0.7, 0.3], mixture_scales=[0.8, 1.4], model_noise="mixture"),
        GMLangevinScheduler(
            mixture_weights=[0.7, 0.3],
            mixture_scales=[0.8, 1.4],
            model_noise="mixture",
            prediction_type="scaled_score",
        ),
        DDPMScheduler(),
    ],
    ids=["velocity", "companion", "lifted", "mixture", "mixture score", "ddpm"],
)
def test_of_a_pipeline(scheduler, generator):
    native = str(scheduler.config["prediction_type"]).startswith("cld_")
    unet = tiny_network(2 if native else 1, 1)
    pipeline = (CLDPipeline if isinstance(scheduler, CLDSSCSScheduler) else UnconditionalPipeline)(unet, scheduler)
    images = torch.randint(0, 17, (5, 1, 8, 8), generator=generator) / 8 - 1
    state = generator.get_state()
    bits = bits_of_images(pipeline, images, 17, num_steps=5, generator=generator, batch_size=2)
    assert bits.shape == (5,)
    assert bits.isfinite().all()
    assert all(p.grad is None for p in unet.parameters())
    generator.set_state(state)
    assert torch.equal(bits_of_images(pipeline, images, 17, num_steps=5, generator=generator, batch_size=2), bits)


def test_what_clips_samples_has_no_say(generator):
    images = torch.randint(0, 17, (2, 1, 8, 8), generator=generator) / 8 - 1
    bits = [
        bits_of_images(
            UnconditionalPipeline(tiny_network(), DDPMScheduler(clip_sample=clips)), images, 17, 5, seeded(0)[0]
        )
        for clips in (True, False)
    ]
    assert torch.equal(*bits)


def test_a_run_that_starts_from_unit_noise_is_measured_by_it(generator):
    """A network that sees no noise moves nothing: the density is that of the start, y = noise / alpha, which is wider
    than the largest level. Of ten levels that is much: 1.05 where sigma is 0.33."""
    scheduler, unet = DDPMScheduler(num_train_timesteps=10), tiny_network()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    images = torch.randint(0, 17, (3, 1, 8, 8), generator=generator) / 8 - 1
    bits = bits_of_images(UnconditionalPipeline(unet, scheduler), images, 17, 5, seeded(0)[0])
    start = torch.distributions.Normal(0, scheduler.alphas_cumprod[-1].double() ** -0.5)
    noisy = dequantized(images, 17, seeded(0)[0]).double()
    exact = bits_per_dimension(-start.log_prob(noisy).flatten(1).sum(1), 64, 17)
    torch.testing.assert_close(bits, exact, rtol=1e-5, atol=0)


def test_no_device_is_asked_for_float64(generator):
    """All of a float32 run stays float32, but for log densities, which are `(B, d)` and `(B,)` on the CPU."""
    images = torch.rand(3, 2, 4, 5, generator=generator)
    wide = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                wide.add(tuple(result.shape))
            return result

    def denoiser(y, sigma):
        assert y.dtype == torch.float32
        return y.tanh() / (1 + sigma)

    with Watch():
        flow_nll(denoiser, images, (0.1, 10.0), 2, generator)
    assert {shape for shape in wide if math.prod(shape) > 3} <= {(3, 2, 4, 5), (2, 4, 5), (3, 40)}


def test_bad_input():
    images, denoiser = torch.zeros(2, 1, 2, 2), normal_denoiser(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        flow_nll(denoiser, images, (0.1, 1.0), 0)
    with pytest.raises(ValueError, match="finite"):
        flow_nll(denoiser, images * math.nan, (0.1, 1.0))
    with pytest.raises(ValueError, match=r"levels must be positive and rise, got \(1.0, 0.1\)"):
        flow_nll(denoiser, images, (1.0, 0.1))
    with pytest.raises(ValueError, match="float32 or float64, got torch.bfloat16"):
        flow_nll(denoiser, images.bfloat16(), (0.1, 1.0))


# --- The command ---


def test_the_command_says_which_models_it_takes(tmp_path, capsys):
    large = tiny_network(sample_size=16)
    GMSGMPipeline(large, GMLangevinScheduler()).save_pretrained(tmp_path / "large")
    (tmp_path / "empty").mkdir()
    for name, words in [
        ("large", "is one of 1x16x16 images, and not of the digits"),
        ("empty", "holds no trained model"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / name)])
        assert ended.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert words in line
        assert "make one with train_gm_sgm.py --dequantize 17" in line


@pytest.mark.parametrize("prediction_type", ["cld_mixed", "cld_edm", "epsilon"])
def test_the_command_prints_a_bound(tmp_path, prediction_type, capsys):
    unet = tiny_network(1 if prediction_type == "epsilon" else 2, 1)
    CLDPipeline(unet, CLDSSCSScheduler(prediction_type=prediction_type)).save_pretrained(tmp_path)
    main([str(tmp_path), "--num_images", "3", "--num_steps", "2"])
    training, held_out = capsys.readouterr().out.splitlines()
    assert training.startswith("training digits: at most ")
    assert held_out.endswith(" bits per dimension (3 images)")
