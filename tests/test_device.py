"""No float64 where there is none: Apple's GPUs. And nothing that lets the CPU wait for the device."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from schedulers import READINGS, SAMPLERS, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from diffusers_gm import GaussianMixtureNoise, GMLangevinScheduler
from diffusers_gm.losses import cld_loss, denoising_loss
from diffusers_gm.processes.cld import CLD
from diffusers_gm.processes.random import Draw
from diffusers_gm.readings.noise_space import PREDICTION_TYPES
from diffusers_gm.training.methods import METHODS
from diffusers_gm.training.methods.method import Batch
from diffusers_gm.training.options import TrainingArguments

DEVICE = torch.device("meta")
MIX = {"mixture_weights": [0.8, 0.2], "mixture_scales": [0.75, 1.62]}


class NoFloat64(TorchDispatchMode):
    """The meta device stands for a GPU without float64: no operation there may read or give it, nor any copy to it.

    Meta tensors have no values, so that waiting for the device is an error besides.
    """

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device != DEVICE:
            return result
        leaves, _ = tree_flatten((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = [t for t in tensors if t.device == DEVICE]
        self.seen += len(there)
        assert all(t.dtype != torch.float64 for t in there), f"float64 on the device: {func}"
        # A copy that moves float64 first and converts then is one operation too.
        if there and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            sources = [t for t in tensors if t.device != DEVICE]
            assert all(t.dtype != torch.float64 or t.ndim == 0 for t in sources), f"float64 moved to the device: {func}"
        return result


class NothingSent(TorchDispatchMode):
    """Nothing may be copied to the meta device, or not more often than `most`: a GPU makes the CPU wait until it
    has what it is sent."""

    def __init__(self, most=0):
        super().__init__()
        self.left = most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves, _ = tree_flatten((args, kwargs))
        from_elsewhere = any(isinstance(leaf, torch.Tensor) and leaf.device != DEVICE for leaf in leaves)
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        self.left -= copies and from_elsewhere and result.device == DEVICE
        assert self.left >= 0, f"sent to the device: {func}"
        return result


@pytest.fixture
def no_float64():
    with NoFloat64() as mode:
        yield mode
    assert mode.seen > 0


def images(channels=1, dtype=torch.float32):
    return torch.empty(2, channels, 4, 4, device=DEVICE, dtype=dtype)


def test_the_guard_sees_float64(no_float64):
    images()
    with pytest.raises(AssertionError, match="float64"):
        images().double()
    with pytest.raises(AssertionError, match="float64"):
        torch.ones(3, dtype=torch.float64).to(DEVICE)
    with pytest.raises(AssertionError, match="float64"):
        torch.ones(3, dtype=torch.float64).to(images())
    torch.ones(3, dtype=torch.float64).to(torch.float32).to(DEVICE)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run(reading, name, no_float64):
    for dtype, clip in ((torch.float32, {"clip_sample": True}), (torch.float16, {"thresholding": True})):
        scheduler = make(reading, name, **clip)
        native = scheduler.noise_space is None
        scheduler.set_timesteps(60, device=DEVICE)
        sample = scheduler.initial_sample(images(1 + native).shape, None, DEVICE, dtype)
        scheduler.set_begin_index(57)
        for t in scheduler.timesteps[-3:]:
            model_input = scheduler.scale_model_input(sample, t)
            output = model_input[:, :1] if native else model_input
            result = scheduler.step(output, t, sample)
            sample = result.prev_sample
            assert sample.dtype == result.pred_original_sample.dtype == dtype
        scheduler.scale_model_input(sample, 3)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_sent_in_a_run(reading, name):
    """But by the first step of the first run, the table of a mixture."""
    for arguments in ({}, {"clip_sample": True}, {"thresholding": True}):
        scheduler = make(reading, name, **arguments)
        for guard in (nullcontext(), NothingSent()):
            scheduler.set_timesteps(60, device=DEVICE)
            sample = scheduler.initial_sample(
                images(1 + (scheduler.noise_space is None)).shape, None, DEVICE, torch.float32
            )
            timesteps = list(scheduler.timesteps)
            with guard:
                for t in timesteps[:3]:
                    output = scheduler.scale_model_input(sample, t)[:, :1]
                    sample = scheduler.step(output, t, sample).prev_sample


@pytest.mark.parametrize("reading", [name for name in READINGS if "score" not in name and "cld" not in name])
def test_nothing_is_sent_in_a_step_of_training_by_hand(reading):
    scheduler, timesteps = make(reading, "ancestral"), torch.ones(2, device=DEVICE)
    for guard in (nullcontext(), NothingSent()):
        with guard:
            scheduler.add_noise(images(), images(), timesteps)
            scheduler.get_velocity(images(), images(), timesteps)


def test_the_noise_of_a_list_of_generators_is_sent_at_once():
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with NothingSent(most=1):
        assert Draw(generators, DEVICE).normal((3, 1, 4, 4)).device == DEVICE


def test_the_guard_sees_what_is_sent():
    with NothingSent(), pytest.raises(AssertionError, match="sent to the device"):
        torch.ones(3).to(DEVICE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "scaled_score"])
@pytest.mark.parametrize("algorithm", GMLangevinScheduler.algorithms)
def test_a_run_of_a_mixture_network(algorithm, prediction_type, no_float64):
    kinds = {"model_noise": "mixture", "algorithm_type": algorithm, "prediction_type": prediction_type}
    for per_element in (False, True):
        scheduler = GMLangevinScheduler(**MIX, **kinds, mixture_per_element=per_element)
        scheduler.set_timesteps(60, device=DEVICE)
        sample = scheduler.initial_sample(images().shape, None, DEVICE, torch.float32)
        for t in scheduler.timesteps[-3:]:
            output = scheduler.scale_model_input(sample, t)
            sample = scheduler.step(output, t, sample).prev_sample


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_training_asks(reading, dtype, no_float64):
    scheduler = make(reading, "ancestral")
    native = scheduler.noise_space is None
    clean, noise = images(dtype=dtype), images(1 + native, dtype)
    on_cpu = torch.tensor([3.0, 1.0]) if reading not in ("edm", "svd") else torch.tensor([0.5, -0.5])
    for timesteps in [on_cpu] if native else [on_cpu, on_cpu.to(DEVICE)]:
        assert scheduler.add_noise(clean, noise, timesteps).dtype == dtype
        if not native:
            assert scheduler.get_velocity(clean, noise, timesteps).dtype == dtype
    scheduler.set_timesteps(60, device=DEVICE)
    scheduler.add_noise(clean, noise, on_cpu)


@pytest.mark.parametrize("reading", [name for name in READINGS if "score" not in name and "cld" not in name])
def test_the_denoising_loss(reading, no_float64):
    space = make(reading, "ancestral").noise_space
    timesteps = torch.empty(2, device=DEVICE)
    for mixture in (GaussianMixtureNoise([1.0], [1.0]), GaussianMixtureNoise([0.8, 0.2], [0.75, 1.62])):
        for prediction_type in [kind for kind in PREDICTION_TYPES[space.kind] if kind != "score"]:
            loss = denoising_loss(lambda x, t: x, images(), timesteps, images(), space, mixture, prediction_type)
            assert loss.shape == (2,)


@pytest.mark.parametrize("weighting", ["ell", "likelihood"])
@pytest.mark.parametrize("velocity", [False, True])
def test_the_cld_loss(weighting, velocity, no_float64):
    v0 = images() if velocity else None
    times = torch.tensor([0.1, 0.9])
    loss = cld_loss(
        lambda u, t: u[:, :1], images(), times, images(2), CLD(), "cld_mixed", velocity=v0, weighting=weighting
    )
    assert loss.device == DEVICE


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gm-sgm"},
        {"method": "gm-sgm", "objective": "score", "mixture_per_element": True},
        {"method": "ncsnv2", "prediction_type": "sample", "scale_input": False},
        {"method": "cld"},
        {"method": "cld", "cld_feed_companion": True, "snr_gamma": 5.0, "timestep_sampling": "log_uniform"},
        {"method": "cld", "objective": "score"},
        {"method": "cld", "cld_loss": "dsm", "cld_weighting": "likelihood", "cld_mixed_score": False},
    ],
    ids=str,
)
def test_a_step_of_training(options):
    """With the times and the noise that the methods draw themselves."""
    args = TrainingArguments(**options)
    method = METHODS[args.method]
    noise = method.noise(args, torch.zeros(2, 1, 4, 4), lambda images: 10.0)
    scheduler = method.scheduler(args, noise, {})
    with NoFloat64(), torch.random.fork_rng(devices=[]):
        labels = method.labels(args, noise, torch.rand(2, dtype=torch.float64))
        network = lambda x, t: SimpleNamespace(sample=x[:, :1])
        loss = method.loss(args, scheduler, Batch(network, images(), labels, Draw.like(images())))
    assert loss.device == DEVICE
    assert loss.dtype == torch.float32
