"""Preconditioned networks and the noise levels of their training: laws, weights, minimisers, and who reads them."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr
from training import TINY, arguments, plan_for

from diffusers_gm import (
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    calibrate,
    data,
)
from diffusers_gm.losses import denoising_loss, min_snr_weight
from diffusers_gm.processes.cld import CLD, lift
from diffusers_gm.processes.mixture import GAUSSIAN
from diffusers_gm.readings import CompanionReading, NoiseSpace
from diffusers_gm.training.methods import METHODS
from diffusers_gm.training.methods.method import Noise
from diffusers_gm.training.objective import Objective, build_scheduler

EDM = NoiseSpace.edm(0.01, 30.0, 1000, sigma_data=0.8)
VE = NoiseSpace.ve(0.01, 30.0, 1000)
ROOT_OF_UNIFORM = (math.log(30) - math.log(0.01)) / 12**0.5


def levels_of(options, ends=(0.01, 30.0)):
    """The noise levels of numbers spread over [0, 1), by the reading of the scheduler that is saved."""
    args, n = arguments(**options), 20_000
    noise, method = Noise(1000, *ends, sigma_data=0.8), METHODS[args.method]
    labels = method.labels(args, noise, torch.arange(n, dtype=torch.float64) / n)
    assert labels.shape == (n,)
    return method.scheduler(args, noise, {}).reading.sigma(labels).log()


@pytest.mark.parametrize(
    "network", [{}, {"prediction_type": "epsilon"}, {"method": "cld"}, {"method": "cld", "cld_feed_companion": True}]
)
@pytest.mark.parametrize(
    ("options", "mean", "deviation"),
    [
        ({"timestep_sampling": "uniform"}, math.log(30 * 0.01) / 2, ROOT_OF_UNIFORM),
        ({"timestep_sampling": "log_uniform"}, math.log(30 * 0.01) / 2, ROOT_OF_UNIFORM),
        ({"timestep_sampling": "log_normal"}, -1.2, 1.2),
        ({"timestep_sampling": "log_normal", "p_mean": -0.8, "p_std": 0.5}, -0.8, 0.5),
    ],
    ids=["uniform", "log_uniform", "log_normal", "narrow"],
)
def test_the_law_of_the_levels(network, options, mean, deviation):
    """Mean and deviation of ln sigma; and that nothing is beyond the ends."""
    log_sigma = levels_of(network | options)
    assert math.log(0.01) - 1e-6 <= log_sigma.min() <= log_sigma.max() <= math.log(30) + 1e-6
    assert float(log_sigma.mean()) == pytest.approx(mean, abs=0.01)
    assert float(log_sigma.std()) == pytest.approx(deviation, rel=0.01)


def test_a_normal_law_that_is_too_wide_ends_where_the_levels_do():
    log_sigma = levels_of({"p_std": 3.0}, (0.1, 1.0))
    for end in (0.1, 1.0):
        assert 0.1 < float((log_sigma - math.log(end)).abs().lt(1e-6).double().mean()) < 0.7


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "edm"])
def test_min_snr_weights_the_error_of_the_image(prediction_type, generator):
    """Whatever the network answers: `min(SNR, gamma)` times the squared error of D in units of the data."""
    sigma = torch.tensor([0.02, 0.3, 1.0, 20.0], dtype=torch.float64)
    images, noise, output = torch.randn(3, 4, 1, 2, 2, generator=generator, dtype=torch.float64)
    network = lambda x, t: output
    timesteps = EDM.timestep(sigma)
    loss = denoising_loss(network, images, timesteps, noise, EDM, GAUSSIAN, prediction_type, snr_gamma=5.0)
    s = sigma.view(-1, 1, 1, 1)
    denoised = EDM.denoised(output, images + s * noise, s, prediction_type)
    error = ((denoised - images) / EDM.sigma_data).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, (EDM.sigma_data / sigma).square().clamp(max=5.0) * error)


def test_min_snr_weights_are_those_of_diffusers_examples():
    """`min(SNR, gamma) / SNR` of the noise, `/ (SNR + 1)` of the velocity, as in train_text_to_image.py."""
    betas = VE.betas()
    scheduler = SimpleNamespace(alphas_cumprod=(1 - betas).cumprod(0))
    timesteps = torch.tensor([10, 500, 990])
    snr, sigma = compute_snr(scheduler, timesteps), VE.sigma(timesteps)
    clipped = snr.clamp(max=5.0)
    torch.testing.assert_close(min_snr_weight(sigma, VE, "epsilon", 5.0), clipped / snr, check_dtype=False)
    torch.testing.assert_close(min_snr_weight(sigma, VE, "v_prediction", 5.0), clipped / (snr + 1), check_dtype=False)


# --- Minimisers ---

VARIANCE = 0.49


class Linear(torch.nn.Module):
    """Of Gaussian pixels of `VARIANCE`, the exact network, `F = a(sigma) y` in EDM's words, times `1 + theta[0]`, plus
    `theta[1]` times the companion, if any."""

    def __init__(self, scheduler):
        super().__init__()
        self.reading, self.theta = scheduler.reading, torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, model_input, labels):
        space, companion = self.reading.space, model_input.shape[1] == 2
        sigma = self.reading.sigma(labels).view(-1, 1, 1, 1)
        y = model_input[:, :1].double() / space.alpha(sigma)
        denoised = VARIANCE / (VARIANCE + sigma**2) * y
        output = (1 + self.theta[0]) * space.output(denoised, (y - denoised) / sigma, sigma, "edm")
        return SimpleNamespace(sample=output + self.theta[1] * model_input[:, 1:] if companion else output)


@pytest.mark.parametrize("gamma", [None, 5.0], ids=["unit", "min-SNR"])
@pytest.mark.parametrize(
    "method", [{"method": "ncsnv2"}, {"method": "cld"}, {"method": "cld", "cld_feed_companion": True}]
)
def test_the_exact_denoiser_is_the_minimiser(method, gamma, generator):
    """The gradient of the loss there is zero within five standard errors; a tenth further it is not."""
    args = arguments(**method, sigma_data=2.0, snr_gamma=gamma)
    scheduler = build_scheduler(args, plan_for(args))
    network, objective = Linear(scheduler), Objective(args, plan_for(args), scheduler)
    images = VARIANCE**0.5 * torch.randn(400, 1, 8, 8, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for theta, zero in ((0.0, True), (0.1, False)):
            network.theta.data.fill_(theta)
            # The loss is quadratic in theta: central differences are exact, one gradient an image.
            gradients = []
            for i in range(2 if "cld_feed_companion" in method else 1):
                losses = []
                for h in (0.5, -0.5):
                    torch.manual_seed(i)
                    network.theta.data[i] += h
                    losses.append(objective(network, images).detach())
                    network.theta.data[i] -= h
                gradients.append(losses[0] - losses[1])
            for g in gradients:
                assert (abs(g.mean()) < 5 * g.std() / len(g) ** 0.5) == zero


def test_what_a_network_that_is_preconditioned_for_the_size_of_the_data_learns_has_unit_size(generator):
    images = 0.7 + 0.3 * torch.randn(2000, 1, 4, 4, generator=generator, dtype=torch.float64)
    space = NoiseSpace.edm(0.01, 30.0, 1000, float(images.square().mean().sqrt()))
    silence = lambda x, t: torch.zeros_like(x)
    for sigma in (0.02, 0.5, 20.0):
        timesteps = space.timestep(torch.tensor(sigma).double()).expand(2000)
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        loss = denoising_loss(silence, images, timesteps, noise, space, GAUSSIAN, "edm")
        assert float(loss.mean()) == pytest.approx(1, abs=0.05)


def test_one_component_is_ncsnv2_to_the_bit():
    losses = []
    for options in ({"method": "ncsnv2"}, {"mixture_weights": [1.0], "mixture_scales": [1.0]}):
        args = arguments(**options)
        plan = plan_for(args)
        network = lambda x, t: SimpleNamespace(sample=torch.tanh(x + t.view(-1, 1, 1, 1)))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(Objective(args, plan, build_scheduler(args, plan))(network, data.split_digits()[0][:9]))
    assert torch.equal(*losses)


# --- Who reads them ---


@pytest.mark.parametrize(
    ("words", "pipeline"),
    [
        ("--method ncsnv2", NCSNv2Pipeline),
        ("--mixture_weights 1 --mixture_scales 1", GMSGMPipeline),
        ("--method cld", CLDPipeline),
    ],
)
def test_diffusers_reads_what_is_trained(train, tmp_path, words, pipeline, generator):
    """As EDM: the same input of the network and the same denoised image of its output."""
    train(TINY, words, "--output_dir", tmp_path)
    pipe = pipeline.from_pretrained(tmp_path)
    assert pipe.scheduler.reading.prediction_type == "edm"
    y, n = torch.randn(2, 1, 8, 8, generator=generator), 12
    for source in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        theirs = source.from_config(pipe.scheduler.diffusers_config())
        assert theirs.config["sigma_max"] == 80
        theirs.set_timesteps(n)
        ours = GMLangevinScheduler.from_config(theirs.config, algorithm_type="ode", timestep_spacing="karras")
        ours.set_timesteps(n)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=1e-5, atol=1e-5)
        for i in (0, 5, 11):
            ours.set_timesteps(n)
            ours.set_begin_index(i)
            t, sigma = ours.timesteps[i], theirs.sigmas[i]
            noisy = float(sigma) * y
            fed = ours.scale_model_input(noisy, t)
            torch.testing.assert_close(fed, theirs.precondition_inputs(noisy, sigma), rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                output = pipe.unet(fed, t).sample
            denoised = ours.step(output, t, noisy).pred_original_sample
            expected = theirs.precondition_outputs(noisy, output, sigma)
            torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)


READING = CompanionReading(CLD(gamma=0.1), "cld_edm", 1000, NoiseSpace.edm(0.01, 30.0, 1000, 0.6))


def test_a_companion_network_sees_the_noisy_image_and_the_companion(generator):
    """Also where the labels differ within a batch and no run is known."""
    labels = READING.timestep(torch.tensor([0.05, 7.0], dtype=torch.float64))
    images = torch.randn(2, 1, 3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
    sample = READING.add_noise(images, noise, labels)
    fed = READING.model_input(sample, labels, None)
    for i, call in enumerate(READING.calls(labels)[:2]):
        one = sample[i : i + 1]
        torch.testing.assert_close(READING.model_input(one, labels[i], call), fed[i : i + 1])
        y, companion = READING.coordinates(one, call)
        torch.testing.assert_close(fed[i : i + 1], torch.cat([y / math.hypot(call.sigma, 0.6), companion], 1))
    with pytest.raises(ValueError, match="needs the timestep"):
        READING.model_input(sample, None, None)


def test_a_companion_network_starts_where_its_training_ends(generator):
    first, last = READING.timestep_range
    assert 0 < first < last < 1000
    assert float(READING.sigma(torch.tensor(last).double())) == pytest.approx(30.0)
    noise = torch.randn(4000, 2, 2, 2, generator=generator, dtype=torch.float64)
    start = READING.initial_sample(noise, 30.0)
    y, companion = READING.coordinates(start, READING.calls(torch.tensor([last]).double())[0])
    torch.testing.assert_close(torch.cat([y / 30, companion], 1), noise, rtol=1e-5, atol=1e-5)
    # Nearly the prior: the image is a thirtieth of the noise.
    prior = torch.stack([start[:, :1].var(), start[:, 1:].var()])
    torch.testing.assert_close(prior, torch.tensor([1.0, 0.25]).double(), rtol=0.1, atol=0)


def test_a_companion_network_is_trained_sampled_and_calibrated(train, tmp_path):
    train(TINY, "--method cld --cld_feed_companion --timestep_spacing log_snr --output_dir", tmp_path)
    pipe = CLDPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.scheduler.reading, CompanionReading)
    for algorithm in CLDSSCSScheduler.algorithms:
        pipe.scheduler = CLDSSCSScheduler.from_config(pipe.scheduler.config, algorithm_type=algorithm)
        assert pipe(2, 6, torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()
    images = pipe(2, ode_solver="bosh3", rtol=0.1, atol=0.1, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2
    pipe.scheduler = calibrate(pipe, (3,), progress=False, batch_size=2, effort="fast")
    assert pipe(2, 3, torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()
    with pytest.raises(ValueError, match="no scheduler of diffusers reads a network that sees a velocity"):
        pipe.scheduler.diffusers_config()


def test_the_labels_of_a_companion_network_are_times():
    """`t * num_train_timesteps` of the level that the image has."""
    args = arguments(method="cld", cld_feed_companion=True, beta_0=3.0, beta_1=2.0)
    plan = plan_for(args)
    scheduler, seen = build_scheduler(args, plan), []

    def network(model_input, labels):
        seen.append((model_input, labels))
        return SimpleNamespace(sample=torch.zeros_like(model_input[:, :1]))

    images = torch.zeros(3000, 1, 4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Objective(args, plan, scheduler)(network, images)
    ((fed, labels),) = seen
    process = scheduler.process
    sigma = lift(process.marginal(process.clock(labels.double() / 1000))).sigma
    assert float(sigma.log().mean()) == pytest.approx(-1.2, abs=5 * 1.2 / 3000**0.5)
    # y is noise of that level alone, seen through alpha.
    scale = sigma / torch.hypot(sigma, torch.tensor(plan.sigma_data).double())
    for half, size in zip(fed.double().unbind(1), (scale, torch.ones_like(scale)), strict=True):
        ratio = half.square().mean((1, 2)) / size**2
        assert float(ratio.mean()) == pytest.approx(1, abs=5 * (2 / 16 / 3000) ** 0.5)
