"""Calibration: what a network's errors are, and what is done about them."""

import math
from io import BytesIO
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, StableDiffusion3Pipeline
from diffusers_pipelines import embeddings, sd3
from PIL import Image
from points import DOUBLE, HIGH, LOW, network, points, seen, start

from diffusers_gm import CalibratedMultistepScheduler, GaussianMixtureNoise
from diffusers_gm.calibration.calibrate import calibrate_in_full, measured
from diffusers_gm.calibration.errors import (
    ReverseDiffusion,
    hiding_level,
    largest_deviation,
    levels_of_errors,
    reverse_diffusion,
    stochasticity_for,
)
from diffusers_gm.calibration.levels import Ladder
from diffusers_gm.calibration.oracle import MANY, with_denoiser
from diffusers_gm.calibration.picture import plot
from diffusers_gm.calibration.trajectory import Trajectories
from diffusers_gm.readings.grids import even_levels, power_levels
from diffusers_gm.samplers import Memory, Multistep


def test_the_martingale_defect_tells_a_network_that_errs():
    exact = reverse_diffusion(seen(points), start(2000), HIGH, LOW).defect
    generator = torch.Generator().manual_seed(0)

    def errs(y, sigma):
        return points(y, sigma) + 0.3 * torch.randn(y.shape, generator=generator, **DOUBLE)

    assert exact > -0.05
    assert reverse_diffusion(seen(errs), start(2000), HIGH, LOW).defect < -0.3


def test_the_mean_square_of_d_grows_for_exact_networks_and_falls_for_one_that_sees_too_much_in_noise():
    """With an exact D by that of its changes."""
    assert reverse_diffusion(seen(points), start(2000), HIGH, LOW).left > 1

    def too_strong(y, sigma):
        return (1 + 2 * sigma) * points(y, sigma)

    found = reverse_diffusion(seen(too_strong), start(2000), HIGH, LOW)
    assert found.left < 1
    assert found.errs


def test_a_network_that_answers_the_same_whatever_it_sees_has_no_defect():
    run = reverse_diffusion(lambda y, sigma: (torch.full_like(y, 0.3), None), start(20), HIGH, LOW)
    assert (run.defect, run.left) == (0.0, 1.0)


def test_a_network_of_low_levels_alone_is_measured_on_these():
    told = []

    def denoiser(y, sigma):
        told.append(sigma)
        return y / (1 + sigma**2), None

    start = 0.03 * torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    run = reverse_diffusion(denoiser, start, 0.03, 0.01)
    assert torch.isfinite(run.images).all()
    assert told == sorted(told, reverse=True)
    assert told[0] == pytest.approx(0.03)
    assert told[-1] == pytest.approx(0.015)


def test_a_network_without_low_levels_has_none_to_fade_on():
    assert reverse_diffusion(seen(points), start(20), HIGH, 3.0).left == 1
    assert reverse_diffusion(seen(lambda y, sigma: 0 * y + (sigma < 1)), start(20), HIGH, LOW).left == 1


def test_noise_is_for_networks_that_err_and_less_of_it_for_few_calls():
    def taus(defect, left, num_images, *calls):
        found = ReverseDiffusion(defect, left, torch.zeros(num_images, 1))
        return [stochasticity_for(found, n) for n in calls]

    assert taus(-0.01, 1.0, 64, 2, 5, 6, 50) == [0, 0, 0, 0]
    assert taus(-0.1, 1.0, 64, 2, 5, 6, 50) == [0, 0, (0.5, 1.0), (0.5, 1.0)]
    assert taus(-0.1, 1.0, 4, 6, 50) == [0, 0]  # by chance
    assert taus(-0.5, 1.0, 16, 2, 3, 4, 5, 50) == [0, 0, 0.5, 1, 1]
    assert taus(-0.6, 1.0, 16, 4, 5, 6, 7, 50) == [0, 0, 0.5, 1, 1]
    assert taus(-0.5, 0.7, 16, 2, 5, 10, 15, 50) == [0, 0, 0, 0, 0]


def erring(error):
    """A pipeline whose network answers the exact epsilon and so much noise."""
    own = CalibratedMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    unet, generator = network(own.noise_space), torch.Generator().manual_seed(0)
    unet.register_forward_hook(
        lambda module, args, output: setattr(
            output, "sample", output.sample + error * torch.randn(output.sample.shape, generator=generator)
        )
    )
    return DDPMPipeline(unet, DDPMScheduler(clip_sample=False))


def test_a_network_whose_errors_dominate_keeps_the_fixed_grid():
    """Levels that follow its runs would follow its errors. It begins where noise hides images, as errors are largest
    above, and ends higher where calls are very few."""
    pipe = erring(0.2)
    result = calibrate_in_full(pipe, (5, 10), progress=False, batch_size=48, output_type="np")
    assert result.martingale_defect < -0.4
    assert result.network_calls == 48
    assert result.stochasticity == {5: 0.0, 10: 1.0}
    of_all = {"3": 0.0, "4": 0.0, "5": 0.0, "6": 0.5, "7": 1.0, "10": 1.0}
    assert result.scheduler.config.calibration["stochasticity"] == of_all, "also of runs that were not calibrated"
    for n, tau in ((2, 0.0), (6, 0.5), (30, 1.0)):
        result.scheduler.set_timesteps(n)
        assert result.scheduler.sampler.stochasticity == tau
    top, lower = result.levels[5][0], result.levels[10][0]
    assert 6 < top < 15, "ten times the deviation of the images, which is about 0.8 in every direction"
    assert 3 < lower < 6, "as errors dominate everywhere"
    assert result.levels[10] == even_levels(lower, 0.01, 10).tolist()
    assert result.levels[5] == pytest.approx(power_levels(top, 0.1, 5, 3.0).tolist())


def test_mixture_noise_per_element_gets_no_gaussian_noise():
    """However far from a martingale D is under that: it says nothing of the network."""
    generator = torch.Generator().manual_seed(0)

    def errs(y, sigma):
        return points(y, sigma) + 0.3 * torch.randn(y.shape, generator=generator, **DOUBLE), None

    for per_element in (False, True):
        noise = GaussianMixtureNoise.from_power_law(1.5, 2, per_element=per_element)
        ladder = Ladder(errs, start(64), HIGH, LOW, Multistep(), noise)
        result = measured(ladder, CalibratedMultistepScheduler(sigma_max=HIGH), [10], "fast", None, None)
        assert result.stochasticity == {10: 0.0 if per_element else 1.0}
        assert (result.martingale_defect is None) is per_element
        assert ("stochasticity" in result.scheduler.config.calibration) is not per_element


def test_a_network_that_errs_keeps_the_fixed_grid_at_very_few_calls():
    """Its long runs are no judge of these; and it begins lower nowhere."""
    pipe = erring(0.008)
    result = calibrate_in_full(pipe, (4, 5, 7), progress=False, batch_size=64, output_type="np")
    assert -0.4 < result.martingale_defect < -0.05
    assert {n: result.levels[n] == result.fixed[n] for n in (4, 5, 7)} == {4: True, 5: True, 7: False}
    assert result.levels[7][0] == pytest.approx(result.fixed[7][0])
    assert result.errors.keys() == {7}
    assert result.stochasticity == {4: 0.0, 5: 0.0, 7: (0.5, 1.0)}
    drawn = BytesIO()
    plot(result, drawn)
    assert Image.open(drawn).size[0] > 1000, "both panels, though two budgets have no errors"


def of_deviation(largest, left=1.0, num_images=20, defect=-0.5, of_shapes=-0.2):
    """What is said of a network that makes images which differ so much."""
    images = torch.randn((num_images, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    return ReverseDiffusion(defect, left, images * largest / largest_deviation(images), of_shapes)


def ends(levels):
    return levels[[0, -1]].tolist()


def test_where_runs_of_very_few_calls_of_a_network_of_errors_end():
    """Higher than the fixed grid, the more so the higher they begin; with a shift of its resolution, so much higher."""
    for top, last in ((5.0, 0.1), (20.0, 0.28), (1000.0, 0.8)):
        for shift in (1.0, 3.0):
            levels = levels_of_errors(of_deviation(1.0), 5, top * shift, 0.01, shift=shift)
            assert ends(levels) == pytest.approx([top * shift, last * shift])
    assert ends(levels_of_errors(of_deviation(1.0, defect=-0.6), 5, 40.0, 0.01)) == pytest.approx([40.0, 0.28])
    among = levels_of_errors(of_deviation(1.0), 6, 1000.0, 0.01)
    assert ends(among) == pytest.approx(ends(even_levels(1000.0, 0.01, 6)))


def test_levels_of_few_calls_begin_lower_and_end_higher_where_noise_corrects_them():
    """And more even than the fixed grid, as all from six calls on."""

    def levels(num_calls, deviation=lambda sigma: sigma, **images):
        return levels_of_errors(of_deviation(1.0, **images), num_calls, 40.0, 0.01, deviation).tolist()

    assert levels(5) == pytest.approx(power_levels(3.5, 0.16, 5, 2.0).tolist())
    assert levels(14) == pytest.approx(power_levels(9.8, 0.8 / 14, 14, 1.6).tolist())
    assert levels(2) == pytest.approx([3.5, 0.4])
    for among in (levels(15), levels(14, defect=-0.6)):
        n = len(among)
        assert among == pytest.approx(power_levels(10.0, 0.5 / n, n, 3 - n / 10).tolist())
    # Where no run may begin lower there is nothing to correct.
    assert levels(14, deviation=None) == pytest.approx(power_levels(40.0, 0.5 / 14, 14, 1.6).tolist())


def test_levels_are_mostly_above_where_noise_corrects_errors_and_images_take_shape_without():
    """Steps are shorter where images take shape; begin and end stay. Where errors dominate there, too, it is the fixed
    grid, as where noise corrects nothing."""
    span = 40.0, 0.01, lambda sigma: sigma
    for defect in (-0.5, -0.6):
        run = of_deviation(1.0, defect=defect)
        for n, power in ((15, 1.5), (18, 1.2), (20, 1.0), (50, 1.0)):
            levels, fixed = levels_of_errors(run, n, *span), even_levels(10.0, 0.01, n)
            assert levels.tolist() == pytest.approx(power_levels(10.0, 0.5 / n, n, power).tolist())
            assert ends(levels) == pytest.approx(ends(fixed))
            assert (levels > 1).sum() > (fixed > 1).sum()
            without_noise = levels_of_errors(run, n, *span, noisy=False)
            assert without_noise.tolist() == pytest.approx(fixed.tolist())
            in_shapes = levels_of_errors(of_deviation(1.0, defect=defect, of_shapes=-0.5), n, *span)
            assert in_shapes.tolist() == pytest.approx(even_levels(float(in_shapes[0]), 0.01, n).tolist())
            assert 3 < in_shapes[0] < 4
            fades = levels_of_errors(of_deviation(1.0, left=0.9, defect=defect), n, *span)
            assert fades.tolist() == pytest.approx(even_levels(40.0, 0.01, n).tolist())


def test_a_network_of_errors_that_is_sampled_without_noise_has_no_levels_that_need_it():
    """`stochasticity=0` is the user's word: they are those of a network that noise does not help either."""
    span = 40.0, 0.01, lambda sigma: sigma, 1.0
    for n in (5, 8):
        told = levels_of_errors(of_deviation(1.0), n, *span, noisy=False)
        assert float(told[0]) == pytest.approx(10.0)
        assert float(told[0]) > 1.3 * float(levels_of_errors(of_deviation(1.0), n, *span)[0])
    asked = {"progress": False, "batch_size": 64, "output_type": "np"}
    by_rule, told, also = (
        calibrate_in_full(erring(0.02), (8,), stochasticity=s, **asked) for s in (None, 0.0, (0.0, 0.0))
    )
    assert -0.55 < by_rule.martingale_defect < -0.4
    assert told.levels[8][0] > 1.3 * by_rule.levels[8][0]
    assert also.levels == told.levels


def test_levels_that_need_noise_are_gone_where_real_images_choose_none(monkeypatch):
    monkeypatch.setattr(Ladder, "closest", lambda *_: 0.0)
    asked = {"progress": False, "batch_size": 64, "output_type": "np"}
    chosen, told, by_rule = (
        calibrate_in_full(erring(0.02), (8,), **given, **asked)
        for given in ({"images": torch.zeros(64, 1, 2, 2)}, {"stochasticity": 0.0}, {})
    )
    assert chosen.stochasticity == {8: 0.0}
    assert chosen.levels == told.levels != by_rule.levels
    assert chosen.scheduler.config.calibration["8"] == told.scheduler.config.calibration["8"]


def test_where_runs_of_a_network_of_errors_begin():
    """Where noise hides the images; of few calls lower, but where images fade."""

    def begins(num_calls, high=100.0, **images):
        return float(levels_of_errors(of_deviation(3.0, **images), num_calls, high, 0.01, lambda sigma: sigma)[0])

    assert begins(15) == pytest.approx(30)
    assert [begins(n) for n in (3, 5, 6, 9)] == pytest.approx([10.5, 10.5, 12.6, 18.9])
    assert begins(5, left=0.9) == pytest.approx(30)
    assert begins(6, left=0.9) == pytest.approx(100), "no level can be spared"
    assert begins(5, defect=-0.6) == pytest.approx(30), "without noise, which corrects a lower start"
    assert begins(5, high=10.0) == pytest.approx(10)
    assert begins(6, defect=-0.6) == pytest.approx(30)
    assert begins(6, num_images=15) == pytest.approx(100), "of few images nothing is concluded"
    # Where they dominate as images take shape, too, as low as noise hides the images and their mean.
    mean_square = float(of_deviation(3.0).images.square().mean())
    for n in (10, 15, 50):
        assert begins(n, defect=-0.6, of_shapes=-0.5) == pytest.approx(3.5 * mean_square**0.5)
    assert begins(9, defect=-0.6, of_shapes=-0.5) == pytest.approx(30)
    assert begins(15, of_shapes=-0.5, left=0.9) == pytest.approx(100)
    # What unit noise has in place of an image is next to nothing there.
    for deviation in (lambda sigma: math.hypot(1, sigma), lambda sigma: 1 + sigma):
        level = hiding_level(0.0, 4000.0, deviation)
        assert 1.01 < deviation(level) / level < 1.02
    assert hiding_level(0.0, 100.0, lambda sigma: sigma) == 1.0, "of images that are all the same"


def test_the_largest_deviation_is_that_of_the_widest_direction():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn((5000, 1), generator=generator) * torch.tensor([3.0, 4.0]) + 7.0
    assert largest_deviation(wide.view(5000, 1, 1, 2)) == pytest.approx(5.0, rel=5 / (2 * 5000) ** 0.5)


def test_the_fixed_grid_is_shifted_once():
    """Stable Diffusion 3 with a network of errors alone: what is kept is the grid without a calibration."""
    pipe, generator = sd3(StableDiffusion3Pipeline), torch.Generator().manual_seed(0)
    pipe.transformer.register_forward_hook(
        lambda module, args, output: tuple(torch.randn(x.shape, generator=generator) for x in output)
    )
    arguments = {"height": 16, "width": 16, "output_type": "latent", "guidance_scale": 1.0} | embeddings(
        (8, 4, 8), (8, 8)
    )
    result = calibrate_in_full(pipe, (10,), progress=False, **arguments)
    assert result.martingale_defect < -0.4
    fixed = CalibratedMultistepScheduler.from_config(pipe.scheduler.config)
    for scheduler in (fixed, result.scheduler):
        scheduler.set_timesteps(10)
    torch.testing.assert_close(result.scheduler.timesteps, fixed.timesteps, rtol=1e-5, atol=0)  # of six digits
    s = result.scheduler.sigmas[1:-1].double()
    torch.testing.assert_close((s / (1 - s)).tolist(), result.levels[10][1:], rtol=1e-4, atol=0)  # as it is said


def test_what_clipping_takes_from_d_long_steps_take_from_y_as_ddim_does():
    """The noise between them stays what the network saw: long first-order steps are those of diffusers' DDIM."""
    theirs = DDIMScheduler(clip_sample=True, set_alpha_to_one=False, timestep_spacing="trailing")
    ours = CalibratedMultistepScheduler.from_config(
        theirs.config, grid=None, timestep_spacing="trailing", multistep_order=1, corrector=False
    )
    theirs.set_timesteps(4)
    ours.set_timesteps(4)
    assert ours.sigmas[1] > 5
    sample, output = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = theirs.timesteps[0]
    expected, result = theirs.step(output, t, sample), ours.step(output, t, sample)
    assert float(expected.pred_original_sample.abs().max()) == 1
    torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.prev_sample, expected.prev_sample, atol=1e-4, rtol=0)


def test_runs_converge_where_d_is_clipped():
    """In first order: what y takes of it shrinks with the steps."""
    scheduler = CalibratedMultistepScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=True)

    def too_strong(y, sigma):
        denoised, memory = scheduler.clipped(2 * y / sigma, sigma, Memory())
        return denoised, memory.clipped

    def end(n):
        sigmas, y = torch.logspace(2, 1, n, **DOUBLE), 100 * torch.linspace(-2, 2, 8, **DOUBLE)[:, None]
        sampler = Multistep(1, corrector=False)
        trajectories = Trajectories(too_strong, y, sigmas, sampler)
        return trajectories.run(list(range(n))).states[-1][0]

    distances = [float((end(n) - end(2 * n)).abs().max()) for n in (50, 100, 200)]
    for coarse, fine in pairwise(distances):
        assert 1.7 < coarse / fine < 2.3, distances


def test_a_calibration_sees_what_clipping_adds_to_d():
    diffuser = DDPMScheduler(clip_sample_range=0.5)
    scheduler = CalibratedMultistepScheduler.from_config(diffuser.config)
    pipe = DDPMPipeline(network(scheduler.noise_space), diffuser)

    def work(denoiser, start, _):
        return [(*denoiser(start, sigma), points(start, sigma)) for sigma in (8.0, 2.0)]

    arguments = {"num_inference_steps": MANY, "batch_size": 4, "output_type": "np", "generator": torch.Generator()}
    (clipped, added, denoised), (whole, nothing, _) = with_denoiser(pipe, scheduler, work, **arguments)
    assert float(denoised.abs().max()) > 0.51
    torch.testing.assert_close(clipped, denoised.clamp(-0.5, 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(added, clipped - denoised, atol=1e-3, rtol=0)
    assert nothing is None
    assert float(whole.abs().max()) > 0.51
