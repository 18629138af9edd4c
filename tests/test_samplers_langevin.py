"""Langevin, consistent, ancestral and two-step samplers: their updates, their orders, their plans."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from networks import Pulses, final_variance

from diffusers_gm import GaussianMixtureNoise
from diffusers_gm.processes.annealed import PRESETS
from diffusers_gm.processes.random import Draw
from diffusers_gm.readings.grids import even_levels
from diffusers_gm.samplers import Ancestral, Langevin, Memory, TwoStep, sample
from diffusers_gm.samplers.langevin import exponential_step, exponential_step_size, langevin_step
from diffusers_gm.samplers.mixture import check_consistent_step, consistent_step
from diffusers_gm.samplers.sampler import levels_after, to_the_middle

DOUBLE = {"dtype": torch.float64}


# --- Updates ---


def test_consistent_step_leaves_exactly_the_next_level(generator):
    y = 3.0 * torch.randn(400_000, dtype=torch.float64, generator=generator)
    noise = torch.randn(400_000, dtype=torch.float64, generator=generator)
    for eta in (1 / 3 + 1e-6, 0.5, 1.0, 1.6):
        check_consistent_step(eta, 3.0, 2.0)
        left = consistent_step(y, torch.zeros_like(y), 3.0, 2.0, eta, noise)
        assert float(left.var()) == pytest.approx(4.0, abs=5 * 4 * math.sqrt(2 / 400_000))
    for eta in (0.3, 1.7):
        with pytest.raises(ValueError, match="consistent annealed sampling"):
            check_consistent_step(eta, 3.0, 2.0)


def test_langevin_step_is_stationary_to_first_order_in_the_step():
    """On Gaussian data the stationary variance is v / (1 - a sigma^2 / (2 v)), v = s^2 + sigma^2: error O(a)."""
    sigma, v = 0.5, 1.0 + 0.25
    errors = []
    for a in (0.2, 0.1, 0.05):
        factor = float(
            langevin_step(torch.ones(1).double(), torch.full((1,), 1 - sigma**2 / v).double(), sigma, a, torch.zeros(1))
        )
        noise = float(langevin_step(torch.zeros(1), torch.zeros(1), sigma, a, torch.ones(1)))
        stationary = noise**2 / (1 - factor**2)
        assert stationary == pytest.approx(v / (1 - a * sigma**2 / (2 * v)), rel=1e-5)
        errors.append(stationary - v)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.05)


def test_exponential_step_is_langevin_for_small_steps_and_exact_for_a_point_mass(generator):
    y, denoised, noise = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64, generator=generator)
    a = 1e-7
    small = exponential_step(y, denoised, 0.7, a, noise)
    langevin = langevin_step(y, denoised, 0.7, a, noise)
    torch.testing.assert_close(small, langevin, rtol=0, atol=1e-8)
    e2 = math.exp(-1.6)
    kept = exponential_step(y, torch.zeros_like(y), 0.7, 1.6, torch.zeros_like(y))
    torch.testing.assert_close(kept, e2 * y)
    fresh = exponential_step(torch.zeros_like(y), torch.zeros_like(y), 0.7, 1.6, noise)
    torch.testing.assert_close(fresh, 0.7 * math.sqrt(1 - e2**2) * noise)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_step_of_exponential_runs_has_the_smallest_sum_of_lag_and_narrowing(num_steps):
    """The lag is that of a chain of so many steps a level, which has gone down many."""
    weights, scales, ratio = torch.tensor([0.8, 0.2], **DOUBLE), torch.tensor([0.75, 1.62], **DOUBLE), 1.7

    def errors(a):
        e, variance = torch.exp(-a * scales**2), 1.0
        for _ in range(200):
            variance *= ratio**2
            for _ in range(num_steps):
                variance = float(weights @ e**2) * variance + 1 - float(weights @ e**2)
        return variance - 1 + (1 - float(weights @ e)) / 2

    a = float(exponential_step_size(torch.tensor([ratio], **DOUBLE), torch.tensor([num_steps]), weights, scales))
    assert errors(a) < min(errors(1.05 * a), errors(a / 1.05))


def test_ancestral_step_is_ddpm_s_for_one_component(generator):
    """Posterior of y' given y and x0 = D, for y = y' + N(0, sigma^2 - sigma'^2): product of two Gaussians."""
    y, denoised, noise = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64, generator=generator)
    sigma, sigma_next = 2.0, 1.5
    precision = 1 / sigma_next**2 + 1 / (sigma**2 - sigma_next**2)
    mean = (denoised / sigma_next**2 + y / (sigma**2 - sigma_next**2)) / precision
    expected = mean + precision**-0.5 * noise
    torch.testing.assert_close(
        consistent_step(y, denoised, sigma, sigma_next, 1 - (sigma_next / sigma) ** 2, noise), expected
    )


def test_one_component_of_another_scale_is_gaussian_noise_of_other_levels(generator):
    """Noise of scale 2 at levels 3 and 1 is unit noise at 6 and 2."""
    y, denoised = torch.randn(2, 4, 1, 2, 2, **DOUBLE, generator=generator)
    after = []
    for scale in (1.0, 2.0):
        sampler = Ancestral(GaussianMixtureNoise([1.0], [scale]))
        plan = sampler.plan(torch.tensor([6.0, 2.0], **DOUBLE) / scale)
        draw = Draw.like(y, torch.Generator().manual_seed(0))
        after.append(sampler.step(plan, 0, y, denoised, Memory(), draw)[0])
    torch.testing.assert_close(*after)


def test_two_steps_are_exact_for_a_frozen_denoiser_and_for_one_linear_in_log_sigma(generator):
    y, denoised, slope = torch.randn(3, 4, 1, 2, 2, **DOUBLE, generator=generator)
    sampler, draw = TwoStep(), Pulses(0)
    plan = sampler.plan(torch.tensor([4.0, 2.0, 1.0], **DOUBLE))
    first, memory = sampler.step(plan, 0, y, denoised, Memory(), draw)
    torch.testing.assert_close(first, denoised + 0.5 * (y - denoised))
    # D moves by slope a unit of log sigma, downwards.
    second, memory = sampler.step(plan, 1, y, denoised + slope * math.log(2.0), memory, draw)
    middle = denoised + slope * math.log(2.0) * 1.5
    torch.testing.assert_close(second, middle + 0.5 * (y - middle))
    # The step from the last level to 0 extrapolates nothing.
    assert torch.equal(sampler.step(plan, 2, y, denoised, memory, draw)[0], denoised)


def test_local_steps_leave_the_mixture_with_weights_divided_by_the_squared_scales(generator):
    """Langevin steps of `a sigma^2 / w` on a point mass in one dimension, where components overlap and mix: the
    stationary law has E[y^2] = sigma^2 / E[c^-2], up to O(a), and not sigma^2 E[c^2]."""
    mixture = GaussianMixtureNoise([0.6, 0.4], [0.6, 1.8])
    a, n = 0.01, 20_000
    y = mixture.sample((n, 1), generator)
    for _ in range(1500):
        w = mixture.residual_precision(y, 1.0)
        y = langevin_step(y, torch.zeros_like(y), 1 / w.sqrt(), a, torch.randn(n, 1, generator=generator))
    squares = y.square()
    expected = 1 / float((mixture.weights / mixture.scales**2).sum())
    assert float(squares.mean()) == pytest.approx(
        expected, abs=5 * float(squares.std()) / math.sqrt(n) + 2 * a * expected
    )
    assert expected < 0.6 * mixture.moment(2)


def test_a_step_that_is_much_longer_than_the_one_before_looks_one_difference_ahead(generator):
    y, new, old = torch.randn(3, 4, 1, 2, 2, **DOUBLE, generator=generator)
    memory, quiet = Memory(denoised=((4.0, old),)), SimpleNamespace(normal=lambda shape: torch.zeros(shape, **DOUBLE))
    for sampler in (TwoStep(), Ancestral(order=2)):
        for last, further in ((1.0, 0.5), (0.5, 1.0), (0.1, 1.0)):
            plan = sampler.plan(torch.tensor([2.0, last], **DOUBLE))
            after, _ = sampler.step(plan, 0, y, new, memory, quiet)
            share = last / 2 if sampler == TwoStep() else (last / 2) ** 2
            torch.testing.assert_close(after, torch.lerp(new + further * (new - old), y, share))


def test_a_chain_looks_ahead_from_where_it_is_to_where_it_will_be(generator):
    """And not at all where it goes up: steps on a level that it has reached leave it a little above."""
    y, *denoised = torch.randn(4, 4, 1, 2, 2, **DOUBLE, generator=generator)
    quiet = SimpleNamespace(normal=lambda shape: torch.zeros(shape, **DOUBLE))
    down, level = torch.tensor([8.0, 2.0, 0.5, 0.2], **DOUBLE), torch.tensor([1.0, 1.0, 1.0, 0.9, 0.9], **DOUBLE)
    for sampler in (Langevin(follow_chain=True, order=2), Langevin(order=2), Langevin(follow_chain=True)):
        plan, memory, image = sampler.plan(down), Memory(), y
        (_, first, *_), (_, second, *_) = plan.steps[:2]
        for i in range(2):
            image, memory = sampler.step(plan, i, image, denoised[i], memory, quiet)
        above, here, after = plan.sigmas[:3].log().tolist()
        further = (here - after) / (2 * (above - here)) if sampler.follow_chain and sampler.order == 2 else 0
        assert not further or further > 0.1
        towards = torch.lerp(denoised[0], denoised[1], 1 + further)
        torch.testing.assert_close(image, torch.lerp(torch.lerp(y, denoised[0], first), towards, second))
    sampler = Langevin(3, step_size=0.05, follow_chain=True, order=2)
    plan = sampler.plan(level)
    memory = Memory(level=1.0, denoised=((1.1, denoised[0]),))
    moved, memory = sampler.step(plan, 0, y, denoised[1], memory, quiet)
    assert memory.level > 1, "it goes up"
    torch.testing.assert_close(moved, torch.lerp(y, denoised[1], plan.steps[0][1]))


def test_where_steps_lead_and_how_far_they_look():
    sigmas = torch.tensor([4.0, 2.0, 1.0], **DOUBLE)
    assert levels_after(sigmas, denoise=True) == [2, 1, 0]
    assert levels_after(sigmas, denoise=False) == [2, 1, 0.5]
    assert to_the_middle(2.0, 1.0) == 0.25
    assert to_the_middle(0.0, 1.0) == 0
    with pytest.raises(ValueError, match="the order must be 1 or 2, got 3"):
        Ancestral(order=3)
    with pytest.raises(ValueError, match="the order must be 1 or 2, got 0"):
        Langevin(order=0)
    with pytest.raises(ValueError, match="single call is the denoised image"):
        Ancestral(denoise=False).plan(sigmas[:1])


# --- Samplers ---


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (TwoStep(), 2),
        (Ancestral(), 1),
        (Ancestral(order=2), 2),
        (Langevin(follow_chain=True), 1),
        (Langevin(follow_chain=True, order=2), 2),
        (Langevin(follow_chain=True, criterion="fixed_point"), 0.5),
        (Langevin(follow_chain=True, criterion="fixed_point", order=2), 1.5),
    ],
    ids=[
        *("two-step", "ancestral", "ancestral of order 2"),
        *("chain", "chain of order 2", "chain, fixed point", "chain of order 2, fixed point"),
    ],
)
def test_order_of_convergence_on_gaussian_data(sampler, order):
    """The variance after a run approaches that of the reference grid's limit at the promised order."""
    variance, low = 0.25, 0.02
    errors = []
    for n in (40, 80, 160):
        sigmas = torch.logspace(math.log10(8), math.log10(low), n, **DOUBLE)
        end = float(sampler.plan(sigmas).sigmas[-1])  # of a chain that lags behind, above the last level
        limit = variance**2 / (variance + end**2)  # what is left there, denoised
        errors.append(abs(final_variance(sampler, sigmas, variance) - limit))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[1] == pytest.approx(order, abs=0.15), (errors, slopes)


def test_the_published_cifar10_chain_has_the_predicted_law():
    """1.1283 sigma_L^2 on a point mass, the fixed point of the whole chain; not the 1.0555 of Proposition 3."""
    preset = PRESETS["ncsnv2-cifar10"]
    levels = torch.logspace(math.log10(preset.sigma_max), math.log10(preset.sigma_min), preset.num_levels, **DOUBLE)
    sampler = Langevin(preset.num_langevin_steps, preset.step_size, denoise=False)
    assert sampler.calls_per_level(232 * 5) == [5] * 232
    left = final_variance(sampler, levels.repeat_interleave(5), 0.0)
    assert left / preset.sigma_min**2 == pytest.approx(1.1283, abs=5e-5)
    # In images of [-1, 1] the same sampler, twice as large.
    twice = Langevin(preset.num_langevin_steps, 4 * preset.step_size, denoise=False)
    one, two = sampler.plan(levels), twice.plan(2 * levels)
    assert [a for _, a, *_ in two.steps] == pytest.approx([a for _, a, *_ in one.steps])


def test_a_chain_that_is_told_its_level_goes_down_from_its_first_call_on():
    """Its noise is drawn at the first level, and steps there would lead nowhere. By Proposition 3 alone the step to the
    next is the ancestral one."""
    sigmas = torch.tensor([8.0, 2.0, 0.5, 0.2], **DOUBLE)
    plan = Langevin(follow_chain=True).plan(sigmas)
    assert [target for target, *_ in plan.steps] == [2, 0.5, 0.2, 0.2]
    assert [a for _, a, *_ in plan.steps] == pytest.approx([1 - 1 / 16, 1 - 1 / 16, 1 - 0.4**2, 0], abs=1e-6)
    assert (plan.sigmas.diff() < 0).all()
    assert plan.sigmas[1] == pytest.approx(2 * math.sqrt(2 - 1 / 16))
    assert Langevin(follow_chain=True).calls_per_level(4) == [1, 1, 1, 1]
    assert Langevin(3, follow_chain=True).calls_per_level(9) == [1, 4, 4]
    assert Langevin(3, follow_chain=True, denoise=False).calls_per_level(8) == [1, 4, 3]
    # One level, and the call for D.
    assert Langevin(follow_chain=True).calls_per_level(2) == [1, 1]
    plan = Langevin(follow_chain=True).plan(sigmas[:2])
    assert plan.sigmas.tolist() == pytest.approx([8, 2 * math.sqrt(2 - 1 / 16)])


def test_jumps_and_runs_without_d_stay_near_the_ladder_where_they_can():
    """By Proposition 3 alone more calls would not bring jumps nearer; and without D nothing removes what is left."""
    heavy = GaussianMixtureNoise([0.9, 0.1], [0.4, 2.92])
    fixed_point = Langevin(jumps=heavy, criterion="fixed_point").plan(even_levels(80.0, 0.02, 2000))
    chain = Langevin(follow_chain=True, jumps=heavy).plan(even_levels(80.0, 0.02, 2000))
    assert [a for _, a, *_ in chain.steps[:-2]] == pytest.approx([a for _, a, *_ in fixed_point.steps[1:-1]])
    without = Langevin(follow_chain=True, denoise=False).plan(even_levels(80.0, 0.02, 200))
    target, _, kept, fresh = without.steps[-1]
    left = math.sqrt(kept * float(without.sigmas[-1]) ** 2 + fresh * target**2)
    assert left < 1.15 * 0.02


def test_jumps_may_fall_behind_for_a_while_where_the_network_is_told():
    sampler = Langevin(follow_chain=True, jumps=GaussianMixtureNoise([0.8, 0.2], [0.75, 1.62]))
    sigmas = even_levels(157.0, 0.02, 30)
    with pytest.raises(ValueError, match="Technique 4 .* has no solution"):
        replace(sampler, follow_chain=False).plan(sigmas)
    behind = sampler.plan(sigmas).sigmas / sigmas
    assert behind.max() > 5, "where the levels are far apart"
    assert behind[-1] < 3
    with pytest.raises(ValueError, match="too far behind: 10 network calls .* times the last level"):
        sampler.plan(even_levels(157.0, 0.02, 10))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("denoise", [True, False])
def test_calls_are_spent_from_the_first_level_on(num_steps, denoise):
    sampler = Langevin(num_steps, denoise=denoise)
    for n in (60, 61, 62, 100):
        counts = sampler.calls_per_level(n)
        assert sum(counts) == n
        assert len(counts) == (n - denoise) // num_steps
        assert counts[-1] == num_steps + denoise
        assert all(a in (b, b + 1) for a, b in itertools.pairwise(counts[:-1]))


@pytest.mark.parametrize("sigmas", [[0.1, 1.0], [1.0, 0.1, 0.0], [1.0, float("nan")], [], [[1.0, 0.1]]], ids=str)
def test_levels_that_are_none_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must be positive noise levels, none above the one before"):
        sample(TwoStep(), lambda y, sigma: y, torch.zeros(1, 1, 4, 4), torch.tensor(sigmas))


def test_the_loop_counts_its_calls_and_asks_at_the_levels_of_the_plan(generator):
    """`sample` is the loop: with `follow_chain` the network is told other levels than those of the grid."""
    sigmas = torch.logspace(1, -2, 12, **DOUBLE)
    for sampler in (Langevin(), Langevin(follow_chain=True), Ancestral(), TwoStep()):
        asked = []

        def denoiser(y, sigma, asked=asked):
            asked.append(sigma)
            return torch.zeros_like(y)

        y = 10 * torch.randn(2, 1, 4, 4, generator=generator, **DOUBLE)
        left = sample(sampler, denoiser, y, sigmas, generator)
        assert asked == sampler.plan(sigmas).sigmas.tolist()
        assert float(left.abs().max()) == 0
        single = sampler.plan(sigmas).sigmas.float()
        sample(sampler, denoiser, y, single, generator)
        assert asked[len(sigmas) :] == sampler.plan(single.double()).sigmas.tolist()  # coefficients are float64
    assert asked[: len(sigmas)] == sigmas.tolist()


def test_where_the_chain_is_is_where_the_network_is_told(generator):
    """Data that are one point: the noise in y at every call has the level of the plan, exactly."""
    for jumps in (GaussianMixtureNoise([1.0], [1.0]), GaussianMixtureNoise([0.8, 0.2], [0.75, 1.62])):
        for sampler in (
            Langevin(follow_chain=True, jumps=jumps),
            Langevin(2, follow_chain=True, jumps=jumps, exact=True),
        ):
            levels = torch.logspace(1, -2, len(sampler.calls_per_level(30)), **DOUBLE)
            sigmas = levels.repeat_interleave(torch.tensor(sampler.calls_per_level(30)))
            plan = sampler.plan(sigmas)
            variance = float(sigmas[0] ** 2)
            for i, told in enumerate(plan.sigmas.tolist()[:-1]):
                assert told == pytest.approx(math.sqrt(variance), rel=1e-9)
                # The law of one step on a point mass: kept and added variance, means over the jumps.
                target, size, *_ = plan.steps[i]
                if sampler.exact:
                    kept = float((jumps.weights * torch.exp(-2 * size * jumps.scales**2)).sum())
                    variance = kept * variance + (1 - kept) * target**2
                else:
                    kept = float((jumps.weights * (1 - size * jumps.scales**2) ** 2).sum())
                    variance = kept * variance + 2 * size * jumps.moment(2) * target**2


@pytest.mark.parametrize("exact", [False, True])
def test_jumps_of_another_unit_take_the_same_steps(exact):
    """A step is `a c^2`: with all jumps twice as large, a is a quarter, at its largest as well."""
    levels = torch.logspace(1, -2, 12, **DOUBLE)
    one, two = (
        Langevin(exact=exact, jumps=GaussianMixtureNoise([0.5, 0.5], [unit, 2 * unit])).plan(levels).steps[:-1]
        for unit in (1.0, 2.0)
    )
    for (_, a, *moments), (_, b, *others) in zip(one, two, strict=True):
        assert b == pytest.approx(a / 4, rel=1e-6 if not exact else 0.03)  # of a logarithmic grid
        if not exact:
            assert others == pytest.approx(moments)


def test_any_step_is_stable_if_it_is_integrated_exactly():
    levels, step_size = torch.tensor([1.0, 0.1, 0.01, 0.01], **DOUBLE), 5 * 0.01**2
    jumps = GaussianMixtureNoise([0.8, 0.2], [0.75, 1.62])
    _, a, kept, fresh = Langevin(step_size=step_size, exact=True, jumps=jumps).plan(levels).steps[0]
    assert (a, kept + fresh) == (pytest.approx(5), pytest.approx(1))
    with pytest.raises(ValueError, match="unstable step"):
        Langevin(step_size=step_size, jumps=jumps).plan(levels)
