"""Hybrid and denoising score matching of CLD."""

import pytest
import torch

from diffusers_gm.losses import cld_loss
from diffusers_gm.processes.cld import CLD
from diffusers_gm.readings.velocity import score_coefficients

PROCESS = CLD()
VARIANCE = 0.25
N = 200_000


def exact_score_rows(time):
    """`s_v = row . u` for data N(0, VARIANCE)."""
    marginal = PROCESS.marginal(PROCESS.clock(time))
    m = marginal.transition[:, 0]
    return -torch.linalg.inv(marginal.covariance + VARIANCE * torch.outer(m, m))[1], marginal


def batch(generator, time, velocity):
    images = VARIANCE**0.5 * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    v0 = torch.randn(N, 1, generator=generator, dtype=torch.float64) * (PROCESS.gamma * PROCESS.mass) ** 0.5
    return images, time.expand(N), noise, PROCESS, "cld_mixed", v0 if velocity else None


@pytest.mark.parametrize("velocity", [False, True], ids=["hsm", "dsm"])
@pytest.mark.parametrize("weighting", ["ell", "likelihood"])
@pytest.mark.parametrize("time", [0.02, 0.3, 1.0])
def test_minimiser_is_the_true_score(velocity, weighting, time, generator):
    """The loss of `output = true + a x + b v` has no slope in a, b at 0, to five standard errors."""
    time = torch.tensor(time, dtype=torch.float64)
    row, marginal = exact_score_rows(time)
    of_velocity, of_output = score_coefficients(marginal, "cld_mixed")
    a, b = torch.zeros(2, N, 1, dtype=torch.float64, requires_grad=True).unbind(0)
    a.retain_grad(), b.retain_grad()

    def network(model_input, labels):
        assert torch.equal(labels, torch.full((N,), float(time) * 1000))
        x, v = model_input[:, :1], model_input[:, 1:] * PROCESS.velocity_scale
        true = (row[0] * x + row[1] * v - of_velocity * v) / of_output
        return true + a * x + b * v

    cld_loss(network, *batch(generator, time, velocity), weighting=weighting).sum().backward()
    for slope in (a.grad, b.grad):
        assert abs(slope.mean()) < 5 * slope.std() / N**0.5
        assert slope.std() > 0


def test_hybrid_target_has_less_variance(generator):
    """The least loss of HSM is below that of DSM with the same weight, at a time when the velocity still matters."""
    time = torch.tensor(0.05, dtype=torch.float64)
    row, marginal = exact_score_rows(time)
    of_velocity, of_output = score_coefficients(marginal, "cld_mixed")

    def network(model_input, _):
        x, v = model_input[:, :1], model_input[:, 1:] * PROCESS.velocity_scale
        return (row[0] * x + row[1] * v - of_velocity * v) / of_output

    hybrid, plain = (
        cld_loss(network, *batch(generator, time, velocity), weighting="likelihood") for velocity in (False, True)
    )
    assert plain.mean() - hybrid.mean() > 5 * (plain.std() + hybrid.std()) / N**0.5


@pytest.mark.parametrize("prediction_type", ["velocity_score", "scaled_velocity_score", "cld_mixed"])
def test_prediction_types_describe_the_same_score(prediction_type, generator):
    time = torch.tensor(0.3, dtype=torch.float64)
    row, marginal = exact_score_rows(time)
    of_velocity, of_output = score_coefficients(marginal, prediction_type)
    images, times, noise, process, *_ = batch(generator, time, False)

    def network(model_input, _):
        x, v = model_input[:, :1], model_input[:, 1:] * PROCESS.velocity_scale
        return (row[0] * x + row[1] * v - of_velocity * v) / of_output

    loss = cld_loss(network, images, times, noise, process, prediction_type)
    ell = 1 / marginal.root[1, 1]
    m, root = marginal.transition[:, 0], marginal.root
    u = m[:, None, None] * images + torch.einsum("ij,bj->ib", root, noise)[:, :, None]
    by_hand = ((row[0] * u[0] + row[1] * u[1]) / -ell - noise[:, 1:]).square()[:, 0]
    torch.testing.assert_close(loss, by_hand)


def test_float32_is_finite_at_the_smallest_time_of_training(generator):
    images, noise = torch.rand(8, 3, 4, 4, generator=generator), torch.randn(8, 6, 4, 4, generator=generator)
    for velocity in (None, torch.zeros_like(images)):
        for weighting in ("ell", "likelihood"):
            loss = cld_loss(
                lambda u, t: torch.zeros_like(u[:, :3]), images, torch.full((8,), 1e-5), noise, PROCESS,
                velocity=velocity, weighting=weighting,
            )  # fmt: skip
            assert (loss.shape, loss.dtype) == ((8,), torch.float32)
            assert loss.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": torch.tensor([0.5, 1.1])}, "times"),
        ({"times": torch.tensor([-0.1, 0.5])}, "times"),
        ({"noise": torch.zeros(2, 3, 4, 4)}, "noise"),
        ({"velocity": torch.zeros(2, 3, 4, 5)}, "one shape"),
        ({"weighting": "uniform"}, "weighting"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"model": lambda u, t: u}, "velocity network"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "model": lambda u, t: u[:, :3],
        "images": torch.zeros(2, 3, 4, 4),
        "times": torch.tensor([0.1, 0.9]),
        "noise": torch.zeros(2, 6, 4, 4),
        "process": PROCESS,
    }
    with pytest.raises(ValueError, match=message):
        cld_loss(**(arguments | change))
