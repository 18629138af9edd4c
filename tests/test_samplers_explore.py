"""Exploring: Langevin dynamics on the first level, then the probability flow."""

import math

import pytest
import torch
from networks import final_variance

from diffusers_gm.samplers import Explore, Langevin, TwoStep, sample
from diffusers_gm.samplers.langevin import langevin_step
from diffusers_gm.studies.exact import ExactDenoiser

DOUBLE = {"dtype": torch.float64}


def ladder_of(sampler, num_calls, high, low):
    counts = sampler.calls_per_level(num_calls)
    levels = torch.logspace(math.log10(high), math.log10(low), len(counts), **DOUBLE)
    return levels.repeat_interleave(torch.tensor(counts))


@pytest.mark.parametrize("num_calls", [1, 2, 5, 12, 13, 50])
def test_exploring_is_langevin_dynamics_on_one_level_and_then_the_probability_flow(num_calls, generator):
    denoiser = ExactDenoiser(torch.randn(5, 1, 2, 2, generator=generator), 0.3)
    sigmas, y = ladder_of(Explore(), num_calls, 4.0, 0.05), 4 * torch.randn(8, 1, 2, 2, generator=generator, **DOUBLE)
    assert len(sigmas) == num_calls
    left = sample(Explore(), denoiser, y, sigmas, torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    for _ in range(max(num_calls - 12, 0)):
        y = langevin_step(y, denoiser(y, 4.0), 4.0, 0.25, torch.randn(y.shape, generator=draws, **DOUBLE))
    assert torch.equal(left, sample(TwoStep(), denoiser, y, sigmas[-12:]))


def test_exploring_keeps_the_law():
    """Of Gaussian data much narrower than the level, where Langevin steps are off by a / 2 of their variance."""
    sigmas = ladder_of(Explore(), 60, 3.0, 0.02)
    plain = final_variance(TwoStep(), sigmas[-12:], 0.25)
    step = final_variance(Explore(step_size=0.25 * 0.02**2), sigmas, 0.25)
    assert step == pytest.approx(final_variance(Explore(), sigmas, 0.25), rel=1e-9)
    assert 0 < step / plain - 1 < 0.25 / 2 / (1 - 0.25 / 2) + 0.01
    assert final_variance(Explore(step_size=0.01 * 0.02**2), sigmas, 0.25) == pytest.approx(plain, rel=0.01)
    with pytest.raises(ValueError, match="unstable step: step_size=1"):
        Explore(step_size=1.0).plan(sigmas)


def test_exploring_finds_far_modes_that_steps_down_the_ladder_do_not():
    """Fifty calls from one of six modes, at a quarter of their distance: the distance of what share each has."""
    points, weights = torch.eye(6)[:, None, None] * 10 / 2**0.5, torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    denoiser, errors = ExactDenoiser(points, 0.3, weights=weights), []
    for sampler in (Explore(), Langevin()):
        sigmas = ladder_of(sampler, 50, 2.5, 0.1)
        start = points[:1] + 2.5 * torch.randn(1000, 1, 1, 6, generator=torch.Generator().manual_seed(0))
        left = sample(sampler, denoiser, start, sigmas, torch.Generator().manual_seed(1))
        nearest = torch.cdist(left.flatten(1), points.flatten(1)).argmin(1)
        errors.append(float((torch.bincount(nearest, minlength=6) / 1000 - weights).abs().sum()) / 2)
    assert errors[0] < 0.09, errors
    assert errors[1] > 3 * errors[0], errors
