"""Swaps of flow networks: what they answer, their shift and their grids, there and back."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from schedulers import every_scheduler, every_spaced_scheduler, told_its_levels

from diffusers_gm import AnnealedLangevinScheduler

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


@every_scheduler
@pytest.mark.parametrize("source", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("kind", ["flow_prediction", "sample", "epsilon"])
def test_a_flow_network_of_a_solver_answers_what_is_said(cls, source, kind):
    """As the solver itself reads it; the default of theirs, of which nobody said anything, is the velocity."""
    theirs = source(use_flow_sigmas=True, flow_shift=3.0, prediction_type=kind)
    ours, clean = cls.from_config(theirs.config), torch.full((1, 1, 2, 2), 0.7)
    assert ours.reading.prediction_type == kind
    assert cls.from_config(source(use_flow_sigmas=True, flow_shift=3.0).config).reading.prediction_type == (
        "flow_prediction"
    )
    ours.set_timesteps(20)
    s, t = float(ours.sigmas[8]), ours.timesteps[8]
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    answers = {"flow_prediction": noise - clean, "sample": clean, "epsilon": noise}
    made = ours.step(answers[kind], t, (1 - s) * clean + s * noise, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.pred_original_sample, clean, rtol=1e-4, atol=1e-4)


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


@every_scheduler
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["solver", "flow match"],
)
def test_a_shift_that_was_changed_between_swaps_stays(cls, source, on_disk, tmp_path):
    """By whatever name the scheduler between calls it, and twice."""
    shift, scheduler = 3.0, cls.from_config(source.config)
    between = [(UniPCMultistepScheduler, "flow_shift"), (FlowMatchEulerDiscreteScheduler, "shift")]
    for other, name in [*between, *between[::-1]]:
        shift += 1.0
        if on_disk:
            scheduler.save_pretrained(tmp_path)
            theirs = other.from_pretrained(tmp_path, **{name: shift})
            theirs.save_pretrained(tmp_path)
            config = cls.load_config(tmp_path)
        else:
            theirs = other.from_config(scheduler.config, **{name: shift})
            config = theirs.config
        scheduler = cls.from_config(config)
        assert scheduler.config.shift == shift
    assert cls.from_config(dict(scheduler.config)).config.shift == shift


@every_scheduler
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_shift_of_which_a_solver_between_swaps_was_told_nothing_stays(cls, dynamic, on_disk, tmp_path):
    """`flow_shift=1` is its default."""
    source = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    solver = UniPCMultistepScheduler.from_config(cls.from_config(source.config).config)
    if on_disk:
        solver.save_pretrained(tmp_path)
    config = cls.load_config(tmp_path) if on_disk else solver.config
    assert cls.from_config(config).config.shift == 3.0


# --- Levels ---


@every_scheduler
def test_noise_of_a_run_that_was_given_timesteps_and_sigmas(cls):
    """At its levels, as in diffusers; other labels mean what they always do, and so do all in the next run."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[1000.0, 750.0, 500.0, 250.0], sigmas=[1.0, 0.75, 0.5, 0.25])
    noise = torch.ones(2, 1, 1, 1)
    for i, timestep in enumerate(ours.timesteps):
        noisy = ours.scale_noise(torch.zeros(2, 1, 1, 1), timestep.repeat(2), noise)
        expected = theirs.scale_noise(torch.zeros(2, 1, 1, 1), theirs.timesteps[i : i + 1].repeat(2), noise)
        torch.testing.assert_close(noisy, expected)
        torch.testing.assert_close(noisy, ours.scale_noise(torch.zeros(2, 1, 1, 1), timestep, noise))
    assert float(ours.add_noise(torch.zeros(1), torch.ones(1), torch.tensor(300.0))) == pytest.approx(0.3)
    ours.set_timesteps(4)
    assert float(ours.add_noise(torch.zeros(1), torch.ones(1), torch.tensor(500.0))) == pytest.approx(0.5)


@every_spaced_scheduler
@pytest.mark.parametrize("ends", [{}, {"sigma_max": 200.0, "sigma_min": 0.02}, {"beta_schedule": "scaled_linear"}])
def test_karras_levels_are_of_sigma_in_solvers_and_of_s_in_flow_schedulers(cls, ends):
    def levels(scheduler, n=8):
        scheduler.set_timesteps(n)
        return scheduler.sigmas[:8]

    n = 9 if cls is AnnealedLangevinScheduler else 8  # the last level twice
    words = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    theirs = UniPCMultistepScheduler(use_karras_sigmas=True, **words, **ends)
    own = told_its_levels(cls)
    swapped = cls.from_config(theirs.config, **own)
    later = cls.from_config(
        cls.from_config(UniPCMultistepScheduler(**words, **ends).config, **own).config, use_karras_sigmas=True
    )
    for ours in (swapped, later):
        torch.testing.assert_close(levels(ours, n), levels(theirs), rtol=1e-4, atol=1e-5)
    # DPM-Solver takes sigma itself for s there.
    solver = DPMSolverMultistepScheduler(use_exponential_sigmas=True, **words)
    found = levels(cls.from_config(solver.config, **own), n).double()
    torch.testing.assert_close((found / (1 - found)).log().diff(n=2), torch.zeros(6).double(), rtol=0, atol=1e-3)
    flow = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, shift=3.0)
    ends_of_s = levels(cls.from_config(flow.config, **own), n)[[0, -1]]
    torch.testing.assert_close(ends_of_s, torch.tensor([1.0, 0.003]), rtol=0.01, atol=0)
