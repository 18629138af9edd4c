"""The samplers: their law on known data, their order, and diffusers' contract."""

import copy
import inspect
import json
import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from networks import CPU, perfect_network
from networks import run as run_from

from diffusers_gm import AnnealedLangevinScheduler, GaussianMixtureNoise, GMLangevinScheduler
from diffusers_gm.processes.annealed import PRESETS
from diffusers_gm.studies.exact import ExactDenoiser

MIXTURE = GaussianMixtureNoise.from_power_law(1.5, 2)
MIX = {"mixture_weights": MIXTURE.weights.tolist(), "mixture_scales": MIXTURE.scales.tolist()}
SMALL = {"sigma_min": 0.02, "sigma_max": 8.0}
GM_ALGORITHMS = ("langevin", "jump", "exponential", "ancestral", "ode")
# Every sampler, on a Gaussian model.
SAMPLERS = {
    "annealed": AnnealedLangevinScheduler,
    "consistent": lambda **kw: AnnealedLangevinScheduler(algorithm_type="consistent", **kw),
    **{name: lambda name=name, **kw: GMLangevinScheduler(algorithm_type=name, **(MIX | kw)) for name in GM_ALGORITHMS},
}
SPACES = {
    "vp": {"beta_schedule": "linear"},
    "ve": SMALL,
    "ve-unscaled": {**SMALL, "scale_input": False},
    "flow": {"shift": 1.0, "prediction_type": "flow_prediction"},
}
all_samplers = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
all_spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def run(scheduler, network, num_calls, shape, generator, sample=None):
    """A run from its own start, or from `sample`."""
    scheduler.set_timesteps(num_calls)
    if sample is None:
        sample = scheduler.initial_sample(shape, generator, CPU, torch.float32)
    return run_from(scheduler, network, sample, generator)


def levels_of(scheduler, num_calls):
    """The noise level of every call of a run."""
    scheduler.set_timesteps(num_calls)
    return scheduler.sigmas[:-1].tolist()


# --- Laws ---


def test_the_published_cifar10_ladder_is_that_of_the_preset():
    preset = PRESETS["ncsnv2-cifar10"]
    for scheduler in (
        AnnealedLangevinScheduler(**preset.scheduler_config()),
        GMLangevinScheduler(algorithm_type="langevin", **preset.scheduler_config()),
    ):
        scheduler.set_timesteps(preset.num_inference_steps)
        assert scheduler.timesteps[::5].tolist() == [*range(231, -1, -1), 0]
        assert scheduler.sampler.step_size == preset.step_size


@pytest.mark.parametrize("name", ["annealed", "langevin", "jump", "exponential"])
def test_langevin_samplers_approach_the_data_as_calls_grow(name, generator):
    """Variance of Gaussian data 0.25: the error shrinks from 20 to 640 calls and ends below 12%."""
    scheduler = SAMPLERS[name](**SMALL, num_langevin_steps=2)
    network = perfect_network(scheduler, ExactDenoiser(torch.zeros(1, 1, 1, 1), 0.5))
    errors = []
    for n in (20, 640):
        samples = run(scheduler, network, n, (4000, 1, 1, 1), generator)
        errors.append(abs(float(samples.var()) / 0.25 - 1))
    assert errors[1] < 0.07 + 5 * math.sqrt(2 / 4000)
    assert errors[1] < errors[0] or errors[0] < 0.05


@pytest.mark.parametrize("prediction_type", ["epsilon", "scaled_score"])
@pytest.mark.parametrize("name", ["ancestral", "ode"])
def test_mixture_models_keep_variance_and_kurtosis_of_the_noise(name, prediction_type, generator):
    """On a point mass a run without the last denoising leaves exactly the mixture, at the last level."""
    scheduler = SAMPLERS[name](**SMALL, model_noise="mixture", prediction_type=prediction_type, denoise=False)
    denoiser = ExactDenoiser(torch.zeros(1, 1, 8, 8), noise=MIXTURE)
    left = run(scheduler, perfect_network(scheduler, denoiser), 30, (4000, 1, 8, 8), generator).double()
    last, before = levels_of(scheduler, 30)[:-3:-1]
    z = left / (last**2 / before)  # a run goes one level further than its last call
    # Elements of an image share a component: the moments are means over images.
    second, fourth = (z**2).mean((1, 2, 3)), (z**4).mean((1, 2, 3))
    assert float(second.mean()) == pytest.approx(1, abs=5 * float(second.std()) / math.sqrt(4000))
    assert float(fourth.mean()) == pytest.approx(3 * MIXTURE.moment(4), abs=5 * float(fourth.std()) / math.sqrt(4000))


def test_langevin_steps_follow_the_local_noise_level_of_every_component(generator):
    """Images that start in component k are at the level c_k sigma all along: on a point mass each component follows
    NCSNv2's own recursion of the variance, in units of its own level. The lag of 1.5 in the variance is large enough
    to take a narrow image for a wide one, were it not accounted for."""
    scheduler = SAMPLERS["langevin"](**SMALL, model_noise="mixture", denoise=False)
    sigmas = levels_of(scheduler, 40)
    steps = [a for _, a, *_ in scheduler.sampler.plan(torch.tensor(sigmas, dtype=torch.float64)).steps]
    variance = sigmas[0] ** 2
    for a, sigma in zip(steps, sigmas, strict=True):
        variance = (1 - a) ** 2 * variance + 2 * a * sigma**2
    c = MIXTURE.scales.float().repeat_interleave(200).view(-1, 1, 1, 1)
    start = scheduler.init_noise_sigma * c * torch.randn(400, 1, 16, 16, generator=generator)
    network = perfect_network(scheduler, ExactDenoiser(torch.zeros(1, 1, 16, 16), noise=MIXTURE))
    left = run(scheduler, network, 40, None, generator, sample=start) / (c * sigmas[-1])
    expected = variance / sigmas[-1] ** 2
    assert expected > 1.3
    for component in left.split(200):
        found = float(component.square().mean())
        assert found == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / component.numel()))


def test_putting_the_score_where_the_denoiser_belongs_would_be_seen(generator):
    """The trap of section 4.2: reading a score network as a Gaussian model breaks the law of the noise."""
    scheduler = SAMPLERS["ancestral"](**SMALL, model_noise="gaussian", prediction_type="scaled_score", denoise=False)
    denoiser = ExactDenoiser(torch.zeros(1, 1, 8, 8), noise=MIXTURE)
    left = run(scheduler, perfect_network(scheduler, denoiser), 30, (2000, 1, 8, 8), generator)
    last, before = levels_of(scheduler, 30)[:-3:-1]
    assert abs(float(left.var()) / (last**2 / before) ** 2 - 1) > 0.3


def test_technique_1_few_modes_from_a_small_first_level_many_from_a_large_one(generator):
    """The poster's figure: everything starts at one image of 40; how many images do 200 samples end at?"""
    images = torch.sign(torch.randn(40, 1, 8, 8, generator=generator))
    reached = {}
    for sigma_max in (1.0, float(torch.cdist(images.flatten(1), images.flatten(1)).max())):
        scheduler = AnnealedLangevinScheduler(sigma_min=0.05, sigma_max=sigma_max, num_langevin_steps=5)
        network = perfect_network(scheduler, ExactDenoiser(images))
        start = images[:1] + sigma_max * torch.randn(200, 1, 8, 8, generator=generator)
        samples = run(scheduler, network, 251, None, generator, sample=start)
        reached[sigma_max] = len(torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1).unique())
    few, many = reached.values()
    assert few <= 3
    assert many >= 35


# --- Equivalences ---


@all_spaces
@pytest.mark.parametrize("algorithm_type", ["langevin", "jump"])
@pytest.mark.parametrize("mixture", [{}, {"mixture_weights": [1.0], "mixture_scales": [1.0], "model_noise": "mixture"}])
def test_one_component_is_ncsnv2_to_the_bit(space, algorithm_type, mixture):
    points = ExactDenoiser(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    samples = []
    for scheduler in (
        AnnealedLangevinScheduler(**space, num_langevin_steps=3),
        GMLangevinScheduler(**space, num_langevin_steps=3, algorithm_type=algorithm_type, **mixture),
    ):
        generator = torch.Generator().manual_seed(7)
        samples.append(run(scheduler, perfect_network(scheduler, points), 32, (3, 1, 4, 4), generator))
    assert torch.equal(*samples)


def test_consistent_default_is_the_ancestral_sampler_of_one_component():
    points = ExactDenoiser(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    samples = []
    for scheduler in (
        AnnealedLangevinScheduler(**SMALL, algorithm_type="consistent"),
        GMLangevinScheduler(**SMALL, algorithm_type="ancestral"),
    ):
        generator = torch.Generator().manual_seed(7)
        samples.append(run(scheduler, perfect_network(scheduler, points), 20, (3, 1, 4, 4), generator))
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [5, 20])
def test_ancestral_of_order_2_is_sde_dpm_solver_2m_of_one_component(n):
    """diffusers' own, on the same levels and with the same noise."""
    solver = DPMSolverMultistepScheduler(
        beta_schedule="linear", algorithm_type="sde-dpmsolver++", timestep_spacing="trailing", lower_order_final=False
    )
    ours = GMLangevinScheduler.from_config(solver.config, algorithm_type="ancestral")
    assert ours.config.step_order == 2
    points = ExactDenoiser(torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    solver.set_timesteps(n)
    samples = []
    for scheduler in (solver, ours):
        scheduler.set_timesteps(timesteps=solver.timesteps.tolist())
        generator = torch.Generator().manual_seed(7)
        sample = torch.randn(3, 1, 4, 4, generator=generator)
        network = perfect_network(ours, points)
        for t in scheduler.timesteps:
            sample = scheduler.step(network(sample, t), t, sample, generator=generator).prev_sample
        samples.append(sample)
    torch.testing.assert_close(*samples, rtol=1e-3, atol=1e-3)


@all_samplers
def test_equal_networks_in_other_conventions_give_equal_samples(make):
    """The same denoiser behind every prediction type of vp space."""
    points = ExactDenoiser(torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    samples = []
    for prediction_type in ("epsilon", "sample", "v_prediction", "score", "scaled_score"):
        scheduler = make(beta_schedule="linear", prediction_type=prediction_type)
        scheduler.set_timesteps(40)
        generator = torch.Generator().manual_seed(3)
        sample = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=generator)
        samples.append(run_from(scheduler, perfect_network(scheduler, points), sample, generator))
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], rtol=1e-4, atol=1e-4)


# --- The contract ---


@all_samplers
@pytest.mark.parametrize("num_langevin_steps", [1, 3])
@pytest.mark.parametrize("denoise", [True, False])
def test_num_inference_steps_means_network_calls(make, num_langevin_steps, denoise):
    scheduler = make(**SMALL, num_langevin_steps=num_langevin_steps, denoise=denoise)
    for n in (60, 61, 62, 100):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == n
        assert (scheduler.timesteps.diff() <= 0).all()
        assert float(scheduler.timesteps[0]) == 999
        assert float(scheduler.timesteps[-1]) == 0


@all_samplers
@all_spaces
def test_generators_decide_everything(make, space):
    """Equal seeds, equal samples; a batch of 4 is 2 + 2; inputs are not modified."""

    def sample(seeds):
        scheduler = make(**space)
        network = perfect_network(scheduler, ExactDenoiser(torch.ones(1, 1, 2, 2)))
        return run(scheduler, network, 60, (len(seeds), 1, 2, 2), [torch.Generator().manual_seed(s) for s in seeds])

    whole = sample([0, 1, 2, 3])
    assert torch.equal(whole, torch.cat([sample([0, 1]), sample([2, 3])]))
    assert torch.equal(whole, sample([0, 1, 2, 3]))
    scheduler = make(**space)
    scheduler.set_timesteps(60)
    model_output, x = torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    scheduler.step(model_output, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model_output, torch.ones(2, 1, 2, 2))
    assert torch.equal(x, torch.ones(2, 1, 2, 2))


@all_samplers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype_and_half_precision_is_computed_in_single(make, dtype, generator):
    scheduler = make(beta_schedule="linear")
    scheduler.set_timesteps(60)
    x = torch.randn(2, 1, 4, 4, generator=generator).to(dtype)
    out = scheduler.step(x, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    assert out.prev_sample.dtype == out.pred_original_sample.dtype == dtype
    scheduler.set_timesteps(60)
    single = scheduler.step(x.float(), scheduler.timesteps[0], x.float(), generator=torch.Generator().manual_seed(0))
    if dtype != torch.float64:
        assert torch.equal(out.prev_sample, single.prev_sample.to(dtype))


@all_samplers
def test_tuples_deep_copies_and_runs_in_between(make, generator):
    scheduler = make(**SMALL)
    scheduler.set_timesteps(60)
    x = torch.randn(2, 1, 4, 4, generator=generator)
    for t in scheduler.timesteps[:5]:
        x = scheduler.step(x, t, x, generator=generator).prev_sample
    twin = copy.deepcopy(scheduler)
    t = scheduler.timesteps[5]
    ours = scheduler.step(x, t, x, generator=torch.Generator().manual_seed(1))
    theirs = twin.step(x, twin.timesteps[5], x, generator=torch.Generator().manual_seed(1), return_dict=False)
    assert isinstance(theirs, tuple)
    assert torch.equal(ours.prev_sample, theirs[0])
    assert torch.equal(ours.pred_original_sample, theirs[1])
    assert scheduler.step_index == twin.step_index == 6
    scheduler.set_timesteps(60)
    assert scheduler.step_index is None


@all_samplers
def test_starting_in_the_middle(make, generator):
    """Image-to-image: the begin index, an element of timesteps, or an equal number, all start at the same call."""
    x = torch.randn(2, 1, 4, 4, generator=generator)
    results = []
    for start in ("begin_index", "element", "number"):
        scheduler = make(**SMALL)
        scheduler.set_timesteps(60)
        t = scheduler.timesteps[20]
        if start == "begin_index":
            scheduler.set_begin_index(20)
        if start == "number":
            t = float(t)
        results.append(scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample)
        assert scheduler.step_index == 21
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_repeated_labels_are_told_apart():
    scheduler = AnnealedLangevinScheduler(**SMALL, num_langevin_steps=5)
    scheduler.set_timesteps(51)
    assert scheduler.timesteps[3] == scheduler.timesteps[0]
    x = torch.zeros(1, 1, 2, 2)
    scheduler.step(x, scheduler.timesteps[3:][0], x, generator=torch.Generator().manual_seed(0))
    assert scheduler.step_index == 4


@all_samplers
def test_misuse_is_a_clear_error(make, generator):
    scheduler = make(**SMALL)
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps must be called"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(60)
    with pytest.raises(ValueError, match="not one of scheduler.timesteps"):
        scheduler.step(x, 5.4321, x)
    with pytest.raises(ValueError, match="output has shape"):
        scheduler.step(torch.zeros(2, 2, 4, 4), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="list of 3"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=[generator] * 3)
    assert scheduler.step_index is None, "a refused call must not count"
    for t in scheduler.timesteps:
        scheduler.step(x, t, x, generator=generator)
    with pytest.raises(ValueError, match="all 60 steps"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    for n in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(n)


@all_samplers
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_what_a_caller_does_to_the_tensors_of_a_step_is_not_seen_by_the_run(make, prediction_type):
    """A preview that is clamped in place; a compiled network that writes into the output it gave before."""
    left = []
    for touched in (False, True):
        scheduler = make(**SMALL, prediction_type=prediction_type)
        scheduler.set_timesteps(60)
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2, 1, 4, 4, generator=generator)
        for t in scheduler.timesteps:
            output = 0.1 * sample
            step = scheduler.step(output, t, sample, generator=generator)
            sample = step.prev_sample
            if touched:
                step.pred_original_sample.zero_()
                output.zero_()
        left.append(sample)
    assert torch.equal(*left)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnnealedLangevinScheduler(sigma_min=1.0, sigma_max=1.0), "sigma_min=1.0, sigma_max=1.0"),
        (lambda: AnnealedLangevinScheduler(sigma_min=0.0), "0 < sigma_min"),
        (lambda: AnnealedLangevinScheduler(algorithm_type="hmc"), "'hmc'"),
        (lambda: AnnealedLangevinScheduler(num_train_timesteps=1), "num_train_timesteps"),
        (lambda: AnnealedLangevinScheduler(num_langevin_steps=0).set_timesteps(10), "num_langevin_steps"),
        (lambda: AnnealedLangevinScheduler(step_size=2e-4).set_timesteps(10), "unstable step"),
        (lambda: AnnealedLangevinScheduler(step_size=-1e-6).set_timesteps(10), "unstable step"),
        (lambda: GMLangevinScheduler(step_order=3), "step_order must be 1 or 2, got 3"),
        (lambda: AnnealedLangevinScheduler(step_order=0), "step_order must be 1 or 2, got 0"),
        (
            lambda: AnnealedLangevinScheduler(step_size_criterion="x").set_timesteps(10),
            "step_size_criterion 'x'",
        ),
        (
            lambda: AnnealedLangevinScheduler(algorithm_type="consistent", step_size=1e-5).set_timesteps(10),
            "consistent",
        ),
        (
            lambda: AnnealedLangevinScheduler(thresholding=True, dynamic_thresholding_ratio=2),
            "dynamic_thresholding",
        ),
        (lambda: AnnealedLangevinScheduler(clip_sample=True, clip_sample_range=-1.0), "clip_sample_range .* -1.0"),
        (lambda: GMLangevinScheduler(shift=0.0), "shift must be positive, got 0.0"),
        (lambda: GMLangevinScheduler(shift=float("nan")), "shift must be positive, got nan"),
        (lambda: GMLangevinScheduler(shift=3.0, shift_terminal=1.0), "shift_terminal must be in .0, 1., got 1.0"),
        (lambda: AnnealedLangevinScheduler().set_begin_index(-2), "begin_index must be at least 0, got -2"),
        (lambda: AnnealedLangevinScheduler(timestep_spacing="x").set_timesteps(10), "timestep_spacing 'x'"),
        (lambda: GMLangevinScheduler(algorithm_type="levy"), "'levy'"),
        (lambda: GMLangevinScheduler(model_noise="cauchy"), "'cauchy'"),
        (lambda: GMLangevinScheduler(mixture_weights=[0.5, 0.5]), "go together"),
        (lambda: GMLangevinScheduler(mixture_weights=[0.5, 0.6], mixture_scales=[1.0, 2.0]), "sum to one"),
        # a * c_max^2 >= 1
        (
            lambda: GMLangevinScheduler(
                algorithm_type="jump", mixture_weights=[0.5, 0.5], mixture_scales=[1.0, 3.0], step_size=1.2e-5
            ).set_timesteps(10),
            "unstable step.*0.1111",
        ),
        (
            lambda: GMLangevinScheduler(
                algorithm_type="jump", mixture_weights=[0.99, 0.01], mixture_scales=[0.5, 8.0]
            ).set_timesteps(10),
            "no solution",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- Configs ---


@all_samplers
@all_spaces
def test_configs_survive_the_disk(make, space, tmp_path, generator):
    scheduler = make(**space)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == {
        k: v for k, v in scheduler.config.items() if not k.startswith("_")
    }
    points = ExactDenoiser(torch.ones(1, 1, 2, 2))
    samples = [
        run(s, perfect_network(s, points), 60, (2, 1, 2, 2), torch.Generator().manual_seed(0))
        for s in (scheduler, loaded)
    ]
    assert torch.equal(*samples)


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, GMLangevinScheduler])
def test_swapped_into_a_diffusers_config_from_memory_or_disk(cls, tmp_path):
    source = DDPMScheduler(clip_sample=False)  # everything else left at its default
    source.save_pretrained(tmp_path)
    for config in (source.config, DDPMScheduler.load_config(tmp_path)):
        ours = cls.from_config(config)
        assert ours.noise_space.kind == "vp"
        sigma = ((1 - source.alphas_cumprod) / source.alphas_cumprod).sqrt()
        torch.testing.assert_close(ours.noise_space.sigma(torch.arange(1000)).float(), sigma, rtol=1e-5, atol=1e-6)
        assert ours.config.timestep_spacing == "leading"
        assert ours.init_noise_sigma == 1.0
        back = DDPMScheduler.from_config(ours.config)
        assert back.config.variance_type == source.config.variance_type
    wins = cls.from_config(source.config, timestep_spacing="log_snr")
    assert wins.config.timestep_spacing == "log_snr"


@all_samplers
def test_runs_in_a_pipeline_of_diffusers(make, tiny_unet):
    pipeline = DDPMPipeline(tiny_unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make(beta_schedule="linear")
    images = [pipeline(2, torch.Generator().manual_seed(0), 50, output_type="np").images for _ in range(2)]
    assert images[0].shape == (2, 8, 8, 1)
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, GMLangevinScheduler])
def test_every_argument_is_documented_and_json_safe(cls):
    document = (AnnealedLangevinScheduler.__doc__ or "") + (cls.__doc__ or "")
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name != "self":
            assert name in document, name
            json.dumps(parameter.default)


def test_thresholding_and_clipping_act_on_the_denoised_image(generator):
    x = 3 * torch.randn(4, 1, 8, 8, generator=generator)
    for config, bound in (
        ({"clip_sample": True, "clip_sample_range": 0.7}, 0.7),
        ({"thresholding": True}, 1.0),
    ):
        scheduler = AnnealedLangevinScheduler(**SMALL, prediction_type="sample", **config)
        scheduler.set_timesteps(10)
        denoised = scheduler.step(x, scheduler.timesteps[0], x, generator=generator).pred_original_sample
        assert float(denoised.abs().max()) == pytest.approx(bound)
        dark = scheduler.denoise(lambda y, t: 0.1 * torch.tanh(x), x, None, torch.tensor(1.0))
        assert torch.equal(dark, 0.1 * torch.tanh(x)), "what is in range stays"
    scheduler = AnnealedLangevinScheduler(prediction_type="sample", thresholding=True, sample_max_value=2.0)
    bright = scheduler.denoise(lambda y, t: 10 * x, x, None, torch.tensor(1.0))
    torch.testing.assert_close(bright, (10 * x).clamp(-2, 2) / 2)
