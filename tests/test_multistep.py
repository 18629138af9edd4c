"""The multistep sampler: exact moments, its orders, noise that leaves the law alone, and its scheduler."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from networks import final_variance
from scipy import integrate

from diffusers_gm import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMLangevinScheduler
from diffusers_gm.processes.mixture import GaussianMixtureNoise
from diffusers_gm.readings import level_range
from diffusers_gm.readings.grids import calibrated_levels, calibrated_value, even_levels
from diffusers_gm.samplers import Memory, Multistep, TwoStep, sample
from diffusers_gm.samplers.multistep import exponential_moments, exponential_weights
from diffusers_gm.studies.exact import ExactDenoiser

DOUBLE = {"dtype": torch.float64}
VARIANCE = 0.25


def gaussian(y, sigma):
    """The denoiser of N(0, VARIANCE)."""
    return VARIANCE / (VARIANCE + sigma**2) * y


def levels(n, high=20.0, low=0.01):
    return torch.logspace(math.log10(high), math.log10(low), n, **DOUBLE)


@pytest.mark.parametrize("x", [1e-7, 0.3, 1.99, 2.01, 30.0])
def test_moments_are_the_integrals(x):
    for k, moment in enumerate(exponential_moments(torch.tensor(x, **DOUBLE), 4).tolist()):
        exact, _ = integrate.quad(lambda u, k=k: x * math.exp(-x * (1 - u)) * u**k, 0, 1, epsabs=0, epsrel=1e-13)
        assert moment == pytest.approx(exact, rel=1e-11)


def test_weights_are_exact_for_polynomials():
    start, end, a = 0.4, 1.7, 1.36
    nodes = torch.tensor([0.4, 0.1, -0.5], **DOUBLE)
    weights = exponential_weights(torch.tensor(start, **DOUBLE), torch.tensor(end, **DOUBLE), nodes, a)
    exact, _ = integrate.quad(lambda r: a * math.exp(-a * (end - r)) * (3 * r**2 - r + 0.5), start, end)
    assert float(weights @ (3 * nodes**2 - nodes + 0.5)) == pytest.approx(exact, rel=1e-12)


def flow_error(sampler, n):
    """Error of the probability flow of Gaussian data, whose solution scales y by the ratio of deviations."""
    sigmas = levels(n)
    first, last = (math.sqrt(VARIANCE + float(s) ** 2) for s in (sigmas[0], sigmas[-1]))
    exact = gaussian(last / first, float(sigmas[-1]))
    return abs(float(sample(sampler, gaussian, torch.ones(1, **DOUBLE), sigmas)) - exact)


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (1, True), (2, True), (3, True)])
def test_order_of_the_probability_flow(order, corrector):
    errors = [flow_error(Multistep(order, corrector), n) for n in (80, 160, 320)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order + corrector, abs=0.15), (errors, slopes)


def test_third_order_without_the_corrector_is_at_least_that():
    errors = [flow_error(Multistep(3, False), n) for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) > 2.9


def run_variance(sampler, n):
    """Var of the last D of a run on Gaussian data, exactly: sample 0 answers to a unit pulse at the start, sample i + 1
    to one in the noise of call i, and squares add up."""
    sigmas = levels(n)
    pulses = torch.eye(n + 1, **DOUBLE).view(n + 1, n + 1, 1)
    calls = iter(range(1, n + 1))

    class Pulses:
        def normal(self, shape):
            return pulses[next(calls)].clone()

    plan, memory, y = sampler.plan(sigmas), Memory(), pulses[0].clone()
    for i, sigma in enumerate(sigmas.tolist()):
        y, memory = sampler.step(plan, i, y, gaussian(y, sigma), memory, Pulses())
    start = VARIANCE + float(sigmas[0]) ** 2
    return float(start * y[0] ** 2 + y[1:].square().sum())


@pytest.mark.parametrize("tau", [0.4, 1.0, (0.5, 1.0)])
@pytest.mark.parametrize(
    ("order", "corrector", "expected"),
    [(1, False, 1), (2, False, 2), (3, False, 2), (1, True, 2), (2, True, 2), (3, True, 2)],
)
def test_weak_order_of_the_reverse_diffusion(tau, order, corrector, expected):
    """At least the promised one; the spread of noise over a step is exact, D is what is approximated."""
    limit = VARIANCE**2 / (VARIANCE + 1e-4)
    errors = [abs(run_variance(Multistep(order, corrector, tau), n) - limit) for n in (160, 320, 640)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] > expected - 0.2, (errors, slopes)


def test_without_the_corrector_it_is_dpm_solver_to_second_order(generator):
    """The polynomial through two D's, integrated exactly, and D at the middle of the step agree as steps shrink."""
    y = torch.randn(64, **DOUBLE, generator=generator)
    differences = [
        float((sample(Multistep(2, False), gaussian, y, grid) - sample(TwoStep(), gaussian, y, grid)).abs().max())
        for grid in (levels(40), levels(80))
    ]
    assert math.log2(differences[0] / differences[1]) > 1.8


@pytest.mark.parametrize("tau", [0.4, 1.0])
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_noise_between_near_levels_is_not_extrapolated(tau, variance):
    """The difference of D's at 2 and 1.99 is of the noise between them: the step to .7 is 200 times as long."""
    sampler, levels = Multistep(stochasticity=tau), [20.0, 5.0, 2.0, 0.7, 0.3, 0.1]
    alone = final_variance(sampler, torch.tensor(levels, dtype=torch.float64), variance)
    beside = final_variance(sampler, torch.tensor([*levels[:3], 1.99, *levels[3:]], dtype=torch.float64), variance)
    assert 0.85 < beside / alone < 1.4


def test_a_stochastic_step_gives_way_to_first_order_by_its_length_and_its_growth():
    """`1 / (1 + 0.2 h^4 r)` of the difference of D's is left, r the growth, which counts where it is more than 1."""
    tau = 0.7
    for before, h in ((1.5, 0.5), (0.5, 0.5), (0.5, 1.5)):
        clock = torch.tensor([0.0, before, before + h], **DOUBLE)
        plan = Multistep(2, False, tau).plan(torch.exp(-clock))
        start, end, a = clock[1:2], clock[2:], torch.tensor([1 + tau**2], **DOUBLE)
        full = exponential_weights(start, end, clock[:2].flip(0)[None], a)[0]
        *_, of_calls = plan.steps[1]
        blend = float(of_calls[1][1] / full[1])
        assert blend == pytest.approx(1 / (1 + 0.2 * h**4 * max(h / before, 1)))
        assert sum(of_calls[1]) == pytest.approx(float(full.sum()))


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("order", [2, 3])
def test_two_nearly_equal_levels_are_as_one(order, tau):
    def deviation(sigmas):
        start = 20 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
        sigmas = torch.tensor(sigmas, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        return float(sample(Multistep(order, stochasticity=tau), gaussian, start, sigmas, generator).std())

    alone = deviation([20, 8, 3, 1, 0.3, 0.1, 0.03])
    for more in (1e-2, 1e-4, 1e-6):
        assert deviation([20, 8, 3 * (1 + more), 3, 1, 0.3, 0.1, 0.03]) == pytest.approx(alone, rel=0.15)


@pytest.mark.parametrize("num_calls", [8, 20])
def test_a_long_last_step_does_not_extrapolate(num_calls):
    """Levels even in time, as Bria's and CogView4's pipelines pass them, end in a step many times as long as the one
    before: by the line through the last two D's, samples of narrow data would be nearly twice as wide."""
    s = torch.linspace(1, 1e-3, num_calls, dtype=torch.float64)[1:]
    sigmas, deviation = s / (1 - s), 0.3
    y = torch.linspace(-2, 2, 9, dtype=torch.float64) * (sigmas[0] ** 2 + deviation**2) ** 0.5

    def last(order):
        plan, x, memory = Multistep(order).plan(sigmas), y, Memory()
        for i, sigma in enumerate(sigmas):
            x, memory = Multistep(order).step(plan, i, x, x * deviation**2 / (deviation**2 + sigma**2), memory, None)
        return x

    exact = torch.linspace(-2, 2, 9, dtype=torch.float64) * deviation
    for order in (2, 3):
        assert (last(order) - exact).abs().max() < 0.7 * (last(1) - exact).abs().max()


def test_the_probability_flow_of_mixture_noise_keeps_the_law_of_the_images(generator):
    """Heavy-tailed noise, whose components differ by factors. Noise between the steps, which is Gaussian, would not."""
    noise = GaussianMixtureNoise.from_stable(1.2, 5)
    sigmas, width = torch.logspace(math.log10(200), -2, 100, dtype=torch.float64), 0.3
    denoiser = ExactDenoiser(torch.zeros(1, 1, 4, 4), width, noise)
    y = noise.sample((1000, 1, 4, 4), generator) * 200.0
    flow, noisy = (float(sample(Multistep(stochasticity=tau), denoiser, y, sigmas, generator).std()) for tau in (0, 1))
    error = width / (2 * y.numel()) ** 0.5
    assert flow == pytest.approx(width, abs=5 * error)
    assert noisy > 1.2 * width


def test_two_stochasticities_are_those_above_and_below_noise_level_1():
    sigmas = torch.tensor([20.0, 5.0, 1.0, 0.3, 0.1], **DOUBLE)
    above, below, both = (
        Multistep(corrector=False, stochasticity=tau).plan(sigmas).steps for tau in (0.5, 1.0, (0.5, 1.0))
    )
    assert both == [*above[:2], *below[2:]]


@pytest.mark.parametrize(
    "arguments",
    [{"order": 4}, {"order": 0}, *({"stochasticity": tau} for tau in (-1.0, math.inf, (1.0,), (0.5, -1.0), "12"))],
)
def test_bad_samplers_are_named(arguments):
    with pytest.raises(ValueError, match=r"order|stochasticity"):
        Multistep(**arguments)


def test_repeated_levels_change_nothing(generator):
    """A call at the level of the one before takes its place: without the corrector the same run, with a call more."""
    y, sigmas = torch.randn(8, **DOUBLE, generator=generator), levels(9)
    twice, plain = torch.cat([sigmas[:4], sigmas[3:]]), Multistep(corrector=False)
    torch.testing.assert_close(
        sample(plain, gaussian, y, twice), sample(plain, gaussian, y, sigmas), rtol=1e-9, atol=1e-9
    )


# --- Levels ---


def test_even_levels_end_higher_for_fewer_calls():
    for n in (2, 5, 20, 50):
        grid = even_levels(157.0, 0.01, n)
        assert len(grid) == n
        assert (grid.diff() < 0).all()
        assert float(grid[0]) == pytest.approx(157)
        assert float(grid[-1]) == pytest.approx(0.5 / n)
    assert float(even_levels(157.0, 0.3, 20)[-1]) == pytest.approx(0.3)
    assert even_levels(157.0, 0.01, 1).tolist() == [157.0]
    narrow = even_levels(0.2, 0.01, 2)  # whose highest level is below where two calls would end
    assert narrow.tolist() == pytest.approx([0.2, 0.1])


def test_calibrated_levels_between_budgets():
    calibration = {"4": [16.0, 4.0, 1.0, 0.25], "8": [16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125], "stochasticity": {}}
    assert calibrated_levels(calibration, 4).tolist() == pytest.approx([16.0, 4.0, 1.0, 0.25])
    assert calibrated_levels(calibration, 8).tolist() == pytest.approx(calibration["8"])
    six = calibrated_levels(calibration, 6)
    assert (six.diff() < 0).all()
    assert 0.125 < float(six[-1]) < 0.25
    assert float(calibrated_levels(calibration, 2)[-1]) == pytest.approx(0.25)
    assert calibrated_levels(calibration, 1).tolist() == [16.0]
    assert len(calibrated_levels(calibration, 30)) == 30


def test_runs_between_one_that_begins_lower_and_one_that_does_not_begin_as_the_nearer_one():
    calibration = {"5": [6.0, 3.0, 1.0, 0.4, 0.1], "8": [80.0, 20.0, 8.0, 3.0, 1.0, 0.5, 0.2, 0.06]}
    assert [float(calibrated_levels(calibration, n)[0]) for n in (4, 5, 6, 7, 8)] == pytest.approx([6, 6, 6, 80, 80])


def test_stochasticities_are_those_of_the_nearest_budget_in_the_logarithm_of_its_calls():
    calibration = {"stochasticity": {"4": 0.2, "16": [0.5, 1.0]}}
    values = [calibrated_value(calibration, "stochasticity", n) for n in (2, 4, 7, 9, 16, 40)]
    assert calibrated_value({"stochasticity": {}}, "stochasticity", 4) is None
    assert values == [0.2, 0.2, 0.2, [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, GMLangevinScheduler, CLDSSCSScheduler])
def test_the_spacing_of_another_scheduler_is_not_taken_for_its_own(cls):
    """Which was made for that one's sampler."""
    for config in (cls().config, dict(cls().config)):
        scheduler = CalibratedMultistepScheduler.from_config(config)
        scheduler.set_timesteps(5)
        high, low = float(scheduler.sigmas[0]), scheduler.config.sigma_min
        assert scheduler.sigmas[:-1].tolist() == pytest.approx(even_levels(high, low, 5).tolist(), rel=1e-4)


@pytest.mark.parametrize(("space", "top", "label"), [("flow", 4095.98, 1000), ("vp", 157.406, 999)])
def test_a_rounded_first_level_is_the_last_label(space, top, label):
    """Calibrations have six digits; learned embeddings take whole labels alone, and pure noise has its own."""
    config = {"noise_space": space, "beta_schedule": "linear"} if space == "vp" else {"noise_space": space}
    scheduler = CalibratedMultistepScheduler(**config, calibration={"3": [top, 1.0, 0.1]})
    scheduler.set_timesteps(3)
    assert float(scheduler.timesteps[0]) == label


def test_runs_of_more_calls_than_a_calibration_knows():
    """Begin at the top, unless runs of many calls, of a network of errors, do not."""
    for most, first in (("5", 80.0), ("10", 6.0)):
        levels = torch.logspace(math.log10(6), -1, int(most)).tolist()
        edm = {"noise_space": "edm", "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.01}
        scheduler = CalibratedMultistepScheduler(**edm, calibration={most: levels})
        scheduler.set_timesteps(20)
        assert float(scheduler.sigmas[0]) == pytest.approx(first)
        scheduler.set_timesteps(1)
        assert float(scheduler.sigmas[0]) == pytest.approx(80.0), "a single call sees nothing but noise"


@pytest.mark.parametrize(
    "calibration",
    [
        {},
        {"0": []},
        {"four": [1.0]},
        {"2": [1.0]},
        {"2": [1.0, 2.0]},
        {"2": [1.0, 0.0]},
        {"2": [1.0, 1.0]},
        {"1": [0.0]},
        {"1": [math.inf]},
        {"02": [2.0, 1.0]},
        {"2": [2.0, 1.0], "stochasticty": {"2": 1.0}},
        {"2": [2.0, 1.0], "stochasticity": 0.5},
        {"2": [2.0, 1.0], "stochasticity": {"few": 0.5}},
        {"2": [2.0, 1.0], "shift": 0.0},
        {"2": [2.0, 1.0], "shift": "3"},
        {"2": [2.0, 1.0], "stochasticity": {"0": 0.5}},
        {"2": 5},
        {"2": ["2.0", "1.0"]},
    ],
)
def test_what_is_no_calibration_is_refused(calibration):
    with pytest.raises(ValueError, match="calibration"):
        CalibratedMultistepScheduler(calibration=calibration)


# --- The scheduler ---


@pytest.mark.parametrize("tau", [0.4, [0.5, 1.0]])
def test_its_configs_survive_the_disk_and_other_schedulers(tmp_path, tau):
    levels_of = {"3": [150.0, 2.0, 0.2], "stochasticity": {"3": tau}}
    ours = CalibratedMultistepScheduler.from_config(DDPMScheduler(beta_end=0.015).config, calibration=levels_of)
    ours.save_pretrained(tmp_path)
    for again in (
        CalibratedMultistepScheduler.from_pretrained(tmp_path),
        CalibratedMultistepScheduler.from_config(ours.config),
        CalibratedMultistepScheduler.from_config(UniPCMultistepScheduler.from_config(ours.config).config),
    ):
        again.set_timesteps(3)
        assert again.sigmas[1:3].tolist() == pytest.approx([2.0, 0.2], rel=1e-5)
        assert again.sampler.stochasticity == tau
        assert again.config.beta_end == 0.015
    theirs = UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert theirs.config.beta_end == 0.015
    theirs.set_timesteps(5)


def test_every_scheduler_can_take_the_levels():
    calibration = {"4": [150.0, 4.0, 1.0, 0.25]}
    for cls in (AnnealedLangevinScheduler, CLDSSCSScheduler, GMLangevinScheduler):
        one_call_a_level = {"algorithm_type": "consistent"} if cls is AnnealedLangevinScheduler else {}
        scheduler = cls(beta_schedule="linear", calibration=calibration, grid="calibrated", **one_call_a_level)
        scheduler.set_timesteps(4)
        assert scheduler.sigmas[1:4].tolist() == pytest.approx([4.0, 1.0, 0.25], rel=1e-5)
        # The grid belongs to the sampler: what is swapped onto a calibrated config keeps its own, unless told.
        calibrated = CalibratedMultistepScheduler(beta_schedule="linear", calibration=calibration)
        assert cls.from_config(calibrated.config).config.grid is None
        assert cls.from_config(calibrated.config, grid="calibrated").config.grid == "calibrated"


def test_a_swap_uses_the_calibrated_grid_whatever_the_source_says():
    for source in (DDPMScheduler(), DDPMScheduler(timestep_spacing="trailing"), UniPCMultistepScheduler()):
        scheduler = CalibratedMultistepScheduler.from_config(source.config)
        scheduler.set_timesteps(5)
        assert float(scheduler.sigmas[4]) == pytest.approx(0.1, rel=1e-5)
    other = CalibratedMultistepScheduler.from_config(DDPMScheduler().config, timestep_spacing="trailing")
    other.set_timesteps(5)
    assert other.timesteps.tolist() == [999, 799, 599, 399, 199]


def test_levels_follow_the_shift_of_flow():
    three = CalibratedMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    low, high = level_range(three.reading)
    for n in (6, 50):
        three.set_timesteps(n)
        s = three.sigmas[1:n].double()
        torch.testing.assert_close(s / (1 - s), 3 * even_levels(high / 3, low / 3, n)[1:], rtol=1e-4, atol=1e-5)
        assert (three.timesteps.diff() < 0).all(), "no call is spent at the same level again"
    calibrated = CalibratedMultistepScheduler.from_config(
        three.config, calibration={"3": [100.0, 3.0, 0.3], "shift": 3.0}
    )
    calibrated.set_timesteps(3)
    torch.testing.assert_close(calibrated.sigmas[1], torch.tensor(0.75))


def test_edits_between_steps_stay():
    """The correction is added to the sample that is given: with D = 0, an edit of the sample is scaled and no more."""
    ends = []
    for edit in (0.0, 1.0):
        scheduler = CalibratedMultistepScheduler(beta_schedule="linear", prediction_type="sample")
        scheduler.set_timesteps(6)
        x = torch.ones(1, 1, 2, 2, **DOUBLE)
        for i, t in enumerate(scheduler.timesteps[:4]):
            x = x + edit * (i == 3)
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        ends.append(x)
    visible = scheduler.noise_space.alpha(scheduler.sigmas[3:5].double())
    expected = float(scheduler.sigmas[4] / scheduler.sigmas[3] * visible[1] / visible[0])
    torch.testing.assert_close(ends[1] - ends[0], torch.full_like(ends[0], expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tau", [0.0, 0.4])
def test_a_step_compiles_without_a_break(tau, generator):
    sampler, y = Multistep(stochasticity=tau), torch.randn(2, 1, 4, 4, generator=generator)
    plan, noise, memory = sampler.plan(levels(8)), torch.randn(y.shape, generator=generator), Memory()

    class Drawn:
        def __init__(self, noise):
            self.noise = noise

        def normal(self, shape):
            return self.noise.clone()

    for i in range(3):
        _, memory = sampler.step(plan, i, y, 0.5 * y, memory, Drawn(noise))

    def step(y, denoised, noise, memory):
        return sampler.step(plan, 3, y, denoised, memory, Drawn(noise))[0]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y, 0.3 * y, noise, memory), step(y, 0.3 * y, noise, memory))


def test_a_final_zero_among_custom_sigmas_is_no_call():
    calibration = {"3": [150.0, 2.0, 0.2], "4": [150.0, 4.0, 1.0, 0.2], "stochasticity": {"3": 0.4, "4": 0.0}}
    scheduler = CalibratedMultistepScheduler(beta_schedule="linear", calibration=calibration)
    for sigmas in ([150.0, 2.0, 0.2], [150.0, 2.0, 0.2, 0.0]):
        scheduler.set_timesteps(sigmas=sigmas)
        assert len(scheduler.timesteps) == 3
        assert scheduler.sampler.stochasticity == 0.4
