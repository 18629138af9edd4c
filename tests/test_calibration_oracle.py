"""What a calibration is of: the pipeline that it runs, and the samples that it judges by."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from points import DOUBLE, HIGH, LOW, POINTS, network, points, seen, start

from diffusers_gm import CalibratedMultistepScheduler
from diffusers_gm.calibration.calibrate import _quiet
from diffusers_gm.calibration.levels import Ladder
from diffusers_gm.calibration.oracle import with_denoiser
from diffusers_gm.calibration.trajectory import denoised_images, sliced_distance
from diffusers_gm.processes.random import Draw
from diffusers_gm.samplers import Multistep


@pytest.mark.parametrize("says", [True, False])
def test_a_pipeline_that_begins_midway_is_told_what_is_asked(says):
    """As image-to-image does: it has its timesteps from the begin index on, which not all tell their scheduler."""

    class Midway:
        def __init__(self, unet, scheduler):
            self.unet, self.scheduler = unet, scheduler

        def __call__(self, num_inference_steps):
            scheduler, sample = self.scheduler, start(4)
            scheduler.set_timesteps(num_inference_steps)
            if says:
                scheduler.set_begin_index(5)
            for t in scheduler.timesteps[5:]:
                output = self.unet(scheduler.scale_model_input(sample, t), t).sample
                sample = scheduler.step(output, t, sample).prev_sample

    scheduler = CalibratedMultistepScheduler(noise_space="ve", sigma_min=0.01, sigma_max=50.0)
    pipe = Midway(network(scheduler.noise_space), scheduler)
    y, levels = start(4), (30.0, 2.0, 0.3)
    work = lambda denoiser, first, shift: [denoiser(0.1 * y, sigma) for sigma in levels]
    for sigma, (denoised, _) in zip(levels, with_denoiser(pipe, scheduler, work, num_inference_steps=20), strict=True):
        torch.testing.assert_close(denoised.double(), points(0.1 * y, sigma), rtol=1e-3, atol=1e-3)
    assert pipe.scheduler is scheduler


def test_the_progress_bar_of_the_pipeline_is_as_it_was(tiny_unet):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler())
    with _quiet(pipe):
        assert pipe._progress_bar_config["disable"]
    assert not hasattr(pipe, "_progress_bar_config"), "what is not said is decided where a bar is made"
    for before in ({}, {"disable": True}, {"disable": False, "desc": "mine"}):
        pipe.set_progress_bar_config(**before)
        with _quiet(pipe):
            assert pipe._progress_bar_config["disable"]
        assert pipe._progress_bar_config == before


def test_the_sliced_distance_prefers_no_side(generator):
    """Sets of other sizes are matched at the middles of their shares: turned around they are as far apart."""
    a, b = torch.randn(20, 1, 2, 2, generator=generator), torch.randn(60, 1, 2, 2, generator=generator)
    assert sliced_distance(-a, -b) == pytest.approx(sliced_distance(a, b), rel=1e-5)


def test_stochasticities_are_judged_by_runs_whose_noise_is_not_that_of_their_start():
    """Of a denoiser that sees nothing y is noise of the level of each call, and no more."""
    seen_at = {}

    def blind(y, sigma):
        seen_at.setdefault(sigma, []).append(y)
        return torch.zeros_like(y)

    ladder = Ladder(seen(blind), start().float(), HIGH, LOW, Multistep())
    ladder.closest(1.0, (), [HIGH, 30.0, 20.0], torch.zeros(1024, 1, 1, 1))
    for sigma, batches in seen_at.items():
        y = torch.cat(batches)
        assert float(y.std()) == pytest.approx(sigma, rel=5 / (2 * len(y)) ** 0.5)


def test_stochasticities_are_judged_from_fresh_starts_of_the_level_that_a_run_begins_at():
    starts = []

    def denoiser(y, sigma):
        if sigma == 4.0:
            starts.append(y)
        return points(y, sigma)

    ladder = Ladder(seen(denoiser), start(), HIGH, LOW, Multistep(), deviation=lambda sigma: sigma)
    assert ladder.closest(0.0, (), [4.0, 1.0, 0.1], POINTS[torch.arange(1024) % 3].view(1024, 1, 1, 1)) == 0.0
    first, opposite, second, *_ = starts
    assert torch.equal(opposite, -first)
    for y in starts:
        assert float(y.std()) == pytest.approx(4.0, rel=5 / (2 * 256) ** 0.5)
    assert not torch.equal(first, second)
    assert not torch.equal(first, start())


@pytest.mark.parametrize("ruled", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("best", [0.0, 1.0])
def test_real_images_overrule_a_stochasticity_where_that_is_no_chance(ruled, best):
    """Of images that runs with a stochasticity make, that one is chosen."""
    levels, half = [HIGH, 8.0, 2.0, 0.5], seen(lambda y, sigma: 0.5 * y)
    y = HIGH * torch.randn(16384, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    draw = Draw.like(y, torch.Generator().manual_seed(2))
    *_, images = denoised_images(half, y, torch.tensor(levels, **DOUBLE), Multistep(stochasticity=best), draw)
    ladder = Ladder(half, start().float(), HIGH, LOW, Multistep())
    assert ladder.closest(ruled, (0.0, 1.0), levels, images) == best


def test_real_images_seldom_overrule_by_chance():
    """Where no stochasticity has to do with the images, half of the differences are gains, and few of two standard
    errors."""
    generator = torch.Generator().manual_seed(0)
    noise = seen(lambda y, sigma: torch.randn(y.shape, generator=generator))
    ladder = Ladder(noise, start(64).float(), HIGH, LOW, Multistep())
    images = torch.randn(512, 1, 1, 1, generator=generator)
    assert sum(ladder.closest(0.0, (1.0,), [HIGH, 1.0], images) != 0.0 for _ in range(80)) < 24


def test_a_fresh_start_is_as_wide_as_the_pipeline_s():
    """What unit noise amounts to in y differs from the level by what it has in place of an image."""
    first = 0.5 * start()
    fresh = Ladder(points, first, HIGH, LOW, Multistep()).fresh_start(3)
    assert float(fresh.std()) == pytest.approx(float(first.std()), rel=5 / (2 * 256) ** 0.5)
