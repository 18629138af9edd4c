"""Runs of a scheduler that get mixed up: every result is that of the run alone, or a clear error at once."""

import copy
import threading

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import CPU, seeded, tiny_network
from schedulers import READINGS, VP, every_scheduler

from diffusers_gm import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMSGMPipeline


def loop(scheduler, sample, timesteps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for t in timesteps:
        sample = scheduler.step(0.3 * sample, t, sample, generator=generator).prev_sample
    return sample


def stepper(scheduler, sample, timesteps, seed=0):
    """The same loop, a step at a time; its last value is the result."""
    generator = torch.Generator().manual_seed(seed)
    for t in timesteps:
        sample = scheduler.step(0.3 * sample, t, sample, generator=generator).prev_sample
        yield sample


# --- One after the other, and in turns ---


@every_scheduler
def test_a_second_run_in_between_is_an_error_and_a_copy_is_not(cls, generator):
    x, other = torch.randn(1, 1, 4, 4, generator=generator), torch.randn(3, 1, 4, 4, generator=generator)
    scheduler = cls(**VP)
    scheduler.set_timesteps(12)
    alone = loop(scheduler, x, scheduler.timesteps)

    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps
    half = loop(scheduler, x, timesteps[:6])
    twin = copy.deepcopy(scheduler)
    scheduler.set_timesteps(12)
    loop(scheduler, other, scheduler.timesteps[:3])
    with pytest.raises(ValueError, match="one run at a time"):
        scheduler.step(half, timesteps[6], half)
    # The copy has kept everything; with the noise of the whole run, its second half is that of the run alone.
    noise = torch.Generator().manual_seed(0)
    first = copy.deepcopy(twin)
    first.set_timesteps(12)
    sample = x
    for t in first.timesteps[:6]:
        sample = first.step(0.3 * sample, t, sample, generator=noise).prev_sample
    assert torch.equal(sample, half)
    for t in twin.timesteps[6:]:
        sample = twin.step(0.3 * sample, t, sample, generator=noise).prev_sample
    assert torch.equal(sample, alone)


@every_scheduler
def test_runs_after_an_interrupted_one_or_of_another_size_start_afresh(cls, generator):
    scheduler = cls(**VP)
    runs = []
    for size, stop in ((2, 12), (2, 5), (2, 12), (5, 12), (2, 12)):
        x = torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(7))
        scheduler.set_timesteps(12)
        runs.append(loop(scheduler, x, scheduler.timesteps[:stop]))
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0], runs[4])


@every_scheduler
def test_callbacks_may_edit_the_sample(cls, generator):
    """A step acts on the sample that it is given: an edit shows, and nothing of the old one comes back."""
    scheduler = cls(**VP, prediction_type="sample")
    x = torch.randn(2, 1, 4, 4, generator=generator)
    left = []
    for edit in (torch.zeros_like(x), torch.ones_like(x)):
        scheduler.set_timesteps(10)
        noise = torch.Generator().manual_seed(0)
        sample = x
        for i, t in enumerate(scheduler.timesteps[:6]):
            sample = edit if i == 5 else sample
            sample = scheduler.step(torch.zeros_like(x), t, sample, generator=noise).prev_sample
        left.append(sample)
    # With D = 0 a step is linear in the sample, with the same noise: the difference is a multiple of the edit's.
    difference = left[1] - left[0]
    torch.testing.assert_close(difference, difference.mean().expand_as(difference), rtol=1e-5, atol=1e-5)


@every_scheduler
@pytest.mark.parametrize("numbers", [False, True], ids=["elements", "numbers"])
@pytest.mark.parametrize("lengths", [(12, 12), (12, 9), (9, 12)])
@pytest.mark.parametrize("lead", [0, 1, 3])
def test_interleaved_loops_never_give_a_wrong_result(cls, numbers, lengths, lead, generator):
    """Two loops that take turns on one scheduler, the second begun after `lead` steps of the first."""
    scheduler = cls(**VP)
    x = torch.randn(2, 1, 4, 4, generator=generator)

    def grid(n):
        scheduler.set_timesteps(n)
        return scheduler.timesteps.tolist() if numbers else scheduler.timesteps

    alone = [loop(scheduler, x, grid(n), seed) for seed, n in enumerate(lengths)]
    results, refused = [None, None], ["", ""]
    loops = [stepper(scheduler, x, grid(lengths[0]), 0)]
    for _ in range(lead):
        results[0] = next(loops[0])
    loops.append(stepper(scheduler, x, grid(lengths[1]), 1))
    running = [0, 1]
    while running:
        for i in list(running):
            try:
                results[i] = next(loops[i])
            except StopIteration:
                running.remove(i)
            except ValueError as error:
                refused[i] = str(error)
                running.remove(i)
    for i in (0, 1):
        assert refused[i] or torch.equal(results[i], alone[i])
    assert any(refused)
    assert all("one run at a time" in said for said in refused if said)
    if not numbers:
        assert not refused[1], "the run that was prepared last goes on"


@every_scheduler
@pytest.mark.parametrize("numbers", [False, True], ids=["elements", "numbers"])
def test_set_timesteps_in_mid_run_ends_the_run(cls, numbers, generator):
    scheduler = cls(**VP)
    x = torch.randn(2, 1, 4, 4, generator=generator)
    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps.tolist() if numbers else scheduler.timesteps
    half = loop(scheduler, x, timesteps[:6])
    scheduler.set_timesteps(12)
    with pytest.raises(ValueError, match="that set_timesteps has ended since: a scheduler serves one run at a time"):
        scheduler.step(half, timesteps[6], half, generator=generator)
    # And nothing is left of it.
    fresh = cls(**VP)
    fresh.set_timesteps(12)
    assert torch.equal(loop(scheduler, x, scheduler.timesteps), loop(fresh, x, fresh.timesteps))


@every_scheduler
def test_image_to_image_and_copies_raise_no_false_alarm(cls, generator):
    """Slices of timesteps, numbers, a begin index after an interrupted run, a deep copy at any point."""
    x = torch.randn(2, 1, 4, 4, generator=generator)
    scheduler = cls(**VP)
    scheduler.set_timesteps(12)
    expected = loop(scheduler, x, scheduler.timesteps[4:])
    for stop in (None, 7):  # after a whole run, and after one that was left at call 7
        for how in ("slice", "numbers", "begin index", "copy", "moved"):
            scheduler.set_timesteps(12)
            loop(scheduler, x, scheduler.timesteps[:stop])
            scheduler.set_timesteps(12)
            used = copy.deepcopy(scheduler) if how == "copy" else scheduler
            timesteps = used.timesteps[4:]
            if how == "begin index":
                used.set_begin_index(4)
            if how == "numbers":
                timesteps = timesteps.tolist()
            if how == "moved":
                timesteps = timesteps.clone()
            assert torch.equal(loop(used, x, timesteps), expected), (stop, how)


@every_scheduler
def test_a_run_may_begin_at_the_label_where_the_one_before_stopped(cls, generator):
    """With its first call; and anywhere after a run that was finished."""
    x = torch.randn(1, 1, 4, 4, generator=generator)
    scheduler = cls(**VP)
    scheduler.set_timesteps(timesteps=[999, 500, 100])
    scheduler.step(x, 999, x, generator=generator)
    scheduler.set_timesteps(timesteps=[500, 100, 0])
    for t in (500, 100, 0):
        scheduler.step(x, t, x, generator=generator)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(timesteps=[500, 100, 0])
    scheduler.step(x, 0, x, generator=generator)
    assert scheduler.step_index == 3


@every_scheduler
def test_a_step_of_one_of_the_runs_before_is_told(cls, generator):
    """Whatever its label, which may be the expected one."""
    x = torch.randn(1, 1, 4, 4, generator=generator)
    scheduler = cls(**VP)
    scheduler.set_timesteps(12)
    old = scheduler.timesteps
    for _ in range(3):
        scheduler.set_timesteps(12)
    with pytest.raises(ValueError, match="belongs to a run that set_timesteps has ended"):
        scheduler.step(x, old[0], x, generator=generator)


def test_a_thread_does_not_see_the_run_of_one_that_has_ended():
    """Identifiers of threads are used again; and nothing is kept of the ended ones."""

    def in_a_thread(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    scheduler, seen = CalibratedMultistepScheduler(**VP), []
    for _ in range(5):
        in_a_thread(lambda: scheduler.set_timesteps(10))
    scheduler.set_timesteps(5)
    in_a_thread(lambda: seen.append(len(scheduler.timesteps)))
    assert seen == [5]
    assert len(scheduler._prepared) == 1


@pytest.mark.parametrize("space", ["ve", "edm"])
def test_an_input_that_is_not_scaled_is_told_once(space, caplog):
    x = torch.zeros(1, 1, 4, 4)
    for scaled in (True, False):
        scheduler = CalibratedMultistepScheduler(**READINGS[space])
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            scheduler.step(scheduler.scale_model_input(x, t) if scaled else x, t, x)
        said = [record for record in caplog.records if "scale_model_input was not called" in record.message]
        assert len(said) == (not scaled)


@pytest.mark.parametrize("space", ["ve", "edm"])
def test_the_input_is_scaled_by_the_levels_of_a_run_however_its_labels_are_said(space):
    scheduler = CalibratedMultistepScheduler(**READINGS[space])
    high = float(scheduler.timesteps[0])
    labels = [high, high - 0.5, high - 1.0]
    scheduler.set_timesteps(timesteps=labels, sigmas=[10.0, 3.0, 0.5])
    x = torch.ones(1, 1, 2, 2)
    for t in scheduler.timesteps:
        by_element = scheduler.scale_model_input(x, t)
        for same in (float(t), t.clone()):
            torch.testing.assert_close(scheduler.scale_model_input(x, same), by_element)


@every_scheduler
def test_a_sample_of_another_shape_in_mid_run_is_an_error(cls, generator):
    scheduler = cls(**VP)
    x, other = torch.randn(2, 1, 4, 4, generator=generator), torch.randn(3, 1, 4, 4, generator=generator)
    scheduler.set_timesteps(12)
    half = loop(scheduler, x, scheduler.timesteps[:3])
    t = scheduler.timesteps[3]
    with pytest.raises(ValueError, match=r"sample has shape \(3, 1, 4, 4\), this run began with \(2, 1, 4, 4\)"):
        scheduler.step(other, t, other, generator=generator)
    assert scheduler.step_index == 3, "a refused step does not count"
    scheduler.step(half, t, half, generator=generator)


# --- Plain numbers ---


@every_scheduler
@pytest.mark.parametrize(
    "space",
    [
        {"noise_space": "ve", "sigma_max": 20.0, "num_train_timesteps": 30},
        {"noise_space": "ve", "sigma_max": 20.0, "num_train_timesteps": 1000},
        {"shift": 3.0, "prediction_type": "flow_prediction"},
        {"noise_space": "edm", "sigma_min": 0.02, "sigma_max": 80.0},
        {"beta_schedule": "linear", "timestep_spacing": "karras"},
        {"prediction_type": "cld_mixed"},
    ],
    ids=["ve 30", "ve 1000", "flow", "edm", "vp karras", "cld"],
)
@pytest.mark.parametrize("cut", [float, int, round], ids=["float", "int", "round"])
def test_numbers_walk_a_run_like_elements(cls, space, cut, generator):
    """Also where fractional labels, cut to integers, are the same number for several calls."""
    scheduler = cls(**space)
    x = torch.randn(2, 2, 4, 4, generator=generator)
    output = (lambda sample: 0.3 * sample[:, :1]) if scheduler.noise_space is None else (lambda sample: 0.3 * sample)

    def walk(timesteps):
        sample, noise = x, torch.Generator().manual_seed(0)
        for t in timesteps:
            sample = scheduler.step(output(sample), t, sample, generator=noise).prev_sample
        return sample

    scheduler.set_timesteps(25)
    expected = walk(scheduler.timesteps)
    scheduler.set_timesteps(25)
    numbers = [cut(t) for t in scheduler.timesteps.tolist()]
    assert torch.equal(walk(numbers), expected)


# --- Threads ---


def images_in_threads(pipeline, arguments, tries):
    """`pipeline(**arguments[i])` in a thread each, many times: images, or the ValueError."""
    for _ in range(tries):
        results, gate = [None] * len(arguments), threading.Barrier(len(arguments))

        def work(i, results=results, gate=gate):
            gate.wait()
            try:
                generator = seeded(arguments[i]["seed"])[0]
                results[i] = pipeline(2, num_inference_steps=arguments[i]["steps"], generator=generator, output_type="np").images  # fmt: skip # noqa: E501
            except ValueError as error:
                results[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield results


@pytest.mark.parametrize("steps", [(6, 6), (6, 9)], ids=["equal", "different"])
@pytest.mark.parametrize("ours", [True, False], ids=["our pipeline", "diffusers' pipeline"])
def test_two_threads_on_one_pipeline(ours, steps):
    """Every image that is returned is that of the call alone; what is not, is a ValueError. And calls still come
    through."""
    network, scheduler = tiny_network(), CLDSSCSScheduler(**VP)
    pipeline = GMSGMPipeline(network, scheduler) if ours else DDPMPipeline(network, DDPMScheduler())
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    arguments = [{"seed": i, "steps": n} for i, n in enumerate(steps)]
    alone = [
        pipeline(2, num_inference_steps=a["steps"], generator=seeded(a["seed"])[0], output_type="np").images
        for a in arguments
    ]
    returned = refused = 0
    for results in images_in_threads(pipeline, arguments, 40):
        for result, expected in zip(results, alone, strict=True):
            if isinstance(result, ValueError):
                assert "one run at a time" in str(result), result
                refused += 1
            else:
                assert result is not None, "another error than a ValueError"
                assert (result == expected).all()
                returned += 1
    assert returned >= 20
    assert refused > 0


def test_a_thread_whose_run_was_ended_before_it_began_is_told(generator):
    """One prepares 6 calls, then another 9: the first still sees its 6, and cannot take a step."""
    scheduler = AnnealedLangevinScheduler(**VP)
    x = torch.randn(1, 1, 2, 2, generator=generator)
    scheduler.set_timesteps(6)
    other = threading.Thread(target=lambda: scheduler.set_timesteps(9))
    other.start()
    other.join()
    assert len(scheduler.timesteps) == 6
    with pytest.raises(ValueError, match="one run at a time"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=generator)
    seen = []
    other = threading.Thread(target=lambda: seen.append(len(scheduler.timesteps)))
    other.start()
    other.join()
    assert seen == [9]


# --- One call ---


@every_scheduler
@pytest.mark.parametrize(
    "space",
    [VP, {"sigma_max": 8.0}, {"shift": 3.0, "prediction_type": "flow_prediction"}, {"noise_space": "edm"}],
    ids=["vp", "ve", "flow", "edm"],
)
def test_a_single_call_is_the_denoised_image_at_the_first_level(cls, space, generator):
    scheduler = cls(**space)
    scheduler.set_timesteps(1)
    assert float(scheduler.timesteps) == pytest.approx(scheduler.reading.timestep_range[1], rel=1e-6)
    x = scheduler.initial_sample((2, 1, 4, 4), generator, CPU, torch.float32)
    output = torch.randn(x.shape, generator=generator)
    result = scheduler.step(output, scheduler.timesteps[0], x, generator=generator)
    assert torch.equal(result.prev_sample, result.pred_original_sample)
    call = scheduler.reading.calls(torch.tensor([scheduler.reading.timestep_range[1]], dtype=torch.float64))[0]
    torch.testing.assert_close(result.prev_sample, scheduler.reading.denoised(output, x, call))


def test_too_few_calls_for_langevin_dynamics_say_how_many():
    ladder = {**VP, "network_level": "ladder"}
    with pytest.raises(ValueError, match="num_inference_steps must be 1 .*or .*at least 3, got 2"):
        AnnealedLangevinScheduler(**ladder).set_timesteps(2)
    with pytest.raises(ValueError, match="1 .*or .*at least 7, got 6"):
        AnnealedLangevinScheduler(**ladder, num_langevin_steps=3).set_timesteps(6)
    with pytest.raises(ValueError, match="1 .*or .*at least 4, got 3"):
        AnnealedLangevinScheduler(**VP, num_langevin_steps=3).set_timesteps(3)
    for options in (ladder, VP):
        with pytest.raises(ValueError, match="at least 2, got 1"):
            AnnealedLangevinScheduler(**options, denoise=False).set_timesteps(1)


# --- Compiled ---


def compiled_and_not(scheduler, sample, begin_index=None):
    """The result of the calls from `begin_index` on, compiled without a break, and as they are. Their noise, if they
    have any, is the global one: `torch.compile` knows no generators."""
    torch._dynamo.reset()
    images = slice(0, 1)  # with velocities the sample is twice as wide as the output
    for step in (torch.compile(scheduler.step, fullgraph=True, backend="eager"), scheduler.step):
        scheduler.set_timesteps(6)
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        x = sample
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for t in scheduler.timesteps[begin_index or 0 :]:
                x = step(0.3 * x[:, images], t, x, return_dict=False)[0]
        yield x


@every_scheduler
def test_a_whole_step_compiles_without_a_break(cls, generator):
    for begin_index in (None, 2):
        compiled, plain = compiled_and_not(cls(**VP), torch.randn(2, 1, 4, 4, generator=generator), begin_index)
        assert torch.equal(compiled, plain)


@pytest.mark.parametrize("tau", [0.0, 0.4])
@pytest.mark.parametrize("reading", ["vp v", "ve", "flow", "edm", "velocity score"])
def test_a_whole_step_of_the_calibrated_sampler_compiles_for_every_reading(reading, tau, generator):
    channels = 2 if "velocity" in reading else 1
    scheduler = CalibratedMultistepScheduler(**READINGS[reading], stochasticity=tau, clip_sample=True)
    compiled, plain = compiled_and_not(scheduler, torch.randn(2, channels, 4, 4, generator=generator))
    assert torch.equal(compiled, plain)


def test_a_compiled_step_at_another_timestep_is_an_error(generator):
    x = torch.randn(2, 1, 4, 4, generator=generator)
    scheduler = CalibratedMultistepScheduler(**VP)
    torch._dynamo.reset()
    step = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    scheduler.set_timesteps(6)
    with pytest.raises(RuntimeError, match="another timestep.*one run at a time"):
        step(0.3 * x, scheduler.timesteps[2], x, return_dict=False)
    torch._dynamo.reset()
    scheduler.set_timesteps(6)
    step(0.3 * x, scheduler.timesteps[0], x, return_dict=False)
    with pytest.raises(Exception, match="the sample has shape"):
        step(0.3 * x[:1], scheduler.timesteps[1], x[:1], return_dict=False)
    torch._dynamo.reset()
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        step(0.3 * x, t, x, return_dict=False)
    with pytest.raises(Exception, match="all 2 steps of this run have been taken"):
        step(0.3 * x, scheduler.timesteps[-1], x, return_dict=False)
