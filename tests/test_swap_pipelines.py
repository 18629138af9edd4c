"""The real pipelines of diffusers, around tiny untrained networks, with each of our schedulers swapped in."""

import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers_pipelines import SD, embeddings, sd3, sdxl, stable_diffusion, text_encoder, tokenizer, unet, vae
from networks import build, seeded
from schedulers import every_scheduler
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_gm import (
    CalibratedMultistepScheduler,
    CLDSSCSScheduler,
    GMLangevinScheduler,
)

# Until 0.42, FlowMatchEulerDiscreteScheduler told the network the shifted sigmas in place of the timesteps beside them.
OLDER = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42)


def swapped(pipeline, cls, **arguments):
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check(pipeline, count=2, draws=True, **arguments):
    """Finite, decided by the seed and, if the run `draws`, different for another one; returns the first result."""
    results = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():  # pipelines that pass no generator
            torch.manual_seed(seed)
            results.append(pipeline(**arguments, generator=torch.Generator().manual_seed(seed))[0])
    results = [torch.as_tensor(result) for result in results]
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) != draws
    assert len(results[0]) == count
    return results[0]


IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT = {"prompt": ["a cat", "dogs"], "output_type": "pt", "num_inference_steps": 5, "guidance_scale": 4.0}


@every_scheduler
def test_ddpm(cls, tiny_unet):
    pipeline = swapped(diffusers.DDPMPipeline(tiny_unet, DDPMScheduler()), cls)
    check(pipeline, batch_size=2, num_inference_steps=5, output_type="np")
    # DDIMPipeline hands arguments of its own scheduler to step: use its parts in a DDPMPipeline.
    ddim = swapped(diffusers.DDIMPipeline(tiny_unet, DDIMScheduler()), cls)
    with pytest.raises(TypeError, match="eta"):
        ddim(num_inference_steps=5, generator=torch.Generator())
    ddpm = swapped(diffusers.DDPMPipeline(**ddim.components), cls)
    check(ddpm, count=1, num_inference_steps=5, output_type="np")


@every_scheduler
def test_stable_diffusion_text_to_image(cls):
    pipeline = swapped(stable_diffusion(diffusers.StableDiffusionPipeline), cls)
    whole = check(pipeline, **TEXT, height=16, width=16)
    # A list of generators decides each image, and a callback that changes nothing changes nothing.
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    kept = {"callback_on_step_end": lambda *a: a[3]}
    both = pipeline(**TEXT, height=16, width=16, generator=generators, **kept).images
    one = {**TEXT, "prompt": "dogs"}
    second = pipeline(**one, height=16, width=16, generator=[torch.Generator().manual_seed(6)]).images
    torch.testing.assert_close(both[1:], second, rtol=1e-3, atol=1e-3)
    custom = pipeline(
        **{**TEXT, "num_inference_steps": None}, timesteps=[990, 500, 100, 5], height=16, width=16, generator=generators
    )
    assert custom.images.shape == whole.shape
    assert pipeline.scheduler.timesteps.tolist() == [990, 500, 100, 5]


@every_scheduler
def test_stable_diffusion_with_v_prediction_and_zero_terminal_snr(cls):
    pipeline = stable_diffusion(diffusers.StableDiffusionPipeline)
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check(swapped(pipeline, cls, **config), **TEXT, guidance_rescale=0.7, height=16, width=16)


@every_scheduler
def test_stable_diffusion_image_to_image(cls):
    pipeline = swapped(stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), cls)
    check(pipeline, **TEXT, image=IMAGE, strength=0.6)


@every_scheduler
def test_image_to_image_with_a_single_call(cls):
    """Two calls asked for and half of the strength: one call, at the middle of the grid, and D is the result."""
    pipeline = swapped(stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), cls)
    arguments = {**TEXT, "num_inference_steps": 2, "image": IMAGE, "strength": 0.5}
    told = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: told.append(float(args[1])))
    check(pipeline, **arguments)
    assert told == [float(pipeline.scheduler.timesteps[1])] * 3


@every_scheduler
@pytest.mark.parametrize("in_channels", [4, 9])
def test_stable_diffusion_inpainting(cls, in_channels):
    pipeline = stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels))
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., 8:] = 1
    arguments = {"image": IMAGE, "mask_image": mask, "strength": 0.6, "height": 16, "width": 16}
    check(swapped(pipeline, cls), **TEXT, **arguments)


@every_scheduler
def test_controlnet(cls):
    network = unet()
    controlnet = build(diffusers.ControlNetModel.from_unet, network, conditioning_embedding_out_channels=(4, 8))
    pipeline = stable_diffusion(diffusers.StableDiffusionControlNetPipeline, unet=network, controlnet=controlnet)
    check(swapped(pipeline, cls), **TEXT, image=IMAGE)


@every_scheduler
def test_sdxl_in_two_parts(cls):
    base = swapped(sdxl(diffusers.StableDiffusionXLPipeline), cls)
    check(base, **TEXT, height=16, width=16)
    arguments = {**TEXT, "num_inference_steps": 10}
    latents = check(base, **{**arguments, "output_type": "latent"}, denoising_end=0.6, height=16, width=16)
    taken = base.scheduler.step_index
    assert 0 < taken < 10
    refiner = swapped(sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), cls)
    draws = cls is not CalibratedMultistepScheduler  # the probability flow, unless it is calibrated otherwise
    check(refiner, draws=draws, **arguments, image=latents, denoising_start=0.6)
    assert refiner.scheduler.begin_index == taken, "the second part starts where the first ended"
    assert refiner.scheduler.step_index == 10


@every_scheduler
def test_views_of_a_panorama_are_runs_of_their_own(cls):
    """The pipeline keeps what the scheduler is before the first step once for all of them."""
    pipeline = swapped(stable_diffusion(diffusers.StableDiffusionPanoramaPipeline), cls)
    arguments = {**TEXT, "prompt": "a cat", "output_type": "latent", "view_batch_size": 1}
    check(pipeline, count=1, **arguments, height=128, width=144)


def test_a_pipeline_that_mends_a_config_leaves_the_way_back_open():
    """Those of Stable Diffusion put a plain dictionary in its place where `steps_offset` is not 1."""
    ours = GMLangevinScheduler.from_config(DDIMScheduler(**SD).config, algorithm_type="ode")
    mended = stable_diffusion(diffusers.StableDiffusionPipeline, scheduler=ours).scheduler.config
    assert mended.steps_offset == 1
    assert diffusers.DPMSolverMultistepScheduler.from_config(mended).config.algorithm_type == "dpmsolver++"
    assert GMLangevinScheduler.from_config(mended).config.algorithm_type == "ode"


@every_scheduler
def test_dit_with_a_learned_variance(cls):
    transformer = build(
        diffusers.DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    pipeline = diffusers.DiTPipeline(transformer, vae(), DDIMScheduler(**SD))
    check(swapped(pipeline, cls), class_labels=[1, 2], num_inference_steps=5, output_type="np")


@every_scheduler
def test_stable_diffusion_3(cls):
    texts = embeddings((2, 4, 8), (2, 8))
    texts |= {f"negative_{key}": -value for key, value in texts.items()}
    arguments = {"num_inference_steps": 5, "output_type": "pt", "height": 16, "width": 16, **texts}
    check(swapped(sd3(diffusers.StableDiffusion3Pipeline), cls), **arguments)
    check(swapped(sd3(diffusers.StableDiffusion3Img2ImgPipeline), cls), **arguments, image=IMAGE, strength=0.6)


@every_scheduler
def test_flux_with_dynamic_shifting(cls):
    transformer = build(
        diffusers.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = diffusers.FluxPipeline(scheduler=scheduler, vae=vae(4), transformer=transformer, **nothing)
    texts = embeddings((2, 4, 8), (2, 8))
    check(swapped(pipeline, cls), num_inference_steps=5, output_type="latent", height=16, width=16, **texts)


@every_scheduler
def test_audio(cls):
    """Dance Diffusion: samples `(B, C, length)`."""
    network = build(
        diffusers.UNet1DModel,
        block_out_channels=(32, 32),
        extra_in_channels=64,
        sample_size=64,
        sample_rate=64,
        in_channels=2,
        out_channels=2,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        flip_sin_to_cos=True,
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )
    pipeline = swapped(diffusers.DanceDiffusionPipeline(network, DDPMScheduler()), cls)
    assert check(pipeline, num_inference_steps=5, batch_size=2).shape == (2, 2, 64)


@every_scheduler
def test_video(cls):
    """AnimateDiff: samples `(B, C, frames, H, W)`."""
    adapter = build(
        diffusers.MotionAdapter, block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )  # fmt: skip
    parts = (vae(), text_encoder(), tokenizer(), unet(), adapter, DDIMScheduler(**SD, timestep_spacing="linspace"))
    with torch.random.fork_rng():  # the pipeline builds a network of its own from these
        pipeline = diffusers.AnimateDiffPipeline(*parts)
    check(swapped(pipeline, cls), **TEXT, num_frames=2, height=16, width=16)


# --- Pipelines with wishes of their own ---


@every_scheduler
def test_stable_video_diffusion(cls):
    """Labels `log(sigma) / 4`, levels from 700 down to 0.002, an input of twice the channels."""
    network = svd_network()
    decoder = build(diffusers.AutoencoderKLTemporalDecoder, block_out_channels=(32,), latent_channels=4)
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, intermediate_size=8,
        patch_size=8,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    processor = CLIPImageProcessor(crop_size={"height": 16, "width": 16}, size=16)
    encoder = build(CLIPVisionModelWithProjection, vision)
    pipeline = diffusers.StableVideoDiffusionPipeline(decoder, encoder, network, scheduler, processor)
    theirs = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    theirs.set_timesteps(5)
    told = []
    network.register_forward_pre_hook(lambda module, args: told.append(float(args[1])))
    arguments = {"num_inference_steps": 5, "height": 16, "width": 16, "num_frames": 2, "output_type": "latent"}
    check(swapped(pipeline, cls), count=1, image=IMAGE[:1], **arguments)
    ours = pipeline.scheduler
    assert told[:5] == ours.timesteps.tolist()
    assert ours.timesteps.tolist() == pytest.approx(
        [math.log(sigma) / 4 for sigma in ours.sigmas[:-1].tolist()], rel=1e-5
    )
    assert float(ours.init_noise_sigma) == pytest.approx(700, rel=1e-3)
    if cls in (GMLangevinScheduler, CLDSSCSScheduler):  # the others have levels of their own, or the last one twice
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-3, atol=1e-5)


def svd_network():
    return build(
        diffusers.UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )


@every_scheduler
def test_cogview4_is_told_its_timesteps_at_the_levels_of_its_sigmas(cls):
    """The pipeline passes whole numbers as timesteps, and sigmas that are shifted by the size of the image."""
    transformer = build(
        diffusers.CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(8, 8),
    )
    theirs = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipeline = diffusers.CogView4Pipeline(None, None, vae(4), transformer, theirs)
    told = []
    hook = lambda module, args, kwargs: told.append(float(kwargs["timestep"][0]))
    transformer.register_forward_pre_hook(hook, with_kwargs=True)
    g = torch.Generator().manual_seed(2)
    arguments = {"prompt_embeds": torch.randn(2, 4, 8, generator=g), "guidance_scale": 1.0, "output_type": "latent"}
    arguments |= {"num_inference_steps": 5, "height": 16, "width": 16}
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**arguments, generator=seeded(0)[0])
    levels = theirs.sigmas.clone()
    assert OLDER or told == [1000, 750, 500, 250, 1]
    told.clear()
    check(swapped(pipeline, cls), **arguments)
    assert told[:5] == [1000, 750, 500, 250, 1]
    torch.testing.assert_close(pipeline.scheduler.sigmas, levels, rtol=1e-5, atol=1e-6)
    assert float(levels[1]) != 0.75, "the levels are shifted, the labels are not"


@every_scheduler
def test_timesteps_and_sigmas_together(cls):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[1000.0, 600.0, 300.0], sigmas=[1.0, 0.5, 0.2])
    assert OLDER or theirs.timesteps.tolist() == [1000, 600, 300]
    assert ours.timesteps.tolist() == [1000, 600, 300]
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


def ltx():
    transformer = build(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    autoencoder = build(
        diffusers.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    pipeline = diffusers.LTXConditionPipeline(FlowMatchEulerDiscreteScheduler(), autoencoder, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ltx_arguments(**changes):
    g = torch.Generator().manual_seed(2)
    mask = torch.ones(1, 4)
    return {
        "prompt_embeds": torch.randn(1, 4, 8, generator=g),
        "prompt_attention_mask": mask,
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "image_cond_noise_scale": 0.0,
        "num_inference_steps": 4,
    } | changes


@every_scheduler
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_ltx_conditions_tokens_on_frames(cls, strength):
    """Tokens of a frame that is given have levels of their own: `per_token_timesteps`."""
    pipeline = swapped(ltx(), cls)
    image = IMAGE[:1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    results = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():  # the pipeline hands step no generator
            torch.manual_seed(seed)
            arguments = ltx_arguments(image=image, strength=strength, generator=seeded(seed)[0])
            results.append(pipeline(**arguments)[0])
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    free, given = results[0][:, :, 1:], results[0][:, :, :1]
    assert not torch.equal(free, results[2][:, :, 1:])
    if strength == 1:
        # The frame that is given stays what the pipeline made of it, as under diffusers' own scheduler.
        theirs = ltx()(**ltx_arguments(image=image, strength=strength, generator=seeded(0)[0]))[0]
        assert torch.equal(given, theirs[:, :, :1])


@pytest.mark.parametrize("strength", [None, 1.0, 0.7])
def test_ltx_agrees_with_flow_match_euler_where_both_are_of_first_order(strength):
    """Two calls: the first step of the two-step method is Euler's, and the last one is D."""
    image = {} if strength is None else {"image": IMAGE[:1].repeat_interleave(2, 2).repeat_interleave(2, 3)}
    image |= {} if strength is None else {"strength": strength}
    results = []
    for make in (lambda scheduler: scheduler, lambda scheduler: GMLangevinScheduler.from_config(scheduler.config, algorithm_type="ode")):  # fmt: skip # noqa: E501
        pipeline = ltx()
        pipeline.scheduler = make(pipeline.scheduler)
        results.append(pipeline(**ltx_arguments(**image, num_inference_steps=2, generator=seeded(0)[0]))[0])
    # s = 1 is sigma = 4096 here.
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)
    assert float(results[0].std()) > 0.3
