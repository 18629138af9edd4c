"""The CLD process: its kernel, its clock and the lift."""

import math

import mpmath
import pytest
import torch
from scipy import integrate

from diffusers_gm.processes.cld import CLD, cholesky, lift, perturb

DOUBLE = {"dtype": torch.float64}
PROCESSES = [CLD(), CLD(mass=1.0, gamma=1.0), CLD(damping=0.3), CLD(mass=0.5, damping=4.0)]
CLOCKS = torch.tensor([1e-6, 1e-3, 0.1, 1.0, 4.0], **DOUBLE)


def noise_matrix(process):
    return torch.diag(torch.tensor([0.0, 2 * process.friction], **DOUBLE))


# --- The kernel ---


@pytest.mark.parametrize("process", PROCESSES)
def test_kernel_is_a_semigroup(process):
    a, b = torch.tensor([1e-4, 0.03, 1.7], **DOUBLE), torch.tensor([0.2, 0.01, 2.0], **DOUBLE)
    first, second = process.kernel(a, 0.01), process.kernel(b)
    both = process.kernel(a + b, 0.01)
    torch.testing.assert_close(both.transition, second.transition @ first.transition, rtol=1e-11, atol=1e-14)
    propagated = second.transition @ first.covariance @ second.transition.mT + second.covariance
    torch.testing.assert_close(both.covariance, propagated, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(both.root @ both.root.mT, both.covariance, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("process", PROCESSES)
def test_kernel_solves_the_linear_equation(process):
    """Against the matrix exponential and a numerical integral of `F(s) G G^T F(s)^T`."""
    clock = 1.3
    kernel = process.kernel(torch.tensor(clock, **DOUBLE))
    torch.testing.assert_close(kernel.transition, torch.linalg.matrix_exp(process.drift * clock))

    def integrand(s):
        f = torch.linalg.matrix_exp(process.drift * s)
        return (f @ noise_matrix(process) @ f.T).numpy()

    expected, _ = integrate.quad_vec(integrand, 0, clock, epsabs=1e-13)
    torch.testing.assert_close(kernel.covariance, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_a_singular_covariance_has_a_root():
    """That of `z (1, 0.1)`, whose determinant rounding makes negative."""
    covariance = torch.tensor([[1.0, 0.1], [0.1, 0.01]], **DOUBLE)
    assert torch.linalg.det(covariance) <= 0 or 0.01 - 0.1**2 < 0
    root = cholesky(covariance)
    torch.testing.assert_close(root @ root.mT, covariance)


@pytest.mark.parametrize("process", PROCESSES)
def test_prior_is_the_fixed_point_of_every_kernel(process):
    prior = torch.diag(torch.tensor([1.0, process.mass], **DOUBLE))
    kernel = process.kernel(CLOCKS)
    torch.testing.assert_close(
        kernel.transition @ prior @ kernel.transition.mT + kernel.covariance, prior.expand(5, 2, 2)
    )
    forgotten = process.marginal(torch.tensor(200.0))
    torch.testing.assert_close(forgotten.covariance, prior, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damping", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("hybrid", [True, False])
def test_small_times_lose_no_digits(damping, hybrid):
    """Against 60-digit arithmetic, from t = 1e-6 to 1: every coefficient that losses and samplers use."""
    process = CLD(damping=damping)
    times = torch.tensor([1e-6, 1e-5, 1e-3, 0.1, 1.0], **DOUBLE)
    clocks = process.clock(times)
    kernel = process.marginal(clocks) if hybrid else process.kernel(clocks)
    lifted = lift(kernel)
    tolerance = 1e-12 if damping == 1.0 else 2e-11
    for i, clock in enumerate(clocks.tolist()):
        with mpmath.workdps(60):
            M, G, b = mpmath.mpf(process.mass), mpmath.mpf(process.friction), mpmath.mpf(clock)
            F = mpmath.expm(mpmath.matrix([[0, 1 / M], [-1, -G / M]]) * b)
            prior = mpmath.matrix([[1, 0], [0, M]])
            start = mpmath.matrix([[0, 0], [0, mpmath.mpf(process.gamma * process.mass) if hybrid else 0]])
            S = prior - F * prior * F.T + F * start * F.T
            det = S[0, 0] * S[1, 1] - S[0, 1] ** 2
            m = F[:, 0]
            Sm = (S**-1) * m
            expected = {
                "xx": (kernel.covariance[i, 0, 0], S[0, 0]),
                "xv": (kernel.covariance[i, 0, 1], S[0, 1]),
                "vv": (kernel.covariance[i, 1, 1], S[1, 1]),
                "L22": (kernel.root[i, 1, 1], mpmath.sqrt(det / S[0, 0])),
                "sigma": (lifted.sigma[i], 1 / mpmath.sqrt((m.T * Sm)[0])),
                "gain": (lifted.score_gain[i], Sm[1]),
                "score_v": (lifted.score_state[i, 1], -S[0, 0] / det),
            }
            for name, (ours, exact) in expected.items():
                assert abs(float(ours / float(exact)) - 1) < tolerance, (name, times[i])


@pytest.mark.parametrize("velocity", [None, "given"])
def test_float32_states_are_finite_at_tiny_times(velocity, generator):
    times = torch.tensor([0.0, 1e-6, 1e-5, 1e-4, 1.0])
    images, noise = torch.rand(5, 1, 4, 4, generator=generator), torch.randn(5, 2, 4, 4, generator=generator)
    v0 = None if velocity is None else torch.zeros_like(images)
    single = torch.cat(perturb(CLD(), images, times, noise, v0), 1)
    exact = torch.cat(perturb(CLD(), images.double(), times, noise.double(), None if v0 is None else v0.double()), 1)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single[0, 0], images[0, 0])


# --- Time and clock ---


@pytest.mark.parametrize(("beta_0", "beta_1"), [(4.0, 0.0), (0.1, 8.0), (5.0, -4.0)])
def test_clock_is_the_integral_of_beta(beta_0, beta_1):
    process = CLD(beta_0, beta_1)
    for t in (1e-6, 0.3, 1.0):
        expected, _ = integrate.quad(lambda s: float(process.beta(torch.tensor(s))), 0, t)
        assert float(process.clock(torch.tensor(t, **DOUBLE))) == pytest.approx(expected, rel=1e-6)
    times = torch.tensor([0.0, 1e-6, 0.5, 1.0], **DOUBLE)
    torch.testing.assert_close(process.time(process.clock(times)), times, rtol=1e-12, atol=0)


def test_a_falling_beta_may_never_get_there():
    with pytest.raises(ValueError, match="never reaches"):
        CLD(5.0, -4.0).time(torch.tensor(4.0))


def test_noise_levels_of_the_design_and_their_inverse():
    process = CLD()
    times = torch.tensor([1e-3, 0.1, 0.5, 1.0], **DOUBLE)
    expected = torch.tensor([6.8e-4, 0.408, 8.43, 247.6], **DOUBLE)
    torch.testing.assert_close(process.sigma(process.clock(times)), expected, rtol=6e-3, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_noise_level_grows_and_is_invertible(process):
    clocks = torch.logspace(-6, 1, 200, **DOUBLE)
    sigmas = process.sigma(clocks)
    assert (sigmas.diff() > 0).all()
    torch.testing.assert_close(process.clock_of_sigma(sigmas), clocks, rtol=1e-9, atol=0)


def test_noise_levels_of_strong_damping_are_reached():
    """Overdamped, x forgets at the rate `1 / (2 damping sqrt(M))`: clocks must reach as much further."""
    process, sigmas = CLD(damping=200.0), torch.tensor([0.01, 1.0, 1000.0], **DOUBLE)
    torch.testing.assert_close(process.sigma(process.clock_of_sigma(sigmas)), sigmas, rtol=1e-8, atol=0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_impossible_noise_levels(sigma):
    with pytest.raises(ValueError, match="positive and finite"):
        CLD().clock_of_sigma(torch.tensor([1.0, sigma]))


# --- The lift ---


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("time", [0.01, 0.2, 1.0])
def test_lift_is_exact_on_a_gaussian_mixture(process, time, generator):
    """The velocity score of the lift against autograd of the log density of u, for a mixture of three points."""
    marginal = process.marginal(process.clock(torch.tensor(time)))
    lifted = lift(marginal)
    points, weights = torch.randn(3, 4, generator=generator, **DOUBLE), torch.tensor([0.5, 0.3, 0.2], **DOUBLE)
    mean = marginal.transition[:, 0]
    clean = points[torch.tensor([0, 1, 2, 0, 1])]
    u = mean[:, None, None] * clean + torch.einsum(
        "ij,jbd->ibd", marginal.root, torch.randn(2, 5, 4, generator=generator, **DOUBLE)
    )
    u.requires_grad_()
    rest = u[:, :, None] - mean[:, None, None, None] * points
    energy = torch.einsum("ibkd,ij,jbkd->bk", rest, torch.linalg.inv(marginal.covariance), rest)
    log_density = torch.logsumexp(weights.log() - energy / 2, 1)
    score = torch.autograd.grad(log_density.sum(), u)[0][1]

    x, v = u.detach()
    y, c = lifted.image(x, v)
    log_posterior = weights.log() - (y[:, None] - points).square().sum(-1) / (2 * lifted.sigma**2)
    denoised = torch.softmax(log_posterior, 1) @ points
    torch.testing.assert_close(lifted.velocity_score(x, v, denoised), score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.stack(lifted.state(y, c)), u.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_companion_is_unit_noise_independent_of_the_image(process):
    marginal = process.marginal(CLOCKS[1:])
    lifted = lift(marginal)
    covariance = lifted.inverse @ marginal.covariance @ lifted.inverse.mT
    expected = torch.diag_embed(torch.stack([lifted.sigma**2, torch.ones(4, **DOUBLE)], -1))
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-9)
    blank = lifted.inverse @ marginal.transition[..., :1]
    torch.testing.assert_close(blank[..., 0], torch.tensor([1.0, 0.0], **DOUBLE).expand(4, 2))
    torch.testing.assert_close(lifted.frame @ lifted.inverse, torch.eye(2, **DOUBLE).expand(4, 2, 2), atol=1e-9, rtol=0)


def test_lift_serves_one_clock_per_sample(generator):
    process = CLD()
    lifted = lift(process.marginal(torch.tensor([0.1, 2.0])))
    x, v = torch.randn(2, 2, 1, 3, 3, generator=generator)
    together = lifted.image(x, v)[0]
    torch.testing.assert_close(together[1], lifted[1].image(x, v)[0][1])
    torch.testing.assert_close(lifted.state(*lifted.image(x, v))[1], v, rtol=1e-4, atol=1e-4)


def test_velocity_of_another_shape():
    lifted = lift(CLD().marginal(torch.tensor(1.0)))
    with pytest.raises(ValueError, match="one shape"):
        lifted.image(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_0": 0.0}, "beta"),
        ({"beta_0": -1.0}, "beta"),
        ({"beta_0": 4.0, "beta_1": -4.0}, "beta"),
        ({"beta_0": math.nan}, "beta"),
        ({"mass": 0.0}, "mass"),
        ({"mass": math.inf}, "mass"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": 0.0}, "gamma"),
        ({"damping": 0.0}, "damping"),
    ],
)
def test_parameters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CLD(**arguments)
