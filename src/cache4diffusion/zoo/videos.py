"""Transformers that make videos."""

from __future__ import annotations

import torch

from cache4diffusion.zoo.tiny import Arguments, Tiny, noise, places

_LTX_SOUND = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "rope_double_precision": False,
}
_COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 6,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 5,
}
_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 12,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def _kandinsky5(batch: int) -> Arguments:
    return {
        "pooled_projections": noise(batch, 10),
        "visual_rope_pos": tuple(torch.arange(size) for size in (3, 4, 4)),
        "text_rope_pos": torch.arange(5),
    }


def _kandinsky6(batch: int) -> Arguments:
    return {"pooled_projections": noise(batch, 10), "audio_hidden_states": noise(batch, 7, 6)}


def _consis_id(batch: int) -> Arguments:
    return {
        "image_rotary_emb": (noise(48, 8), noise(48, 8)),
        "id_cond": noise(batch, 6),
        "id_vit_hidden": [noise(batch, 3, 6)],
    }


def _cosmos(batch: int) -> Arguments:
    return {"attention_mask": torch.ones(batch, 5), "fps": 24}


def _cosmos3(batch: int) -> Arguments:
    """A prompt of three tokens and a frame of 3 x 4, packed into one row."""
    text, height, width = 3, 3, 4
    image = torch.arange(text, text + height * width)
    return {
        "input_ids": torch.arange(1, 1 + text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.zeros(3, text + height * width, dtype=torch.long),
        "und_len": text,
        "sequence_length": text + height * width,
        "vision_tokens": [noise(1, 2, 1, height, width)],
        "vision_token_shapes": [(1, height, width)],
        "vision_sequence_indexes": image,
        "vision_mse_loss_indexes": image,
        "vision_timesteps": torch.full((height * width,), 0.5),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _framepack(batch: int) -> Arguments:
    return {
        "image_embeds": noise(batch, 7, 14),
        "indices_latents": torch.arange(3),
        "latents_clean": noise(batch, 4, 2, 4, 8),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": noise(batch, 4, 2, 4, 8),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": noise(batch, 4, 8, 4, 8),
        "indices_latents_history_4x": torch.arange(8),
    }


def _hunyuan15(batch: int) -> Arguments:
    return {
        "encoder_hidden_states_2": noise(batch, 4, 10),
        "encoder_attention_mask_2": torch.ones(batch, 4),
        "image_embeds": torch.zeros(batch, 3, 14),
    }


def _ltx2(batch: int) -> Arguments:
    return {
        "audio_hidden_states": noise(batch, 9, 6),
        "audio_encoder_hidden_states": noise(batch, 5, 12),
        "audio_num_frames": 9,
        "fps": 25.0,
        **_frames(batch),
    }


def _frames(batch: int) -> Arguments:
    return {"num_frames": 2, "height": 3, "width": 4}


def _minimax(batch: int) -> Arguments:
    """Text, sound and video in one row; sound has a clock of its own."""
    text, audio, video = 5, 6, 8
    tags = torch.tensor([1] * text + [2] * audio + [0] * video)
    ids = torch.cat([torch.arange(text + audio)[:, None] * torch.tensor([1, 0, 0]), places(2, 2, 2, axes=3)])
    return {
        "audio_hidden_states": noise(batch, audio, 6),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": ids.float(),
        "text_indices": torch.arange(text),
        "audio_indices": torch.arange(text, text + audio),
        "video_indices": torch.arange(text + audio, text + audio + video),
    }


def _sana_wm(batch: int) -> Arguments:
    return {
        "timestep": torch.full((batch, 1, 3), 500.0),
        "encoder_hidden_states": noise(batch, 1, 5, 12),
    }


def _sana_wm_refiner(batch: int) -> Arguments:
    return {
        "timestep": torch.full((batch, 12), 500.0),
        "video_rotary_emb": (noise(batch, 12, 16), noise(batch, 12, 16)),
    }


VIDEOS = (
    Tiny(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 3,
            "caption_channels": 14,
        },
        latent=(4, 3, 8, 8),
        text=(5, 14),
    ),
    Tiny(
        "CogVideoXTransformer3DModel",
        {**_COGVIDEO, "use_rotary_positional_embeddings": True},
        latent=(3, 4, 8, 8),
        text=(5, 12),
        time=3.0,
        more=lambda batch: {"image_rotary_emb": (noise(48, 8), noise(48, 8))},
    ),
    Tiny(
        "ConsisIDTransformer3DModel",
        {
            **_COGVIDEO,
            "use_rotary_positional_embeddings": True,
            "cross_attn_interval": 1,
            "is_kps": False,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 6,
            "LFE_vit_dim": 6,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 3,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        latent=(3, 4, 8, 8),
        text=(5, 12),
        more=_consis_id,
    ),
    Tiny(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 14,
            "adaln_lora_dim": 6,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "concat_padding_mask": False,  # needs torchvision
            "extra_pos_embed_type": "learnable",
        },
        latent=(4, 3, 8, 8),
        text=(5, 14),
        more=_cosmos,
    ),
    Tiny(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 6,
            "hidden_act": "relu2",
            "hidden_size": 12,
            "intermediate_size": 28,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        more=_cosmos3,
        batches=False,
    ),
    Tiny(
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 3,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 12,
            "time_embed_dim": 10,
            "time_position_encoding_type": "3d_rope",
        },
        latent=(4, 2, 8, 8),
        text=(5, 12),
    ),
    Tiny(
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN,
        latent=(4, 3, 4, 4),
        text=(5, 12),
        time=3.0,
    ),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "image_embed_dim": 14,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        latent=(4, 2, 3, 4),
        text=(5, 12),
        more=_hunyuan15,
    ),
    Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        {**_HUNYUAN, "patch_size": 2, "has_image_proj": True, "image_proj_dim": 14, "has_clean_x_embedder": True},
        latent=(4, 3, 4, 8),
        text=(5, 12),
        more=_framepack,
    ),
    Tiny(
        "JoyImageEditTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 12,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        latent=(4, 2, 4, 8),
        text=(5, 12),
    ),
    Tiny(
        "JoyImageEditPlusTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 12,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        latent=(7, 4, 1, 2, 2),
        text=(5, 12),
        more=lambda batch: {"shape_list": [[(1, 2, 2), (1, 1, 3)]] * batch},
    ),
    Tiny(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 14,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 16,
            "ff_dim": 36,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (2, 2, 4),
        },
        latent=(3, 8, 8, 4),
        text=(5, 12),
        more=_kandinsky5,
    ),
    Tiny(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 10,
            "time_dim": 14,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 16,
            "ff_dim": 36,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (2, 2, 4),
            "visual_cond": False,
            "in_audio_dim": 6,
            "out_audio_dim": 6,
        },
        latent=(3, 8, 8, 4),
        text=(5, 12),
        more=_kandinsky6,
    ),
    Tiny(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 14,
            "model_dim": 32,
            "ff_dim": 36,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        latent=(2, 8, 16, 9),
    ),
    Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 12,
        },
        latent=(24, 4),
        text=(5, 12),
        more=_frames,
    ),
    Tiny(
        "LTX2VideoTransformer3DModel",
        {**_LTX_SOUND, "caption_channels": 12},
        latent=(24, 4),
        text=(5, 12),
        more=_ltx2,
    ),
    Tiny(
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 12,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "video_length": 3,
        },
        latent=(4, 3, 8, 8),
        text=(5, 12),
        more=lambda batch: {"encoder_attention_mask": None},
    ),
    Tiny(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 40,
            "in_channels": 4,
            "audio_in_channels": 6,
            "patch_size": (1, 2, 2),
            "text_dim": 12,
            "freq_dim": 8,
            "time_embed_hidden_dim": 20,
            "time_embed_dim": 14,
            "rope_freq_dim": 2,
        },
        latent=(8, 16),
        text=(5, 12),
        more=_minimax,
    ),
    Tiny(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "pooled_projection_dim": 10,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 6,
            "max_sequence_length": 5,
        },
        latent=(4, 2, 8, 8),
        text=(5, 24),
        more=lambda batch: {"pooled_projections": None},
    ),
    Tiny(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 14,
            "image_embed_dim": 6,
            "rope_axes_dim": (4, 4, 4),
        },
        latent=(9, 2, 3, 4),
        text=(5, 14),
    ),
    Tiny(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 14,
            "sample_size": 4,
            "patch_size": (1, 2, 2),
            "rope_max_seq_len": 32,
        },
        latent=(4, 3, 8, 8),
        text=(5, 14),
    ),
    Tiny(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 12,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 4,
            "image_size": 32,
            "caption_channels": 12,
            "mlp_ratio": 2.0,
        },
        latent=(4, 3, 4, 4),
        text=(5, 12),
        more=_sana_wm,
    ),
    Tiny(
        "SanaWMLTX2RefinerTransformer3DModel",
        {**_LTX_SOUND, "caption_channels": 14},
        latent=(12, 4),
        text=(5, 14),
        more=_sana_wm_refiner,
    ),
    Tiny(
        "TransformerTemporalModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 12,
            "num_layers": 2,
            "norm_num_groups": 4,
        },
        more=lambda batch: {"hidden_states": noise(3 * batch, 12, 4, 4), "num_frames": 3},
    ),
)
"""By class."""
