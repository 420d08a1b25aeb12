"""Wan and the video transformers built like it."""

from __future__ import annotations

from typing import Any

import torch

from cache4diffusion.zoo.tiny import Arguments, Tiny, noise

_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 14,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_NORMED = {**_WAN, "qk_norm": "rms_norm_across_heads"}


def _per_frame(frames: int) -> Any:
    """A clock for every frame, and one that the step goes to."""

    def more(batch: int) -> Arguments:
        return {"timestep": torch.full((batch, frames), 500.0), "r_timestep": torch.full((batch, frames), 250.0)}

    return more


def _helios(batch: int) -> Arguments:
    return {
        "indices_hidden_states": torch.arange(2.0).expand(batch, -1),
        "indices_latents_history_short": torch.ones(batch, 1),
        "indices_latents_history_mid": torch.ones(batch, 1),
        "indices_latents_history_long": torch.ones(batch, 4),
        "latents_history_short": noise(batch, 4, 1, 8, 8),
        "latents_history_mid": noise(batch, 4, 1, 8, 8),
        "latents_history_long": noise(batch, 4, 4, 8, 8),
    }


def _wan_animate(batch: int) -> Arguments:
    return {
        "encoder_hidden_states_image": noise(batch, 7, 10),
        "pose_hidden_states": noise(batch, 4, 20, 4, 4),
        "face_pixel_values": noise(batch, 3, 77, 16, 16),
    }


def _wan_animate_2(batch: int) -> Arguments:
    """The pass over the driving video, which fills the cache of keys and values."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [noise(4, 2, 4, 4)],
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": [noise(5, 14)],
        "condition_latents": [noise(6, 2, 4, 4)],
        "encoder_hidden_states_image": noise(1, 7, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }


WAN: tuple[Tiny, ...] = (
    Tiny(
        "AnyFlowTransformer3DModel",
        {**_WAN, "gate_value": 0.25, "deltatime_type": "r"},
        latent=(3, 4, 8, 8),
        text=(5, 14),
        more=_per_frame(3),
    ),
    Tiny(
        "AnyFlowFARTransformer3DModel",
        {
            **_WAN,
            "compressed_patch_size": (1, 4, 4),
            "full_chunk_limit": 3,
            "gate_value": 0.25,
            "deltatime_type": "r",
        },
        latent=(4, 4, 8, 8),
        text=(5, 14),
        more=lambda batch: {**_per_frame(4)(batch), "chunk_partition": [2, 2]},
    ),
    Tiny(
        "ChronoEditTransformer3DModel",
        {**_NORMED, "rope_temporal_skip_len": 8},
        latent=(4, 2, 8, 8),
        text=(5, 14),
    ),
    Tiny(
        "HeliosTransformer3DModel",
        {
            **{name: value for name, value in _NORMED.items() if name != "rope_max_seq_len"},
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        latent=(4, 2, 8, 8),
        text=(5, 14),
        more=_helios,
    ),
    Tiny(
        "SkyReelsV2Transformer3DModel",
        _NORMED,
        latent=(4, 3, 8, 8),
        text=(5, 14),
    ),
    Tiny(
        "WanTransformer3DModel",
        _NORMED,
        latent=(4, 3, 8, 8),
        text=(5, 14),
        time=3.0,
    ),
    Tiny(
        "WanAnimateTransformer3DModel",
        {
            **_NORMED,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 10,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 18,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        latent=(12, 21, 4, 4),
        text=(5, 14),
        more=_wan_animate,
    ),
    Tiny(
        "WanAnimate2Transformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "text_len": 6,
            "in_dim": 10,
            "dim": 24,
            "ffn_dim": 40,
            "freq_dim": 16,
            "text_dim": 14,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
            "cross_attn_norm": True,
            "use_img_emb": True,
        },
        more=_wan_animate_2,
        batches=False,
    ),
    Tiny(
        "WanVACETransformer3DModel",
        {**_NORMED, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 12},
        latent=(4, 3, 8, 8),
        text=(5, 14),
        more=lambda batch: {"control_hidden_states": noise(batch, 12, 3, 8, 8)},
    ),
)
"""By class."""
