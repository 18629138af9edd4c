"""diffusers' scheduler contract: configs in every direction, custom grids, states that must not go stale."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import logging as diffusers_logging
from schedulers import SCHEDULERS, VP, every_scheduler, every_spaced_scheduler, told_its_levels

from diffusers_gm import AnnealedLangevinScheduler, CalibratedMultistepScheduler, CLDSSCSScheduler, GMLangevinScheduler

FLOW = FlowMatchEulerDiscreteScheduler().config


@pytest.fixture(autouse=True)
def no_warnings_of_unexpected_config_keys():
    diffusers_logging.set_verbosity_error()


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


# --- Configs ---


@every_scheduler
def test_compatible_schedulers_take_our_config_and_give_it_back(cls):
    """diffusers' own test_compatibles, through each class rather than the last one."""
    ours = cls(**VP, clip_sample=True, prediction_type="v_prediction", steps_offset=1)
    assert len(ours.compatibles) > 10
    for theirs in ours.compatibles:
        if theirs.__name__ in ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"):
            continue  # needs torchsde
        if theirs in SCHEDULERS.values():
            continue  # ours keep their own algorithm and grid, see test_swap
        between = theirs.from_config(ours.config)
        assert between.config.prediction_type == "v_prediction"
        back = cls.from_config(between.config)
        assert {key: back.config[key] for key in public(ours.config)} == public(ours.config)
        between.set_timesteps(5)


@every_scheduler
@pytest.mark.parametrize(
    "source",
    [
        DDPMScheduler(clip_sample=True, variance_type="fixed_large", timestep_spacing="trailing", beta_end=0.015),
        DDPMScheduler(trained_betas=[0.01, 0.02, 0.3], num_train_timesteps=3, thresholding=True),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True, final_sigmas_type="sigma_min"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_image_seq_len=99, base_shift=0.4),
    ],
    ids=lambda source: type(source).__name__,
)
def test_no_field_of_a_source_config_is_lost(cls, source, tmp_path):
    """From memory and from disk alike: there, through ours, and back."""
    source.save_pretrained(tmp_path / "theirs")
    from_disk = type(source).load_config(tmp_path / "theirs")
    ours = [cls.from_config(config) for config in (source.config, from_disk)]
    assert public(ours[0].config) == public(ours[1].config)
    ours[0].save_pretrained(tmp_path / "ours")
    for scheduler in (*ours, cls.from_pretrained(tmp_path / "ours")):
        for key, value in public(source.config).items():
            open_end = value is None and key in ("sigma_min", "sigma_max")  # None is not a number of ours
            assert key == "algorithm_type" or open_end or scheduler.config[key] == value, key
        back = public(type(source).from_config(scheduler.config).config)
        assert {key: back[key] for key in public(source.config)} == public(source.config)
    reloaded = cls.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in ours[0].config.items() if k != "_use_default_values"} == dict(reloaded.config)


@every_scheduler
def test_which_grids_of_a_source_are_taken_over(cls):
    """`trailing` is; `leading` and `linspace` give way to `even`, unless asked for, and are there on the way back."""
    calls = 11 if cls is AnnealedLangevinScheduler else 10  # the last level twice

    def labels(spacing, **arguments):
        source = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
        scheduler = cls.from_config(source.config, **told_its_levels(cls), **arguments)
        scheduler.set_timesteps(calls)
        return scheduler.timesteps[:10].tolist()

    for spacing in ("leading", "linspace", "trailing"):
        theirs = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
        theirs.set_timesteps(10)
        assert labels(spacing, timestep_spacing=spacing) == theirs.timesteps.tolist()
        if cls is not CalibratedMultistepScheduler:  # which has levels of its own
            assert labels(spacing) == labels(spacing, timestep_spacing="trailing" if spacing == "trailing" else "even")
        ours = cls.from_config(theirs.config, **told_its_levels(cls))
        assert DDPMScheduler.from_config(ours.config).config.timestep_spacing == spacing
        again = cls.from_config(ours.config, timestep_spacing="leading")
        again.set_timesteps(calls)
        assert again.timesteps[:10].tolist() == labels("leading", timestep_spacing="leading")


@every_scheduler
def test_flags_replace_the_spacing(cls):
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas")
    for flag, spacing in zip(flags, ("karras", "log_snr", "log_snr", "beta"), strict=True):
        grids = []
        for config in ({flag: True, "timestep_spacing": "leading"}, {"timestep_spacing": spacing}):
            scheduler = cls(**VP, **config)
            scheduler.set_timesteps(12)
            grids.append(scheduler.timesteps)
        assert torch.equal(*grids), flag
    with pytest.raises(ValueError, match="only one of"):
        cls(**VP, use_karras_sigmas=True, use_beta_sigmas=True)


@every_spaced_scheduler
def test_karras_and_beta_levels_are_those_of_diffusers(cls):
    """Between the same ends, as far as diffusers' interpolation in sigma agrees with ours in log sigma."""
    for flag in ("use_karras_sigmas", "use_beta_sigmas"):
        theirs = EulerDiscreteScheduler(**VP, **{flag: True})
        theirs.set_timesteps(10)
        ours = cls.from_config(theirs.config, **told_its_levels(cls))
        ours.set_timesteps(10 if cls is not AnnealedLangevinScheduler else 11)
        torch.testing.assert_close(ours.sigmas[:10], theirs.sigmas[:10], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_cogvideox_shifts_its_signal_to_noise_ratio(name, generator):
    source = getattr(diffusers, name)(rescale_betas_zero_snr=True, snr_shift_scale=3.0, prediction_type="v_prediction")
    ours = GMLangevinScheduler.from_config(source.config)
    x, noise = torch.randn(2, 3, 1, 4, 4, generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    expected = source.add_noise(x, noise, timesteps)
    torch.testing.assert_close(ours.add_noise(x, noise, timesteps), expected, rtol=1e-4, atol=1e-4)


@every_scheduler
def test_sources_that_say_little(cls):
    ve = cls.from_config(diffusers.ScoreSdeVeScheduler().config)
    assert (ve.noise_space.kind, ve.config.prediction_type, ve.config.scale_input) == ("ve", "score", False)
    flow = cls.from_config(diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0).config)
    assert (flow.noise_space.kind, flow.config.prediction_type, flow.config.shift) == ("flow", "flow_prediction", 2.0)
    unipc = cls.from_config(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0).config)
    assert (unipc.noise_space.kind, unipc.config.prediction_type, unipc.config.shift) == (
        "flow",
        "flow_prediction",
        5.0,
    )


@every_scheduler
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "count flow time backwards .invert_sigmas=True."),
        (diffusers.FlowMatchLCMScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.CMStochasticIterativeScheduler(), "a consistency model answers .* not a denoised image"),
        (diffusers.LCMScheduler(), "distilled as one"),
        (diffusers.TCDScheduler(), "distilled as one"),
        (diffusers.FlowMatchLCMScheduler(), "distilled as one"),
        (diffusers.VQDiffusionScheduler(num_vec_classes=3), "no noise space can be inferred.*pass noise_space='vp'"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_sources_that_cannot_be_read_are_refused(cls, source, message):
    with pytest.raises(ValueError, match=message):
        cls.from_config(source.config)


@every_scheduler
@pytest.mark.parametrize(
    ("name", "message"),
    [("FlowMapEulerDiscreteScheduler", "mean velocity"), ("MiniMaxH3Scheduler", "counts flow time backwards")],
)
def test_flow_networks_of_another_kind_are_refused(cls, name, message):
    """By the name of the class alone: older versions of diffusers have none, and their options say nothing."""
    config = {"_class_name": name, "shift": 5.0}
    with pytest.raises(ValueError, match=message):
        cls.from_config(config)
    if name.startswith("MiniMax"):
        with pytest.raises(ValueError, match=message):
            cls.from_config({"shift": 5.0, "_use_default_values": []})  # in memory
    if name.startswith("FlowMap"):
        assert cls.from_config(config, noise_space="flow").config.shift == 5.0


@every_scheduler
def test_saved_configs_equal_those_in_memory(cls, tmp_path):
    """diffusers' own test_from_pretrained."""
    scheduler = cls(**VP)
    scheduler.save_pretrained(tmp_path)
    expected = dict(scheduler.config)
    del expected["_use_default_values"]
    assert cls.from_pretrained(tmp_path).config == expected


@every_scheduler
def test_trained_betas_may_be_an_array(cls, tmp_path):
    scheduler = cls(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist()
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor([0.9, 0.63]))
    assert len(scheduler) == scheduler.config.num_train_timesteps == 2, "which nothing else has to say"


# --- The forward process ---


@every_scheduler
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_and_velocity_are_those_of_diffusers(cls, schedule, generator):
    for zero_snr in (False, True):
        theirs = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
        ours = cls.from_config(theirs.config)
        x, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
        timesteps = torch.tensor([0, 10, 700, 999])
        for name in ("add_noise", "get_velocity"):
            expected = getattr(theirs, name)(x, noise, timesteps)
            # Noise levels above 4096 are taken for it.
            torch.testing.assert_close(getattr(ours, name)(x, noise, timesteps), expected, rtol=1e-4, atol=1e-3)
        if zero_snr:
            assert torch.equal(ours.add_noise(x, noise, timesteps)[3], noise[3])
            assert torch.equal(ours.get_velocity(x, noise, timesteps)[3], -x[3])


@every_scheduler
def test_flow_noise_and_velocity(cls, generator):
    ours = cls.from_config(FLOW)
    x, noise = torch.randn(2, 2, 3, 4, 4, generator=generator)
    timesteps = torch.tensor([250.0, 1000.0])
    noisy = ours.scale_noise(x, timesteps, noise)
    torch.testing.assert_close(noisy[0], 0.75 * x[0] + 0.25 * noise[0])
    assert torch.equal(noisy[1], noise[1])
    assert torch.equal(ours.get_velocity(x, noise, timesteps), noise - x)
    half = ours.add_noise(x.half(), noise.half(), timesteps)
    assert half.dtype == torch.float16


# --- Custom grids ---


@every_scheduler
def test_custom_timesteps_and_sigmas_are_one_network_call_each(cls):
    scheduler = cls(**VP, timestep_spacing="leading")
    for call in ({"timesteps": [999, 500, 100.5, 3]}, {"timesteps": torch.tensor([999.0, 500, 100.5, 3])}):
        scheduler.set_timesteps(**call)
        assert scheduler.timesteps.tolist() == [999, 500, 100.5, 3]
        assert scheduler.num_inference_steps == 4
    sigmas = scheduler.sigmas
    assert sigmas[-1] == 0
    assert len(sigmas) == 5
    for given in (sigmas.tolist(), sigmas[:-1].numpy()):  # with and without diffusers' final zero
        scheduler.set_timesteps(sigmas=given)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor([999, 500, 100.5, 3]), rtol=1e-4, atol=1e-3)
    timesteps, n = retrieve_timesteps(scheduler, timesteps=[900, 20, 10], device="cpu")
    assert (timesteps.tolist(), n) == ([900, 20, 10], 3)
    assert retrieve_timesteps(scheduler, 7)[1] == 7


@every_scheduler
def test_a_number_may_stand_beside_as_many_levels(cls):
    """As the pipeline of Cosmos 3 passes both, which flow schedulers of diffusers take."""
    theirs = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4, sigmas=np.linspace(0.999, 0.0, 5)[:-1])
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


@every_scheduler
def test_what_flow_pipelines_pass_unasked_stands_for_a_number(cls):
    """`sigmas=linspace(1, 1 / n, n)`, or Bria's: on the config's own grid where it has one, else as it is."""
    passed, of_bria = np.linspace(1.0, 1 / 6, 6), get_original_sigmas(1000, 6)
    calibration = {"6": [4096.0, 9.0, 2.0, 0.9, 0.4, 0.1], "shift": 3.0}
    for own in (
        {"grid": "karras"},
        {"timestep_spacing": "karras"},
        {"grid": "calibrated", "calibration": calibration},
        {"use_karras_sigmas": True},
    ):
        scheduler = cls.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config, **told_its_levels(cls), **own)
        if own == {"use_karras_sigmas": True} and cls is CalibratedMultistepScheduler:
            continue  # its grid is `calibrated`, which nothing is said of
        runs = []
        for sigmas in (passed, of_bria, [1.0, 0.8, 0.6, 0.4, 0.3, 0.2]):
            scheduler.set_timesteps(sigmas=sigmas)
            runs.append(scheduler.sigmas[:6].tolist())
        scheduler.set_timesteps(6)
        assert runs[0] == runs[1] == scheduler.sigmas[:6].tolist() != runs[2], own
    if cls is AnnealedLangevinScheduler:  # spends the last call of a number on a level that it has been at
        return
    plain = cls.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    plain.set_timesteps(sigmas=passed)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=passed)
    torch.testing.assert_close(plain.sigmas, theirs.sigmas, rtol=1e-6, atol=1e-6)


def test_what_bria_passes_is_known_at_every_number_of_calls():
    scheduler = CLDSSCSScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert all(scheduler.are_unasked(get_original_sigmas(1000, n)) for n in range(1, 101))
    others = (np.linspace(1.0, 0.1, 8), np.linspace(1.0, 0.002, 5), np.linspace(0.99, 0.001, 8), [])
    assert not any(map(scheduler.are_unasked, others))


def test_langevin_steps_are_spent_in_flow_pipelines_too():
    """They pass `sigmas` unasked, on the grid that a swap has; the number is what counts."""
    for options, levels in (
        ({"num_langevin_steps": 5, "network_level": "ladder"}, 3),
        ({"algorithm_type": "explore"}, 12),
    ):
        scheduler = AnnealedLangevinScheduler.from_config(FlowMatchEulerDiscreteScheduler().config, **options)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20))
        assert len(scheduler.timesteps) == 20
        assert len(scheduler.timesteps.unique()) == levels


@every_scheduler
def test_the_grid_of_a_number_may_be_given_back_as_timesteps(cls, generator):
    """Custom labels that repeat are the Langevin steps of a level: the same run."""
    langevin = cls in (AnnealedLangevinScheduler, GMLangevinScheduler)
    steps = {"num_langevin_steps": 3, "algorithm_type": "langevin", "network_level": "ladder"} if langevin else {}
    scheduler = cls(**VP, **steps)
    samples = []
    x = torch.randn(2, 1, 4, 4, generator=generator)
    scheduler.set_timesteps(20)
    labels = scheduler.timesteps.tolist()
    for arguments in ({"num_inference_steps": 20}, {"timesteps": labels}):
        scheduler.set_timesteps(**arguments)
        sample = x
        noise = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            sample = scheduler.step(0.5 * sample, t, sample, generator=noise).prev_sample
        samples.append(sample)
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)  # labels are float32


@every_scheduler
def test_flow_sigmas_are_s_before_the_shift(cls):
    """As pipelines pass them: Flux's linspace(1, 1 / n, n), with and without a shift that depends on the size."""
    s = np.linspace(1.0, 1 / 6, 6)
    for config, mu in (
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 0.7),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1}, 1.4),
    ):
        theirs = FlowMatchEulerDiscreteScheduler(**config)
        ours = cls.from_config(theirs.config, **told_its_levels(cls))
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(sigmas=s, mu=mu)
        if cls is AnnealedLangevinScheduler:  # as a number, see above
            by_number = cls.from_config(theirs.config, **told_its_levels(cls))
            by_number.set_timesteps(6, mu=mu)
            assert torch.equal(ours.timesteps, by_number.timesteps)
            continue
        torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs mu"):
        ours.set_timesteps(5)


@every_scheduler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give num_inference_steps, or custom"),
        ({"num_inference_steps": 4, "timesteps": [3, 2, 1]}, "num_inference_steps=4 beside 3 custom timesteps"),
        ({"timesteps": [3, 2, 1], "sigmas": [3, 2]}, "must be as many, got 3 and 2"),
        ({"timesteps": [10, 20, 5]}, "none above the one before"),
        ({"timesteps": [1000, 20, 5]}, r"in \[0, 999\]"),
        ({"timesteps": [20, 5, -1]}, r"in \[0, 999\]"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [float("nan"), 20, 1]}, "at least one"),
        ({"sigmas": [1e6, 1.0, 0.1]}, "custom sigmas"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_bad_grids_are_named(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**VP).set_timesteps(**arguments)


@every_scheduler
def test_more_levels_than_the_network_was_trained_at(cls):
    with pytest.raises(ValueError, match="more than the 1000 that the network"):
        cls(**VP).set_timesteps(100_000)


# --- The step ---


@every_scheduler
@pytest.mark.parametrize("space", [VP, {"sigma_max": 8.0}, {"shift": 3.0, "prediction_type": "flow_prediction"}])
@pytest.mark.parametrize("clip", [{}, {"clip_sample": True}, {"thresholding": True}])
def test_no_step_waits_for_the_device(cls, space, clip):
    """Tensors without data: whatever reads a value raises."""
    scheduler = cls(**space, **clip)
    scheduler.set_timesteps(12, device="meta")
    sample = torch.empty(2, 3, 4, 4, device="meta")
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(model_input, t, sample).prev_sample
    assert sample.device.type == "meta"


@every_scheduler
@pytest.mark.parametrize("sigma", [6.0, 2.0])
def test_images_are_clipped_and_by_the_multistep_sampler_only_where_noise_hides_them(cls, sigma):
    scheduler = cls(sigma_max=8.0, prediction_type="sample", clip_sample=True)
    denoised = scheduler.denoise(
        lambda x, t: torch.full_like(x, 3.0), torch.zeros(1, 1, 2, 2), None, torch.tensor(sigma)
    )
    kept = cls is CalibratedMultistepScheduler and sigma < 4
    assert torch.all(denoised == (3.0 if kept else 1.0))


@every_scheduler
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances_are_left_out(cls, variance_type, generator):
    scheduler = cls.from_config(DDPMScheduler(variance_type=variance_type).config)
    x, output = torch.randn(2, 2, 3, 4, 4, generator=generator)
    answers = []
    for answer in (output, torch.cat([output, output], 1)):
        scheduler.set_timesteps(10)
        noise = torch.Generator().manual_seed(0)
        answers.append(scheduler.step(answer, scheduler.timesteps[0], x, generator=noise).prev_sample)
    assert torch.equal(*answers)
    plain = cls(**VP)
    plain.set_timesteps(10)
    with pytest.raises(ValueError, match="variance_type='learned_range'"):
        plain.step(torch.cat([output, output], 1), plain.timesteps[0], x)


@every_scheduler
def test_what_pipelines_look_for(cls):
    scheduler = cls(**VP)
    assert {"timesteps", "sigmas", "mu"} <= set(inspect.signature(scheduler.set_timesteps).parameters)
    assert {"generator"} <= set(inspect.signature(scheduler.step).parameters)
    assert scheduler.order == 1
    assert len(scheduler) == 1000
    assert cls(sigma_max=8.0).init_noise_sigma == pytest.approx(8.0), "before any run that of the first level"
    torch.testing.assert_close(scheduler.alphas_cumprod, DDPMScheduler().alphas_cumprod)
    torch.testing.assert_close(scheduler.alphas, 1 - scheduler.betas)
    flow = cls.from_config(FLOW)
    assert not hasattr(flow, "alphas_cumprod")
    flow.set_timesteps(9)
    torch.testing.assert_close(flow.sigmas[:-1], flow.timesteps.float() / 1000)


@every_scheduler
def test_a_swap_between_ours_warns_of_nothing(cls, caplog):
    diffusers_logging.set_verbosity_warning()
    logger = diffusers_logging.get_logger("diffusers.configuration_utils")
    logger.addHandler(caplog.handler)
    try:
        for other in SCHEDULERS.values():
            cls.from_config(other(**VP).config)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
