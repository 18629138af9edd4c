"""Calibration: coupled trajectories, the search, and whole pipelines as denoisers."""

import json
import subprocess
import sys
from functools import partial
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
    StableDiffusionPipeline,
)
from PIL import Image
from points import DOUBLE, HIGH, LOW, POINTS, network, points, seen, start

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
from diffusers_gm.calibrate.__main__ import main
from diffusers_gm.calibration.calibrate import calibrate_in_full
from diffusers_gm.calibration.levels import Ladder, levels_from_one_run, levels_from_trajectories
from diffusers_gm.calibration.search import GROWTH, LocalDefects, fine_ladder, gram, growth, nearest, search
from diffusers_gm.calibration.trajectory import Trajectories, sliced_distance
from diffusers_gm.readings.grids import even_levels
from diffusers_gm.samplers import Multistep

# --- Coupled trajectories ---


def test_the_student_approaches_the_teacher():
    trajectories = Trajectories(seen(points), start(), fine_ladder(HIGH, LOW), Multistep())
    errors = []
    for n in (5, 10, 20, 40, 80):
        errors.append(trajectories.run(nearest(trajectories.sigmas, even_levels(HIGH, LOW, n))).error)
    assert errors[-1] < 0.01 * errors[0], errors
    assert trajectories.run(list(range(len(trajectories.sigmas)))).error == 0.0


def test_a_run_that_goes_on_from_another_is_the_run_itself():
    trajectories = Trajectories(seen(points), start(8), fine_ladder(HIGH, LOW), Multistep())
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
    trajectories = Trajectories(seen(points), start(), fine_ladder(HIGH, LOW), Multistep())
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
    calls = trajectories.num_calls
    search(trajectories, 6, [fixed] * 50, fixed[-1], max_calls=60)
    assert trajectories.num_calls - calls < 60 + 6, "however many starts there are"


def test_a_run_may_begin_below_the_top():
    """From the same noise, as a pipeline begins there; very few calls are better for it."""
    sigmas = fine_ladder(HIGH, LOW)
    trajectories = Trajectories(seen(points), start(), sigmas, Multistep(), lambda sigma: (1 + sigma**2) ** 0.5)
    scale = float(((1 + sigmas[30] ** 2) / (1 + HIGH**2)).sqrt())
    alone = Trajectories(seen(points), scale * start(), sigmas[30:], Multistep())
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
    trajectories = Trajectories(seen(points), found[30.0], sigmas, Multistep(), deviation)
    torch.testing.assert_close(trajectories.start_at(1), found[12.0], rtol=1e-4, atol=1e-4)


def test_dynamic_programming_finds_the_best_of_all_grids():
    """Against trying every choice of levels out of ten."""
    import itertools

    sigmas = fine_ladder(HIGH, LOW, 10)
    trajectories = Trajectories(seen(points), start(), sigmas, Multistep())
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
    of_mixture = Ladder(seen(points), start(8), HIGH, LOW, Multistep(), mixture).fresh_start(3)[:, 0, 0, 0]
    assert len(of_mixture) == 8
    big = Ladder(
        seen(points), HIGH * mixture.sample((n, 1, 1, 1), generator), HIGH, LOW, Multistep(), mixture
    ).fresh_start(3)
    second, fourth = (float((big / HIGH).double().pow(k).mean()) for k in (2, 4))
    spread = [
        ((mixture.moment(2 * k) * f - (mixture.moment(k) * g) ** 2) / n) ** 0.5 for k, f, g in ((2, 3, 1), (4, 105, 3))
    ]
    assert abs(second - mixture.moment(2)) < 5 * spread[0]
    assert abs(fourth - 3 * mixture.moment(4)) < 5 * spread[1]


@pytest.mark.parametrize("made", [levels_from_one_run, partial(levels_from_trajectories, lower=False)])
def test_as_many_calls_as_there_may_be(made):
    """The fixed grid ends below the ladder there, and has more levels than one run."""
    fixed = CalibratedMultistepScheduler(noise_space="ve", sigma_min=0.002, sigma_max=HIGH)
    ladder = Ladder(seen(points), start(4), HIGH, LOW, Multistep())
    for n in (50, 80):
        levels, _ = made(ladder, fixed, [n])[n]
        assert len(levels) == n
        assert levels[0] == pytest.approx(HIGH)
        assert all(a > b for a, b in pairwise(levels))


def test_runs_of_few_calls_begin_lower_where_they_may():
    fixed = CalibratedMultistepScheduler(noise_space="ve", sigma_min=LOW, sigma_max=HIGH)
    ladder = Ladder(seen(points), start(), HIGH, LOW, Multistep(), deviation=lambda sigma: sigma)
    first = {may: levels_from_trajectories(ladder, fixed, [3], may)[3][0][0] for may in (False, True)}
    assert first[True] < first[False] == pytest.approx(HIGH)


def test_the_error_before_is_that_of_the_grid_before():
    """Which a shift of a pipeline's resolution moves."""
    scheduler = CalibratedMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    ladder = Ladder(seen(points), start(), HIGH, LOW, Multistep(), shift=3.0)
    fixed = scheduler.calibrated_or_even_levels(5, 3.0).clamp(max=HIGH)
    scheduler.calibrated_or_even_levels = lambda n, shift=1.0: fixed if shift == 3.0 else even_levels(HIGH, LOW, n)
    before, found = levels_from_trajectories(ladder, scheduler, [5], False)[5][1]
    others = ladder.trajectories(ladder.fresh_start(2), fine_ladder(HIGH, LOW))
    run = others.run(nearest(others.sigmas, fixed))
    assert before == sliced_distance(run.denoised[-1], others.teacher.denoised[-1])
    assert found < before


def test_denoised_images_that_are_not_finite_are_named():
    def overflows(y, sigma):
        return y / 0 if sigma < 1 else points(y, sigma)

    with pytest.raises(ValueError, match=r"not finite at sigma = 0\.\d"):
        Trajectories(seen(overflows), start(2), fine_ladder(HIGH, LOW), Multistep())


# --- Pipelines ---


def test_a_pipeline_of_diffusers_is_calibrated_as_its_denoiser_is(tmp_path):
    """The same levels as from the denoiser itself; the scheduler is put back; what is saved has the levels."""
    own = CalibratedMultistepScheduler.from_config(DDPMScheduler(clip_sample=False).config)
    pipe = DDPMPipeline(network(own.noise_space), DDPMScheduler(clip_sample=False))
    original = pipe.scheduler
    result = calibrate_in_full(pipe, (3, 6), progress=False, batch_size=32, output_type="np")
    assert pipe.scheduler is original
    assert pipe.unet.count == result.network_calls + 2, "the start, and a look at what the pipeline puts back"
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
    assert result.network_calls == 48 + 56 + 4 * 4 * 8
    assert list(result.elsewhere) == [3], "more calls are as stochastic as the images have it"
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


def test_a_network_whose_levels_are_all_low():
    """Below those of the fine ladder of images."""
    scheduler = CalibratedMultistepScheduler(sigma_min=1e-4, sigma_max=0.009)
    pipe = UnconditionalPipeline(network(scheduler.noise_space), scheduler)
    levels = calibrate_in_full(pipe, (5,), progress=False, batch_size=16).levels[5]
    assert 0.009 >= levels[0] > levels[-1] >= 1e-4


def test_a_calibration_does_not_depend_on_the_type_of_new_tensors(tiny_unet):
    made = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            scheduler = CalibratedMultistepScheduler(beta_schedule="linear")
            pipe = UnconditionalPipeline(tiny_unet, scheduler)
            made.append(calibrate(pipe, (7,), progress=False, batch_size=4).config.calibration)
        finally:
            torch.set_default_dtype(torch.float32)
    assert made[0]["7"] == pytest.approx(made[1]["7"], rel=0.2)


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


def test_the_levels_before_are_those_of_the_pipeline():
    """With the shift of a flow network, as the levels after it."""
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fixed = CalibratedMultistepScheduler.from_config(flow.config)
    pipe = UnconditionalPipeline(network(fixed.noise_space), flow)
    result = calibrate_in_full(pipe, (10,), effort="fast", progress=False)
    assert result.martingale_defect > -0.4
    assert result.scheduler.config.calibration["shift"] == 3.0
    fixed.set_timesteps(10)
    levels = fixed.reading.sigma(fixed.timesteps.double())[1:].tolist()  # the first is where s is 1
    assert result.fixed[10][1:] == pytest.approx(levels, rel=1e-4)


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
    words = [sys.executable, "-m", "diffusers_gm.calibrate", tmp_path / "model", "--calls", "5", "8"]
    words += ["--batch_size", "2", "--stochasticity", "0.5,1"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "5 calls: 20, " in run.stdout
    assert "stochasticity 0.5 then 1\n" in run.stdout
    assert (tmp_path / "model" / "calibration.png").stat().st_size > 5000
    loaded = NCSNv2Pipeline.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.scheduler, CalibratedMultistepScheduler)
    assert loaded.scheduler.config.calibration["stochasticity"] == {"5": [0.5, 1.0], "8": [0.5, 1.0]}
    assert {"5", "8"} <= set(loaded.scheduler.config.calibration)
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    missing = subprocess.run([*words[:3], tmp_path / "none"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "is not the folder of a pipeline" in missing.stderr


def test_the_command_has_real_images_choose(tiny_unet, tmp_path, monkeypatch, capsys):
    """As large as those of the pipeline; and not where the stochasticity is given."""
    NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler(sigma_max=20.0)).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--calls", "4", "--effort", "fast", "--batch_size", "2"]
    (tmp_path / "photos").mkdir()
    for i in range(5):
        Image.new("RGB", (20, 30), (40 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    seen = []
    monkeypatch.setattr(Ladder, "closest", lambda self, ruled, taus, levels, images: seen.append(images) or 0.4)
    main([*words, "--train_data_dir", str(tmp_path / "photos")])
    main([*words, "--dataset_name", "digits"])
    assert [tuple(images.shape) for images in seen] == [(5, 1, 8, 8), (1437, 1, 8, 8)]
    assert "stochasticity 0.4\n" in capsys.readouterr().out
    for more, message in (
        (["--dataset_name", "digits", "--stochasticity", "0"], "stochasticity=0.0 is what images would choose"),
        (["--dataset_name", "digits", "--train_data_dir", "photos"], "--dataset_name or --train_data_dir, one of them"),
        (["--train_data_dir", str(tmp_path / "none")], "--train_data_dir"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert message in capsys.readouterr().err


def test_the_command_replaces_the_scheduler_of_no_other_model(tiny_unet, tmp_path, capsys):
    for name in ("model", "other"):
        NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler(sigma_max=20.0)).save_pretrained(tmp_path / name)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "model"), "--effort", "fast", "--output_dir", str(tmp_path / "other")])
    assert stopped.value.code == 2
    assert "holds another pipeline, whose scheduler would be replaced" in capsys.readouterr().err
    assert isinstance(NCSNv2Pipeline.from_pretrained(tmp_path / "other").scheduler, AnnealedLangevinScheduler)


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tiny_unet, tmp_path, capsys, monkeypatch):
    NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler(sigma_max=20.0)).save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    monkeypatch.setitem(main.__globals__, "calibrate_in_full", None)  # not reached
    with pytest.raises(SystemExit):
        main([str(tmp_path / "model"), "--output_dir", str(tmp_path / "file" / "below")])
    assert str(tmp_path / "file" / "below") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_picture_of_the_scheduler_before_goes_where_none_can_be_drawn(tiny_unet, tmp_path, capsys, monkeypatch):
    NCSNv2Pipeline(tiny_unet, AnnealedLangevinScheduler(sigma_max=20.0)).save_pretrained(tmp_path)
    (tmp_path / "calibration.png").write_bytes(b"of the scheduler before")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main([str(tmp_path), "--calls", "4", "--effort", "fast", "--batch_size", "2"])
    assert "no picture" in capsys.readouterr().out
    assert not (tmp_path / "calibration.png").exists()
