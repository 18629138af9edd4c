"""The probability flow of CLD by an adaptive solver."""

import sys

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import perfect_network
from scipy.integrate import solve_ivp

from diffusers_gm import CLDPipeline, CLDSSCSScheduler
from diffusers_gm.pipelines.cld_ode import ODE_SOLVERS, network_model, solve, start_and_ends
from diffusers_gm.studies.exact import ExactDenoiser

VARIANCE = 0.25


def gaussian_model(scheduler):
    """Score and denoiser of a perfect network for N(0, VARIANCE)."""
    denoiser = ExactDenoiser(torch.zeros(1, 1, 1, 1), width=VARIANCE**0.5)
    return network_model(scheduler, perfect_network(scheduler, denoiser))


def covariance(process, clock):
    marginal = process.marginal(torch.as_tensor(clock, dtype=torch.float64))
    m = marginal.transition[:, 0]
    return marginal.covariance + VARIANCE * torch.outer(m, m)


def flow(scheduler, solver, tolerance):
    """The matrix of the flow from start to end, solved, and the clocks: its columns are runs from (1, 0) and (0, 1)."""
    shape = (2, 1 if scheduler.noise_space else 2, 1, 1)
    clocks = start_and_ends(scheduler, shape, None, torch.Generator(), torch.device("cpu"))[2]
    unit = torch.eye(2, dtype=torch.float64).view(2, 2, 1, 1, 1)
    ends = solve(scheduler, gaussian_model(scheduler), unit[0], unit[1], clocks, solver, tolerance, tolerance)
    return torch.stack(ends).view(2, 2), clocks


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "cld_mixed"},
        {"prediction_type": "velocity_score", "mass": 1.0, "gamma": 0.5, "beta_0": 6.0, "beta_1": 2.0},
        {"noise_space": "ve", "sigma_max": 20.0},
        {"beta_schedule": "linear", "prediction_type": "v_prediction"},
    ],
)
def test_exact_on_gaussian_data(config):
    """The flow of a Gaussian is linear, `du/dB = (drift + Gamma e_v e_v^T C^-1) u`, and takes C to C."""
    scheduler = CLDSSCSScheduler(**config)
    process = scheduler.process
    solved, clocks = flow(scheduler, "dopri5", 1e-7)
    start, end = (covariance(process, clock) for clock in clocks)
    unit = end.diag().rsqrt()
    assert (unit[:, None] * (solved @ start @ solved.T - end) * unit).abs().max() < 1e-3

    def slope(clock, u):
        matrix = process.drift.clone()
        matrix[1] += process.friction * torch.linalg.inv(covariance(process, clock))[1]
        return (matrix @ torch.from_numpy(u).view(2, 2)).flatten().numpy()

    reference = solve_ivp(slope, clocks.tolist(), torch.eye(2).flatten(), "LSODA", rtol=1e-10, atol=1e-13).y[:, -1]
    torch.testing.assert_close(solved, torch.from_numpy(reference).view(2, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_every_solver_gives_the_same_flow(solver):
    scheduler = CLDSSCSScheduler(prediction_type="cld_mixed")
    exact, _ = flow(scheduler, "dopri5", 1e-7)
    torch.testing.assert_close(flow(scheduler, solver, 1e-4)[0], exact, rtol=0.02, atol=2e-3)


@pytest.fixture(params=["native", "lifted"])
def pipeline(request, tiny_unet, tiny_velocity_unet, monkeypatch):
    """A pipeline whose network is perfect, for data around four points."""
    points = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    denoiser = ExactDenoiser(points, width=0.3)
    if request.param == "native":
        made = CLDPipeline(tiny_velocity_unet, CLDSSCSScheduler(prediction_type="velocity_score"))
    else:
        made = CLDPipeline(tiny_unet, CLDSSCSScheduler(beta_schedule="linear"))
    network = perfect_network(made.scheduler, denoiser)
    forward = lambda model_input, label: network(model_input.double(), label).float()
    monkeypatch.setattr(made.unet, "forward", lambda u, label: UNet2DOutput(forward(u, label)))
    made.set_progress_bar_config(disable=True)
    return made


def images(pipeline, seeds=(0, 1), solver="dopri5", tolerance=1e-4, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"ode_solver": solver, "rtol": tolerance, "atol": tolerance, "output_type": "pt"} | options
    return pipeline(len(seeds), generator=generators, **options)


def test_agrees_with_the_fixed_steps_at_many_calls(pipeline):
    solved = images(pipeline, tolerance=1e-5).images
    pipeline.scheduler = CLDSSCSScheduler.from_config(pipeline.scheduler.config, algorithm_type="probability_flow")
    errors = []
    for calls in (25, 400):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        fixed = pipeline(2, calls, generators, output_type="pt").images
        errors.append(float((fixed - solved).abs().max()))
    assert solved.std() > 0.01
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 4


def test_reports_the_calls_it_made(pipeline, monkeypatch):
    forward, made = pipeline.unet.forward, []
    monkeypatch.setattr(pipeline.unet, "forward", lambda *args: made.append(0) or forward(*args))
    loose = images(pipeline, tolerance=1e-2).num_network_calls
    assert loose == len(made)
    tight = images(pipeline, tolerance=1e-5).num_network_calls
    assert tight == len(made) - loose
    assert tight > 1.3 * loose
    default = images(pipeline, rtol=None, atol=None, return_dict=False)
    again = images(pipeline)
    assert torch.equal(default[0], again.images)
    assert default[1] == again.num_network_calls


def test_the_generator_decides_the_images(pipeline):
    one = images(pipeline).images
    assert torch.equal(one, images(pipeline).images)
    assert not torch.equal(one, images(pipeline, (0, 2)).images)
    single = [pipeline(2, generator=torch.Generator().manual_seed(3), ode_solver="dopri5").images for _ in range(2)]
    assert [x.tobytes() for x in single[0]] == [x.tobytes() for x in single[1]]


def test_batches_agree_within_the_tolerance(pipeline):
    whole = images(pipeline, (0, 1, 2, 3))
    halves = [images(pipeline, seeds) for seeds in ((0, 1), (2, 3))]
    assert (whole.images - torch.cat([half.images for half in halves])).abs().max() < 2e-3


def test_an_easy_image_does_not_hide_the_error_of_another():
    """A step is taken if the error of every image is small: beside images that do not move it is that of one alone."""
    scheduler = CLDSSCSScheduler(prediction_type="cld_mixed")
    model = gaussian_model(scheduler)
    clocks = start_and_ends(scheduler, (1, 2, 1, 1), None, torch.Generator(), torch.device("cpu"))[2]
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    still = torch.zeros(15, 1, 1, 1, dtype=torch.float64)
    alone = solve(scheduler, model, one, one, clocks, "dopri5", 1e-3, 1e-3)
    beside = solve(scheduler, model, *[torch.cat([one, still])] * 2, clocks, "dopri5", 1e-3, 1e-3)
    for lone, part in zip(alone, beside, strict=True):
        torch.testing.assert_close(part[:1], lone, rtol=1e-9, atol=1e-12)


def test_either_tolerance_counts(pipeline):
    """A larger one of them saves calls, whichever it is."""
    tight = images(pipeline, tolerance=1e-5).num_network_calls
    for name in ("rtol", "atol"):
        assert images(pipeline, tolerance=1e-5, **{name: 1e-2}).num_network_calls < tight


def test_starts_from_latents(pipeline):
    """In native mode all of the start; in lifted mode the image, and the generator draws its companion."""
    channels = pipeline.unet.config.in_channels
    latents = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    given = [images(pipeline, (seed,), latents=latents).images for seed in (0, 0, 1)]
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2]) == (channels == 2)


def test_latents_as_wide_as_another_level_are_refused(tiny_unet):
    pipeline = CLDPipeline(tiny_unet, CLDSSCSScheduler(sigma_max=30.0))
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="the run begins at noise level 30:"):
        pipeline(latents=latents, ode_solver="bosh3")
    start_and_ends(pipeline.scheduler, (1, 1, 8, 8), 30 * latents, torch.Generator(), torch.device("cpu"))


def test_bad_arguments(pipeline):
    for options, said in (
        ({"ode_solver": "rk4"}, "unknown ode_solver 'rk4': use one of .*dopri5"),
        (
            {"ode_solver": "dopri5", "num_inference_steps": 50},
            "num_inference_steps does not go with ode_solver=.dopri5., whose steps are its own",
        ),
        ({"ode_solver": "dopri5", "rtol": 0.0}, "rtol must be positive, got 0.0"),
        ({"ode_solver": "dopri5", "atol": -1.0}, "atol must be positive, got -1.0"),
        ({"ode_solver": "dopri5", "callback_on_step_end": print}, "callback_on_step_end does not go with"),
        ({"ode_solver": "dopri5", "output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"rtol": 1e-3}, "rtol=0.001 and atol=None are those of an ode_solver"),
        ({"ode_solver": "dopri5", "generator": [torch.Generator()] * 2}, "generator is a list of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline(1, **options)


def test_needs_a_scheduler_that_knows_the_diffusion(tiny_unet):
    with pytest.raises(ValueError, match="ode_solver needs a CLDSSCSScheduler.* this is a DDIMScheduler"):
        CLDPipeline(tiny_unet, DDIMScheduler())(1, ode_solver="dopri5")


def test_says_what_to_install(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r'pip install "diffusers-gm\[ode\]"'):
        images(pipeline)


def test_a_network_that_is_not_finite_ends_the_run(pipeline, monkeypatch):
    forward = pipeline.unet.forward

    def broken(*args):
        output = forward(*args)
        output.sample.fill_(torch.nan)
        return output

    monkeypatch.setattr(pipeline.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="not finite at t = "):
        images(pipeline)
