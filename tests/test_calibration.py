"""Calibration: coupled trajectories, the search, and whole pipelines as denoisers."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GaussianMixtureNoise,
    NCSNv2Pipeline,
    UnconditionalPipeline,
    calibrate,
)
from diffusers_gm.calibration.calibrate import (
    Ladder,
    calibrate_in_full,
    levels_from_one_run,
    levels_from_trajectories,
)
from diffusers_gm.calibration.errors import (
    hiding_level,
    largest_deviation,
    levels_of_errors,
    reverse_diffusion,
    stochasticity_for,
)
from diffusers_gm.calibration.search import GROWTH, LocalDefects, fine_ladder, gram, growth, nearest, search
from diffusers_gm.calibration.trajectory import Trajectories, sliced_distance
from diffusers_gm.readings.grids import even_levels, power_levels
from diffusers_gm.samplers import Multistep

DOUBLE = {"dtype": torch.float64}
HIGH, LOW = 40.0, 0.01
POINTS = torch.tensor([-1.0, -0.2, 0.9]).double()


def points(y, sigma):
    """The denoiser of three narrow Gaussians."""
    variance = 0.05**2 + sigma**2
    share = torch.softmax(-((y[..., None] - POINTS.to(y)) ** 2) / (2 * variance), -1)
    mean = share @ POINTS.to(y)
    return mean + 0.05**2 / variance * (y - mean)


def start(n=256):
    return HIGH * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), **DOUBLE)


# --- Coupled trajectories ---


def test_the_student_approaches_the_teacher():
    trajectories = Trajectories(points, start(), fine_ladder(HIGH, LOW), Multistep())
    errors = []
    for n in (5, 10, 20, 40, 80):
        errors.append(trajectories.run(nearest(trajectories.sigmas, even_levels(HIGH, LOW, n))).error)
    assert errors[-1] < 0.01 * errors[0], errors
    assert trajectories.run(list(range(len(trajectories.sigmas)))).error == 0.0


def test_a_run_that_goes_on_from_another_is_the_run_itself():
    trajectories = Trajectories(points, start(8), fine_ladder(HIGH, LOW), Multistep())
    before = trajectories.run([0, 40, 80, 120, 140])
    for index in ([0, 40, 80, 120, 150], [0, 40, 70, 120, 140], [0, 30, 80, 120, 140]):
        calls = trajectories.num_calls
        resumed = trajectories.run(index, before)
        same = next(i for i in range(5) if index[i] != before.index[i])
        assert trajectories.num_calls - calls == 5 - same
        whole = trajectories.run(index)
        assert resumed.error == whole.error
        for (y, _), (other, _) in zip(resumed.states, whole.states, strict=True):
            assert torch.equal(y, other)


def test_the_search_improves_on_its_starts_and_keeps_to_its_limit():
    trajectories = Trajectories(points, start(), fine_ladder(HIGH, LOW), Multistep())
    fixed = nearest(trajectories.sigmas, even_levels(HIGH, LOW, 6))
    calls = trajectories.num_calls
    best = search(trajectories, 6, [fixed], fixed[-1], max_calls=300)
    assert best.error < 0.7 * trajectories.run(fixed).error
    assert trajectories.num_calls - calls < 300 + 6 + 12
    assert (best.index[0], best.index[-1]) == (0, fixed[-1])
    assert all(a < b for a, b in pairwise(best.index))
    assert growth(trajectories.sigmas, best.index) <= GROWTH
    with pytest.raises(ValueError, match="calls must be between 2 and 80"):
        search(trajectories, 81, [], 150, 10)


def test_a_run_may_begin_below_the_top():
    """From the same noise, as a pipeline begins there; very few calls are better for it."""
    sigmas = fine_ladder(HIGH, LOW)
    trajectories = Trajectories(points, start(), sigmas, Multistep(), lambda sigma: (1 + sigma**2) ** 0.5)
    scale = float(((1 + sigmas[30] ** 2) / (1 + HIGH**2)).sqrt())
    alone = Trajectories(points, scale * start(), sigmas[30:], Multistep())
    index = [30, 60, 100, 150]
    run, same = trajectories.run(index), alone.run([k - 30 for k in index])
    torch.testing.assert_close(run.denoised[-1], same.denoised[-1], rtol=0, atol=1e-12)
    resumed = trajectories.run([0, *index[1:]], run)
    torch.testing.assert_close(resumed.denoised[-1], trajectories.run([0, *index[1:]]).denoised[-1], rtol=0, atol=0)
    last = nearest(sigmas, even_levels(HIGH, LOW, 3))[-1]
    top = search(trajectories, 3, [], last, max_calls=200)
    lower = search(trajectories, 3, [], last, max_calls=200, lower=True)
    assert top.index[0] == 0 < lower.index[0]
    assert lower.error < 0.5 * top.error
    assert all(a < b for a, b in pairwise(lower.index))


SPACES = {
    "vp": {},
    "ve": {"noise_space": "ve", "sigma_min": 0.01, "sigma_max": 50.0},
    "flow": {"noise_space": "flow", "shift": 3.0},
    "edm": {"noise_space": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
}


@pytest.mark.parametrize("space", SPACES)
def test_the_start_below_the_top_is_that_of_the_pipelines(space):
    """Calibrated levels are judged from the y that a run on them begins with."""
    noise, found = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), {}
    for sigma in (12.0, 30.0):
        calibration = {"2": [sigma, 0.5], "shift": SPACES[space].get("shift", 1.0)}
        scheduler = CalibratedMultistepScheduler(**SPACES[space], calibration=calibration)
        scheduler.set_timesteps(2)
        call = scheduler.reading.calls(scheduler.timesteps.double())[0]
        assert call.sigma == pytest.approx(sigma, rel=1e-4)
        generator = torch.Generator().manual_seed(0)
        visible = scheduler.initial_sample(noise.shape, generator, torch.device("cpu"), torch.float32)
        found[sigma], _ = scheduler.reading.coordinates(visible, call)
    deviation = scheduler.reading.start_deviation
    sigmas = torch.tensor([30.0, 12.0, 1.0], **DOUBLE)
    trajectories = Trajectories(points, found[30.0], sigmas, Multistep(), deviation)
    torch.testing.assert_close(trajectories.start_at(1), found[12.0], rtol=1e-4, atol=1e-4)


def test_dynamic_programming_finds_the_best_of_all_grids():
    """Against trying every choice of levels out of ten."""
    import itertools

    sigmas = fine_ladder(HIGH, LOW, 10)
    trajectories = Trajectories(points, start(), sigmas, Multistep())
    defects = LocalDefects(sigmas, gram(trajectories.teacher.denoised))

    def total(index):
        triples = zip(index, index[1:], index[2:], strict=False)
        return float(defects.cost[0, 0, index[1]] + sum(defects.cost[triple] for triple in triples))

    for n, end in ((2, 9), (3, 7), (3, 9), (5, 8)):
        every = [(0, *rest, end) for rest in itertools.combinations(range(1, end), n - 2)]
        found = defects.best(n, end)
        assert (len(found), found[0], found[-1]) == (n, 0, end)
        assert total(found) == pytest.approx(min(map(total, every)), rel=1e-9)
        assert growth(sigmas, found) <= GROWTH


def test_other_starts_are_of_the_law_of_the_noise(generator):
    mixture = GaussianMixtureNoise([0.8, 0.2], [0.75, 1.62])
    n = 4000
    of_mixture = Ladder(points, start(8), HIGH, LOW, Multistep(), mixture).fresh_start(3)[:, 0, 0, 0]
    assert len(of_mixture) == 8
    big = Ladder(points, HIGH * mixture.sample((n, 1, 1, 1), generator), HIGH, LOW, Multistep(), mixture).fresh_start(3)
    second, fourth = (float((big / HIGH).double().pow(k).mean()) for k in (2, 4))
    spread = [
        ((mixture.moment(2 * k) * f - (mixture.moment(k) * g) ** 2) / n) ** 0.5 for k, f, g in ((2, 3, 1), (4, 105, 3))
    ]
    assert abs(second - mixture.moment(2)) < 5 * spread[0]
    assert abs(fourth - 3 * mixture.moment(4)) < 5 * spread[1]


@pytest.mark.parametrize("made", [levels_from_one_run, levels_from_trajectories])
def test_as_many_calls_as_there_may_be(made):
    """The fixed grid ends below the ladder there, and has more levels than one run."""
    fixed = CalibratedMultistepScheduler(noise_space="ve", sigma_min=0.002, sigma_max=HIGH)
    ladder = Ladder(points, start(4), HIGH, LOW, Multistep())
    for n in (50, 80):
        levels, _ = made(ladder, fixed, [n])[n]
        assert len(levels) == n
        assert levels[0] == pytest.approx(HIGH)
        assert all(a > b for a, b in pairwise(levels))


def test_denoised_images_that_are_not_finite_are_named():
    def overflows(y, sigma):
        return y / 0 if sigma < 1 else points(y, sigma)

    with pytest.raises(ValueError, match=r"not finite at sigma = 0\.\d"):
        Trajectories(overflows, start(2), fine_ladder(HIGH, LOW), Multistep())


def test_the_martingale_defect_tells_a_network_that_errs():
    exact = reverse_diffusion(points, start(2000), HIGH, LOW)[0]
    generator = torch.Generator().manual_seed(0)

    def errs(y, sigma):
        return points(y, sigma) + 0.3 * torch.randn(y.shape, generator=generator, **DOUBLE)

    assert exact > -0.05
    assert reverse_diffusion(errs, start(2000), HIGH, LOW)[0] < -0.3


def test_noise_is_for_networks_that_err_and_less_of_it_for_few_calls():
    for n in (2, 5, 6, 50):
        assert stochasticity_for(-0.01, n, 64) == 0.0
        assert stochasticity_for(-0.1, n, 64) == ((0.5, 1.0) if n >= 6 else 0.0)
        assert stochasticity_for(-0.1, n, 4) == 0.0  # by chance
    assert [stochasticity_for(-0.5, n, 4) for n in (2, 3, 4, 6, 8, 50)] == [0, 0, 0.3, 0.9, 1, 1]


# --- Pipelines ---


class PointsNetwork(UNet2DModel):
    """The exact network of the three points behind a UNet's interface, for every pixel alike."""

    def forward(self, sample, timestep, **_):
        space = self.space
        sigma = float(space.sigma(torch.as_tensor(timestep).double().flatten()[0]))
        y = sample / float(space.alpha(torch.tensor(sigma)))
        denoised = points(y, sigma)
        self.count += 1
        answer = "flow_prediction" if space.kind == "flow" else "epsilon"
        return type("Output", (), {"sample": space.output(denoised, (y - denoised) / sigma, sigma, answer)})()


def network(space):
    with torch.random.fork_rng():
        made = PointsNetwork(
            sample_size=2, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2,
            layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ).eval()  # fmt: skip
    made.space, made.count = space, 0
    return made


def test_a_pipeline_of_diffusers_is_calibrated_as_its_denoiser_is(tmp_path):
    """The same levels as from the denoiser itself; the scheduler is put back; what is saved has the levels."""
    own = CalibratedMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    pipe = DDPMPipeline(network(own.noise_space), DDPMScheduler(clip_sample=False))
    original = pipe.scheduler
    result = calibrate_in_full(pipe, (3, 6), progress=False, batch_size=32, output_type="np")
    assert pipe.scheduler is original
    assert pipe.unet.count == result.network_calls + 1
    assert result.stochasticity == {3: 0.0, 6: 0.0}
    for n, (fixed, best) in result.errors.items():
        assert best <= fixed
        assert len(result.levels[n]) == n
        assert result.levels[n][0] < 157.5
    assert result.levels[3][0] < 100, "so few calls are better begun below the highest level"
    again = calibrate(pipe, (3, 6), progress=False, batch_size=32, output_type="np")
    assert again.config.calibration == result.scheduler.config.calibration, "the same every time"
    result.scheduler.save_pretrained(tmp_path)
    loaded = CalibratedMultistepScheduler.from_pretrained(tmp_path)
    for n in (3, 4, 5, 6):
        loaded.set_timesteps(n)
        assert len(loaded.timesteps) == n
    for n in (3, 6):
        loaded.set_timesteps(n)
        torch.testing.assert_close(loaded.sigmas[:-1], torch.tensor(result.levels[n]), rtol=1e-5, atol=0)
    for n in (1, 7, 50):  # what was found for fewer says nothing of where more calls begin
        loaded.set_timesteps(n)
        assert (float(loaded.sigmas[0]), float(loaded.timesteps[0])) == (pytest.approx(157.4, rel=1e-3), 999)
    pipe.scheduler = loaded
    assert pipe(2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images.shape
    # Schedulers of diffusers can use the levels.
    theirs = EulerDiscreteScheduler.from_config(DDPMScheduler().config)
    theirs.set_timesteps(sigmas=[*result.levels[6], 0.0])
    torch.testing.assert_close(theirs.sigmas[:6], torch.tensor(result.levels[6]), rtol=1e-5, atol=1e-6)


def test_real_images_choose_the_stochasticity():
    """On an exact network any will do; the choice is one of the candidates, and that of the closest samples."""
    own = CalibratedMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    pipe = DDPMPipeline(network(own.noise_space), DDPMScheduler(clip_sample=False))
    generator = torch.Generator().manual_seed(0)
    images = POINTS[torch.randint(3, (500, 1, 2, 2), generator=generator)].float()
    result = calibrate_in_full(
        pipe, (4,), effort="fast", images=images, progress=False, batch_size=64, output_type="np"
    )
    assert result.stochasticity[4] in (0.0, 0.4, (0.5, 1.0), 1.0)
    assert result.network_calls == 48 + 56 + 4 * 2 * 4
    given = calibrate_in_full(pipe, (4,), effort="fast", stochasticity=(0.5, 1.0), progress=False, batch_size=2)
    assert given.stochasticity == {4: (0.5, 1.0)}
    assert given.scheduler.config.calibration["stochasticity"] == {"4": [0.5, 1.0]}


def test_the_sliced_distance_tells_sets_apart(generator):
    a, b = torch.randn(2, 400, 1, 3, 3, generator=generator)
    assert sliced_distance(a, a.flip(0)) == 0.0
    assert sliced_distance(a[:100], b) < 0.05
    assert sliced_distance(a[:100], b + 1) > 0.5
    assert sliced_distance(a[:100], 2 * b) > 0.5


def test_one_run_is_enough_for_the_fast_effort():
    own = CalibratedMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    pipe = DDPMPipeline(network(own.noise_space), DDPMScheduler(clip_sample=False))
    result = calibrate_in_full(pipe, (3, 8), effort="fast", progress=False, batch_size=8, output_type="np")
    assert result.network_calls == 48 + 56
    assert [len(levels) for levels in result.levels.values()] == [3, 8]
    assert result.errors == {}


def test_a_network_whose_errors_dominate_keeps_the_fixed_grid():
    """Levels that follow its runs would follow its errors. It begins where noise hides images, as errors are largest
    above, and ends higher where calls are very few."""
    own = CalibratedMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    unet, generator = network(own.noise_space), torch.Generator().manual_seed(0)
    unet.register_forward_hook(
        lambda module, args, output: setattr(
            output, "sample", output.sample + 0.5 * torch.randn(output.sample.shape, generator=generator)
        )
    )
    pipe = DDPMPipeline(unet, DDPMScheduler(clip_sample=False))
    result = calibrate_in_full(pipe, (5, 10), progress=False, batch_size=16, output_type="np")
    assert result.martingale_defect < -0.4
    assert result.network_calls == 48
    assert result.stochasticity == {5: 0.6, 10: 1.0}
    top = result.levels[10][0]
    assert 6 < top < 15, "ten times the deviation of the images, which is about 0.8 in every direction"
    assert result.levels[10] == even_levels(top, 0.01, 10).tolist()
    assert result.levels[5] == pytest.approx(power_levels(top, 0.1, 5, 3.0).tolist())


def test_where_runs_of_very_few_calls_of_a_network_of_errors_end():
    """Higher than the fixed grid, the more so the higher they begin; with a shift of its resolution, so much higher."""
    for top, last in ((10.0, 0.1), (20.0, 0.14), (1000.0, 0.3)):
        for shift in (1.0, 3.0):
            levels = levels_of_errors(top * shift, 0.01, 5, shift)
            assert levels[[0, -1]].tolist() == pytest.approx([top * shift, last * shift])
    assert levels_of_errors(1000.0, 0.01, 6).tolist() == even_levels(1000.0, 0.01, 6).tolist()


def test_where_a_run_of_a_network_of_errors_begins():
    images = 2.0 * torch.randn((20, 1, 1, 1), generator=torch.Generator().manual_seed(0))

    def ve(sigma):
        return sigma

    assert hiding_level(images, 100.0, ve) == pytest.approx(10 * largest_deviation(images))
    assert hiding_level(images, 5.0, ve) == 5.0
    assert hiding_level(images[:15], 100.0, ve) == 100.0, "of few images nothing is concluded"
    alike = torch.ones(20, 1, 1, 1)
    assert hiding_level(alike, 100.0, ve) == 1.0, "of images that are all the same"
    # What unit noise has in place of an image is next to nothing there.
    for deviation in (lambda sigma: math.hypot(1, sigma), lambda sigma: 1 + sigma):
        level = hiding_level(alike, 4000.0, deviation)
        assert 1.01 < deviation(level) / level < 1.02


def test_the_largest_deviation_is_that_of_the_widest_direction():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn((5000, 1), generator=generator) * torch.tensor([3.0, 4.0]) + 7.0
    assert largest_deviation(wide.view(5000, 1, 1, 2)) == pytest.approx(5.0, rel=5 / (2 * 5000) ** 0.5)


@pytest.mark.parametrize(
    "scheduler",
    [
        AnnealedLangevinScheduler(sigma_max=20.0),
        AnnealedLangevinScheduler.from_config(EDMEulerScheduler(sigma_max=20.0).config),
    ],
    ids=["ve", "edm"],
)
def test_our_own_pipelines_of_every_space(scheduler, tiny_unet):
    pipe = NCSNv2Pipeline(tiny_unet, scheduler)
    made = calibrate(pipe, (3,), progress=False, batch_size=2, effort="fast")
    assert made.noise_space.kind == scheduler.noise_space.kind
    pipe.scheduler = made
    assert pipe(1, 3, torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()


def test_a_velocity_network(tiny_velocity_unet):
    pipe = CLDPipeline(tiny_velocity_unet, CLDSSCSScheduler(prediction_type="cld_mixed"))
    pipe.scheduler = calibrate(pipe, (3,), progress=False, batch_size=2)
    assert pipe(1, 3, torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()


def test_guidance_is_part_of_the_denoiser():
    """Stable Diffusion: the prompt, guidance and the latents of the pipeline's own run."""
    from diffusers_pipelines import stable_diffusion

    pipe = stable_diffusion(StableDiffusionPipeline)
    arguments = {"prompt": "a cat", "height": 16, "width": 16, "output_type": "latent", "num_images_per_prompt": 2}
    plain, guided = (
        calibrate_in_full(pipe, (3,), progress=False, guidance_scale=scale, **arguments) for scale in (1.0, 7.0)
    )
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert plain.errors[3] != guided.errors[3]
    pipe.scheduler = guided.scheduler
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert images.isfinite().all()


def test_the_fixed_grid_is_shifted_once():
    """Stable Diffusion 3 with a network of errors alone: what is kept is the grid without a calibration."""
    from diffusers_pipelines import embeddings, sd3

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


def test_the_levels_before_are_those_of_the_pipeline():
    """With the shift of a flow network, as the levels after it."""
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fixed = CalibratedMultistepScheduler.from_config(flow.config)
    pipe = UnconditionalPipeline(network(fixed.noise_space), flow)
    result = calibrate_in_full(pipe, (10,), effort="fast", progress=False)
    assert not result.errs
    assert result.scheduler.config.calibration["shift"] == 3.0
    fixed.set_timesteps(10)
    levels = fixed.reading.sigma(fixed.timesteps.double())[1:].tolist()  # the first is where s is 1
    assert result.fixed[10][1:] == pytest.approx(levels, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": (1,)}, "from 2 to 80"),
        ({"calls": ()}, "at least one"),
        ({"calls": (5.5,)}, "whole numbers"),
        ({"effort": "some"}, "unknown effort 'some'"),
        ({"num_inference_steps": 5}, "is what is calibrated"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message, tiny_unet):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler())
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, progress=False, **arguments)


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, 16), ({"batch_size": 3}, 3), ({"generator": [torch.Generator().manual_seed(0)]}, 1)],
)
def test_how_many_images_a_pipeline_of_diffusers_makes(tiny_unet, given, size):
    sizes = set()
    tiny_unet.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler())
    calibrate(pipe, (4,), effort="fast", progress=False, output_type="np", **given)
    assert sizes == {size}


def test_of_large_images_fewer_are_made(tiny_unet):
    def stop(module, arguments):
        raise InterruptedError(f"{tuple(arguments[0].shape)}")

    tiny_unet.register_to_config(sample_size=256)
    tiny_unet.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError, match=r"\(4, 1, 256, 256\)"):
        calibrate(DDPMPipeline(tiny_unet, DDPMScheduler()), (4,), progress=False)


def test_pipelines_that_cannot_be_calibrated_are_named(tiny_unet):
    class Bare:
        pass

    with pytest.raises(ValueError, match="no scheduler that can be swapped"):
        calibrate(Bare())
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler())
    pipe.scheduler = type("Odd", (), {"config": {"rho": 7.0}})()
    with pytest.raises(ValueError, match="cannot be swapped: no noise space"):
        calibrate(pipe)


def test_a_pipeline_with_levels_of_its_own_has_no_use_for_calibrated_ones(tiny_unet):
    class Own(UnconditionalPipeline):
        def __call__(self, num_inference_steps, **_):
            self.scheduler.set_timesteps(timesteps=[999, 500, 1])

    with pytest.raises(ValueError, match="timesteps or sigmas of its own, in place of which no calibrated ones"):
        calibrate(Own(tiny_unet, DDPMScheduler()), (5,), progress=False)


@pytest.mark.parametrize("own", [{"stochasticity": 1.0}, {"grid": "karras"}, {"timestep_spacing": "trailing"}], ids=str)
def test_what_was_calibrated_is_what_runs(own, tiny_unet):
    """Whatever the pipeline's scheduler had been told before."""
    scheduler = CalibratedMultistepScheduler.from_config(DDPMScheduler().config, **own)
    found = calibrate_in_full(
        UnconditionalPipeline(tiny_unet, scheduler),
        (5,),
        effort="fast",
        stochasticity=0.5,
        progress=False,
        batch_size=2,
    )
    found.scheduler.set_timesteps(5)
    levels = found.scheduler.reading.sigma(found.scheduler.timesteps.double())
    torch.testing.assert_close(levels, torch.tensor(found.levels[5], dtype=torch.float64), rtol=1e-3, atol=0)
    assert found.scheduler.sampler.stochasticity == 0.5


@pytest.mark.parametrize(
    "share",
    [{"control_guidance_end": 0.3}, {"control_guidance_start": [0.0, 0.2]}, {"skip_guidance_layers": [7]}],
    ids=str,
)
def test_arguments_that_act_in_a_share_of_a_run_are_refused(share, tiny_unet):
    pipe = UnconditionalPipeline(tiny_unet, DDPMScheduler())
    with pytest.raises(ValueError, match=f"{next(iter(share))}=.* acts in a share of a run"):
        calibrate(pipe, (5,), progress=False, **share)


def test_what_the_pipeline_raises_is_passed_on(tiny_unet):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler())
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 30:
            raise RuntimeError("out of memory")

    handle = tiny_unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(pipe, (3,), progress=False, output_type="np")
    handle.remove()
    assert isinstance(pipe.scheduler, DDPMScheduler)


NAMES = """
import inspect, runpy, sys
import diffusers_gm.calibrate
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("diffusers_gm.calibrate", run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
import diffusers_gm.calibrate.__main__
from diffusers_gm import calibrate
assert calibrate is diffusers_gm.calibrate and inspect.isfunction(calibrate)
"""


@pytest.mark.parametrize("first", ["import diffusers_gm.calibrate", "from diffusers_gm import calibrate"])
def test_the_function_and_the_command_have_one_name(first):
    """In whatever order they are imported, by an interpreter that has not done so yet."""
    words = [sys.executable, "-W", "error::RuntimeWarning", "-c", first + NAMES]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_command_keeps_the_scheduler_in_the_model(tiny_unet, tmp_path):
    pipe = NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler(sigma_max=20.0))
    pipe.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "diffusers_gm.calibrate", tmp_path / "model", "--calls", "5", "8"]
    command += ["--batch_size", "2", "--stochasticity", "0.5,1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "5 calls: 20, " in run.stdout
    assert "stochasticity 0.5 then 1\n" in run.stdout
    assert (tmp_path / "model" / "calibration.png").stat().st_size > 5000
    loaded = NCSNv2Pipeline.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.scheduler, CalibratedMultistepScheduler)
    assert loaded.scheduler.config.calibration["stochasticity"] == {"5": [0.5, 1.0], "8": [0.5, 1.0]}
    assert {"5", "8"} <= set(loaded.scheduler.config.calibration)
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    missing = subprocess.run([*command[:3], tmp_path / "none"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "is not the folder of a pipeline" in missing.stderr
