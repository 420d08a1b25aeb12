"""Transformers that make images."""

from __future__ import annotations

import torch

from cache4diffusion.zoo.tiny import Arguments, Tiny, noise, places

_JOINT = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
_FLUX = {**_JOINT, "in_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)}
_PATCHED = {"patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def _sizes(batch: int) -> Arguments:
    """Sizes of pictures, which CogView and its like are told."""
    sizes = torch.tensor([[64.0, 48.0]] * batch)
    return {"original_size": sizes, "target_size": sizes, "crop_coords": torch.zeros(batch, 2)}


def _glm(batch: int) -> Arguments:
    return {
        "prior_token_id": torch.randint(0, 32, (batch, 16)),
        "prior_token_drop": torch.zeros(batch, 16, dtype=torch.bool),
        "target_size": torch.tensor([[64.0, 48.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
    }


def _hidream(batch: int) -> Arguments:
    return {
        "encoder_hidden_states_t5": noise(batch, 5, 12),
        "encoder_hidden_states_llama3": noise(4, batch, 5, 10),
        "pooled_embeds": noise(batch, 6),
    }


def _hunyuan_dit(batch: int) -> Arguments:
    return {
        "text_embedding_mask": torch.ones(batch, 5),
        "encoder_hidden_states_t5": noise(batch, 6, 24),
        "text_embedding_mask_t5": torch.ones(batch, 6),
        "image_meta_size": noise(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (noise(16, 8), noise(16, 8)),
    }


def _ideogram(batch: int) -> Arguments:
    """One row of tokens, text first."""
    text, image = 5, 12
    first = 65536  # where the places of images begin
    ids = torch.cat([torch.arange(text)[:, None].expand(-1, 3), first + places(3, 4, axes=3).long()])
    is_text = torch.arange(text + image) < text
    return {
        "hidden_states": noise(batch, text + image, 6) * ~is_text[:, None],
        "encoder_hidden_states": noise(batch, text + image, 14) * is_text[:, None],
        "position_ids": ids.expand(batch, -1, -1),
        "segment_ids": torch.ones(batch, text + image, dtype=torch.long),
        "indicator": torch.where(is_text, 3, 2).expand(batch, -1),
    }


def _krea(batch: int) -> Arguments:
    ids = torch.cat([torch.zeros(5, 3), places(3, 4, axes=3)])
    return {"encoder_hidden_states": noise(batch, 5, 3, 14), "position_ids": ids}


def _lumina_next(batch: int) -> Arguments:
    return {
        "encoder_mask": torch.ones(batch, 5),
        "image_rotary_emb": noise(384, 384, 4),
        "cross_attention_kwargs": {},
    }


def _omnigen(batch: int) -> Arguments:
    """A prompt of six words, the clock, and the picture, in one row."""
    words, image = 6, 16
    count = words + 1 + image
    return {
        "input_ids": torch.randint(0, 10, (batch, words)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(batch, count, count),
        "position_ids": torch.arange(count).expand(batch, -1),
    }


def _qwen_two(batch: int) -> Arguments:
    """The picture's place in the row of the vision-language encoder, behind the text: a slot for four tokens."""
    is_image = torch.arange(5 + 6) >= 5
    return {"img_shapes": [[(1, 4, 6)]] * batch, "img_mask": is_image.expand(batch, -1)}


def _z_image(batch: int) -> Arguments:
    return {
        "x": [noise(4, 1, 8, 12) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [noise(5, 14) for _ in range(batch)],
    }


IMAGES = (
    Tiny(
        "AuraFlowTransformer2DModel",
        {
            **{name: value for name, value in _PATCHED.items() if name != "num_layers"},
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 12,
            "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        latent=(4, 8, 8),
        text=(5, 12),
        time=0.5,
    ),
    Tiny(
        "BriaTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": None, "axes_dims_rope": (0, 4, 4)},
        latent=(12, 4),
        text=(5, 12),
        grid=(3, 4),
    ),
    Tiny(
        "BriaFiboTransformer2DModel",
        {
            **_FLUX,
            "joint_attention_dim": 24,
            "text_encoder_dim": 12,
            "pooled_projection_dim": None,
            "axes_dims_rope": (0, 4, 4),
        },
        latent=(12, 4),
        text=(5, 24),
        grid=(3, 4),
        more=lambda batch: {"text_encoder_layers": [noise(batch, 5, 12) for _ in range(4)]},
    ),
    Tiny(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 24,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 12,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 3,
            "max_num_gist_tokens": 3,
            "gist_step": 1,
            "axes_dims": (4, 4, 4),
            "axes_lens": (32, 32, 32),
        },
        latent=(4, 8, 8),
        time=0.5,
        more=lambda batch: {"encoder_hidden_states": noise(batch, 2, 5, 12)},
    ),
    Tiny(
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 14,
            "approximator_layers": 2,
        },
        latent=(12, 4),
        text=(5, 12),
        grid=(3, 4),
        time=0.5,
    ),
    Tiny(
        "CogView3PlusTransformer2DModel",
        {
            **_PATCHED,
            "out_channels": 4,
            "text_embed_dim": 12,
            "time_embed_dim": 14,
            "condition_dim": 6,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        latent=(4, 8, 8),
        text=(5, 12),
        more=_sizes,
    ),
    Tiny(
        "CogView4Transformer2DModel",
        {**_PATCHED, "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 14, "condition_dim": 6},
        latent=(4, 8, 8),
        text=(5, 12),
        more=_sizes,
    ),
    Tiny(
        "DiTTransformer2DModel",
        {**_PATCHED, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
        latent=(4, 8, 8),
        time=3.0,
        more=lambda batch: {"class_labels": torch.ones(batch, dtype=torch.long)},
    ),
    Tiny(
        "DreamLiteTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
        },
        latent=(16, 3, 4),
        text=(5, 12),
    ),
    Tiny(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 2,
            "ffn_hidden_size": 20,
            "in_channels": 6,
            "out_channels": 6,
            "patch_size": 1,
            "text_in_dim": 12,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
        },
        latent=(6, 3, 4),
        more=lambda batch: {"text_bth": noise(batch, 5, 12), "text_lens": torch.full((batch,), 5)},
    ),
    Tiny(
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 10, "guidance_embeds": True},
        latent=(9, 4),
        text=(5, 12),
        grid=(3, 3),
        time=0.5,
    ),
    Tiny(
        "Flux2Transformer2DModel",
        {**_FLUX, "timestep_guidance_channels": 14, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": True},
        latent=(12, 4),
        text=(5, 12),
        grid=(3, 4),
        time=0.5,
    ),
    Tiny(
        "Flux3Transformer2DModel",
        {**_FLUX, "cond_in_channels": 4, "timestep_channels": 14, "axes_dims_rope": (2, 2, 2, 2)},
        latent=(12, 4),
        text=(5, 12),
        grid=(3, 4),
        time=0.5,
    ),
    Tiny(
        "GlmImageTransformer2DModel",
        {
            **_PATCHED,
            "out_channels": 4,
            "text_embed_dim": 12,
            "time_embed_dim": 14,
            "condition_dim": 6,
            "prior_vq_quantizer_codebook_size": 32,
        },
        latent=(4, 8, 8),
        text=(5, 12),
        more=_glm,
    ),
    Tiny(
        "HiDreamImageTransformer2DModel",
        {
            **_JOINT,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "caption_channels": (12, 10),
            "text_emb_dim": 6,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (16, 16),
            "llama_layers": (0, 1, 2, 3),
            "force_inference_output": True,
        },
        latent=(4, 8, 8),
        more=_hidream,
    ),
    Tiny(
        "HunyuanDiT2DModel",
        {
            **_PATCHED,
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 4,
            "mlp_ratio": 2,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 12,
            "text_len": 5,
            "text_len_t5": 6,
        },
        latent=(4, 8, 8),
        text=(5, 12),
        more=_hunyuan_dit,
    ),
    Tiny(
        "HunyuanImageTransformer2DModel",
        {
            **_JOINT,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "guidance_embeds": True,
            "text_embed_dim": 12,
            "text_embed_2_dim": 10,
            "rope_axes_dim": (4, 4),
        },
        latent=(4, 3, 4),
        text=(5, 12),
        more=lambda batch: {
            "encoder_hidden_states_2": noise(batch, 3, 10),
            "encoder_attention_mask_2": torch.ones(batch, 3),
        },
    ),
    Tiny(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 6,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "intermediate_size": 28,
            "adaln_dim": 10,
            "llm_features_dim": 14,
            "rope_theta": 10_000,
            "mrope_section": (2, 1, 1),
        },
        time=0.5,
        more=_ideogram,
    ),
    Tiny(
        "Krea2Transformer2DModel",
        {
            "in_channels": 6,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 14,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 18,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
            "rope_theta": 1000.0,
        },
        latent=(12, 6),
        text=(5, 14),
        time=0.5,
        more=_krea,
    ),
    Tiny(
        "LongCatImageTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 10},
        latent=(12, 4),
        text=(5, 12),
        grid=(3, 4),
        time=0.5,
    ),
    Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "cap_feat_dim": 12,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
        },
        latent=(4, 8, 8),
        text=(5, 12),
        time=0.5,
    ),
    Tiny(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 10,
            "learn_sigma": False,
            "cross_attention_dim": 12,
        },
        latent=(4, 8, 8),
        text=(5, 12),
        time=0.5,
        more=_lumina_next,
    ),
    Tiny(
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 2, 2),
            "dense_moe_strategy": "all_moe",
            "num_experts": 2,
            "moe_intermediate_dim": 10,
            "capacity_factors": 1.0,
        },
        latent=(12, 16),
        text=(5, 12),
        time=0.5,
        more=lambda batch: {"img_shapes": [(1, 3, 4)] * batch},
    ),
    Tiny(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 20,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 32,
            "in_channels": 4,
            "time_step_dim": 6,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        },
        latent=(4, 8, 8),
        time=0.5,
        more=_omnigen,
    ),
    Tiny(
        "OvisImageTransformer2DModel",
        {**_FLUX, "out_channels": 4},
        latent=(12, 4),
        text=(5, 12),
        grid=(3, 4),
        time=0.5,
    ),
    Tiny(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 12,
            "hidden_size": 16,
            "mlp_ratio": 2.5,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        latent=(4, 8, 8),
        text=(5, 12),
        time=0.5,
    ),
    Tiny(
        "PixArtTransformer2DModel",
        {
            **_PATCHED,
            "out_channels": 8,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "use_additional_conditions": False,
        },
        latent=(4, 8, 8),
        text=(5, 12),
        time=3.0,
        more=lambda batch: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    Tiny(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "embedding_dim": 12,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        latent=(12,),
        text=(5, 12),
        more=lambda batch: {
            "proj_embedding": noise(batch, 12),
            "attention_mask": torch.ones(batch, 5, dtype=torch.bool),
        },
    ),
    Tiny(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        latent=(20, 16),
        text=(5, 12),
        time=0.5,
        more=lambda batch: {"img_shapes": [[(1, 4, 5)]] * batch},
    ),
    Tiny(
        "QwenImage21Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "mlp_ratio": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        latent=(24, 4),
        text=(5, 12),
        time=0.5,
        more=_qwen_two,
    ),
    Tiny(
        "SD3Transformer2DModel",
        {
            **_PATCHED,
            "sample_size": 8,
            "num_layers": 3,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        latent=(4, 8, 8),
        text=(5, 12),
        time=3.0,
    ),
    Tiny(
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 4,
        },
        latent=(4, 3, 4),
        text=(5, 12),
    ),
    Tiny(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 16,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
        },
        latent=(16, 3, 4),
        text=(5, 12),
    ),
    Tiny(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 14,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 32, 32],
        },
        more=_z_image,
    ),
)
"""By class."""
