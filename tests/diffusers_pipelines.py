"""Pipelines of diffusers, around tiny untrained networks."""

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from networks import build
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def vae(channels=4):
    return build(
        AutoencoderKL,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        **({"shift_factor": 0.0, "scaling_factor": 1.0} if channels == 16 else {}),
    )


def unet(in_channels=4, **config):
    return build(
        UNet2DConditionModel,
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        **({"cross_attention_dim": 8} | config),
    )


def tokenizer():
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def text_encoder(cls=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return build(cls, config)


def stable_diffusion(cls, **extra):
    return cls(
        **({"unet": unet(), "scheduler": DDIMScheduler(**SD, steps_offset=1)} | extra),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(cls):
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
        cross_attention_dim=16,
    )
    return cls(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def sd3(cls):
    transformer = build(
        diffusers.SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=16,
    )
    nothing = dict.fromkeys(
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    return cls(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16), **nothing)


def embeddings(sequence, pooled):
    g = torch.Generator().manual_seed(2)
    return {
        "prompt_embeds": torch.randn(sequence, generator=g),
        "pooled_prompt_embeds": torch.randn(pooled, generator=g),
    }
