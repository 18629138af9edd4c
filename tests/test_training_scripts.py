"""What training scripts of diffusers read of a scheduler before any run: `timesteps`, `sigmas`, noise levels."""

import copy

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from schedulers import READINGS, every_scheduler, make

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def get_sigmas(noise_scheduler, timesteps, n_dim=4):
    """As in `train_dreambooth_lora_sd3.py` and `train_dreambooth_lora_sdxl.py` with `--do_edm_style_training`."""
    sigmas = noise_scheduler.sigmas.to(dtype=torch.float32)
    schedule_timesteps = noise_scheduler.timesteps
    step_indices = [(schedule_timesteps == t).nonzero().item() for t in timesteps]
    sigma = sigmas[step_indices].flatten()
    while len(sigma.shape) < n_dim:
        sigma = sigma.unsqueeze(-1)
    return sigma


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["consistent", "ancestral", "sscs"])
def test_levels_and_labels_before_any_run(reading, name):
    """All labels that the network was trained at, from the noisiest on, each with its level; then 0."""
    scheduler = make(reading, name)
    assert len(scheduler.timesteps) == len(scheduler) == 1000
    assert scheduler.sigmas.shape == (1001,)
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    assert (scheduler.timesteps.diff() < 0).all()
    levels = scheduler.reading.sigma(scheduler.timesteps.double())
    if scheduler.noise_space is not None and scheduler.noise_space.kind == "flow":
        levels = scheduler.timesteps.double() / 1000  # s
    torch.testing.assert_close(scheduler.sigmas[:-1], levels.float(), rtol=1e-3, atol=1e-6)
    assert scheduler.init_noise_sigma > 0
    assert scheduler.step_index is None
    # And after a run they are those of the run.
    scheduler.set_timesteps(20)
    assert scheduler.sigmas.shape == (21,)
    assert scheduler.sigmas[-1] == 0


@every_scheduler
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}], ids=str)
def test_flow_training_scripts_find_the_levels_of_flow_match_euler(cls, options, generator):
    theirs = FlowMatchEulerDiscreteScheduler(**options)
    ours = cls.from_config(theirs.config)
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(ours.sigmas[:-1], theirs.sigmas, rtol=1e-5, atol=1e-7)
    indices = torch.randint(0, theirs.config.num_train_timesteps, (4,), generator=generator)
    copied = copy.deepcopy(ours)
    sigmas = get_sigmas(copied, copied.timesteps[indices])
    torch.testing.assert_close(sigmas, get_sigmas(theirs, theirs.timesteps[indices]), rtol=1e-5, atol=1e-7)
    images, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    noisy = (1.0 - sigmas) * images + sigmas * noise
    torch.testing.assert_close(ours.scale_noise(images, ours.timesteps[indices].float(), noise), noisy)


@every_scheduler
def test_edm_style_training_finds_the_levels_of_euler(cls, generator):
    """SDXL with EDM-style training: `noise_scheduler` is an Euler scheduler, its input `inp / sqrt(sigma^2 + 1)`."""
    theirs = EulerDiscreteScheduler(**SDXL)
    ours = cls.from_config(theirs.config)
    indices = torch.randint(0, 1000, (4,), generator=generator)
    timesteps = theirs.timesteps[indices]
    sigmas = get_sigmas(ours, timesteps)
    torch.testing.assert_close(sigmas, get_sigmas(theirs, timesteps), rtol=1e-4, atol=1e-6)
    images, noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    scaled = (images + sigmas * noise) / (sigmas**2 + 1).sqrt()
    torch.testing.assert_close(ours.add_noise(images, noise, timesteps), scaled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.timesteps, DDPMScheduler(**SDXL).timesteps.flip(0).sort(descending=True).values)


@every_scheduler
def test_edm_networks_are_trained_at_the_levels_of_edm(cls):
    theirs = EDMDPMSolverMultistepScheduler()
    ours = cls.from_config(theirs.config)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.timesteps, ours.sigmas[:-1].log() / 4, rtol=1e-4, atol=1e-5)
    assert get_sigmas(ours, ours.timesteps[[3, 500]]).flatten().tolist() == ours.sigmas[[3, 500]].tolist()
