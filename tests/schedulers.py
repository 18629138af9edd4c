"""Schedulers in tests: every class, and every reading with every sampler."""

import pytest

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)

# Every scheduler that swaps into pipelines of diffusers.
SCHEDULERS = {
    "annealed": AnnealedLangevinScheduler,
    "gm": GMLangevinScheduler,
    "cld": CLDSSCSScheduler,
    "calibrated": CalibratedMultistepScheduler,
}
every_scheduler = pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=SCHEDULERS.keys())
# Those whose levels are the spacings of diffusers and ours, rather than a calibration's.
every_spaced_scheduler = pytest.mark.parametrize("cls", list(SCHEDULERS.values())[:3], ids=list(SCHEDULERS)[:3])
VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}

READINGS = {
    "vp": {"beta_schedule": "linear"},
    "vp v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "ve": {"sigma_min": 0.02, "sigma_max": 20.0},
    "ve unscaled": {"sigma_min": 0.02, "sigma_max": 20.0, "scale_input": False, "prediction_type": "scaled_score"},
    "flow": {"shift": 3.0, "prediction_type": "flow_prediction"},
    "edm": {"noise_space": "edm", "sigma_min": 0.02, "sigma_max": 80.0, "sigma_data": 0.5},
    "svd": {"noise_space": "edm", "sigma_min": 0.02, "sigma_max": 80.0, "prediction_type": "v_prediction"},
    "velocity score": {"prediction_type": "velocity_score"},
    "scaled velocity score": {"prediction_type": "scaled_velocity_score", "beta_0": 3.0, "beta_1": 2.0},
    "cld edm": {"prediction_type": "cld_edm", "sigma_min": 0.02, "sigma_max": 30.0, "sigma_data": 0.5, "gamma": 0.1},
    "mixed score": {"prediction_type": "cld_mixed", "mass": 0.5, "gamma": 0.1},
}
MIX = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62]}
SAMPLERS = {
    "langevin": (AnnealedLangevinScheduler, {}),
    "langevin, three steps": (AnnealedLangevinScheduler, {"num_langevin_steps": 3}),
    "langevin, chain": (AnnealedLangevinScheduler, {"network_level": "chain"}),
    "consistent": (AnnealedLangevinScheduler, {"algorithm_type": "consistent"}),
    "explore": (AnnealedLangevinScheduler, {"algorithm_type": "explore"}),
    "gm langevin": (GMLangevinScheduler, {"algorithm_type": "langevin"}),
    "jump": (GMLangevinScheduler, {"algorithm_type": "jump", **MIX}),
    "exponential": (GMLangevinScheduler, {"algorithm_type": "exponential", **MIX}),
    "ancestral": (GMLangevinScheduler, {"algorithm_type": "ancestral"}),
    "ancestral, first order": (GMLangevinScheduler, {"step_order": 1}),
    "ode": (GMLangevinScheduler, {"algorithm_type": "ode"}),
    "sscs": (CLDSSCSScheduler, {"splitting_order": 1, "network_at": "step_start"}),
    "sscs, second order": (CLDSSCSScheduler, {"splitting_order": 2}),
    "sscs, half step": (CLDSSCSScheduler, {"splitting_order": 1, "network_at": "half_step"}),
    "euler maruyama": (CLDSSCSScheduler, {"algorithm_type": "euler_maruyama"}),
    "probability flow": (CLDSSCSScheduler, {"algorithm_type": "probability_flow"}),
    "multistep": (CalibratedMultistepScheduler, {}),
    "multistep, third order": (CalibratedMultistepScheduler, {"multistep_order": 3}),
    "multistep, stochastic": (CalibratedMultistepScheduler, {"stochasticity": 1.0}),
}


def make(reading, name, **arguments):
    cls, options = SAMPLERS[name]
    return cls(**(READINGS[reading] | options | arguments))


def told_its_levels(cls):
    """Options with which the network is told the levels of the grid: a Langevin chain, by default, where it is."""
    return {"network_level": "ladder"} if cls is AnnealedLangevinScheduler else {}
