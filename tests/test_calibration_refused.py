"""Pipelines that cannot be calibrated are refused before they run."""

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.guiders import (
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)
from diffusers.hooks import apply_first_block_cache, apply_layerwise_casting
from networks import build

from diffusers_gm import CalibratedMultistepScheduler, UnconditionalPipeline, calibrate
from diffusers_gm.calibration.refused import is_whole, refuse_noise

PROMPTS = ("prompt_embeds", "negative_prompt_embeds")


def hunyuan_image(guider, **config):
    one, eight = ("num_layers", "num_single_layers", "num_refiner_layers"), ("text_embed_dim", "text_embed_2_dim")
    network = build(
        HunyuanImageTransformer2DModel,
        **dict.fromkeys(("in_channels", "out_channels", "num_attention_heads"), 4),
        **dict.fromkeys(one, 1),
        **dict.fromkeys(("attention_head_dim", *eight), 8),
        patch_size=(1, 1),
        rope_axes_dim=(4, 4),
        **config,
    )
    return HunyuanImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), *[None] * 5, network, guider=guider)


@pytest.mark.parametrize(
    "share",
    [
        {"control_guidance_end": 0.3},
        {"control_guidance_start": [0.0, 0.2]},
        {"skip_guidance_layers": [7]},
        {"use_dynamic_cfg": True},
        {"cfg_truncation": 0.5},
        {"edit_warmup_steps": 10, "editing_prompt": ["a hat"]},
        {"edit_momentum_scale": [0.0, 0.1], "editing_prompt_embeddings": torch.zeros(1)},
        {"sld_warmup_steps": 10, "sld_guidance_scale": 1000},
        {"max_iter_to_alter": 25},
        {"thresholds": {0: 0.05}},
        {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)},
        {"callback_on_step_end": MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.4)])},
    ],
    ids=lambda share: next(iter(share)),
)
def test_arguments_that_act_in_a_share_of_a_run_are_refused(share, tiny_unet):
    pipe = UnconditionalPipeline(tiny_unet, DDPMScheduler())
    with pytest.raises(ValueError, match=f"(?s){next(iter(share))}=.* acts in a share of a run"):
        calibrate(pipe, (5,), progress=False, **share)


def test_edits_and_safety_that_do_nothing_are_no_reason(tiny_unet):
    """Their defaults act in a share of a run, and their pipelines are asked for images without them, too."""
    pipe = UnconditionalPipeline(tiny_unet, DDPMScheduler())
    for idle in ({"edit_warmup_steps": 10}, {"sld_warmup_steps": 10, "sld_guidance_scale": 0}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):  # that of this pipeline
            calibrate(pipe, (5,), progress=False, **idle)


def test_schedulers_that_only_their_class_tells_are_refused(tiny_unet):
    """A flow map has the config of an ordinary flow."""
    for name, said in (("FlowMapEulerDiscreteScheduler", "mean velocity"), ("MiniMaxH3Scheduler", "backwards")):
        source = type(name, (FlowMatchHeunDiscreteScheduler,), {})()
        with pytest.raises(ValueError, match=said):
            calibrate(UnconditionalPipeline(tiny_unet, source), (5,), progress=False)


@pytest.mark.parametrize("options", [{"sigma_max": 20.0}, {"noise_space": "edm", "sigma_data": 0.5}])
def test_a_pipeline_that_does_not_scale_its_input_is_refused_where_it_must(options, tiny_unet):
    pipe = DDPMPipeline(tiny_unet, CalibratedMultistepScheduler(**options))
    with pytest.raises(ValueError, match="does not scale its network's input"):
        calibrate(pipe, (5,), progress=False)


@pytest.mark.parametrize(
    ("guider", "option"),
    [
        (ClassifierFreeGuidance(start=0.2), "start"),
        (ClassifierFreeGuidance(stop=0.8), "stop"),
        (SkipLayerGuidance(skip_layer_guidance_layers=[0]), "skip_layer_guidance_start"),
        (AdaptiveProjectedMixGuidance(), "adaptive_projected_guidance_momentum"),
        (AdaptiveProjectedMixGuidance(), "adaptive_projected_guidance_start_step"),
        (ClassifierFreeZeroStarGuidance(), "zero_init_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_guiders_that_act_in_a_share_of_a_run_are_refused(guider, option):
    with pytest.raises(
        ValueError, match=f"guider, of class {type(guider).__name__}, has .*{option}=.* a share of a run"
    ):
        calibrate(hunyuan_image(guider), (5,), progress=False)


@pytest.mark.parametrize("enabled", [True, False])
def test_guiders_that_act_in_all_of_a_run_are_calibrated_with(enabled):
    """And those that are off."""
    generator = torch.Generator().manual_seed(0)
    embeds = {f"{kind}{end}": torch.randn(1, 3, 8, generator=generator) for kind in PROMPTS for end in ("", "_2")}
    masks = {f"{kind}_mask{end}": torch.ones(1, 3, dtype=torch.long) for kind in PROMPTS for end in ("", "_2")}
    guider = ClassifierFreeGuidance(guidance_scale=3.0) if enabled else AdaptiveProjectedMixGuidance(enabled=False)
    arguments = {"height": 64, "width": 64, "output_type": "latent"} | embeds | masks
    found = calibrate(hunyuan_image(guider), (5,), effort="fast", progress=False, **arguments)
    assert "5" in found.config.calibration


def test_levels_of_a_guider_that_acts_otherwise_are_told_each_by_its_own():
    assert is_whole([0.0, 0.0], 0.0)
    assert not is_whole([0.0, 0.2], 0.0)


def test_what_answers_by_the_calls_before_is_refused():
    """A cache, however it came there."""
    caches = (
        lambda network: network.enable_cache(FirstBlockCacheConfig(threshold=0.1)),
        lambda network: apply_first_block_cache(network, FirstBlockCacheConfig(threshold=0.1)),
    )
    for enable in caches:
        pipe = hunyuan_image(None)
        enable(pipe.transformer)
        with pytest.raises(ValueError, match=r"pipe.transformer.disable_cache\(\), or remove its hooks, calibrate"):
            calibrate(pipe, (5,), progress=False)


def test_hooks_that_remember_nothing_are_no_cache():
    pipe = hunyuan_image(None)
    apply_layerwise_casting(pipe.transformer, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):  # that of the pipeline
        calibrate(pipe, (5,), progress=False)


def test_pipelines_inside_keep_their_scheduler(tiny_unet):
    """As in Kandinsky's combined pipelines: the whole one's scheduler is never asked."""
    inner = UnconditionalPipeline(tiny_unet, DDPMScheduler())

    class Combined(UnconditionalPipeline):
        decoder_pipe = None

    pipe = Combined(tiny_unet, inner.scheduler)
    pipe.decoder_pipe = inner
    with pytest.raises(ValueError, match=r"a Combined runs pipe.decoder_pipe, .* pipe.decoder_pipe.scheduler = ..."):
        calibrate(pipe, (5,), progress=False)


def test_a_scheduler_of_the_sound_is_refused(tiny_unet):
    pipe = UnconditionalPipeline(tiny_unet, DDPMScheduler())
    pipe.audio_scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="audio_scheduler takes the sound down levels of its own"):
        calibrate(pipe, (5,), progress=False)


def test_a_pipeline_that_hands_its_own_options_to_step_is_refused(tiny_unet):
    with pytest.raises(ValueError, match=r"calibrate, and use, DDPMPipeline\(\*\*pipe.components\)"):
        calibrate(DDIMPipeline(tiny_unet, DDIMScheduler()), (5,), progress=False)


def test_frames_that_are_given_by_a_velocity_get_no_noise():
    """Of a pipeline that steps a given frame by the velocity towards it, as Cosmos 2.5."""

    class Cosmos2_5_Pipeline(DDPMPipeline):
        pass

    pipe = Cosmos2_5_Pipeline.__new__(Cosmos2_5_Pipeline)
    assert not refuse_noise(pipe, {"prompt": "a"}, None, None)
    assert refuse_noise(pipe, {"image": "a"}, None, None)
    assert refuse_noise(pipe, {"video": "a"}, 0.0, None)
    assert refuse_noise(pipe, {"video": "a"}, (0, 0.0), None)
    assert not refuse_noise(DDPMPipeline.__new__(DDPMPipeline), {"image": "a"}, 0.5, None)
    with pytest.raises(ValueError, match=r"stochasticity=\(0.5, 1\) beside image: .* use stochasticity=0"):
        refuse_noise(pipe, {"image": "a"}, (0.5, 1), None)
    with pytest.raises(ValueError, match="images, which choose among stochasticities, beside video"):
        refuse_noise(pipe, {"video": "a"}, None, torch.zeros(1))


def test_a_network_of_mean_velocities_is_refused():
    with pytest.raises(ValueError, match="transformer was distilled to answer the mean velocity between two levels"):
        calibrate(hunyuan_image(None, use_meanflow=True), (5,), progress=False)
