"""Samples of an evaluation: network calls, seeds, schedulers by name, other pipelines."""

import contextlib
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
)

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    launch,
)
from diffusers_gm.data import SAMPLES, generator_for
from diffusers_gm.evaluation import num_steps_for
from diffusers_gm.evaluation.options import build_parser
from diffusers_gm.evaluation.sampling import (
    NoGridError,
    image_shape,
    load_pipeline,
    options_in,
    sample,
    scheduler_by_name,
)
from diffusers_gm.evaluation.sources import real_images
from diffusers_gm.evaluation.subject import Subject

CPU = torch.device("cpu")


def test_budgets_are_network_calls():
    for cls, calls, steps in [
        (DDIMScheduler, 10, 10),
        (HeunDiscreteScheduler, 10, 5),
        (HeunDiscreteScheduler, 11, 6),
        (KDPM2AncestralDiscreteScheduler, 10, 5),
        (CLDSSCSScheduler, 10, 10),
        (GMLangevinScheduler, 7, 7),
    ]:
        scheduler = cls()
        assert num_steps_for(scheduler, calls) == steps
        assert calls - 1 <= len(scheduler.timesteps) <= calls
    scheduler = PNDMScheduler()  # starts with Runge-Kutta steps of four calls each
    num_steps_for(scheduler, 20)
    assert len(scheduler.timesteps) <= 20
    with pytest.raises(NoGridError, match="no solution"):
        num_steps_for(
            GMLangevinScheduler(algorithm_type="jump", mixture_weights=[0.99, 0.01], mixture_scales=[0.5, 8.0]), 5
        )


def test_more_calls_than_allowed_are_not_compared(ddpm, monkeypatch):
    """As of a scheduler that says less than it takes."""
    pipeline = load_pipeline(ddpm, CPU)
    subject = Subject("it", "", (1, 8, 8), None, None, pipeline=pipeline, runs={"DDPM": (pipeline.scheduler, {})})
    assert subject.images("DDPM", 3, 0, 2, 2)[1] == 3
    monkeypatch.setattr("diffusers_gm.evaluation.subject.num_steps_for", lambda scheduler, calls: calls + 1)
    with pytest.raises(ValueError, match="DDPM made 4 network calls where 3 were allowed"):
        subject.images("DDPM", 3, 0, 2, 2)


def test_a_reference_is_no_smaller_than_the_samples():
    """Nearest neighbours are looked for among as many."""
    args = build_parser("").parse_args(["model", "--dataset_name", "digits", "--num_reference", "20"])
    reference, floor, n = real_images(args, (1, 8, 8), 60)
    assert (len(reference), len(floor), n) == (60, 60, 60)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_batches_each_once(processes, monkeypatch):
    """Also where there are fewer batches than processes."""
    monkeypatch.setattr(launch, "gather_object", lambda results: results)

    def done_by(index, items):
        state = SimpleNamespace(num_processes=processes, process_index=index, is_main_process=index == 0)
        monkeypatch.setattr(launch, "process_state", lambda: state)
        return launch.over_processes(lambda batch: batch.tolist(), items, 2, "")

    for items in map(torch.arange, range(1, 12)):
        parts = [done_by(index, items) for index in range(processes)]
        assert [number for part in parts for batch in part for number in batch] == items.tolist()
        assert max(map(len, parts)) == -(-math.ceil(len(items) / 2) // processes), "nobody does more than needed"


def test_images_depend_on_seed_and_index_alone(ddpm):
    pipeline = load_pipeline(ddpm, CPU)
    for scheduler in (pipeline.scheduler, scheduler_by_name(pipeline.scheduler, ["CLDSSCSScheduler"])[1]):
        images, calls = sample(pipeline, scheduler, 5, 7, seed=3, batch_size=7)
        again, _ = sample(pipeline, scheduler, 5, 7, seed=3, batch_size=2)
        assert calls == 5
        torch.testing.assert_close(images, again, atol=1e-5, rtol=0)
        other, _ = sample(pipeline, scheduler, 5, 7, seed=4, batch_size=7)
        assert (images - other).abs().max() > 0.1
    assert isinstance(pipeline.scheduler, DDPMScheduler)


def test_our_loop_does_what_ddpm_pipeline_does(ddpm):
    """In whose stead it stands, as that one cannot run schedulers with a scaled input, or without a generator."""
    pipeline = load_pipeline(ddpm, CPU)
    images, _ = sample(pipeline, pipeline.scheduler, 5, 3, seed=0, batch_size=3)
    theirs = DDPMPipeline.from_pretrained(ddpm)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(3, [generator_for(0, SAMPLES, i) for i in range(3)], 5, output_type="np").images
    torch.testing.assert_close(images, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1)
    heun = scheduler_by_name(pipeline.scheduler, ["HeunDiscreteScheduler"])[1]
    images, calls = sample(pipeline, heun, num_steps_for(heun, 8), 3, seed=0, batch_size=3)
    assert calls == 7
    assert torch.isfinite(images).all()


def test_native_cld_makes_images_not_states(tiny_velocity_unet, tmp_path):
    CLDPipeline(tiny_velocity_unet, CLDSSCSScheduler(prediction_type="cld_mixed")).save_pretrained(tmp_path)
    pipeline = load_pipeline(str(tmp_path), CPU)
    assert image_shape(pipeline) == (1, 8, 8)
    assert sample(pipeline, pipeline.scheduler, 4, 2, seed=0, batch_size=2)[0].shape == (2, 1, 8, 8)


def test_schedulers_by_name():
    own = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    name, scheduler = scheduler_by_name(own, ["CLDSSCSScheduler", "splitting_order=2", "algorithm_type=sscs"])
    assert name == "CLDSSCSScheduler splitting_order=2 algorithm_type=sscs"
    assert scheduler.config.splitting_order == 2
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    for words, message in [
        (["NoScheduler"], "'NoScheduler' is no scheduler"),
        (["DDPMPipeline"], "'DDPMPipeline' is no scheduler"),
        (["DDIMScheduler", "eta=1"], "'eta=1' must be option=value, the option one of"),
        (["DDIMScheduler", "clip_sample"], "'clip_sample' must be"),
        (["CLDSSCSScheduler", "algorithm_type=no"], "'no'"),
        (
            ["DDIMScheduler", "beta_schedule=no"],
            "beta_schedule=no cannot be made of this config: no is not implemented",
        ),
        (
            ["FlowMatchEulerDiscreteScheduler"],
            "does not suit .* reads those of flow noise, and .* trained with vp noise",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler_by_name(own, words)
    vp = GMLangevinScheduler(noise_space="vp", beta_schedule="linear")
    assert scheduler_by_name(vp, ["DDIMScheduler"])
    flow = CLDSSCSScheduler(noise_space="flow", prediction_type="flow_prediction")
    for other in ("FlowMatchEulerDiscreteScheduler", "CLDSSCSScheduler"):
        assert scheduler_by_name(flow, [other])
    native = CLDSSCSScheduler(prediction_type="cld_mixed")
    assert scheduler_by_name(native, ["CLDSSCSScheduler", "algorithm_type=euler_maruyama"])[1].noise_space is None
    with pytest.raises(ValueError, match="DDIMScheduler does not suit .* velocity: use one of ours"):
        scheduler_by_name(native, ["DDIMScheduler"])


OF_DIFFUSERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))


@pytest.mark.parametrize(
    ("own", "suits"),
    [
        (AnnealedLangevinScheduler(sigma_min=0.01, sigma_max=50.0), "AnnealedLangevinScheduler"),
        (
            GMLangevinScheduler(mixture_weights=[0.5, 0.5], mixture_scales=[0.5, 1.5], model_noise="mixture"),
            "GMLangevinScheduler",
        ),
        (CLDSSCSScheduler(prediction_type="cld_mixed"), "CLDSSCSScheduler"),
        (DDPMScheduler(), "DDIMScheduler"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
    ],
    ids=["ve", "mixture", "velocity", "vp", "flow"],
)
def test_no_scheduler_of_diffusers_is_given_noise_that_it_cannot_read(own, suits):
    """Every scheduler there is: they would all take the config, and most of them answer with noise, not an error."""
    accepted = set()
    for name in OF_DIFFUSERS:
        with contextlib.suppress(ValueError, ImportError):
            accepted.add(type(scheduler_by_name(own, [name])[1]))
    if isinstance(own, GMLangevinScheduler | CLDSSCSScheduler):
        assert not accepted
    else:
        by_betas = {hasattr(cls(), "alphas_cumprod") and not cls().config.get("use_flow_sigmas") for cls in accepted}
        assert by_betas == {not isinstance(own, FlowMatchEulerDiscreteScheduler)}
    assert scheduler_by_name(own, [suits])


def test_values_of_options_are_those_of_json_or_python():
    """`False` is not the word of five letters, which is true."""
    words = [
        "a=False",
        "b=false",
        "c=None",
        "d=null",
        "e=1e-3",
        "f=[1, 2]",
        "g=trailing",
        "h='trailing'",
        'i={"5": [1.5]}',
    ]
    expected = [False, False, None, None, 1e-3, [1, 2], "trailing", "trailing", {"5": [1.5]}]
    assert list(options_in(words).values()) == expected
    assert options_in(["x="]) == {"x": ""}
