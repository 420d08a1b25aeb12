"""The optional inputs of every class: a call with all that its plain one leaves out, and why a few are left out still.

What a configuration must have before an input is read, such as the weights of an adapter, is added to it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cache4diffusion.zoo.tiny import Arguments, Case, Tiny, noise, nothing, places

EVERY = "every optional input"


@dataclass(frozen=True)
class Rich:
    """One class, called with inputs that its plain call leaves out.

    Rows of the batch have texts of different lengths then, where the class takes a mask of the text.

    Args:
        kind: name of the class.
        more: those inputs, by batch size; None takes away what the plain call has.
        config: what its configuration needs so that they are read.
        adapt: what is done to the module, such as to give it the layers of an adapter.
        name: of the call.
    """

    kind: str
    more: Callable[[int], Arguments] = field(default=nothing)
    config: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[nn.Module], None] | None = None
    name: str = EVERY

    def of(self, plain: Tiny) -> Tiny:
        """The class as its plain call has it, with these inputs."""
        return dataclasses.replace(
            plain,
            config={**plain.config, **self.config},
            more=lambda batch: {**plain.more(batch), **self.more(batch)},
            adapt=self.adapt,
            is_padded=True,
        )

    def make(self, plain: Tiny, batch: int = 2) -> Case:
        """The denoiser, and arguments of a call."""
        return self.of(plain).make(batch)


def several(count: int, *shape: int) -> list[torch.Tensor]:
    """Noise for each of some blocks, of another value in each."""
    return [noise(*shape) for _ in range(count)]


def unread(tiny: Tiny, given: Mapping[str, Any]) -> dict[str, str]:
    """Parameters of a class' ``forward`` that a call does not give, with the reason; ``""`` if there is none."""
    names = list(inspect.signature(tiny.cls.forward).parameters)[1:]
    reasons = {**NO_TENSORS, **LEFT_OUT.get(tiny.kind, {})}
    return {name: reasons.get(name, "") for name in names if name not in given}


# --- adapters ---------------------------------------------------------------------------------------------------------


def _flux_adapter(denoiser: Any) -> None:
    """An IP-adapter of one picture, in every block with two streams."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    for block in denoiser.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(16, 12, num_tokens=(4,)))
    projection = ImageProjection(image_embed_dim=14, cross_attention_dim=12, num_image_text_embeds=4)
    denoiser.encoder_hid_proj = MultiIPAdapterImageProjection([projection])


def _sd3_adapter(denoiser: Any) -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    for block in denoiser.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(16, 14, 8, timesteps_emb_dim=10))


def _unet_adapter(denoiser: Any) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    kept = dict(denoiser.attn_processors)
    for name in kept:
        if name.endswith("attn2.processor") and "motion" not in name:
            width = denoiser.get_submodule(name.removesuffix(".processor")).inner_dim
            kept[name] = IPAdapterAttnProcessor2_0(width, 12, num_tokens=(4,))
    denoiser.set_attn_processor(kept)
    projection = ImageProjection(image_embed_dim=14, cross_attention_dim=12, num_image_text_embeds=4)
    denoiser.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    denoiser.register_to_config(encoder_hid_dim_type="ip_image_proj")


def _flux_control(batch: int) -> Arguments:
    return {
        "controlnet_block_samples": several(2, batch, 9, 16),
        "controlnet_single_block_samples": several(2, batch, 9, 16),
    }


def _ip_images(batch: int) -> Arguments:
    return {"joint_attention_kwargs": {"ip_adapter_image_embeds": [noise(batch, 1, 14)]}}


# --- U-Nets -----------------------------------------------------------------------------------------------------------

_ADDED = {
    "time_cond_proj_dim": 6,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


def _conditions(batch: int, images: bool = True) -> Arguments:
    """What SDXL adds to the clock, distilled guidance, and the picture of an IP-adapter."""
    added: Arguments = {"text_embeds": noise(batch, 10), "time_ids": noise(batch, 6)}
    if images:
        added["image_embeds"] = [noise(batch, 1, 14)]
    return {"timestep_cond": noise(batch, 6), "added_cond_kwargs": added}


def _residuals(batch: int, widths: tuple[int, int] = (8, 24), side: int = 16, layers: int = 2) -> Arguments:
    """A ControlNet's: one for every skip, and one for the middle."""
    (outer, inner), half = widths, side // 2
    sizes = [(outer, side)] * (1 + layers) + [(outer, half)] + [(inner, half)] * layers
    return {
        "down_block_additional_residuals": tuple(noise(batch, width, n, n) for width, n in sizes),
        "mid_block_additional_residual": noise(batch, inner, half, half),
    }


def _unet(batch: int) -> Arguments:
    return {
        **_conditions(batch),
        **_residuals(batch),
        "class_labels": torch.arange(batch),
        "encoder_attention_mask": _lengths(batch, 5),
        "down_intrablock_additional_residuals": [noise(batch, 8, 16, 16), noise(batch, 24, 8, 8)],
    }


def _dream_unet(batch: int) -> Arguments:
    return {
        **_conditions(batch, images=False),
        **_residuals(batch, (16, 32), side=8),
        "class_labels": torch.arange(batch),
    }


def _lengths(batch: int, count: int) -> torch.Tensor:
    """A mask of tokens; the last row has fewer than the others."""
    mask = torch.ones(batch, count, dtype=torch.bool)
    mask[-1, count - 1 :] = False
    return mask


# --- transformers -----------------------------------------------------------------------------------------------------


def _image(batch: int) -> Arguments:
    """A picture's tokens."""
    return {"encoder_hidden_states_image": noise(batch, 7, 10)}


def _image_of_wan(batch: int) -> Arguments:
    """A picture's tokens in front of the text's, whose number is fixed."""
    return {**_image(batch), "encoder_hidden_states": noise(batch, 512, 14)}


_WITH_IMAGE = {"image_dim": 10, "added_kv_proj_dim": 24}


def _allegro(batch: int) -> Arguments:
    axes = places(3, 4, 4, axes=3).long().T[:, None].unbind()
    freqs = tuple((noise(size, 4), noise(size, 4)) for size in (3, 4, 4))
    shown = torch.ones(batch, 3, 8, 8)
    shown[-1, :, 6:] = 0
    return {"attention_mask": shown, "image_rotary_emb": (freqs, axes)}


def _cosmos3(batch: int) -> Arguments:
    """Behind the frame, four moments of sound and two of an action."""
    text, frame, sound, action = 3, 12, 4, 2
    first = text + frame
    return {
        "position_ids": torch.zeros(3, first + sound + action, dtype=torch.long),
        "sequence_length": first + sound + action,
        "sound_tokens": [noise(3, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": torch.arange(first, first + sound),
        "sound_mse_loss_indexes": torch.arange(first, first + sound),
        "sound_timesteps": torch.full((sound,), 0.5),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
        "action_tokens": [noise(action, 3)],
        "action_token_shapes": [(action, 1, 1)],
        "action_sequence_indexes": torch.arange(first + sound, first + sound + action),
        "action_mse_loss_indexes": torch.arange(first + sound, first + sound + action),
        "action_timesteps": torch.full((action,), 0.5),
        "action_noisy_frame_indexes": [torch.arange(action)],
        "action_domain_ids": [torch.tensor([1])],
    }


def _hidream(batch: int) -> Arguments:
    """Pictures as rows of patches, of which some are padding."""
    return {
        "hidden_states": noise(batch, 16, 16),
        "img_ids": places(4, 4, axes=3).expand(batch, -1, -1),
        "img_sizes": [(4, 4)] * batch,
        "hidden_states_masks": torch.ones(batch, 16),
    }


def _ltx2(batch: int) -> Arguments:
    seen = torch.ones(batch, 24, 24)
    seen[:, :12, 12:] = 0
    return {
        "audio_timestep": torch.full((batch,), 400.0),
        "sigma": torch.full((batch,), 0.5),
        "audio_sigma": torch.full((batch,), 0.4),
        "use_cross_timestep": True,
        "audio_encoder_attention_mask": _lengths(batch, 5).float(),
        "video_coords": noise(batch, 3, 24, 2),
        "audio_coords": noise(batch, 1, 9, 2),
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.arange(batch).clamp(max=1).float(),
        "video_self_attention_mask": seen,
        "video_keyframes_mask": (torch.arange(24) < 12).float()[:, None].expand(batch, -1, -1),
    }


def _omnigen(batch: int) -> Arguments:
    """A picture to edit, in the middle of the prompt."""
    words, image = 3 + 16 + 3, 16
    count = words + 1 + image
    return {
        "input_ids": torch.randint(0, 10, (batch, words)),
        "input_img_latents": several(batch, 1, 4, 8, 8),
        "input_image_sizes": {row: [[3, 19]] for row in range(batch)},
        "attention_mask": torch.ones(batch, count, count),
        "position_ids": torch.arange(count).expand(batch, -1),
    }


def _sana_wm(batch: int) -> Arguments:
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])]).expand(batch, 3, -1)
    return {
        "camera_conditions": camera + 0.01 * noise(batch, 3, 20),
        "chunk_plucker": noise(batch, 6, 3, 4, 4),
        "frame_valid_mask": _lengths(batch, 3),
        "data_info": {"image_vae_embeds": noise(batch, 4, 3, 4, 4)},
    }


def _z_omni(batch: int) -> Arguments:
    """A picture to go by in front of the one that is made, and what a vision encoder says of it."""
    return {
        "x": [several(2, 4, 1, 8, 12) for _ in range(batch)],
        "cap_feats": [several(2, 5, 14) for _ in range(batch)],
        "siglip_feats": [[noise(2, 3, 10), None] for _ in range(batch)],
        "image_noise_mask": [[0, 1] for _ in range(batch)],
    }


RICH: tuple[Rich, ...] = (
    Rich("AllegroTransformer3DModel", _allegro),
    Rich("AnyFlowFARTransformer3DModel", _image, {"image_dim": 10}),
    Rich("AnyFlowTransformer3DModel", _image, {"image_dim": 10}),
    Rich(
        "AudioLDM2UNet2DConditionModel",
        lambda batch: {
            "class_labels": noise(batch, 10),
            "timestep_cond": noise(batch, 6),
            "encoder_attention_mask": _lengths(batch, 5),
        },
        {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 10,
            "time_cond_proj_dim": 6,
        },
    ),
    Rich(
        "BriaTransformer2DModel",
        lambda batch: {"controlnet_block_samples": several(2, batch, 12, 16)},
    ),
    Rich("BriaFiboTransformer2DModel", config={"guidance_embeds": True}),
    Rich(
        "BriaFibo2Transformer2DModel",
        lambda batch: {"encoder_attention_mask": _lengths(batch, 5), "context_latents": several(2, batch, 4, 4, 6)},
    ),
    Rich(
        "ChromaTransformer2DModel",
        lambda batch: {
            **_ip_images(batch),
            "attention_mask": torch.cat([_lengths(batch, 5), torch.ones(batch, 12, dtype=torch.bool)], dim=1),
            "controlnet_block_samples": several(2, batch, 12, 16),
            "controlnet_single_block_samples": several(2, batch, 12, 16),
        },
        adapt=_flux_adapter,
    ),
    Rich("ChronoEditTransformer3DModel", _image_of_wan, _WITH_IMAGE),
    Rich("CogVideoXTransformer3DModel", lambda batch: {"ofs": torch.full((1,), 2.0)}, {"ofs_embed_dim": 6}),
    Rich(
        "CogView4Transformer2DModel",
        lambda batch: {"attention_mask": _lengths(batch, 5).float(), "image_rotary_emb": (noise(16, 8), noise(16, 8))},
    ),
    Rich(
        "CosmosTransformer3DModel",
        lambda batch: {
            "block_controlnet_hidden_states": several(2, batch, 48, 24),
            "condition_mask": torch.ones(batch, 1, 3, 8, 8),
        },
        {"in_channels": 5, "controlnet_block_every_n": 1},
    ),
    Rich(
        "Cosmos3OmniTransformer",
        _cosmos3,
        {"sound_gen": True, "sound_dim": 3, "action_gen": True, "action_dim": 3},
    ),
    Rich("DreamLiteTransformer2DModel", lambda batch: {"attention_mask": _lengths(batch, 12)}),
    Rich(
        "DreamLiteUNetModel",
        _dream_unet,
        {**_ADDED, "num_class_embeds": 10},
    ),
    Rich(
        "EasyAnimateTransformer3DModel",
        lambda batch: {
            "encoder_hidden_states_t5": noise(batch, 6, 10),
            "inpaint_latents": noise(batch, 3, 2, 8, 8),
            "control_latents": noise(batch, 2, 2, 8, 8),
        },
        {"in_channels": 9, "text_embed_dim_t5": 10},
    ),
    Rich("FluxTransformer2DModel", _flux_control, name="ControlNet"),
    Rich("FluxTransformer2DModel", lambda batch: {**_flux_control(batch), **_ip_images(batch)}, adapt=_flux_adapter),
    Rich(
        "Flux3Transformer2DModel",
        lambda batch: {
            "image_cond_hidden_states": noise(batch, 6, 4),
            "image_cond_ids": places(2, 3, axes=4),
            "target_timestep": torch.full((batch,), 0.25),
        },
        {"flow_map": True},
    ),
    Rich(
        "GlmImageTransformer2DModel",
        lambda batch: {"attention_mask": _lengths(batch, 5).float(), "image_rotary_emb": (noise(16, 8), noise(16, 8))},
    ),
    Rich("HiDreamImageTransformer2DModel", _hidream),
    Rich("HunyuanDiT2DModel", lambda batch: {"controlnet_block_samples": several(1, batch, 16, 16)}),
    Rich(
        "HunyuanImageTransformer2DModel",
        lambda batch: {"timestep_r": torch.full((batch,), 250.0)},
        {"use_meanflow": True},
    ),
    Rich(
        "HunyuanVideo15Transformer3DModel",
        lambda batch: {"timestep_r": torch.full((batch,), 250.0)},
        {"use_meanflow": True},
    ),
    Rich(
        "Kandinsky6Transformer3DModel",
        lambda batch: {
            "visual_rope_pos": tuple(torch.arange(size) for size in (3, 4, 4)),
            "visual_token_type_ids": torch.tensor([0, 1, 1]).expand(batch, -1),
        },
        {"visual_token_type_num_embeddings": 2},
    ),
    Rich(
        "LTXVideoTransformer3DModel",
        lambda batch: {"rope_interpolation_scale": (0.3, 32.0, 32.0), "video_coords": noise(batch, 3, 24)},
    ),
    Rich(
        "LTX2VideoTransformer3DModel",
        _ltx2,
        {
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "perturbed_attn": True,
            "use_keyframes_abs_pos_embedding": True,
        },
    ),
    Rich("LatteTransformer3DModel", lambda batch: {"encoder_attention_mask": noise(3 * batch, 1, 5)}),
    Rich(
        "LongCatAudioDiTTransformer",
        lambda batch: {"latent_cond": noise(batch, 9, 6)},
        {"use_latent_condition": True},
    ),
    Rich("MotifVideoTransformer3DModel", lambda batch: {"image_embeds": noise(batch, 3, 6)}),
    Rich("OmniGenTransformer2DModel", _omnigen),
    Rich("PRXTransformer2DModel", lambda batch: {"attention_mask": _lengths(batch, 5)}),
    Rich(
        "PixArtTransformer2DModel",
        lambda batch: {
            "attention_mask": _lengths(batch, 16),
            "added_cond_kwargs": {"resolution": noise(batch, 2), "aspect_ratio": noise(batch, 1)},
        },
        {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24},
    ),
    Rich(
        "QwenImageTransformer2DModel",
        lambda batch: {
            "controlnet_block_samples": several(2, batch, 20, 32),
            "additional_t_cond": torch.arange(batch).clamp(max=1),
        },
        {"use_additional_t_cond": True},
    ),
    Rich(
        "SD3Transformer2DModel",
        lambda batch: {
            "block_controlnet_hidden_states": several(2, batch, 16, 16),
            "joint_attention_kwargs": {"ip_hidden_states": noise(batch, 4, 14), "temb": noise(batch, 10)},
        },
        adapt=_sd3_adapter,
    ),
    Rich(
        "SanaTransformer2DModel",
        lambda batch: {
            "guidance": torch.full((batch,), 4.5),
            "attention_mask": _lengths(batch, 12),
            "controlnet_block_samples": tuple(several(1, batch, 12, 16)),
        },
        {"guidance_embeds": True},
    ),
    Rich(
        "SanaVideoTransformer3DModel",
        lambda batch: {
            "guidance": torch.full((batch,), 4.5),
            "attention_mask": _lengths(batch, 48),
            "controlnet_block_samples": tuple(several(1, batch, 48, 24)),
        },
        {"guidance_embeds": True},
    ),
    Rich("SanaWMTransformer3DModel", _sana_wm, {"in_channels": 8, "hidden_size": 32, "linear_head_dim": 16}),
    Rich(
        "SkyReelsV2Transformer3DModel",
        lambda batch: {**_image_of_wan(batch), "fps": torch.arange(batch).clamp(max=1)},
        {**_WITH_IMAGE, "inject_sample_info": True},
    ),
    Rich("StableAudioDiTModel", lambda batch: {"attention_mask": _lengths(batch, 12)}),
    Rich("StableAudio3DiTModel", lambda batch: {"local_add_cond": noise(batch, 5, 9)}),
    Rich(
        "StableCascadeUNet",
        lambda batch: {
            "effnet": noise(batch, 6, 4, 4),
            "pixels": noise(batch, 3, 8, 8),
        },
        {"effnet_in_channels": 6, "pixel_mapper_in_channels": 3},
    ),
    Rich(
        "Transformer2DModel",
        lambda batch: {"attention_mask": _lengths(batch, 12), "class_labels": torch.arange(batch)},
        {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10, "norm_elementwise_affine": False},
    ),
    Rich(
        "TransformerTemporalModel",
        lambda batch: {"encoder_hidden_states": noise(16 * batch, 5, 14)},
        {"cross_attention_dim": 14, "double_self_attention": False},
    ),
    Rich("UNet2DModel", lambda batch: {"class_labels": torch.arange(batch)}, {"num_class_embeds": 10}),
    Rich("UNet2DConditionModel", _unet, {**_ADDED, "num_class_embeds": 10}, adapt=_unet_adapter),
    Rich(
        "UNet3DConditionModel",
        lambda batch: {"timestep_cond": noise(batch, 6), **_residuals(3 * batch, side=8)},
        {"time_cond_proj_dim": 6},
    ),
    Rich(
        "UNetMotionModel",
        lambda batch: {**_conditions(batch, images=False), **_residuals(3 * batch, side=8)},
        _ADDED,
    ),
    Rich(
        "UniDiffuserModel",
        lambda batch: {"data_type": torch.arange(batch).clamp(max=1)},
        {"use_data_type_embedding": True},
    ),
    Rich("WanTransformer3DModel", _image_of_wan, _WITH_IMAGE),
    Rich(
        "WanVACETransformer3DModel",
        lambda batch: {**_image_of_wan(batch), "control_hidden_states_scale": torch.tensor([0.7, 0.4])},
        _WITH_IMAGE,
    ),
    Rich(
        "ZImageTransformer2DModel",
        lambda batch: {"controlnet_block_samples": dict(enumerate(several(2, batch, 64, 16)))},
        name="ControlNet",
    ),
    Rich("ZImageTransformer2DModel", _z_omni, {"siglip_feat_dim": 10}),
)
"""By class; several rows where inputs exclude each other, or deserve a row of their own."""

# --- what is left out -------------------------------------------------------------------------------------------------

_SCALE = "no tensor: the scale of a LoRA, or words for attention processors"
_FLAG = "no tensor"
NO_TENSORS = {
    "return_dict": _FLAG,
    "attention_kwargs": _SCALE,
    "joint_attention_kwargs": _SCALE,
    "cross_attention_kwargs": _SCALE,
    "controlnet_blocks_repeat": _FLAG,
    "skip_layers": "no tensors: numbers of blocks; `sd3-skip-layer` of docs/benchmarks/pipelines.md has them",
    "scale_factor": _FLAG,
    "patch_size": _FLAG,
    "f_patch_size": _FLAG,
    "enable_temporal_attentions": _FLAG,
    "isolate_modalities": _FLAG,
    "enable_diffusion_forcing": _FLAG,
    "recycle_depth": _FLAG,
    "chunk_size": _FLAG,
    "motion_encode_batch_size": _FLAG,
    "origin_len": _FLAG,
    "origin_area": _FLAG,
    "is_uncondtion": _FLAG,
    "num_ref_tokens": _FLAG,
    "ref_fixed_timestep": _FLAG,
    "kv_cache_mode": _FLAG,
}
"""Parameters of these names hold none, in any class."""

_KEPT = "what an earlier call left behind, and part of what comes back: no input of one call alone"
_NO_WEIGHTS = "no configuration of the class has the weights for it"
_NEVER_READ = "taken, and never read"
_ONE_LENGTH = "one length for the tokens of every level, and levels differ in theirs"
LEFT_OUT: dict[str, dict[str, str]] = {
    "AnyFlowFARTransformer3DModel": {
        "clean_hidden_states": "training",
        "clean_timestep": "training",
        "kv_cache": _KEPT,
        "kv_cache_flag": _KEPT,
        "attention_mask": "a mask of blocks, compiled beforehand: no tensor",
    },
    "AudioLDM2UNet2DConditionModel": {"attention_mask": _ONE_LENGTH},
    "BriaTransformer2DModel": {
        "pooled_projections": _NEVER_READ,
        "guidance": "its embedder cannot be made: the class raises",
        "controlnet_single_block_samples": "added behind a text that is not in the row: the class raises",
    },
    "BriaFiboTransformer2DModel": {"pooled_projections": _NEVER_READ},
    "CogVideoXTransformer3DModel": {"timestep_cond": _NO_WEIGHTS},
    "ConsisIDTransformer3DModel": {"timestep_cond": _NO_WEIGHTS},
    "CosmosTransformer3DModel": {"padding_mask": "needs torchvision"},
    "DreamLiteTransformer2DModel": {
        "added_cond_kwargs": _NEVER_READ,
        "class_labels": "read by norms that no configuration of the class has",
    },
    "DreamLiteUNetModel": {
        "attention_mask": _ONE_LENGTH,
        "down_intrablock_additional_residuals": "its blocks without self-attention take none",
    },
    "EasyAnimateTransformer3DModel": {"timestep_cond": _NO_WEIGHTS},
    "Flux2Transformer2DModel": {"kv_cache": _KEPT},
    "GlmImageTransformer2DModel": {"kv_caches": _KEPT},
    "I2VGenXLUNet": {"timestep_cond": _NO_WEIGHTS},
    "Kandinsky5Transformer3DModel": {"sparse_params": "masks of blocks for compiled sparse attention"},
    "LongCatImageTransformer2DModel": {"guidance": _NEVER_READ},
    "QwenImage21Transformer2DModel": {"kv_cache": _KEPT},
    "QwenImageTransformer2DModel": {"guidance": "handed to an embedder that takes none: the class raises"},
    "RFD4ProteinaTransformer": {"atom37_mask": "read by features of known atoms, which have no small configuration"},
    "SanaWMLTX2RefinerTransformer3DModel": {"kv_cache": _KEPT},
    "SanaWMTransformer3DModel": {
        "mask": "another name of encoder_attention_mask",
        "cam_pos_embeds": "what is computed from camera_conditions otherwise",
        "raymats": "what is computed from camera_conditions otherwise",
        "pos_embeds": "what is computed from the latent otherwise",
    },
    "StableCascadeUNet": dict.fromkeys(
        ("sca", "crp"), "asked for its truth, which several rows do not have: the class raises"
    ),
    "Transformer2DModel": {"added_cond_kwargs": "read in the configuration of PixArt, a class of its own"},
    "TransformerTemporalModel": {"class_labels": "read by norms that no configuration of the class has"},
    "UNet2DConditionModel": {"attention_mask": _ONE_LENGTH},
    "UNet3DConditionModel": {"attention_mask": _ONE_LENGTH, "class_labels": _NEVER_READ},
    "UNetMotionModel": {"attention_mask": _ONE_LENGTH},
    "UniDiffuserModel": {"encoder_hidden_states": _NEVER_READ},
    "WanAnimate2Transformer3DModel": {"reference_grid_sizes": "read with a cache that an earlier call has filled"},
}
"""By class and parameter: why no call here gives it."""
