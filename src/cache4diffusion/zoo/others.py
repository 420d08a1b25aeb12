"""Transformers that make sound, molecules, or several things at once."""

from __future__ import annotations

import torch

from cache4diffusion.zoo.tiny import Arguments, Tiny, noise


def _ace(batch: int) -> Arguments:
    return {"timestep_r": torch.full((batch,), 0.25), "context_latents": noise(batch, 8, 12)}


def _film(batch: int) -> Arguments:
    """Notes and what was played before, each with a mask."""
    return {
        "encodings_and_masks": [(noise(batch, n, 16), torch.ones(batch, n)) for n in (5, 7)],
        "decoder_input_tokens": noise(batch, 12, 6),
        "decoder_noise_time": torch.full((batch,), 0.5),
    }


def _proteina(batch: int) -> Arguments:
    """A chain of nine residues: places of their backbone, and a latent for each."""
    count = 9
    here = torch.ones(batch, count, dtype=torch.bool)
    return {
        "bb_ca": noise(batch, count, 3),
        "local_latents": noise(batch, count, 6),
        "bb_ca_time": torch.full((batch,), 0.5),
        "local_latents_time": torch.full((batch,), 0.5),
        "padding_mask": here,
        "token_type": torch.zeros(batch, count, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": ~here, "supports_local_latent": here},
    }


def _stable_audio(batch: int) -> Arguments:
    return {"global_hidden_states": noise(batch, 1, 10), "rotary_embedding": (noise(13, 4), noise(13, 4))}


def _unidiffuser(batch: int) -> Arguments:
    return {
        "latent_image_embeds": noise(batch, 4, 8, 8),
        "image_embeds": noise(batch, 1, 10),
        "prompt_embeds": noise(batch, 5, 12),
        "timestep_img": torch.full((batch,), 500.0),
        "timestep_text": torch.full((batch,), 500.0),
    }


OTHERS = (
    Tiny(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16,
            "intermediate_size": 36,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 18,
            "audio_acoustic_hidden_dim": 6,
            "patch_size": 2,
            "sliding_window": 16,
        },
        latent=(8, 6),
        text=(5, 16),
        time=0.5,
        more=_ace,
    ),
    Tiny(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 2,
            "dit_heads": 2,
            "dit_text_dim": 12,
            "latent_dim": 6,
            "text_conv": False,
        },
        latent=(9, 6),
        text=(5, 12),
        time=0.5,
        more=lambda batch: {"attention_mask": torch.ones(batch, 9, dtype=torch.bool)},
    ),
    Tiny(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 6,
            "condition_dim": 12,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 36,
            "rotary_dim": 4,
            "fourier_embedding_dim": 10,
        },
        latent=(6, 9),
        text=(9, 12),
        time=0.5,
    ),
    Tiny(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 2,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 12,
            "pair_repr_dim": 10,
            "latent_dim": 6,
            "token_type_emb_dim": 4,
            "t_emb_dim": 8,
            "seq_sep_dim": 5,
            "xt_pair_dist_dim": 7,
            "tri_mult_c": 6,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        more=_proteina,
    ),
    Tiny(
        "StableAudioDiTModel",
        {
            "sample_size": 12,
            "in_channels": 6,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 6,
            "cross_attention_dim": 8,
            "time_proj_dim": 10,
            "global_states_input_dim": 10,
            "cross_attention_input_dim": 12,
        },
        latent=(6, 12),
        text=(5, 12),
        time=0.5,
        more=_stable_audio,
    ),
    Tiny(
        "StableAudio3DiTModel",
        {
            "io_channels": 6,
            "patch_size": 1,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 12,
            "global_cond_dim": 10,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 14,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        latent=(6, 9),
        text=(5, 12),
        time=0.5,
        more=lambda batch: {"global_hidden_states": noise(batch, 10)},
    ),
    Tiny(
        "T5FilmDecoder",
        {
            "input_dims": 6,
            "targets_length": 12,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 36,
        },
        more=_film,
    ),
    Tiny(
        "UniDiffuserModel",
        {
            "text_dim": 12,
            "clip_img_dim": 10,
            "num_text_tokens": 5,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "sample_size": 8,
            "patch_size": 2,
            "norm_num_groups": 4,
            "activation_fn": "gelu",
        },
        more=_unidiffuser,
    ),
)
"""By class."""
