"""Right, not merely running: the law of the samples when a scheduler is swapped onto a network of known data."""

import json

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)
from networks import POINTS, WEIGHTS, check_four_points, four_points, perfect_network, run
from schedulers import every_scheduler

from diffusers_gm import (
    AnnealedLangevinScheduler,
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)
from diffusers_gm.readings.noise_space import PREDICTION_TYPES
from diffusers_gm.studies.exact import ExactDenoiser

SOURCES = {
    "vp": DDPMScheduler(clip_sample=False),
    "vp-cosine": DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2"),
    "vp-zero-snr": DDPMScheduler(clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "ve": ScoreSdeVeScheduler(sigma_max=20.0, num_train_timesteps=1000),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@every_scheduler
@every_source
@pytest.mark.parametrize("start", [0, 40, 90])
def test_four_points_from_pure_noise_and_from_noised_data(cls, source, start, generator):
    """100 calls from `start` on: the samples are the points, in their proportions."""
    scheduler = cls.from_config(source.config)
    scheduler.set_timesteps(100)
    n = 2000
    if start == 0:
        sample = scheduler.init_noise_sigma * torch.randn(n, 1, 1, 2, generator=generator)
    else:
        chosen = POINTS[torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)]
        noise = torch.randn(chosen.shape, generator=generator)
        sample = scheduler.add_noise(chosen, noise, scheduler.timesteps[start].expand(n))
        scheduler.set_begin_index(start)
    network = perfect_network(scheduler, four_points())
    check_four_points(run(scheduler, network, sample, generator, scheduler.timesteps[start:]))


@every_scheduler
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_equal_networks_of_other_prediction_types_give_equal_samples(cls, name):
    denoiser = ExactDenoiser(POINTS.double(), 0.3)
    results = {}
    for prediction_type in PREDICTION_TYPES[name]:
        scheduler = cls.from_config(SOURCES[name].config, prediction_type=prediction_type, scale_input=True)
        scheduler.set_timesteps(12)
        generator = torch.Generator().manual_seed(0)
        sample = scheduler.init_noise_sigma * torch.randn(3, 1, 1, 2, dtype=torch.float64, generator=generator)
        results[prediction_type] = run(scheduler, perfect_network(scheduler, denoiser), sample, generator)
    for prediction_type, result in results.items():
        torch.testing.assert_close(result, results["sample"], rtol=1e-4, atol=1e-4, msg=prediction_type)


# --- What is left unsaid ---


def grid_of(scheduler, num_calls=6):
    scheduler.set_timesteps(num_calls)
    return scheduler.timesteps.tolist()


GRIDS = {
    "leading": DDIMScheduler(timestep_spacing="leading", steps_offset=1),
    "trailing": DDIMScheduler(timestep_spacing="trailing"),
    "karras": DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": EDMEulerScheduler(),
    "edm, exponential": EDMEulerScheduler(sigma_schedule="exponential"),
    "svd": EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True),
}


@pytest.mark.parametrize("cls", [AnnealedLangevinScheduler, GMLangevinScheduler, CLDSSCSScheduler])
@pytest.mark.parametrize("source", GRIDS.values(), ids=GRIDS)
def test_a_sampler_has_its_grid_back_after_a_calibrated_one(cls, source):
    between = CalibratedMultistepScheduler.from_config(source.config)
    assert grid_of(cls.from_config(between.config)) == grid_of(cls.from_config(source.config))


@every_scheduler
@pytest.mark.parametrize("theirs", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_ends_of_our_ladder_do_not_leak_into_others(cls, theirs, tmp_path):
    source = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = cls.from_config(source.config)
    ours.save_pretrained(tmp_path)
    options = {"use_karras_sigmas": True, "timestep_spacing": "leading"}
    direct = theirs.from_config(source.config, **options)
    for way in (ours.config, theirs.load_config(tmp_path)):
        back = theirs.from_config(way, **options)
        assert grid_of(back) == grid_of(direct)
        assert torch.equal(back.sigmas, direct.sigmas)


@every_scheduler
def test_ends_that_a_source_has_itself_are_kept(cls, tmp_path):
    source = EulerDiscreteScheduler(sigma_min=0.1, sigma_max=10.0, use_exponential_sigmas=True)
    ours = cls.from_config(source.config)
    ours.save_pretrained(tmp_path)
    for config in (ours.config, EulerDiscreteScheduler.load_config(tmp_path)):
        back = EulerDiscreteScheduler.from_config(config)
        assert (back.config.sigma_min, back.config.sigma_max) == (0.1, 10.0)


@every_scheduler
@pytest.mark.parametrize(
    "source", [DDPMScheduler(clip_sample=True), DDIMScheduler(steps_offset=1)], ids=["ddpm", "ddim"]
)
def test_a_file_of_diffusers_says_what_its_class_leaves_unsaid(cls, source, tmp_path):
    """Files of older versions have fewer fields than the class has today."""
    source.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    content = json.loads(file.read_text())
    for name in ("clip_sample", "timestep_spacing", "thresholding"):
        content.pop(name)
    file.write_text(json.dumps(content))
    loaded, direct = cls.from_pretrained(tmp_path), cls.from_config(source.config)
    assert loaded.config.clip_sample is direct.config.clip_sample is True
    calls = 7  # one for a repeated level
    assert grid_of(loaded, calls) == grid_of(direct, calls)


@every_scheduler
def test_what_is_asked_for_takes_the_place_of_what_the_source_has(cls):
    """A shift, as pipelines of flow networks are told to pass it; a grid, whatever flags the source has."""
    source = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction").config
    assert cls.from_config(source, flow_shift=3.0).config.shift == 3.0
    assert cls.from_config(source).config.shift == 5.0
    flow = FlowMatchEulerDiscreteScheduler().config
    assert cls.from_config(flow, use_flow_sigmas=True, flow_shift=3.0).config.shift == 3.0
    karras = DPMSolverMultistepScheduler(use_karras_sigmas=True).config

    def levels(**options):
        scheduler = cls.from_config(karras, **options)
        scheduler.set_timesteps(12)
        return scheduler.sigmas.tolist()

    if cls is CLDSSCSScheduler:
        assert levels() == levels(grid=None, timestep_spacing="karras", use_karras_sigmas=False)
    assert levels(grid="even") == levels(grid="even", use_karras_sigmas=False)
    assert levels(timestep_spacing="trailing") == levels(timestep_spacing="trailing", use_karras_sigmas=False)
    assert levels(use_exponential_sigmas=True) == levels(grid=None, timestep_spacing="log_snr", use_karras_sigmas=False)


@every_scheduler
def test_options_that_do_not_exist_are_named(cls, caplog):
    cls.from_config(DDPMScheduler().config, algorithm="ode")
    said = f"{cls.__name__} has no option 'algorithm', which does nothing; the nearest are ['algorithm_type'"
    assert said in caplog.text
    caplog.clear()
    cls.from_config(FlowMatchEulerDiscreteScheduler().config, use_flow_sigmas=True, flow_shift=3.0)
    assert "has no option" not in caplog.text


def test_a_source_that_names_no_spacing_gets_even_levels():
    scheduler = CLDSSCSScheduler.from_config(DPMSolverSinglestepScheduler().config)
    assert scheduler.config.grid == "even"


@every_scheduler
@pytest.mark.parametrize(
    ("source", "space"),
    [(SOURCES["flow"], "flow"), (EDMEulerScheduler(), "edm"), (DDPMScheduler(clip_sample=True), "vp")],
    ids=["flow", "edm", "vp"],
)
def test_naming_the_noise_space_changes_nothing_else(cls, source, space):
    named, inferred = cls.from_config(source.config, noise_space=space), cls.from_config(source.config)
    assert dict(named.config) == dict(inferred.config)


@every_scheduler
@pytest.mark.parametrize("space", ["vp", "ve", "edm"])
def test_ends_that_a_source_leaves_open_are_ours(cls, space):
    config = cls.from_config(EulerDiscreteScheduler().config, noise_space=space).config
    assert (config.sigma_min, config.sigma_max) == (0.01, 50.0)


def test_an_ordinary_network_that_a_distilled_one_was_sampled_beside():
    config = diffusers.LCMScheduler(beta_schedule="scaled_linear").config
    assert CLDSSCSScheduler.from_config(config, noise_space="vp").config.beta_schedule == "scaled_linear"


def test_a_network_that_is_told_sigma_is_none_of_betas(tmp_path):
    scheduler = AnnealedLangevinScheduler(noise_space="ve", sigma_labels=True)
    with pytest.raises(ValueError, match="sigma_labels=False"):
        scheduler.diffusers_config()
    scheduler.save_pretrained(tmp_path)
    assert "trained_betas" not in AnnealedLangevinScheduler.load_config(tmp_path)
    assert AnnealedLangevinScheduler.from_pretrained(tmp_path).noise_space.sigma_labels


@every_scheduler
def test_a_network_that_is_told_sigma_itself(cls, generator):
    """As `ScoreSdeVePipeline` calls NCSN++: `network(y, sigma)`, which answers the score."""
    mean, width = 0.3, 0.5
    scheduler = cls.from_config(ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0).config)
    scheduler.set_timesteps(201)
    n = 4000
    sample = scheduler.init_noise_sigma * torch.randn(n, 1, 1, 2, generator=generator)
    for t in scheduler.timesteps:
        assert 0.01 - 1e-6 <= float(t) <= 50.0 + 1e-3, "sigma, not an index"
        score = (mean - scheduler.scale_model_input(sample, t)) / (width**2 + t**2)
        sample = scheduler.step(score, t, sample, generator=generator).prev_sample
    # Five standard errors, and what Langevin steps of this size do.
    bias = 0.15 if cls is AnnealedLangevinScheduler else 0.02
    assert abs(float(sample.mean()) - mean) < 5 * width / (2 * n) ** 0.5 + bias * mean
    assert abs(float(sample.std()) / width - 1) < 5 / (4 * n) ** 0.5 + bias


def test_solvers_of_diffusers_sample_a_flow_network(generator):
    """From memory, by `diffusers_config`: their words for a flow."""
    mean, width = 0.3, 0.5
    ours = CLDSSCSScheduler.from_config(SOURCES["flow"].config)
    theirs = UniPCMultistepScheduler.from_config(ours.diffusers_config())
    theirs.set_timesteps(40)
    sample = torch.randn(4000, 1, 1, 2, generator=generator)
    for t in theirs.timesteps:
        s = float(t) / 1000
        variance = (1 - s) ** 2 * width**2 + s**2
        off = sample - (1 - s) * mean
        velocity = s / variance * off - mean - (1 - s) * width**2 / variance * off
        sample = theirs.step(velocity, t, sample).prev_sample
    assert abs(float(sample.mean()) - mean) < 5 * width / 8000**0.5 + 0.01
    assert abs(float(sample.std()) / width - 1) < 0.05


# --- Quality ---


@pytest.mark.slow
@every_scheduler
def test_defaults_reach_the_floor_at_200_calls(cls):
    """On the digits behind a DDPM config: sliced W2 within 1.2 of that of as many draws from the law itself."""
    from diffusers_gm.data import split_digits
    from diffusers_gm.evaluation import sliced_wasserstein

    train, _ = split_digits()
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        chosen = train[torch.randint(len(train), (n,), generator=generator)]
        return chosen + 0.1 * torch.randn(chosen.shape, generator=generator)

    reference, n, seeds = draw(5000), 256, 4
    floor = sum(sliced_wasserstein(draw(n), reference) for _ in range(8)) / 8
    scheduler = cls.from_config(SOURCES["vp"].config)
    distances = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(200)
        start = torch.randn(n, 1, 8, 8, generator=generator)
        samples = run(scheduler, perfect_network(scheduler, ExactDenoiser(train, 0.1)), start, generator)
        distances.append(sliced_wasserstein(samples, reference))
    assert sum(distances) / seeds < 1.2 * floor, (distances, floor)


def test_an_edm_network_without_a_size_of_its_data_goes_to_diffusers_as_it_is(generator):
    """Theirs would take 0.5 for it: the size is 1, which is what no size means."""
    own = GMLangevinScheduler(noise_space="edm", sigma_min=0.02, sigma_max=80.0, prediction_type="v_prediction")
    scheduler = EDMEulerScheduler.from_config(own.diffusers_config())
    denoiser = ExactDenoiser(torch.zeros(1, 1, 1, 1).double(), width=0.3)
    scheduler.set_timesteps(100)
    sample = scheduler.init_noise_sigma * torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(sample, t)
        output = denoiser.network_output(fed, t.double(), own.noise_space, "v_prediction")
        sample = scheduler.step(output, t, sample).prev_sample
    assert float(sample.std()) == pytest.approx(0.3, rel=0.1)
    with pytest.raises(ValueError, match="reads a network of edm space that answers 'epsilon'"):
        GMLangevinScheduler(noise_space="edm", sigma_max=80.0).diffusers_config()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("theirs", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_schedulers_of_diffusers_sample_our_ve_networks(theirs, prediction_type, generator):
    """The way back: `diffusers_config` makes a beta schedule of a geometric ladder, and the law comes out exact."""
    own = AnnealedLangevinScheduler(sigma_max=20.0, prediction_type=prediction_type)
    scheduler = theirs.from_config(own.diffusers_config(), clip_sample=False)
    denoiser = ExactDenoiser(POINTS.double(), width=0.5, weights=WEIGHTS)
    n = 4000
    scheduler.set_timesteps(200)
    sample = scheduler.init_noise_sigma * torch.randn(n, 1, 1, 2, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        output = denoiser.network_output(
            scheduler.scale_model_input(sample, t), t.double(), own.noise_space, prediction_type
        )
        sample = scheduler.step(output, t, sample).prev_sample
    points, weights = POINTS.flatten(1).double(), WEIGHTS.double()
    mean = weights @ points
    variance = weights @ (points - mean) ** 2 + 0.5**2
    samples = sample.flatten(1)
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    # The variance of a variance is at most that of a Gaussian here; 1% for the solver.
    assert ((samples.var(0) / variance - 1).abs() < 5 * (2 / n) ** 0.5 + 0.01).all()


def test_networks_that_diffusers_cannot_read_are_refused():
    mixture = {"mixture_weights": [0.5, 0.5], "mixture_scales": [0.5, 1.5]}
    for own, message in [
        (GMLangevinScheduler(model_noise="mixture", **mixture), "mixture noise"),
        (CLDSSCSScheduler(prediction_type="cld_mixed"), "velocity"),
        (AnnealedLangevinScheduler(prediction_type="score"), "answers a score"),
        (AnnealedLangevinScheduler(scale_input=False), "scale_input=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            own.diffusers_config()
    # Mixture jumps on an ordinary network leave it what it is; and `vp` configs need no translation.
    assert "trained_betas" in GMLangevinScheduler(model_noise="gaussian", **mixture).diffusers_config()
    ours = AnnealedLangevinScheduler.from_config(DDPMScheduler(beta_end=0.01).config)
    assert DDIMScheduler.from_config(ours.diffusers_config()).config.beta_end == 0.01


def test_our_schedulers_take_each_others_configs():
    """The sampler belongs to the class, unless both have it; a typing error is still one."""
    annealed = AnnealedLangevinScheduler(sigma_max=9.0, algorithm_type="consistent")
    for source in (annealed, GMLangevinScheduler(sigma_max=9.0), GMLangevinScheduler(beta_schedule="linear")):
        for cls in (CLDSSCSScheduler, GMLangevinScheduler, AnnealedLangevinScheduler):
            swapped = cls.from_config(source.config)
            for timestep in (3, 500, 999):
                assert swapped.noise_space.sigma(torch.tensor(timestep)) == source.noise_space.sigma(
                    torch.tensor(timestep)
                )
            kept = type(source) is cls
            assert swapped.config.algorithm_type == (source if kept else cls()).config.algorithm_type
    there = DPMSolverMultistepScheduler.from_config(
        GMLangevinScheduler.from_config(DDPMScheduler(beta_end=0.01).config).config, algorithm_type="sde-dpmsolver++"
    )
    back = CLDSSCSScheduler.from_config(there.config)
    assert (back.config.algorithm_type, back.config.beta_end) == ("sscs", 0.01)
    there = SASolverScheduler.from_config(back.config, algorithm_type="noise_prediction")
    assert AnnealedLangevinScheduler.from_config(there.config).config.algorithm_type == "langevin"
    langevin = GMLangevinScheduler(algorithm_type="langevin")
    assert AnnealedLangevinScheduler.from_config(langevin.config).config.algorithm_type == "langevin"
    for config in (
        {**annealed.config, "algorithm_type": "langevn"},
        {"noise_space": "ve", "algorithm_type": "langevn"},
    ):
        with pytest.raises(ValueError, match="'langevn': CLDSSCSScheduler has sscs, "):
            CLDSSCSScheduler.from_config(config)
    with pytest.raises(ValueError, match="unknown algorithm_type 'langevin'"):
        CLDSSCSScheduler.from_config(annealed.config, algorithm_type="langevin")


def test_networks_of_mixture_noise_are_kept_from_gaussian_samplers():
    mixture = {"mixture_weights": [0.5, 0.5], "mixture_scales": [0.5, 1.5]}
    trained = GMLangevinScheduler(model_noise="mixture", **mixture)
    for cls in (AnnealedLangevinScheduler, CLDSSCSScheduler):
        with pytest.raises(ValueError, match="trained with mixture noise, .* use GMLangevinScheduler"):
            cls.from_config(trained.config)
        with pytest.raises(ValueError, match="trained with mixture noise"):
            cls.from_config(
                GMLangevinScheduler(model_noise="mixture", mixture_weights=[1.0], mixture_scales=[2.0]).config
            )
        one = GMLangevinScheduler(model_noise="mixture", mixture_weights=[1.0], mixture_scales=[1.0])
        assert cls.from_config(one.config)
        assert cls.from_config(GMLangevinScheduler(**mixture).config), "jumps on an ordinary network"


# --- Options that change ---


@every_scheduler
def test_options_that_are_registered_later_count(cls, generator):
    """As training scripts of diffusers name their prediction type; what is no option or wrong does nothing."""
    given = cls.from_config(DDPMScheduler(beta_end=0.015).config, prediction_type="v_prediction")
    changed = cls.from_config(DDPMScheduler(beta_end=0.015).config)
    changed.set_timesteps(9)
    changed.register_to_config(prediction_type="v_prediction")
    assert dict(changed.config) == dict(given.config)
    with pytest.raises(ValueError, match="set_timesteps must be called"):
        changed.step(torch.zeros(1, 1, 2, 2), 999, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="'flow_prediction' is not offered in noise space 'vp'"):
        changed.register_to_config(prediction_type="flow_prediction")
    x, results = torch.randn(1, 1, 2, 2, generator=generator), []
    for scheduler in (given, changed):
        scheduler.set_timesteps(9)
        scheduler.register_to_config(note="of no option")
        noise = torch.Generator().manual_seed(0)
        results.append(scheduler.step(0.5 * x, scheduler.timesteps[0], x, generator=noise))
    assert torch.equal(results[0].prev_sample, results[1].prev_sample)
    assert torch.equal(results[0].pred_original_sample, results[1].pred_original_sample)


@every_scheduler
@pytest.mark.parametrize("asked", [{"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}, {"grid": "log_snr"}])
def test_a_spacing_that_is_registered_later_counts(cls, asked):
    """As if `from_config` had been told so: that which a swap has by itself gives way."""
    source = DDPMScheduler().config
    given = cls.from_config(source, **asked)
    changed = cls.from_config(source)
    changed.register_to_config(**asked)
    for scheduler in (given, changed):
        scheduler.set_timesteps(8)
    assert torch.equal(given.timesteps, changed.timesteps)
    by_itself = cls.from_config(source)
    by_itself.set_timesteps(8)
    assert not torch.equal(by_itself.timesteps, changed.timesteps)
