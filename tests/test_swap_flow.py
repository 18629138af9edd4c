"""Swaps of flow networks: what they answer, their shift and their grids, there and back."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from schedulers import every_scheduler

# --- What the network answers ---


@every_scheduler
def test_a_flow_network_of_which_nothing_is_said_answers_the_velocity(cls, tmp_path):
    source = FlowMatchHeunDiscreteScheduler(shift=3.0)
    source.save_pretrained(tmp_path)
    of_fields = {name: value for name, value in source.config.items() if not name.startswith("_")}
    of_folder = cls.from_config(str(tmp_path))
    for scheduler in (cls(shift=3.0), cls(noise_space="flow"), cls(**of_fields), of_folder):
        assert scheduler.config.prediction_type == scheduler.reading.prediction_type == "flow_prediction"
    assert dict(of_folder.config) == dict(cls.from_pretrained(tmp_path).config)
    told = cls.from_config(cls(shift=3.0, prediction_type="epsilon").config)
    assert told.config.prediction_type == told.reading.prediction_type == "epsilon"
    for others in ({"beta_schedule": "linear"}, {"noise_space": "ve"}, {"noise_space": "edm"}):
        assert cls(**others).config.prediction_type == "epsilon"


# --- The shift ---


@every_scheduler
def test_shift_and_flow_shift_are_one(cls):
    """Asked of the source or of our config, by either name: what is run is what goes back to a solver."""
    source = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ours = cls.from_config(source.config)
    for config in (source.config, ours.config):
        for name in ("shift", "flow_shift"):
            swapped = cls.from_config(config, **{name: 8.0})
            assert swapped.config.shift == 8.0
            for back in (swapped.config, swapped.diffusers_config()):
                assert UniPCMultistepScheduler.from_config(back).config.flow_shift == 8.0
    flow_match = cls.from_config(cls.from_config(FlowMatchEulerDiscreteScheduler().config).config, flow_shift=8.0)
    assert FlowMatchEulerDiscreteScheduler.from_config(flow_match.config).config.shift == 8.0
