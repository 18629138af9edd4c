"""The level where a Langevin chain is, and exploring from one."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import CPU, perfect_network
from networks import run as run_from

from diffusers_gm import AnnealedLangevinScheduler, CalibratedMultistepScheduler, GMLangevinScheduler
from diffusers_gm.processes.random import Draw
from diffusers_gm.samplers import Explore, Langevin, Memory, Multistep
from diffusers_gm.studies.exact import ExactDenoiser


@pytest.mark.parametrize(
    "scheduler",
    [
        AnnealedLangevinScheduler(network_level="chain"),
        AnnealedLangevinScheduler(network_level="chain", num_langevin_steps=3, beta_schedule="linear"),
        GMLangevinScheduler(network_level="chain", algorithm_type="langevin"),
    ],
    ids=["annealed", "three steps, vp", "gm"],
)
def test_the_network_is_told_where_the_chain_is(scheduler, generator):
    """One known image: the noise in y at every call has the level of that call's label, within five standard errors."""
    scheduler.set_timesteps(12)
    n, point = 20_000, torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    space = scheduler.noise_space
    told = []

    def network(model_input, t):
        level = space.sigma(t.double())
        noise = model_input / float(space.alpha(level)) - point
        spread = float(noise.square().mean().sqrt())
        told.append((float(level), spread))
        return perfect_network(scheduler, ExactDenoiser(point))(model_input, t)

    sample = scheduler.initial_sample((n, 1, 1, 1), generator, CPU, torch.float64)
    left = run_from(scheduler, network, sample, generator)
    for level, spread in told:
        assert spread == pytest.approx(level, rel=5 / math.sqrt(2 * n) + 1e-3)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx([level for level, _ in told], rel=1e-4)
    assert float((left - point).abs().max()) < 1e-6
    ladder = type(scheduler).from_config(scheduler.config, network_level="ladder")
    ladder.set_timesteps(12)
    assert float(ladder.timesteps[5]) < float(scheduler.timesteps[5]), "the chain lags behind"


def test_a_score_is_read_at_the_level_where_the_chain_is(generator):
    """It tells the component of an image by its length, which is that of the chain's own level."""
    mixture = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62], "model_noise": "mixture"}
    scheduler = GMLangevinScheduler(**mixture, algorithm_type="langevin", prediction_type="score", sigma_max=4.0)
    scheduler.set_timesteps(12)
    levels = scheduler.reading.sigma(scheduler.timesteps)
    first, second = levels[:2].tolist()
    _, _, kept, fresh = scheduler.sampler.plan(levels).steps[0]
    lag = math.sqrt((kept + fresh) * first**2)
    y, start, score = torch.randn(3, 8, 1, 3, 3, generator=generator, dtype=torch.float64)
    scheduler.step(start, scheduler.timesteps[0], y, generator)
    found = scheduler.step(score / second, scheduler.timesteps[1], y, generator).pred_original_sample
    displacement = second * score
    read = lambda level: y + displacement / scheduler.mixture.displacement_precision(displacement, level)
    torch.testing.assert_close(found, read(lag), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, read(second), rtol=0.01)


def test_unknown_network_level():
    for cls in (AnnealedLangevinScheduler, GMLangevinScheduler):
        with pytest.raises(ValueError, match="network_level 'level': use 'ladder' or 'chain'"):
            cls(network_level="level")


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, GMLangevinScheduler])
def test_a_swapped_chain_tells_the_network_where_it_is(cls):
    """Labels that are given it tells as they are; a network of DDPM is told whole numbers."""
    langevin = {"algorithm_type": "langevin"}
    for options in ({}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}):
        swapped, chain, ladder = (
            cls.from_config(DDPMScheduler().config, **langevin, **options, **level)
            for level in ({}, {"network_level": "chain"}, {"network_level": "ladder"})
        )
        for n in (6, 40):
            for scheduler in (swapped, chain, ladder):
                scheduler.set_timesteps(n)
            told = swapped.timesteps
            assert torch.equal(told, chain.timesteps)
            if not options:  # on the grid of a swap, which has whole numbers
                assert told.dtype == torch.int64
                assert (told.diff() <= 0).all()
            assert (told[2:-1] > ladder.timesteps[2:-1]).all(), "a chain lags behind"
        for given in ({"timesteps": [900, 500, 100, 100]}, {"sigmas": [10.0, 2.0, 0.1, 0.1]}):
            for scheduler in (swapped, chain, ladder):
                scheduler.set_timesteps(**given)
            assert torch.equal(swapped.timesteps, ladder.timesteps)
            assert not torch.equal(swapped.timesteps, chain.timesteps)
    assert swapped.config.network_level is None
    # The samplers of one class may differ from run to run: none is left behind.
    swapped.set_timesteps(6)
    assert swapped.sampler.follow_chain
    swapped.set_timesteps(timesteps=[900, 500, 100, 100])
    assert not swapped.sampler.follow_chain


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, GMLangevinScheduler])
def test_more_calls_than_a_network_has_levels(cls):
    """Langevin steps on a level: what a chain is told then has no label of its own."""
    swapped = cls.from_config(
        DDPMScheduler(trained_betas=[0.1, 0.2, 0.4], num_train_timesteps=3).config,
        algorithm_type="langevin",
        num_langevin_steps=4,
    )
    swapped.set_timesteps(9)
    assert swapped.sampler.follow_chain
    assert len(swapped.timesteps) == 9
    assert swapped.timesteps.dtype == torch.int64, "learned embeddings of a network take nothing else"


def test_all_levels_of_a_network_and_d():
    """The published budget, L T + 1 calls, whether or not the call at the first level is one of those of a level."""
    source = DDPMScheduler(num_train_timesteps=20)
    for steps in (1, 3):
        for level in ("ladder", "chain"):
            scheduler = AnnealedLangevinScheduler.from_config(
                source.config, num_langevin_steps=steps, network_level=level
            )
            scheduler.set_timesteps(20 * steps + 1)
            assert len(scheduler.timesteps) == 20 * steps + 1
            with pytest.raises(ValueError, match="noise levels are more than the 20"):
                scheduler.set_timesteps(22 * steps + 1)


def test_what_a_chain_is_told_is_where_it_is_however_many_steps_a_level_has():
    """Whole numbers next to it."""
    source = DDPMScheduler(num_train_timesteps=50, beta_end=0.4)
    for n in (50, 51, 200):
        swapped = AnnealedLangevinScheduler.from_config(source.config, num_langevin_steps=5)
        swapped.set_timesteps(n)
        counts = torch.tensor(swapped.sampler.calls_per_level(n))
        levels = swapped.reading.sigma(swapped.labels_of(len(counts)).repeat_interleave(counts))
        exact = swapped.sampler.plan(levels).sigmas
        assert len(swapped.timesteps) == n
        assert (swapped.timesteps - swapped.reading.timestep(exact)).abs().max() <= 0.5 + 1e-3


def test_labels_that_a_chain_is_given_stay_where_it_begins():
    swapped = AnnealedLangevinScheduler.from_config(DDPMScheduler().config, network_level="chain")
    swapped.set_timesteps(timesteps=[500] * 30 + [100] * 21)
    assert set(swapped.timesteps[:30].tolist()) == {500}
    labels, sigmas = [900.0, 500.0, 100.0, 100.0], [20.0, 5.0, 0.5, 0.5]
    swapped.set_timesteps(timesteps=labels, sigmas=sigmas)
    assert float(swapped.timesteps[0]) == 900
    # And of the levels that the chain has, they are as far between as the levels are, in their logarithm.
    at = np.interp(swapped.sigmas[:-1].log(), np.log(sigmas[::-1]), labels[::-1])
    torch.testing.assert_close(swapped.timesteps.double(), torch.from_numpy(at), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("follows", [False, True])
def test_a_sampler_that_is_put_in_is_kept(follows):
    for scheduler in (AnnealedLangevinScheduler(), AnnealedLangevinScheduler(beta_schedule="linear")):
        put_in = scheduler.sampler = Langevin(follow_chain=follows)
        scheduler.set_timesteps(10)
        assert scheduler.sampler is put_in
        assert scheduler.sampler_for(10) is put_in, "which pipelines ask for"
    calibrated = CalibratedMultistepScheduler(beta_schedule="linear")
    put_in = calibrated.sampler = Multistep(3)
    calibrated.set_timesteps(10)
    assert calibrated.sampler is put_in


def test_a_published_ladder_is_told_as_it_is():
    for options in ({}, {"noise_space": "ve", "sigma_max": 9.0}):
        published, ladder = (
            AnnealedLangevinScheduler(**options),
            AnnealedLangevinScheduler(**options, network_level="ladder"),
        )
        for scheduler in (published, ladder):
            scheduler.set_timesteps(30)
        assert torch.equal(published.timesteps, ladder.timesteps)


# --- Exploring ---


def test_what_was_known_before_exploring_is_of_another_image(generator):
    """A level that is named twice on the way down: the step that leaves it knows one denoised image, the last."""
    y, *denoised = torch.randn(4, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    plan, memory = Explore().plan(torch.tensor([8.0, 4.0, 4.0, 1.0], dtype=torch.float64)), Memory()
    for i in range(2):
        y, memory = Explore().step(plan, i, y, denoised[i], memory, Draw.like(y, generator))
    left, _ = Explore().step(plan, 2, y, denoised[2], memory, Draw.like(y, generator))
    torch.testing.assert_close(left, denoised[2] + (y - denoised[2]) / 4)


def test_exploring_from_the_first_level():
    scheduler = AnnealedLangevinScheduler(sigma_max=8.0, algorithm_type="explore")
    for n in (1, 5, 12, 13, 50):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert (scheduler.sigmas[:-1] == 8.0).sum() == max(1, n - 11)
        assert (scheduler.sigmas[max(0, n - 12) :].diff() < 0).all()


@pytest.mark.parametrize(
    "config", [{"sigma_max": 8.0}, {"beta_schedule": "linear", "timestep_spacing": "trailing"}], ids=["ve", "vp"]
)
def test_a_run_that_begins_midway_explores_there(config, generator):
    """As pipelines begin one: they cut the timesteps, and then say where they have."""
    scheduler = AnnealedLangevinScheduler(**config, algorithm_type="explore")
    plain = AnnealedLangevinScheduler(**config, algorithm_type="consistent")
    plain.set_timesteps(40)
    denoiser = ExactDenoiser(torch.randn(3, 1, 2, 2, generator=generator))
    for begin in (10, 35):
        scheduler.set_timesteps(40)
        timesteps = scheduler.timesteps[begin:]
        scheduler.set_begin_index(begin)
        explored = max(1, 40 - begin - 11)
        level = plain.sigmas[begin]
        assert (scheduler.sigmas[begin:-1] == level).sum() == explored
        assert (timesteps == plain.timesteps[begin]).sum() == explored
        assert (timesteps[explored - 1 :].diff() < 0).all()
        assert float(scheduler.sigmas[-2]) == pytest.approx(float(plain.sigmas[-2]), rel=1e-6)
        noisy = scheduler.add_noise(
            torch.zeros(4, 1, 2, 2), torch.randn(4, 1, 2, 2, generator=generator), timesteps[:1]
        )
        left = run_from(scheduler, perfect_network(scheduler, denoiser), noisy, generator, timesteps)
        assert float(torch.cdist(left.flatten(1), denoiser.points.flatten(1)).min(1).values.max()) < 0.05


def test_a_run_that_begins_midway_says_so_before_it_explores(generator):
    """Else noise of the first level was added to the image of a pipeline that does not call `set_begin_index`."""
    scheduler = AnnealedLangevinScheduler(sigma_max=8.0, algorithm_type="explore")
    sample = torch.zeros(1, 1, 2, 2)
    scheduler.set_timesteps(40)
    with pytest.raises(ValueError, match=r"begins at step 30, which set_begin_index\(30\) was to say before noise"):
        scheduler.step(sample, scheduler.timesteps[30], sample, generator)
    assert scheduler.step_index is None
    scheduler.set_timesteps(40)
    scheduler.set_begin_index(30)
    scheduler.step(sample, scheduler.timesteps[30], sample, generator)
    scheduler.set_timesteps(timesteps=[999.0, 700.0, 700.0, 300.0])  # of which the user knows
    scheduler.step(sample, scheduler.timesteps[1], sample, generator)


def test_levels_of_the_user_are_explored_where_they_are_repeated():
    scheduler = AnnealedLangevinScheduler(sigma_max=8.0, algorithm_type="explore")
    scheduler.set_timesteps(sigmas=[4.0, 2.0, 2.0, 2.0, 1.0, 0.1])
    before = scheduler.timesteps.clone()
    scheduler.set_begin_index(1)
    assert torch.equal(scheduler.timesteps, before)
