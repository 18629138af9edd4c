"""Every reading with every sampler: the law of known data, and the same samples as the pure loop."""

import itertools
import math

import pytest
import torch
from networks import check_four_points, final_variance, four_points, output_of, samples_of
from schedulers import READINGS, SAMPLERS, make

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)
from diffusers_gm.processes.cld import CLD
from diffusers_gm.readings import VelocityReading
from diffusers_gm.samplers import (
    Ancestral,
    CriticallyDamped,
    Explore,
    Langevin,
    Multistep,
    TwoStep,
    sample,
)

every_pair = pytest.mark.parametrize(
    ("reading", "name"), list(itertools.product(READINGS, SAMPLERS)), ids=lambda value: value
)


@every_pair
def test_four_points_in_their_proportions(reading, name, generator):
    scheduler = make(reading, name)
    # Euler-Maruyama and the published order go wrong at the steps that log sigma has near t = 1.
    slack = 0.03 if name not in ("euler maruyama", "sscs, half step") else 0.06
    check_four_points(samples_of(scheduler, four_points(), 100, (1000, 1, 1, 2), generator), slack)


@every_pair
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"])
def test_the_scheduler_is_the_pure_loop(reading, name, dtype, tolerance):
    """From one start and with one generator: `sample` on y, and the pipeline's loop on what the network sees."""
    scheduler = make(reading, name)
    labels = scheduler.reading.grid(50, "log_snr")
    levels = scheduler.reading.sigma(labels)
    plan = scheduler.sampler.plan(levels)
    calls = scheduler.reading.calls(labels, plan.sigmas)
    denoised = lambda y, sigma: 0.3 * torch.tanh(y / (0.3 + sigma)) + y / (1 + sigma**2) / 2

    y = levels[0].to(dtype) * torch.randn(2, 1, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = sample(scheduler.sampler, denoised, y, levels, torch.Generator().manual_seed(2))

    noise = torch.Generator().manual_seed(2)
    # A network of CLD brings the companion that CLD's samplers draw first.
    native, cld = isinstance(scheduler.reading, VelocityReading), isinstance(scheduler, CLDSSCSScheduler)
    companion = torch.randn(y.shape, dtype=dtype, generator=noise) if native and cld else torch.ones_like(y)
    state = scheduler.reading.visible(y, companion, calls[0])
    scheduler.set_timesteps(timesteps=labels.tolist())
    for t, call in zip(scheduler.timesteps, calls, strict=False):
        there, _ = scheduler.reading.coordinates(state, call)
        output = output_of(scheduler.reading, denoised(there, call.sigma), state, call)
        state = scheduler.step(output, t, state, generator=noise).prev_sample
    torch.testing.assert_close(scheduler.reading.image(state), expected, rtol=0, atol=tolerance * 10)


LINEAR = [name for name in SAMPLERS if name not in ("jump", "exponential")]


@pytest.mark.parametrize(("reading", "name"), list(itertools.product(READINGS, LINEAR)), ids=lambda value: value)
def test_exact_moments_of_a_gaussian(reading, name):
    """Without samples: the variance after a run tends to that of the data, and faster for the second-order samplers."""
    scheduler = make(reading, name)
    first, last = scheduler.reading.timestep_range
    ends = scheduler.reading.sigma(torch.tensor([last, first], dtype=torch.float64)).log()
    errors = []
    for n in (100, 400):
        steps = scheduler.config.get("num_langevin_steps", 1)
        levels = torch.linspace(*ends.tolist(), n, dtype=torch.float64).exp()
        levels = levels[::steps].repeat_interleave(steps)[:n]
        variance = final_variance(scheduler.sampler, levels, 0.25)
        narrowed = 0.25**2 / (0.25 + float(levels[-1]) ** 2)  # D at the last level
        errors.append(abs(variance / narrowed - 1))
    assert errors[1] < (0.02 if name in ("ode", "sscs, second order", "probability flow") else 0.2)
    assert errors[1] < 0.7 * errors[0] or errors[0] < 1e-3
    assert math.isfinite(errors[0])


STEPS = {"step_size": 1e-5, "denoise": False}
OF_LANGEVIN = {"num_langevin_steps": 3, "step_size_criterion": "prop3", "network_level": "chain", **STEPS}
CHAIN = {"num_steps": 3, "criterion": "prop3", "follow_chain": True, "order": 2, **STEPS}
HALF = {"splitting_order": 1, "half_step": True}


@pytest.mark.parametrize(
    ("cls", "options", "expected"),
    [
        (AnnealedLangevinScheduler, {"algorithm_type": "consistent", **STEPS}, Ancestral(**STEPS, order=2)),
        (AnnealedLangevinScheduler, {"algorithm_type": "explore", **STEPS}, Explore(1e-5, False)),
        (AnnealedLangevinScheduler, OF_LANGEVIN, Langevin(**CHAIN)),
        (GMLangevinScheduler, {"algorithm_type": "langevin"} | OF_LANGEVIN, Langevin(**CHAIN)),
        (AnnealedLangevinScheduler, {"step_order": 1}, Langevin()),
        (GMLangevinScheduler, {"algorithm_type": "ancestral", "denoise": False}, Ancestral(denoise=False, order=2)),
        (GMLangevinScheduler, {"step_order": 1}, Ancestral()),
        (GMLangevinScheduler, {"algorithm_type": "ode", "denoise": False}, TwoStep(False)),
        (CalibratedMultistepScheduler, {"corrector": False, "multistep_order": 3}, Multistep(3, False)),
        (CalibratedMultistepScheduler, {"stochasticity": (0.5, 1.0)}, Multistep(stochasticity=(0.5, 1.0))),
        (CLDSSCSScheduler, {"mass": 0.5, "gamma": 0.1, "beta_1": 2.0}, CriticallyDamped(CLD(4.0, 2.0, 0.5, 0.1))),
        (CLDSSCSScheduler, {"network_at": "step_start"}, CriticallyDamped(CLD(), splitting_order=1)),
        (CLDSSCSScheduler, {"network_at": "half_step"}, CriticallyDamped(CLD(), **HALF)),
        (CLDSSCSScheduler, {"prediction_type": "cld_edm"}, CriticallyDamped(CLD())),
        (
            CLDSSCSScheduler,
            {"prediction_type": "velocity_score"},
            CriticallyDamped(CLD(), **HALF, published_end=0.004),
        ),
        (
            CLDSSCSScheduler,
            {"prediction_type": "velocity_score", "network_at": "step_start"},
            CriticallyDamped(CLD(), splitting_order=1, published_end=0.004),
        ),
    ],
    ids=str,
)
def test_options_reach_the_sampler(cls, options, expected):
    assert cls(**options).sampler == expected


@pytest.mark.parametrize("algorithm", ["jump", "exponential"])
def test_options_reach_the_sampler_of_jumps(algorithm):
    scheduler = make("ve", algorithm, **OF_LANGEVIN)
    jumps, exact = scheduler.mixture, algorithm == "exponential"
    assert scheduler.sampler == Langevin(**CHAIN, jumps=jumps, exact=exact)
