"""`CLDSSCSScheduler` in both modes, and `CLDPipeline`."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import CPU, final_variance, perfect_network, run, tiny_network, velocity_network
from scipy import integrate

from diffusers_gm import CLDPipeline, CLDSSCSScheduler
from diffusers_gm.processes.cld import CLD, lift
from diffusers_gm.readings.velocity import score_coefficients
from diffusers_gm.studies.exact import ExactDenoiser, exact_network

DOUBLE = {"dtype": torch.float64}
PROCESS = CLD()
ALGORITHMS = [
    {"network_at": "step_start"},
    {"network_at": "half_step"},
    {"splitting_order": 2},
    {"algorithm_type": "euler_maruyama"},
    {"algorithm_type": "probability_flow"},
]
POINTS = ExactDenoiser(torch.tensor([-0.8, 0.1, 0.9]).view(3, 1, 1, 1).double(), width=0.1)


def native(**kwargs):
    return CLDSSCSScheduler(prediction_type="velocity_score", **kwargs)


def lifted(**kwargs):
    return CLDSSCSScheduler(beta_schedule="linear", prediction_type="epsilon", **kwargs)


# --- Exact moments ---


def terminal_variance(scheduler, num_calls, data_variance=0.25, begin=0):
    """Var(x) of the scheduler's own sampler and grid with the exact score of N(0, data_variance), without samples.

    A run starts from the prior; one that begins midway, from the exact marginal of that call.
    """
    reading = scheduler.reading
    labels = reading.grid(num_calls, scheduler.config.timestep_spacing)[begin:]
    call = reading.calls(labels)[0]

    def prior(draw):
        return reading.coordinates(reading.initial_sample(draw.normal((draw.size, 2, 1, 1)), call.sigma), call)

    return final_variance(scheduler.sampler, reading.sigma(labels), data_variance, None if begin else prior)


@pytest.mark.parametrize(
    ("algorithm", "spacing", "expected"),
    [
        ("euler_maruyama", "uniform", 0.2801),
        ("euler_maruyama", "quadratic", 0.2662),
        ("sscs", "uniform", 0.2280),
        ("sscs", "quadratic", 0.2410),
    ],
)
def test_terminal_variance_of_the_paper(algorithm, spacing, expected):
    scheduler = native(algorithm_type=algorithm, timestep_spacing=spacing)
    assert terminal_variance(scheduler, 50) == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize(("order", "tolerance"), [(1, 0.15), (2, 0.3)])
def test_native_order_through_the_scheduler(order, tolerance):
    errors = [
        abs(terminal_variance(native(splitting_order=order, timestep_spacing="quadratic"), n) - 0.25) for n in (51, 101)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=tolerance)


@pytest.mark.parametrize("algorithm", [{"splitting_order": 2}, {"algorithm_type": "euler_maruyama"}])
def test_run_that_begins_midway(algorithm):
    """From an exact marginal, the rest of the run is as accurate as a whole one."""
    scheduler = native(timestep_spacing="uniform", **algorithm)
    whole = terminal_variance(scheduler, 201) - 0.25
    rest = terminal_variance(scheduler, 201, begin=150) - 0.25
    assert abs(rest) < abs(whole) + 1e-4


# --- The two modes are one model ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_native_and_lifted_runs_agree(algorithm, generator):
    """The velocity network made of a denoiser and the denoiser itself, same noise: the same D at every call."""
    ends = PROCESS.sigma(PROCESS.clock(torch.tensor([1.0, 1e-3], **DOUBLE))).tolist()
    plain = CLDSSCSScheduler(
        noise_space="ve",
        sigma_max=ends[0],
        sigma_min=ends[1],
        scale_input=False,
        prediction_type="sample",
        **algorithm,
    )
    velocity = native(**algorithm)
    plain.set_timesteps(12)
    velocity.set_timesteps(12)
    noise = torch.Generator().manual_seed(3)
    y = ends[0] * torch.randn(16, 1, 1, 1, generator=generator, **DOUBLE)
    c = torch.randn(y.shape, generator=copy_of(noise), **DOUBLE)
    u = torch.cat(lift(PROCESS.marginal(PROCESS.clock(torch.tensor(1.0)))).state(y, c), 1)
    network = velocity_network(PROCESS, POINTS)
    velocity_noise = copy_of(noise)
    torch.randn(y.shape, generator=velocity_noise, **DOUBLE)  # the companion
    for i, (t, label) in enumerate(zip(plain.timesteps, velocity.timesteps, strict=True)):
        one = plain.step(POINTS(y, float(plain.noise_space.sigma(t))), t, y, generator=noise)
        # Labels are float32: a velocity network is a steep function of them, the comparison is not exact.
        two = velocity.step(network(velocity.scale_model_input(u), label), label, u, generator=velocity_noise)
        torch.testing.assert_close(two.pred_original_sample, one.pred_original_sample, rtol=0, atol=5e-3)
        y, u = one.prev_sample, two.prev_sample
        assert i == 11 or (y - lift_of(velocity, i + 1).image(*u.chunk(2, 1))[0]).abs().max() < 5e-3
    torch.testing.assert_close(u[:, :1], y, rtol=0, atol=1e-2)


def lift_of(scheduler, index):
    return lift(PROCESS.marginal(PROCESS.clock(scheduler.timesteps[index].double() / 1000)))


def copy_of(generator):
    return torch.Generator().set_state(generator.get_state())


@pytest.mark.parametrize("prediction_type", ["scaled_velocity_score", "cld_mixed"])
def test_native_prediction_types_agree(prediction_type, generator):
    score, other = native(), CLDSSCSScheduler(prediction_type=prediction_type)
    score.set_timesteps(5)
    other.set_timesteps(5)
    u = torch.randn(2, 2, 4, 4, generator=generator, **DOUBLE)
    s_v = torch.randn(2, 1, 4, 4, generator=generator, **DOUBLE)
    for t in score.timesteps:
        marginal = PROCESS.marginal(PROCESS.clock(t.double() / 1000))
        of_velocity, of_output = score_coefficients(marginal, prediction_type)
        output = (s_v - of_velocity * u[:, 1:]) / of_output
        one = score.step(s_v, t, u, torch.Generator().manual_seed(0))
        two = other.step(output, t, u, torch.Generator().manual_seed(0))
        torch.testing.assert_close(one.prev_sample, two.prev_sample, rtol=1e-5, atol=1e-5)


# --- Probability flow ---


@pytest.mark.parametrize("prediction_type", ["velocity_score", "scaled_velocity_score", "cld_mixed"])
def test_the_exact_network_of_the_studies_is_that_of_the_lift(prediction_type, generator):
    scheduler = CLDSSCSScheduler(prediction_type=prediction_type, mass=0.5, gamma=0.1)
    denoiser = ExactDenoiser(torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64), 0.1)
    seen, label = torch.randn(5, 2, 2, 2, generator=generator, dtype=torch.float64), torch.tensor(300.0)
    expected = velocity_network(scheduler.process, denoiser, prediction_type)(seen, label)
    torch.testing.assert_close(exact_network(denoiser, scheduler)(seen, label), expected)
    with pytest.raises(ValueError, match="prediction_type 'cld_edm': must be one of velocity_score"):
        exact_network(denoiser, CLDSSCSScheduler(prediction_type="cld_edm"))


def test_probability_flow_converges_to_the_ode_with_order_two(generator):
    """Lifted, exact denoiser of three blobs: against an adaptive solver of the velocity-score ODE."""
    scheduler = lifted(algorithm_type="probability_flow", timestep_spacing="log_snr")
    start = torch.linspace(-1.2, 1.2, 7, **DOUBLE).view(7, 1, 1, 1)
    results = {}
    for num_calls in (81, 161, 321):
        scheduler.set_timesteps(num_calls)
        seeded = torch.Generator().manual_seed(1)
        network = perfect_network(scheduler, POINTS)
        results[num_calls] = run(scheduler, network, start, seeded, scheduler.timesteps[:-1]).flatten()

    # The visible sample of vp space is alpha y.
    first, last = scheduler.noise_space.sigma(torch.tensor([999.0, 0.0]))
    results = {n: result / float(scheduler.noise_space.alpha(last)) for n, result in results.items()}
    clocks = PROCESS.clock_of_sigma(torch.stack([first, last])).tolist()
    c = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
    at = lift(PROCESS.marginal(torch.tensor(clocks[0])))
    u = torch.stack(at.state(start.flatten() / float(scheduler.noise_space.alpha(first)), c.flatten()))

    def slope(clock, flat):
        u = torch.from_numpy(flat).view(2, 7)
        here = lift(PROCESS.marginal(torch.tensor(clock, **DOUBLE)))
        denoised = POINTS(here.image(*u)[0].view(7, 1, 1, 1), float(here.sigma)).flatten()
        push = -PROCESS.friction * here.velocity_score(*u, denoised)
        return (PROCESS.drift @ u + torch.stack([torch.zeros_like(push), push])).flatten().numpy()

    solution = integrate.solve_ivp(slope, clocks, u.flatten().numpy(), "DOP853", rtol=1e-9, atol=1e-10)
    to = lift(PROCESS.marginal(torch.tensor(clocks[1])))
    exact = to.image(*torch.from_numpy(solution.y[:, -1]).view(2, 7))[0]
    errors = [(results[n] - exact).abs().max().item() for n in results]
    assert errors[-1] < 1e-3
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(slope > 1.7 for slope in slopes), slopes


# --- The contract ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_calls", [1, 2, 3, 10])
@pytest.mark.parametrize("make", [native, lifted])
def test_calls_are_counted_and_grids_fall(make, algorithm, num_calls):
    spacings = ["uniform", "quadratic", "log_snr"] + ["leading", "trailing", "linspace", "karras"] * (make is lifted)
    for spacing in spacings:
        scheduler = make(timestep_spacing=spacing, **algorithm)
        scheduler.set_timesteps(num_calls)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == num_calls
        assert (scheduler.timesteps.diff() < 0).all()
        if make is native:
            assert scheduler.timesteps.dtype == torch.float32
            assert scheduler.timesteps[[0, -1]].tolist() == pytest.approx([1000, 1 if num_calls > 1 else 1000])


def test_lifted_run_starts_at_the_network_s_own_level():
    scheduler = lifted(timestep_spacing="quadratic")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[[0, -1]].tolist() == pytest.approx([999, 0], abs=1e-3)
    assert scheduler.init_noise_sigma == 1.0
    wide = CLDSSCSScheduler(noise_space="ve", sigma_max=378.0)
    wide.set_timesteps(5)
    assert wide.init_noise_sigma == pytest.approx(378)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("make", [native, lifted])
def test_generators_decide_every_sample(make, algorithm):
    scheduler = make(**algorithm)
    channels = 2 if make is native else 1
    scores = make is native

    def sample(seeds):
        scheduler.set_timesteps(6)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = scheduler.initial_sample((len(seeds), channels, 3, 3), generators, CPU, torch.float32)
        return run(scheduler, lambda u, t: torch.tanh(-u[:, -1:] if scores else u), start, generators)

    four = sample([1, 2, 3, 4])
    assert torch.equal(four, torch.cat([sample([1, 2]), sample([3, 4])]))
    assert torch.equal(four, sample([1, 2, 3, 4]))
    assert not torch.equal(four, sample([5, 6, 7, 8]))


def test_companion_is_state_of_the_run(generator):
    """Kept over steps, carried by deepcopy, drawn anew after set_timesteps; a sample of another shape is refused."""
    scheduler = lifted()
    sample = torch.randn(2, 1, 4, 4, generator=generator)

    def two_steps(seed, again):
        scheduler.set_timesteps(6)
        noise = torch.Generator().manual_seed(seed)
        scheduler.step(sample, scheduler.timesteps[0], sample, generator=noise)
        where = copy.deepcopy(scheduler) if again else scheduler
        return where.step(sample, where.timesteps[1], sample, generator=torch.Generator().manual_seed(9)).prev_sample

    assert torch.equal(two_steps(0, False), two_steps(0, False))
    assert torch.equal(two_steps(0, False), two_steps(0, True))
    assert not torch.equal(two_steps(0, False), two_steps(1, False)), "the second step has the companion of the first"
    other = sample[:1, :, :3]
    with pytest.raises(ValueError, match=r"sample has shape \(1, 1, 3, 4\), this run began with \(2, 1, 4, 4\)"):
        scheduler.step(other, scheduler.timesteps[2], other, generator=generator)


@pytest.mark.parametrize("make", [native, lifted])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_inputs_are_kept(make, dtype, generator):
    scheduler = make()
    scheduler.set_timesteps(4)
    sample = torch.randn(2, 4, 4, 4, generator=generator).to(dtype)
    for t in scheduler.timesteps:
        output = 0.1 * sample[:, : 2 if make is native else 4]
        before = sample.clone(), output.clone()
        result = scheduler.step(output, t, sample, generator=generator)
        assert torch.equal(before[0], sample)
        assert torch.equal(before[1], output)
        assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
        assert result.prev_sample.isfinite().all()
        assert result.pred_original_sample.shape == output.shape
        sample = result.prev_sample
    scheduler.set_timesteps(4)
    assert isinstance(scheduler.step(output, scheduler.timesteps[0], sample, generator, return_dict=False), tuple)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("make", [native, lifted])
def test_step_never_waits_for_the_device(make, algorithm):
    """Tensors of the meta device have no values: asking for one would fail."""
    scheduler = make(clip_sample=True, **algorithm)
    scheduler.set_timesteps(4)
    sample = torch.empty(2, 2, 4, 4, device="meta")
    for t in scheduler.timesteps:
        result = scheduler.step(sample[:, : 1 if make is native else 2], t, sample)
        assert result.prev_sample.shape == sample.shape


@pytest.mark.parametrize("make", [native, lifted])
def test_clipping_acts_on_the_denoised_image(make, generator):
    """D of +-5 clipped to 1 makes the same step as D of 1 does."""
    clipped, plain = make(clip_sample=True), make()
    sample = torch.randn(2, 2, 4, 4, generator=generator, **DOUBLE)
    for t in (0, 1):
        clipped.set_timesteps(6)
        plain.set_timesteps(6)
        for scheduler in (clipped, plain):
            scheduler.set_begin_index(t)
        label = plain.timesteps[t]

        def output(denoised, label=label):
            shape = sample[:, :1] if make is native else sample
            return perfect_network(plain, lambda y, sigma: denoised.expand_as(shape))(
                plain.scale_model_input(sample, label), label
            )

        five, one = torch.tensor(5.0, **DOUBLE), torch.tensor(1.0, **DOUBLE)
        a = clipped.step(output(five), label, sample, torch.Generator().manual_seed(0))
        b = plain.step(output(one), label, sample, torch.Generator().manual_seed(0))
        torch.testing.assert_close(a.pred_original_sample, torch.ones_like(a.pred_original_sample))
        torch.testing.assert_close(a.prev_sample, b.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", [{}, *ALGORITHMS], ids=str)
def test_a_native_run_that_ends_early_ends_with_the_denoised_image(algorithm, generator):
    """The step of the paper to 0 leaves what noise there is, which is next to none where its grids end."""
    scheduler = native(**algorithm, timestep_spacing="uniform")
    denoise = lambda y, sigma: y / (1 + sigma**2)
    for num_calls, levels, ends in ((8, None, False), (1, None, True), (None, [20.0, 2.0, 0.3], True)):
        scheduler.set_timesteps(num_calls, sigmas=levels)
        sample = scheduler.initial_sample((2, 2, 4, 4), generator, CPU, torch.float64)
        network, seen = perfect_network(scheduler, denoise), []
        for t in scheduler.timesteps:
            seen.append(scheduler.step(network(scheduler.scale_model_input(sample, t), t), t, sample, generator))
            sample = seen[-1].prev_sample
        image, denoised = scheduler.reading.image(sample), seen[-1].pred_original_sample
        assert torch.equal(image, denoised) == ends
        torch.testing.assert_close(image, denoised, rtol=0, atol=0.03)


def test_native_add_noise_has_the_law_of_the_process(generator):
    scheduler = native()
    images = torch.full((20_000, 1), 0.5)
    state = scheduler.add_noise(images, torch.randn(20_000, 2, generator=generator), torch.tensor(250.0))
    marginal = PROCESS.marginal(PROCESS.clock(torch.tensor(0.25)))
    error = state.mean(0) - 0.5 * marginal.transition[:, 0]
    assert (error.abs() < 5 * (marginal.covariance.diagonal() / 20_000).sqrt()).all()
    torch.testing.assert_close(scheduler.scale_model_input(state), state * torch.tensor([1.0, 2.0]))


def test_a_spacing_in_time_may_be_named_as_the_grid():
    spaced, gridded = (
        CLDSSCSScheduler.from_config(DDPMScheduler().config, **{name: "quadratic"})
        for name in ("timestep_spacing", "grid")
    )
    spaced.set_timesteps(8)
    gridded.set_timesteps(8)
    assert torch.equal(gridded.timesteps, spaced.timesteps)


def test_lifted_scheduler_reads_other_configs(generator):
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler = CLDSSCSScheduler.from_config(ddpm.config)
    assert scheduler.noise_space is not None
    assert scheduler.noise_space.kind == "vp"
    images, noise = torch.randn(2, 2, 3, 4, 4, generator=generator)
    t = torch.tensor([10, 500])
    torch.testing.assert_close(scheduler.add_noise(images, noise, t), ddpm.add_noise(images, noise, t))
    again = CLDSSCSScheduler.from_config(native(mass=1.0, beta_1=2.0).config)
    assert again.noise_space is None
    assert again.process == CLD(beta_1=2.0, mass=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_0": -4.0}, "beta"),
        ({"beta_0": 1.0, "beta_1": -1.0}, "beta"),
        ({"mass": 0.0}, "mass"),
        ({"gamma": -1.0}, "gamma"),
        ({"algorithm_type": "heun"}, "algorithm_type"),
        ({"splitting_order": 3}, "splitting_order"),
        ({"network_at": "end"}, "network_at"),
        ({"prediction_type": "velocity"}, "prediction_type"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CLDSSCSScheduler(**arguments)


def test_bad_calls():
    scheduler = native()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 1.0, torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="'uniform', 'quadratic', 'even', 'log_snr' or 'karras'"):
        native(timestep_spacing="leading").set_timesteps(5)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="velocity network"):
        scheduler.step(torch.zeros(1, 2, 2, 2), t, torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match="even number"):
        scheduler.step(torch.zeros(1, 1, 2, 2), t, torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="even number"):
        scheduler.initial_sample((1, 3, 2, 2), torch.Generator(), CPU, torch.float32)
    with pytest.raises(ValueError, match="times"):
        scheduler.add_noise(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), torch.tensor([1001.0]))
    with pytest.raises(ValueError, match="noise"):
        scheduler.add_noise(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([10.0]))
    with pytest.raises(ValueError, match="generator"):
        scheduler.step(torch.zeros(2, 1, 2, 2), t, torch.zeros(2, 2, 2, 2), [torch.Generator()])
    plain = lifted()
    plain.set_timesteps(5)
    with pytest.raises(ValueError, match="agree"):
        plain.step(torch.zeros(1, 1, 2, 2), plain.timesteps[0], torch.zeros(1, 2, 2, 2))


# --- Samples ---


def test_lifted_samples_of_known_data(generator):
    """Three blobs, one per image: the shares and the mean square within five standard errors, at 60 calls."""
    scheduler = lifted()
    scheduler.set_timesteps(60)
    number = 4000
    start = scheduler.initial_sample((number, 1, 1, 1), generator, CPU, torch.float64)
    x = run(scheduler, perfect_network(scheduler, POINTS), start, generator).flatten()
    centres = torch.tensor([-0.8, 0.1, 0.9], **DOUBLE)
    shares = torch.bincount((x[:, None] - centres).abs().argmin(1), minlength=3) / number
    # A bias of 0.02 is the first order of 60 calls.
    assert (shares - 1 / 3).abs().max() < 0.02 + 5 * math.sqrt(2 / 9 / number)
    expected = (centres**2).mean().item() + 0.01
    assert x.square().mean().item() == pytest.approx(expected, abs=0.02 + 5 * x.square().std().item() / number**0.5)


@pytest.mark.parametrize("mode", ["native", "lifted"])
def test_pipeline(mode, tmp_path):
    if mode == "native":
        pipeline = CLDPipeline(tiny_network(6, 3), CLDSSCSScheduler(prediction_type="cld_mixed"))
    else:
        pipeline = CLDPipeline(tiny_network(3, 3), lifted())
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(args))

    def images(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(len(seeds), 6, generator=generators, output_type="np").images

    four = images([0, 1, 2, 3])
    assert four.shape == (4, 8, 8, 3)
    assert len(calls) == 6
    assert calls[0][0].shape[1] == (6 if mode == "native" else 3)
    np.testing.assert_allclose(four, np.concatenate([images([0, 1]), images([2, 3])]), atol=1e-4)
    state = torch.zeros(1, 6 if mode == "native" else 3, 8, 8)
    assert pipeline(1, 3, torch.Generator().manual_seed(0), latents=state, output_type="pt").images.shape == (
        1,
        3,
        8,
        8,
    )


def test_pipeline_wants_the_channels_of_the_mode():
    with pytest.raises(ValueError, match="network with 6 input channels"):
        CLDPipeline(tiny_network(3, 3), CLDSSCSScheduler(prediction_type="cld_mixed"))(1, 3)
    with pytest.raises(ValueError, match="network with 3 input channels"):
        CLDPipeline(tiny_network(6, 3), lifted())(1, 3)
