"""What only a GPU can show: that it gives what the CPU does, and that nothing waits for it. Left out where there is
none."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from networks import seeded, tiny_network
from schedulers import READINGS, SAMPLERS, SCHEDULERS, make
from training import SHORT, WEIGHTS, launch, load

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDPipeline,
    CLDSSCSScheduler,
    GMLangevinScheduler,
    GMSGMPipeline,
    NCSNv2Pipeline,
    UnconditionalPipeline,
    calibrate,
)
from diffusers_gm.calibrate.__main__ import main as calibrate_command
from diffusers_gm.evaluation.command import main as evaluate
from diffusers_gm.samplers import Memory, Multistep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


@contextmanager
def nothing_waits():
    """Inside, to wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_sees_a_wait():
    number = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), nothing_waits():
        number.item()


# --- Schedulers ---


def run(scheduler, generator, device):
    native = scheduler.noise_space is None
    scheduler.set_timesteps(60, device=device)
    sample = scheduler.initial_sample((2, 1 + native, 4, 4), generator, device, torch.float64)
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        output = 0.1 * model_input[:, :1] if native else 0.1 * model_input
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_is_that_of_the_cpu(reading, name):
    for clip in ({}, {"clip_sample": True}):
        ends = [run(make(reading, name, **clip), seeded(1, 2), device) for device in ("cpu", DEVICE)]
        assert ends[1].device.type == DEVICE
        torch.testing.assert_close(ends[1].cpu(), ends[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits(reading, name):
    for arguments in ({}, {"clip_sample": True}, {"thresholding": True}):
        scheduler, (generator,) = make(reading, name, **arguments), seeded(0, device=DEVICE)
        native = scheduler.noise_space is None
        for guard in (nullcontext(), nothing_waits()):  # the first run sends the table of a mixture
            scheduler.set_timesteps(60, device=DEVICE)
            sample = scheduler.initial_sample((2, 1 + native, 4, 4), generator, DEVICE, torch.float32)
            timesteps = list(scheduler.timesteps)
            with guard:
                for t in timesteps:
                    model_input = scheduler.scale_model_input(sample, t)
                    output = 0.1 * model_input[:, :1] if native else 0.1 * model_input
                    sample = scheduler.step(output, t, sample, generator=generator).prev_sample
            assert sample.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_generators_of_the_device_decide_each_sample(name):
    def one(*seeds):
        scheduler = make("vp", name)
        scheduler.set_timesteps(20 if name not in ("jump", "exponential") else 60, device=DEVICE)
        generators = seeded(*seeds, device=DEVICE)
        sample = scheduler.initial_sample((len(seeds), 1, 4, 4), generators, DEVICE, torch.float64)
        for t in scheduler.timesteps:
            output = 0.1 * scheduler.scale_model_input(sample, t)
            sample = scheduler.step(output, t, sample, generator=generators).prev_sample
        return sample

    torch.testing.assert_close(one(1, 2, 3, 4), torch.cat([one(1, 2), one(3, 4)]))


@pytest.mark.parametrize("tau", [0.0, 0.4])
def test_a_step_compiles_without_a_break(tau):
    sampler, y = Multistep(stochasticity=tau), torch.randn(2, 1, 64, 64, generator=seeded(0)[0]).to(DEVICE)
    plan, memory = sampler.plan(torch.logspace(2, -2, 8, dtype=torch.float64)), Memory()

    class Drawn:
        def normal(self, shape):
            return torch.ones(shape, device=DEVICE)

    for i in range(3):
        _, memory = sampler.step(plan, i, y, 0.5 * y, memory, Drawn())
    step = lambda y, denoised, memory: sampler.step(plan, 3, y, denoised, memory, Drawn())[0]
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(y, 0.3 * y, memory), step(y, 0.3 * y, memory), rtol=1e-4, atol=1e-5)


# --- Pipelines ---

PIPELINES = {
    "ncsnv2": lambda: NCSNv2Pipeline(tiny_network(), AnnealedLangevinScheduler()),
    "gm": lambda: GMSGMPipeline(tiny_network(), GMLangevinScheduler()),
    "cld": lambda: CLDPipeline(tiny_network(2, 1), CLDSSCSScheduler(prediction_type="velocity_score")),
    "calibrated": lambda: UnconditionalPipeline(tiny_network(), CalibratedMultistepScheduler(beta_schedule="linear")),
    "euler": lambda: UnconditionalPipeline(tiny_network(), EulerDiscreteScheduler()),
    "diffusers": lambda: DDPMPipeline(tiny_network(), CalibratedMultistepScheduler(beta_schedule="linear")),
}


def images(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    found = pipe(batch_size=2, num_inference_steps=60, generator=seeded(1, 2), output_type="np", **arguments).images
    return torch.as_tensor(found)


@pytest.fixture
def exact(monkeypatch):
    """Convolutions of float32, as on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_makes_the_images_of_the_cpu(name, exact):
    on_cpu = images(PIPELINES[name]())
    torch.testing.assert_close(images(PIPELINES[name]().to(DEVICE)), on_cpu, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_that_is_kept_on_the_cpu_and_moved_part_by_part(name, exact):
    pipe = PIPELINES[name]()
    if pipe.model_cpu_offload_seq is None:
        pytest.skip("this pipeline cannot")
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(images(pipe), images(PIPELINES[name]()), atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_half_the_precision(name, dtype):
    if name == "diffusers" and dtype == torch.bfloat16:
        pytest.skip("numpy, to which diffusers' pipeline goes in the network's own dtype, has none")
    found, whole = images(PIPELINES[name]().to(DEVICE, dtype)), images(PIPELINES[name]())
    assert found.isfinite().all()
    assert (found - whole).abs().mean() < 0.1


def test_levels_are_those_of_the_cpu_and_close_to_them_in_half_the_precision(exact):
    found = []
    for device, dtype in (("cpu", torch.float32), (DEVICE, torch.float32), (DEVICE, torch.float16)):
        pipe = DDPMPipeline(tiny_network(), DDPMScheduler()).to(device, dtype)
        pipe.set_progress_bar_config(disable=True)
        scheduler = calibrate(pipe, (5, 8), progress=False, generator=seeded(*range(8)), batch_size=8)
        assert pipe.unet.device.type == device
        found.append(scheduler.config.calibration)
    for calls in ("5", "8"):
        for other, close in ((found[1], 0.05), (found[2], 0.3)):
            ratio = torch.tensor(other[calls]) / torch.tensor(found[0][calls])
            assert (ratio.log().abs() < close).all(), ratio


def test_the_commands(tmp_path):
    DDPMPipeline(tiny_network(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    calibrate_command([str(tmp_path / "ddpm"), "--calls", "5", "8", "--effort", "fast"])
    words = [str(tmp_path / "ddpm"), "--dataset_name", "digits", "--num_samples", "64", "--calls", "5"]
    evaluate([*words, "--metrics", "sw", "--seeds", "0", "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_training_by_diffusers_own_example(cls):
    scheduler = cls.from_config(DDPMScheduler().config)
    clean, noise = torch.randn(2, 4, 1, 8, 8, device=DEVICE, generator=seeded(0, device=DEVICE)[0])
    timesteps = torch.tensor([0, 3, 500, 999])
    there = timesteps.to(DEVICE)
    scheduler.add_noise(clean, noise, there)  # sends the table of levels
    with nothing_waits():
        noisy = scheduler.add_noise(clean, noise, there)
    expected = scheduler.add_noise(clean.cpu(), noise.cpu(), timesteps)
    torch.testing.assert_close(noisy.cpu(), expected, rtol=1e-5, atol=1e-5)


# --- Training ---


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["gm-sgm", "ncsnv2", "cld", "ddpm"])
def test_training_goes_on_where_it_was(method, precision, tmp_path):
    launcher = ("launch", "--num_processes", "1", "--mixed_precision", precision)
    options = f"--dataset_name digits --method {method} {SHORT} --calibrate fast"
    options = options.replace("--max_train_steps 3", "--max_train_steps 6")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch(options, "--output_dir", whole, launcher=launcher)
    launch(
        options,
        "--output_dir",
        resumed,
        "--resume_from_checkpoint",
        whole / "checkpoint-3",
        launcher=launcher,
    )
    one, other = load(whole / WEIGHTS), load(resumed / WEIGHTS)
    for name in one:
        assert one[name].isfinite().all()
        torch.testing.assert_close(other[name], one[name], atol=2e-3, rtol=0)
