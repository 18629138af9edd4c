"""Calibration: what it asks of pipelines, and leaves of them."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPAGPipeline
from diffusers_pipelines import stable_diffusion
from points import network

from diffusers_gm import CalibratedMultistepScheduler, UnconditionalPipeline, calibrate
from diffusers_gm.calibration.calibrate import calibrate_in_full


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": (1,)}, "from 2 to 80"),
        ({"calls": ()}, "at least one"),
        ({"calls": (5.5,)}, "whole numbers"),
        ({"calls": 10}, r"calls must be several whole numbers, such as \(5, 10, 20\), got 10"),
        ({"calls": (10, 70)}, r"calls=\[10, 70\]: the network was trained at 60 noise levels; use at most 60"),
        ({"effort": "some"}, "unknown effort 'some'"),
        ({"num_inference_steps": 5}, "is what is calibrated"),
        ({"images": torch.zeros(3, 1, 8, 8)}, "images has 3, of which nothing can be told: give some hundreds"),
        ({"images": [[0.0]]}, r"images must be a tensor \(n, C, H, W\), got a list"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message, tiny_unet):
    pipe = DDPMPipeline(tiny_unet, DDPMScheduler(num_train_timesteps=60))
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, progress=False, **arguments)


def test_a_network_that_overflows_is_named_where_no_run_is_judged(tiny_unet):
    """Of very few calls the fixed grid stays, and only the stochasticity is measured."""
    with torch.no_grad():
        tiny_unet.conv_out.bias.fill_(torch.inf)
    for calls in ((3, 5), iter([4])):
        with pytest.raises(ValueError, match="the denoised image is not finite at sigma = 40"):
            calibrate(DDPMPipeline(tiny_unet, DDPMScheduler(clip_sample=False)), calls, batch_size=2, progress=False)


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


class Told(UnconditionalPipeline):
    """Says what it was asked for, and makes nothing."""

    def __call__(self, num_inference_steps, batch_size=None, generator=None, strength=None, **_):
        raise InterruptedError(num_inference_steps, batch_size)


def told(tiny_unet, calls, **arguments):
    with pytest.raises(InterruptedError) as asked:
        calibrate(Told(tiny_unet, DDPMScheduler()), calls, progress=False, **arguments)
    return asked.value.args


def test_there_are_steps_enough_for_all_budgets_whatever_share_of_them_is_made(tiny_unet):
    """A search takes up to 240 calls, twice, and real images fifty runs of each budget."""
    assert told(tiny_unet, range(2, 81))[0] > 480 * 79
    assert told(tiny_unet, range(5, 51), images=torch.zeros(4, 1, 8, 8))[0] > 50 * sum(range(5, 51))
    assert told(tiny_unet, (5,), strength=0.05)[0] * 0.05 >= told(tiny_unet, (5,))[0]


def test_own_pipelines_make_as_many_as_there_are_latents_or_generators(tiny_unet):
    assert told(tiny_unet, (5,), latents=torch.zeros(8, 1, 8, 8))[1] == 8
    assert told(tiny_unet, (5,), generator=[torch.Generator() for _ in range(3)])[1] == 3
    assert told(tiny_unet, (5,), latents=torch.zeros(8, 1, 8, 8), batch_size=8)[1] == 8


@pytest.mark.parametrize("space", ["vp", "flow", "ve", "edm"])
def test_edits_of_latents_are_seen_in_place_as_otherwise(space, tiny_unet):
    def found(edit):
        pipe = UnconditionalPipeline(tiny_unet, CalibratedMultistepScheduler(noise_space=space, sigma_min=0.02))
        return calibrate_in_full(
            pipe,
            (4,),
            effort="fast",
            stochasticity=0.0,
            progress=False,
            batch_size=4,
            output_type="np",
            callback_on_step_end=lambda pipe, step, timestep, tensors: {"latents": edit(tensors["latents"])},
        )

    in_place, otherwise = found(lambda latents: latents.mul_(0.9)), found(lambda latents: latents * 0.9)
    assert in_place.levels == otherwise.levels
    assert in_place.martingale_defect == otherwise.martingale_defect


def test_a_number_of_numpy_is_saved_as_one(tiny_unet, tmp_path):
    pipe = UnconditionalPipeline(tiny_unet, DDPMScheduler())
    found = calibrate(pipe, (5,), effort="fast", stochasticity=np.float32(0.5), progress=False, batch_size=2)
    found.save_pretrained(tmp_path)
    assert CalibratedMultistepScheduler.from_pretrained(tmp_path).config.calibration["stochasticity"] == {"5": 0.5}


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


def test_pipelines_that_tell_the_network_the_scheduler_s_sigmas_tell_it_those_of_the_call():
    """As Cosmos 2.5 does: of a flow, s."""
    euler = FlowMatchEulerDiscreteScheduler()
    unet, told = network(CalibratedMultistepScheduler.from_config(euler.config).noise_space), []

    class OfSigmas(DDPMPipeline):
        def __call__(self, num_inference_steps, batch_size=1, generator=None):
            sample = torch.randn((batch_size, 1, 2, 2), generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for i, t in enumerate(self.scheduler.timesteps):
                told.append((float(t), 1000 * float(self.scheduler.sigmas[i])))
                sample = self.scheduler.step(self.unet(sample, t).sample, t, sample).prev_sample

    calibrate(OfSigmas(unet, euler), (4,), effort="fast", progress=False)
    levels, sigmas = torch.tensor(told).T
    assert len(levels.unique()) > 40
    torch.testing.assert_close(sigmas, levels, rtol=1e-3, atol=0)


def test_attention_that_a_pipeline_perturbs_is_put_back():
    """Where its loop ends, as this one does not."""
    pipe = stable_diffusion(StableDiffusionPAGPipeline)
    before = dict(pipe.unet.attn_processors)
    size = {"height": 16, "width": 16, "output_type": "latent"}
    calibrate(pipe, (4,), effort="fast", prompt="a cat", pag_scale=3.0, progress=False, **size)
    assert pipe.unet.attn_processors == before


class Copying(UnconditionalPipeline):
    """As pipelines of views, and of pictures with sound, do."""

    def __call__(self, num_inference_steps, **_):
        self.scheduler.set_timesteps(num_inference_steps)
        copy.deepcopy(self.scheduler)


class ByToken(UnconditionalPipeline):
    def __call__(self, num_inference_steps, **_):
        self.scheduler.set_timesteps(num_inference_steps)
        t, sample = self.scheduler.timesteps[0], torch.zeros(1, 4, 2)
        self.scheduler.step(sample, t, sample, per_token_timesteps=t.expand(1, 4))


class Grounded(UnconditionalPipeline):
    """As GLIGEN's, whose default acts in a share of a run."""

    def __call__(self, num_inference_steps, gligen_scheduled_sampling_beta=0.3, **_):
        raise InterruptedError


def test_a_default_that_acts_in_a_share_of_a_run_is_refused(tiny_unet):
    pipe = Grounded(tiny_unet, DDPMScheduler())
    with pytest.raises(ValueError, match="gligen_scheduled_sampling_beta=0.3 acts in a share of a run.*: give 1.0"):
        calibrate(pipe, (5,), progress=False)
    with pytest.raises(InterruptedError):
        calibrate(pipe, (5,), progress=False, gligen_scheduled_sampling_beta=1.0)


def test_a_frame_at_a_level_of_its_own_is_refused(tiny_unet):
    """As Wan 2.2's image-to-video with `expand_timesteps` has it."""
    pipe = UnconditionalPipeline(tiny_unet, FlowMatchEulerDiscreteScheduler())
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(ValueError, match="expand_timesteps gives the frame that it begins with a level of its own"):
        calibrate(pipe, (5,), progress=False, image=torch.zeros(1, 1, 4, 4))


def test_a_shift_that_depends_on_the_number_of_calls_is_that_of_a_usual_run():
    """As Flux.2's does, by `mu`: of the thousands of steps of a calibration it would be absurd."""
    source = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    unet = network(CalibratedMultistepScheduler.from_config(source.config).noise_space)

    class ByNumber(DDPMPipeline):
        def __call__(self, num_inference_steps, generator):
            sample = torch.randn((16, 1, 2, 2), generator=generator)
            sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=2.2 - 0.01 * num_inference_steps)
            for t in self.scheduler.timesteps:
                sample = self.scheduler.step(self.unet(sample, t).sample, t, sample, generator=generator).prev_sample
            return sample

    pipe = ByNumber(unet, source)
    for effort in ("fast", "full"):
        pipe.scheduler = calibrate(pipe, (8,), effort=effort, progress=False)
        assert pipe.scheduler.config.calibration["shift"] == pytest.approx(math.exp(2.0))
        sample = pipe(8, generator=torch.Generator().manual_seed(1))
        assert len(pipe.scheduler.sigmas.unique()) == 9
        assert 0.3 < float(sample.std()) < 1
        pipe.scheduler = source


@pytest.mark.parametrize(
    ("cls", "message"), [(Copying, "copies its scheduler"), (ByToken, "gives tokens timesteps of their own")]
)
def test_what_a_calibration_would_misread_is_named(cls, message, tiny_unet):
    with pytest.raises(ValueError, match=f"the pipeline {message}"):
        calibrate(cls(tiny_unet, FlowMatchEulerDiscreteScheduler()), (5,), progress=False)


def test_a_known_part_that_is_put_back_says_nothing_of_the_network():
    """As inpainting does after every step: there D goes straight to the image, which would hide the other errors."""
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    exact = network(CalibratedMultistepScheduler.from_config(ddpm.config).noise_space)

    class Inpainting(DDPMPipeline):
        def __call__(self, num_inference_steps, generator, known, from_image=False):
            noise = torch.randn((64, 1, 2, 2), generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            sample, image = noise, torch.full_like(noise, 0.9)
            if from_image:  # with a strength below 1: what is put back at the start's level is what is there
                sample = self.scheduler.add_noise(image, noise, self.scheduler.timesteps[:1]).half()
            for t, after in pairwise(self.scheduler.timesteps):
                output = self.unet(sample.float(), t).sample
                sample = self.scheduler.step(output, t, sample).prev_sample
                given = self.scheduler.add_noise(image, noise, torch.tensor([after]))
                sample[..., :known] = given[..., :known]

    for given in ({"known": 0}, {"known": 1}, {"known": 1, "from_image": True}):
        found = calibrate_in_full(Inpainting(exact, ddpm), (4,), effort="fast", progress=False, **given)
        assert abs(found.martingale_defect) < 0.1
