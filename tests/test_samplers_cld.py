"""The CLD samplers: exact moments on Gaussian data, and their orders of convergence."""

import itertools
import math

import pytest
import torch
from networks import Pulses

from diffusers_gm.processes.cld import CLD, lift
from diffusers_gm.samplers import CriticallyDamped, Memory
from diffusers_gm.samplers.cld import (
    denoising_step,
    euler_maruyama_step,
    frozen_length,
    half_step,
    look_ahead,
    probability_flow_step,
    score_step,
    sscs_loop_step,
    sscs_second_order_step,
    sscs_step,
)

DOUBLE = {"dtype": torch.float64}
PROCESS = CLD()
VARIANCE = 0.25


def noise_of(step):
    return step.root @ step.root.mT


def gaussian_covariance(process, clock):
    """Covariance of u for data N(0, VARIANCE)."""
    marginal = process.marginal(clock)
    m = marginal.transition[..., 0]
    return marginal.covariance + VARIANCE * m[..., :, None] * m[..., None, :]


def propagate(process, steps, clocks, covariance, damped=None):
    """Covariance of u after steps whose D is the exact one, `D = VARIANCE / (VARIANCE + sigma^2) y` of their start.

    With `damped`, D is extrapolated by `look_ahead`: the state is (u, the D of the call before).
    """
    sigmas = process.sigma(clocks).tolist()
    at = lift(process.marginal(clocks[:-1]))
    denoiser = (VARIANCE / (VARIANCE + at.sigma**2))[:, None] * at.inverse[:, 0]
    ahead = [0.0] * len(sigmas) if damped is None else look_ahead(sigmas, damped)
    covariance = torch.block_diag(covariance, torch.zeros(1, 1, **DOUBLE))
    for i, row in enumerate(denoiser):
        matrix = torch.zeros(3, 3, **DOUBLE)
        matrix[:2, :2] = steps.matrix[i] + (1 + ahead[i]) * torch.outer(steps.gain[i], row)
        matrix[:2, 2] = -ahead[i] * steps.gain[i]
        matrix[2, :2] = row
        covariance = matrix @ covariance @ matrix.mT
        covariance[:2, :2] += noise_of(steps)[i]
    return covariance[:2, :2]


def published(process, clocks):
    start, end = clocks[:-1], clocks[1:]
    middles = torch.cat([start[:1], (start + end) / 2, end[-1:]])
    steps = sscs_loop_step(process, start, start - end, middles[1:-1] - middles[2:])
    return steps, half_step(process, middles[0] - middles[1])


SAMPLERS = {
    "sscs published": (published, 1, None),
    "sscs step start": (lambda p, b: (sscs_step(p, b[:-1], b[1:]), None), 1, None),
    "sscs second order": (lambda p, b: (sscs_second_order_step(p, b[:-1], b[1:]), None), 2, True),
    "sscs second order, not damped": (lambda p, b: (sscs_second_order_step(p, b[:-1], b[1:]), None), 2, False),
    "sscs second order, frozen": (lambda p, b: (sscs_second_order_step(p, b[:-1], b[1:]), None), 1, None),
    "euler maruyama": (lambda p, b: (euler_maruyama_step(p, b[:-1], b[1:]), None), 1, None),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", [PROCESS, CLD(0.1, 8.0), CLD(damping=2.0)], ids=["constant", "linear", "over"])
def test_order_of_convergence(name, process):
    """The variance of x at t = 0.05, begun at the exact marginal of t = 1: its error divides by 2^order."""
    sampler, order, damped = SAMPLERS[name]
    errors = []
    for num_steps in (200, 400, 800):
        clocks = process.clock(torch.linspace(1, 0.05, num_steps + 1, **DOUBLE))
        steps, first = sampler(process, clocks)
        covariance = gaussian_covariance(process, clocks[0])
        if first is not None:
            covariance = first[0] @ covariance @ first[0].mT + first[1]
        error = propagate(process, steps, clocks, covariance, damped) - gaussian_covariance(process, clocks[-1])
        errors.append(abs(error[0, 0].item()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.15)


def test_second_order_splitting_is_stable_over_any_step():
    """Known data: D never moves, and x ends within its own noise, however long the steps are."""
    for num_steps in (1, 2, 5):
        clocks = PROCESS.clock_of_sigma(torch.logspace(2, -2, num_steps + 1, **DOUBLE))
        steps = sscs_second_order_step(PROCESS, clocks[:-1], clocks[1:])
        covariance = PROCESS.marginal(clocks[0]).covariance
        for matrix, noise in zip(steps.matrix, noise_of(steps), strict=True):
            covariance = matrix @ covariance @ matrix.mT + noise
        assert covariance[0, 0] < 1
        assert torch.linalg.eigvals(steps.matrix).abs().max() <= 1


def test_look_ahead_is_linear_extrapolation_to_the_middle():
    """On a D that is linear in log sigma; nothing at the ends, after an empty step, and, damped, for long steps."""
    sigmas = [8.0, 4.0, 1.0, 1.0, 0.9]
    plain, damped = look_ahead(sigmas, damped=False), look_ahead(sigmas, damped=True)
    for i in (0, 3, 4):
        assert plain[i] == damped[i] == 0
    logs = [math.log(sigma) for sigma in sigmas]
    assert logs[1] + plain[1] * (logs[1] - logs[0]) == pytest.approx((logs[1] + logs[2]) / 2)
    assert damped[1] == pytest.approx(plain[1] / (1 + math.log(4) ** 4))
    short = [1.0, 0.99, 0.98]
    assert look_ahead(short, damped=True)[1] == pytest.approx(look_ahead(short, damped=False)[1], rel=1e-7)
    assert look_ahead([2.0], damped=True) == [0.0]
    assert look_ahead([2.0, 1.0], damped=True) == [0.0, 0.0]


def test_prior_is_invariant_under_the_half_step():
    matrix, covariance = half_step(PROCESS, torch.tensor(0.7))
    prior = torch.diag(torch.tensor([1, PROCESS.mass], **DOUBLE))
    torch.testing.assert_close(matrix @ prior @ matrix.mT + covariance, prior)


def test_two_half_steps_are_one():
    a, b = torch.tensor(0.2), torch.tensor(0.5)
    first, second, both = half_step(PROCESS, a), half_step(PROCESS, b), half_step(PROCESS, a + b)
    torch.testing.assert_close(second[0] @ first[0], both[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second[0] @ first[1] @ second[0].mT + second[1], both[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        lambda b: sscs_step(PROCESS, b, b),
        lambda b: sscs_second_order_step(PROCESS, b, b),
        lambda b: euler_maruyama_step(PROCESS, b, b),
        lambda b: probability_flow_step(PROCESS, b, b),
    ],
)
def test_step_over_no_interval_is_the_identity(step):
    step = step(torch.tensor([0.01, 2.0], **DOUBLE))
    torch.testing.assert_close(step.matrix, torch.eye(2, **DOUBLE).expand(2, 2, 2))
    assert step.gain.abs().max() < 1e-12
    assert step.root is None or step.root.abs().max() == 0


def test_frozen_length_is_the_exact_flow():
    """S with D frozen, `dv = 2 Gamma (s_v + v / M) dB` with x fixed, against many small steps of it."""
    clock, length, many = torch.tensor(0.8, **DOUBLE), torch.tensor(0.5, **DOUBLE), 4000
    at = lift(PROCESS.marginal(clock))
    x, v, denoised = torch.tensor([0.7, -0.4, 0.3], **DOUBLE)

    def velocity(v):
        score = at.score_state[0] * x + at.score_state[1] * v + at.score_gain * denoised
        return 2 * PROCESS.friction * (score + v / PROCESS.mass)

    exact = v
    for _ in range(many):
        middle = exact + velocity(exact) * length / (2 * many)
        exact = exact + velocity(middle) * length / many
    step = score_step(PROCESS, at, frozen_length(PROCESS, at, length))
    ours = step.matrix @ torch.stack([x, v]) + step.gain * denoised
    torch.testing.assert_close(ours[1], exact, rtol=1e-6, atol=1e-8)
    assert float(ours[0]) == float(x)


@pytest.mark.parametrize("process", [PROCESS, CLD(mass=1.0, gamma=1.0), CLD(damping=2.0)])
def test_probability_flow_step_is_exact_for_a_frozen_denoiser(process):
    """Against Runge-Kutta on `du/dB = drift u - Gamma (0, s_v)` with D fixed."""
    start, end = torch.tensor(3.0, **DOUBLE), torch.tensor(0.05, **DOUBLE)
    y, c, denoised = torch.tensor([1.2, -0.7, 0.4], **DOUBLE)
    at, to = lift(process.marginal(start)), lift(process.marginal(end))
    u = at.frame @ torch.stack([y, c])

    def slope(clock, u):
        here = lift(process.marginal(clock))
        score = here.score_state @ u + here.score_gain * denoised
        return process.drift @ u - process.friction * torch.stack([torch.zeros_like(score), score])

    grid = torch.linspace(math.log(3.0), math.log(0.05), 401, **DOUBLE).exp()
    for a, b in itertools.pairwise(grid):
        h = b - a
        k1 = slope(a, u)
        k2 = slope(a + h / 2, u + h / 2 * k1)
        k3 = slope(a + h / 2, u + h / 2 * k2)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(b, u + h * k3))

    step = probability_flow_step(process, start, end)
    ours = step.matrix @ (at.frame @ torch.stack([y, c])) + step.gain * denoised
    torch.testing.assert_close(ours, u, rtol=1e-6, atol=1e-6)
    # The same on images.
    in_images = step.in_images(at, to.inverse)
    images = in_images.matrix @ torch.stack([y, c]) + in_images.gain * denoised
    torch.testing.assert_close(images, to.inverse @ u, rtol=1e-6, atol=1e-6)


def test_the_sampler_makes_the_step_on_the_images_of_the_lift(generator):
    """From (y, c) and unit pulses of noise to the (y, c) of `matrix u + gain D + root z`."""
    clocks = torch.tensor([2.0, 0.5, 0.1], **DOUBLE)
    at = lift(PROCESS.marginal(clocks))
    step = sscs_step(PROCESS, clocks[:1], clocks[1:2])
    draw = Pulses(2)
    noise = torch.eye(2, **DOUBLE).view(2, 2, 1, 1, 1)
    x, v, denoised = torch.randn(3, 2, 1, 1, 1, generator=generator, **DOUBLE)
    sampler = CriticallyDamped(PROCESS, splitting_order=1)
    plan = sampler.plan(at.sigma)
    y, c = at[0].image(x, v)
    y, memory = sampler.step(plan, 0, y, denoised, Memory(companion=c), draw)
    state = torch.stack(at[1].state(y, memory.companion)).flatten(1)
    expected = step.matrix[0] @ torch.stack([x, v]).flatten(1) + step.gain[0][:, None] * denoised.flatten()
    torch.testing.assert_close(state, expected + step.root[0] @ noise.flatten(1).mT)


def test_final_denoising_is_a_noiseless_euler_step():
    clock = torch.tensor([0.004], **DOUBLE)
    step = denoising_step(PROCESS, clock)
    torch.testing.assert_close(step.matrix[0, 0], torch.tensor([1, -0.004 / PROCESS.mass], **DOUBLE))
    assert not step.root.any()


@pytest.mark.parametrize("published_end", [0.01, 0.009, 0.0])
def test_the_last_step_ends_in_the_state_at_clock_0(published_end, generator):
    """There y is x, and c is v in units of its deviation `sqrt(gamma M)`, which D alone leaves as it is."""
    clocks = torch.tensor([0.5, 0.01], **DOUBLE)
    at = lift(PROCESS.marginal(clocks))
    y, c, denoised = torch.randn(3, 2, 1, 1, 1, generator=generator, **DOUBLE)
    sampler = CriticallyDamped(PROCESS, published_end=published_end)
    image, memory = sampler.step(sampler.plan(at.sigma), 1, y, denoised, Memory(companion=c), Pulses(0))
    if published_end < 0.01:
        assert torch.equal(image, denoised)
        assert torch.equal(memory.companion, c)
        return
    step = denoising_step(PROCESS, clocks[1])
    x, v = step.matrix @ torch.stack(at[1].state(y, c)).flatten(1) + step.gain[:, None] * denoised.flatten()
    torch.testing.assert_close(image.flatten(), x)
    torch.testing.assert_close(memory.companion.flatten() * math.sqrt(PROCESS.gamma * PROCESS.mass), v)


def test_only_fresh_noise_damps_the_look_ahead():
    """The probability flow has none: its D's differ by trend alone, which long steps extrapolate, too."""
    sigmas = torch.tensor([8.0, 4.0, 1.0], **DOUBLE)
    for sampler, damped in ((CriticallyDamped(PROCESS), True), (CriticallyDamped(PROCESS, "probability_flow"), False)):
        assert [a for *_, a in sampler.plan(sigmas).steps] == look_ahead(sigmas.tolist(), damped)
    assert look_ahead(sigmas.tolist(), True) != look_ahead(sigmas.tolist(), False)
