"""U-Nets."""

from __future__ import annotations

import torch

from cache4diffusion.zoo.tiny import Arguments, Tiny, noise

_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (8, 24),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
_STAGES = ("CrossAttnDownBlock{}", "DownBlock{}"), ("UpBlock{}", "CrossAttnUpBlock{}")


def _stages(words: str) -> dict[str, tuple[str, ...]]:
    """Attention on the outer level, none on the inner one."""
    down, up = (tuple(name.format(words) for name in side) for side in _STAGES)
    return {"down_block_types": down, "up_block_types": up}


def _audioldm2(batch: int) -> Arguments:
    """Two texts: what a language model goes on with, and the words themselves."""
    return {
        "encoder_hidden_states": noise(batch, 5, 12),
        "encoder_hidden_states_1": noise(batch, 7, 14),
        "encoder_attention_mask_1": torch.ones(batch, 7, dtype=torch.bool),
        "encoder_attention_mask": None,
    }


def _cascade(batch: int) -> Arguments:
    return {
        "timestep_ratio": torch.full((batch,), 0.5),
        "clip_text_pooled": noise(batch, 1, 10),
        "clip_text": noise(batch, 5, 14),
        "clip_img": noise(batch, 1, 18),
    }


def _i2vgen(batch: int) -> Arguments:
    return {
        "fps": torch.full((batch,), 16),
        "image_latents": noise(batch, 4, 3, 8, 8),
        "image_embeddings": noise(batch, 12),
    }


def _uvit(batch: int) -> Arguments:
    return {
        "input_ids": torch.randint(0, 30, (batch, 6, 6)),
        "pooled_text_emb": noise(batch, 10),
        "micro_conds": noise(batch, 5),
    }


UNETS = (
    Tiny(
        "AudioLDM2UNet2DConditionModel",
        {
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": ((None, 12, 14), (None, 12, 14)),
            "attention_head_dim": 4,
        },
        latent=(4, 16, 16),
        more=_audioldm2,
    ),
    Tiny(
        "DreamLiteUNetModel",
        {
            **_UNET,
            "block_out_channels": (16, 32),
            "attention_head_dim": 8,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        },
        latent=(4, 8, 8),
        text=(5, 12),
    ),
    Tiny(
        "I2VGenXLUNet",
        {**_UNET, **_stages("3D"), "attention_head_dim": 4},
        latent=(4, 3, 8, 8),
        text=(5, 12),
        more=_i2vgen,
    ),
    Tiny(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 24),
            "cross_attention_dim": 12,
            "encoder_hid_dim": 10,
        },
        latent=(4, 8, 8),
        text=(5, 10),
    ),
    Tiny(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 12,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "clip_text_in_channels": 14,
            "clip_text_pooled_in_channels": 10,
            "clip_image_in_channels": 18,
            "switch_level": (False,),
        },
        latent=(4, 8, 8),
        more=_cascade,
    ),
    Tiny(
        "UNet1DModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64),
        },
        latent=(4, 32),
        more=lambda batch: {"timestep": torch.tensor(500)},
    ),
    Tiny(
        "UNet2DConditionModel",
        {**_UNET, **_stages("2D"), "attention_head_dim": 2},
        latent=(4, 16, 16),
        text=(5, 12),
        more=lambda batch: {"timestep": torch.tensor(3), "encoder_attention_mask": None},
    ),
    Tiny(
        "UNet2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 24),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        },
        latent=(4, 16, 16),
        more=lambda batch: {"timestep": torch.tensor(3)},
    ),
    Tiny(
        "UNet3DConditionModel",
        {**_UNET, **_stages("3D"), "attention_head_dim": 4},
        latent=(4, 3, 8, 8),
        text=(5, 12),
    ),
    Tiny(
        "UNetMotionModel",
        {**_UNET, **_stages("Motion"), "num_attention_heads": 2, "motion_num_attention_heads": 2},
        latent=(4, 3, 8, 8),
        more=lambda batch: {"encoder_hidden_states": noise(3 * batch, 5, 12)},
    ),
    Tiny(
        "UNetSpatioTemporalConditionModel",
        {
            **{name: value for name, value in _UNET.items() if name != "norm_num_groups"},
            **_stages("SpatioTemporal"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "in_channels": 8,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 18,
        },
        latent=(3, 8, 8, 8),
        text=(1, 12),
        more=lambda batch: {"added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * batch)},
    ),
    Tiny(
        "UVit2DModel",
        {
            "hidden_size": 24,
            "cond_embed_dim": 10,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 14,
            "vocab_size": 32,
            "codebook_size": 30,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 36,
            "sample_size": 6,
        },
        text=(5, 14),
        more=_uvit,
    ),
)
"""By class."""
