"""The CLD samplers: exact moments on Gaussian data, and their orders of convergence."""

import itertools
import math

import pytest
import torch

from diffusers_gm.processes.cld import CLD, lift
from diffusers_gm.processes.cld_dynamics import (
    denoising_step,
    euler_maruyama_step,
    half_step,
    linear_length,
    probability_flow_step,
    score_step,
    sscs_loop_step,
    sscs_step,
)

DOUBLE = {"dtype": torch.float64}
PROCESS = CLD()
VARIANCE = 0.25


def gaussian_covariance(process, clock):
    """Covariance of u for data N(0, VARIANCE)."""
    marginal = process.marginal(clock)
    m = marginal.transition[..., 0]
    return marginal.covariance + VARIANCE * m[..., :, None] * m[..., None, :]


def propagate(process, steps, clocks, covariance):
    """Covariance of u after steps whose D is the exact one, `D = VARIANCE / (VARIANCE + sigma^2) y` of their start."""
    at = lift(process.marginal(clocks[:-1]))
    denoiser = (VARIANCE / (VARIANCE + at.sigma**2))[:, None] * at.inverse[:, 0]
    matrices = steps.matrix + steps.gain[:, :, None] * denoiser[:, None, :]
    for matrix, noise in zip(matrices, steps.covariance, strict=True):
        covariance = matrix @ covariance @ matrix.mT + noise
    return covariance


def published(process, clocks):
    start, end = clocks[:-1], clocks[1:]
    middles = torch.cat([start[:1], (start + end) / 2, end[-1:]])
    steps = sscs_loop_step(process, start, start - end, middles[1:-1] - middles[2:])
    return steps, half_step(process, middles[0] - middles[1])


def second_order(process, clocks):
    length = clocks[:-1] - clocks[1:]
    kick = torch.cat([length.new_zeros(1), length[:-1] / 2]) + torch.cat([length[:-1] / 2, length[-1:]])
    kick = linear_length(process, clocks[:-1], kick, VARIANCE)
    return sscs_loop_step(process, clocks[:-1], kick, length), None


SAMPLERS = {
    "sscs published": (published, 1),
    "sscs step start": (lambda p, b: (sscs_step(p, b[:-1], b[1:]), None), 1),
    "sscs second order": (second_order, 2),
    "euler maruyama": (lambda p, b: (euler_maruyama_step(p, b[:-1], b[1:]), None), 1),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", [PROCESS, CLD(0.1, 8.0), CLD(damping=2.0)], ids=["constant", "linear", "over"])
def test_order_of_convergence(name, process):
    """The variance of x at t = 0.05, begun at the exact marginal of t = 1: its error divides by 2^order."""
    sampler, order = SAMPLERS[name]
    errors = []
    for num_steps in (200, 400, 800):
        clocks = process.clock(torch.linspace(1, 0.05, num_steps + 1, **DOUBLE))
        steps, first = sampler(process, clocks)
        covariance = gaussian_covariance(process, clocks[0])
        if first is not None:
            covariance = first[0] @ covariance @ first[0].mT + first[1]
        error = propagate(process, steps, clocks, covariance) - gaussian_covariance(process, clocks[-1])
        errors.append(abs(error[0, 0].item()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.15)


def test_frozen_answer_makes_the_second_order_variant_first_order_on_other_data():
    """What `linear_length` claims: with the wrong data variance the order is one, the constant small."""
    errors = {}
    for variance in (None, 0.1):
        for num_steps in (400, 800):
            clocks = PROCESS.clock(torch.linspace(1, 0.05, num_steps + 1, **DOUBLE))
            length = clocks[:-1] - clocks[1:]
            kick = length if variance is None else linear_length(PROCESS, clocks[:-1], length, variance)
            steps = sscs_loop_step(PROCESS, clocks[:-1], kick, length)
            error = propagate(PROCESS, steps, clocks, gaussian_covariance(PROCESS, clocks[0]))
            errors[variance, num_steps] = abs((error - gaussian_covariance(PROCESS, clocks[-1]))[0, 0].item())
    assert math.log2(errors[0.1, 400] / errors[0.1, 800]) == pytest.approx(1, abs=0.15)
    assert errors[0.1, 800] < errors[None, 800]


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
        lambda b: sscs_loop_step(PROCESS, b, linear_length(PROCESS, b, b - b, 0.25), b - b),
        lambda b: euler_maruyama_step(PROCESS, b, b),
        lambda b: probability_flow_step(PROCESS, b, b),
    ],
)
def test_step_over_no_interval_is_the_identity(step):
    step = step(torch.tensor([0.01, 2.0], **DOUBLE))
    torch.testing.assert_close(step.matrix, torch.eye(2, **DOUBLE).expand(2, 2, 2))
    assert step.gain.abs().max() < 1e-12
    assert step.root.abs().max() == 0


def test_linear_length_is_the_exact_flow(generator):
    """S on Gaussian data, `dv = 2 Gamma (s_v + v / M) dB` with x fixed, against many small steps of it."""
    clock, length, many = torch.tensor(0.8, **DOUBLE), torch.tensor(0.5, **DOUBLE), 4000
    precision = torch.linalg.inv(gaussian_covariance(PROCESS, clock))
    x, v = 0.7, -0.4

    def velocity(v):
        return 2 * PROCESS.friction * (-(precision[1, 0] * x + precision[1, 1] * v) + v / PROCESS.mass)

    exact = torch.tensor(v, **DOUBLE)
    for _ in range(many):
        middle = exact + velocity(exact) * length / (2 * many)
        exact = exact + velocity(middle) * length / many

    at = lift(PROCESS.marginal(clock))
    denoised = VARIANCE / (VARIANCE + at.sigma**2) * (at.inverse[0, 0] * x + at.inverse[0, 1] * v)
    step = score_step(PROCESS, at, linear_length(PROCESS, clock, length, VARIANCE))
    ours = step(*torch.tensor([[[x]], [[v]]], **DOUBLE), denoised.reshape(1, 1))
    torch.testing.assert_close(ours[1][0, 0], exact, rtol=1e-6, atol=1e-8)
    assert float(ours[0]) == x


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
    ours = step(y.view(1, 1), c.view(1, 1), denoised.view(1, 1))
    torch.testing.assert_close(torch.cat(ours).flatten(), to.inverse @ u, rtol=1e-6, atol=1e-6)
    # The same on states.
    in_states = step.in_states(at, to)
    torch.testing.assert_close(
        in_states.matrix @ (at.frame @ torch.stack([y, c])) + in_states.gain * denoised, u, rtol=1e-6, atol=1e-6
    )


def test_coordinates_describe_the_same_step(generator):
    start, end = torch.tensor([2.0], **DOUBLE), torch.tensor([0.5], **DOUBLE)
    at, to = lift(PROCESS.marginal(start)), lift(PROCESS.marginal(end))
    step = sscs_step(PROCESS, start, end)
    x, v, denoised = torch.randn(3, 2, 1, 3, 3, generator=generator, **DOUBLE)
    noise = torch.randn(2, 2, 1, 3, 3, generator=generator, **DOUBLE)
    new = step[0](x, v, denoised, noise)
    images = step.in_images(at, to)[0](*at[0].image(x, v), denoised, noise)
    torch.testing.assert_close(to[0].state(*images), new)
    score = at[0].velocity_score(x, v, denoised)
    torch.testing.assert_close(step.with_scores(at)[0](x, v, score, noise), new)
    torch.testing.assert_close(step.in_images(at, to).in_states(at, to).matrix, step.matrix)


def test_final_denoising_is_a_noiseless_euler_step():
    clock = torch.tensor([0.004], **DOUBLE)
    step = denoising_step(PROCESS, clock)
    torch.testing.assert_close(step.matrix[0, 0], torch.tensor([1, -0.004 / PROCESS.mass], **DOUBLE))
    assert step.root.abs().max() == 0
