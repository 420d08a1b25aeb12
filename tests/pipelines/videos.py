"""Cases of transformers that make videos or sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from pipelines.case import Case
from pipelines.images import NEGATIVE, PROMPT, embedded, embeds, hunyuan_image_call
from pipelines.parts import (
    LENGTH,
    WIDTH,
    build,
    clip_images,
    clip_vision,
    cogvideox_vae,
    film,
    hunyuan_vae,
    ltx_vae,
    mask,
    noise,
    picture,
    siglip_images,
    siglip_vision,
    t5,
    t5_text,
    tokenizer,
    wan_vae,
    without,
)

FILM = {**PROMPT, **NEGATIVE, "max_sequence_length": LENGTH, "guidance_scale": 4.0}


def embedded_film(**more: Any) -> dict[str, Any]:
    """For pipelines that wash prompts with ftfy, which need not be installed."""
    return embedded(mask_name="", guidance_scale=4.0, **more)


# ---------------------------------------------------------------------- Wan

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def wan_transformer(seed: int = 1, kind: str = "WanTransformer3DModel", **changes: Any) -> Any:
    return build(getattr(diffusers, kind), seed, **{**WAN, **changes})


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_like(kind: str = "WanPipeline", transformer: Any = None, scheduler: Any = None, **more: Any) -> Any:
    return getattr(diffusers, kind)(
        transformer=transformer or wan_transformer(),
        vae=wan_vae(),
        scheduler=scheduler or unipc(),
        **t5_text(),
        **more,
    )


def wan22(share: float = 0.875) -> Any:
    return wan_like(transformer_2=wan_transformer(2), boundary_ratio=share)


def skyreels() -> Any:
    return diffusers.SkyReelsV2DiffusionForcingPipeline(
        transformer=wan_transformer(kind="SkyReelsV2Transformer3DModel"),
        vae=wan_vae(),
        scheduler=unipc(),
        **t5_text(),
    )


WANS = (
    Case(
        "wan",
        wan_like,
        lambda: {**FILM, "num_frames": 5},
        task="text-to-video",
        guidance="two named calls",
        core="part",
    ),
    Case(
        "wan-euler",
        lambda: wan_like(scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0)),
        lambda: {**FILM, "num_frames": 5},
        task="text-to-video",
        guidance="two named calls",
    ),
    Case(
        "wan2.2",
        wan22,
        lambda: {**FILM, "num_frames": 5, "guidance_scale_2": 3.0},
        task="text-to-video",
        guidance="two named calls",
        steps=10,
        exercises="two experts",
        core="span",
    ),
    Case(
        "wan-i2v",
        lambda: wan_like(
            "WanImageToVideoPipeline",
            wan_transformer(in_channels=36, image_dim=WIDTH),
            image_encoder=clip_vision(),
            image_processor=clip_images(),
        ),
        lambda: embedded_film(image=picture(), num_frames=5),
        task="image-to-video",
        guidance="two named calls",
    ),
    Case(
        "wan-v2v",
        lambda: wan_like("WanVideoToVideoPipeline"),
        lambda: embedded_film(video=film(5), strength=0.6),
        task="video-to-video",
        guidance="two calls",
        steps=10,
    ),
    Case(
        "wan-vace",
        lambda: wan_like(
            "WanVACEPipeline",
            wan_transformer(kind="WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=96),
        ),
        lambda: embedded_film(video=film(5), mask=[mask()] * 5, num_frames=5),
        task="video control",
        guidance="two named calls",
    ),
    Case(
        "skyreels-v2-df",
        skyreels,
        lambda: embedded_film(prompt=None, num_frames=9),
        task="text-to-video",
        guidance="two named calls",
        exercises="diffusion forcing, a timestep per frame",
    ),
    Case(
        "skyreels-v2-df-chunks",
        skyreels,
        lambda: embedded_film(
            prompt=None, num_frames=17, base_num_frames=9, overlap_history=5, ar_step=2, causal_block_size=1
        ),
        task="text-to-video",
        guidance="two named calls",
        exercises="autoregressive chunks",
    ),
)

# ---------------------------------------------------------------------- CogVideoX, LTX, Mochi, Latte, Allegro


def cogvideox_like(kind: str = "CogVideoXPipeline", scheduler: Any = None, **changes: Any) -> Any:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 6,
        "text_embed_dim": WIDTH,
        "num_layers": 3,
        "sample_width": 2,
        "sample_height": 2,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": LENGTH,
        "use_rotary_positional_embeddings": True,
    }
    return getattr(diffusers, kind)(
        transformer=build(diffusers.CogVideoXTransformer3DModel, 1, **{**settings, **changes}),
        vae=cogvideox_vae(),
        scheduler=scheduler or diffusers.CogVideoXDDIMScheduler(),
        **t5_text(),
    )


def ltx_like(kind: str = "LTXPipeline") -> Any:
    return getattr(diffusers, kind)(
        transformer=build(
            diffusers.LTXVideoTransformer3DModel,
            1,
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=WIDTH,
        ),
        vae=ltx_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **t5_text(),
    )


def ltx_call(**more: Any) -> dict[str, Any]:
    return {**FILM, "height": 32, "width": 32, "num_frames": 9, **more}


def mochi() -> Any:
    return diffusers.MochiPipeline(
        transformer=build(
            diffusers.MochiTransformer3DModel,
            1,
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=12,
            qk_norm="rms_norm",
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            activation_fn="swiglu",
            max_sequence_length=LENGTH,
        ),
        vae=build(
            diffusers.AutoencoderKLMochi,
            21,
            latent_channels=12,
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **t5_text(),
    )


def latte() -> Any:
    from pipelines.parts import vae

    return diffusers.LattePipeline(
        transformer=build(
            diffusers.LatteTransformer3DModel,
            1,
            sample_size=8,
            video_length=3,
            num_layers=3,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        vae=vae(levels=2),
        scheduler=DDIMScheduler(),
        **t5_text(length=120),
    )


OTHERS = (
    Case(
        "cogvideox",
        cogvideox_like,
        lambda: {**FILM, "num_frames": 9},
        task="text-to-video",
        guidance="batched",
        core="part",
    ),
    Case(
        "cogvideox-dpm",
        lambda: cogvideox_like(scheduler=diffusers.CogVideoXDPMScheduler()),
        lambda: {**FILM, "num_frames": 9, "use_dynamic_cfg": True},
        task="text-to-video",
        guidance="batched",
        exercises="a scheduler that is handed the prediction before",
    ),
    Case(
        "cogvideox-i2v",
        lambda: cogvideox_like("CogVideoXImageToVideoPipeline", in_channels=8, use_learned_positional_embeddings=True),
        lambda: {**FILM, "image": picture(), "num_frames": 9},
        task="image-to-video",
        guidance="batched",
    ),
    Case(
        "cogvideox-v2v",
        lambda: cogvideox_like("CogVideoXVideoToVideoPipeline"),
        lambda: {**FILM, "video": film(9), "strength": 0.6},
        task="video-to-video",
        guidance="batched",
        steps=10,
    ),
    Case("ltx", ltx_like, ltx_call, task="text-to-video", guidance="batched", core="whole"),
    Case(
        "ltx-i2v",
        lambda: ltx_like("LTXImageToVideoPipeline"),
        lambda: ltx_call(image=picture(side=32)),
        task="image-to-video",
        guidance="batched",
        exercises="a timestep per token",
        core="whole",
    ),
    Case(
        "ltx-condition",
        lambda: ltx_like("LTXConditionPipeline"),
        lambda: ltx_call(image=picture(side=32), frame_index=0, strength=1.0),
        task="image-to-video",
        guidance="batched",
        exercises="a timestep per token",
    ),
    Case("mochi", mochi, lambda: {**FILM, "num_frames": 7}, task="text-to-video", guidance="batched"),
    Case(
        "latte",
        latte,
        lambda: {
            **PROMPT,
            **NEGATIVE,
            "guidance_scale": 4.0,
            "video_length": 3,
            "clean_caption": False,
            "mask_feature": False,
        },
        task="text-to-video",
        guidance="batched",
        exercises="two interleaved lists of blocks",
    ),
)

# ---------------------------------------------------------------------- Hunyuan

HUNYUAN = {
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
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "rope_axes_dim": (2, 4, 4),
}
LLAMA = without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def hunyuan_video(kind: str = "HunyuanVideoPipeline", transformer: Any = None, **more: Any) -> Any:
    return getattr(diffusers, kind)(
        transformer=transformer or build(diffusers.HunyuanVideoTransformer3DModel, 1, **HUNYUAN),
        vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **LLAMA,
        **more,
    )


def hunyuan_call(is_guided: bool = False, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.5}
    for head, seed in (("", 1), *((("negative_", 2),) if is_guided else ())):
        found |= {
            f"{head}prompt_embeds": embeds(seed),
            f"{head}pooled_prompt_embeds": noise(seed + 2, 1, WIDTH),
            f"{head}prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
        }
    return {**found, **({"true_cfg_scale": 3.0} if is_guided else {}), **more}


def framepack() -> Any:
    transformer = build(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        1,
        **{**HUNYUAN, "patch_size": 2},
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    )
    return hunyuan_video(
        "HunyuanVideoFramepackPipeline",
        transformer,
        image_encoder=siglip_vision(),
        feature_extractor=siglip_images(),
    )


HUNYUANS = (
    Case("hunyuan-video", hunyuan_video, hunyuan_call, task="text-to-video", guidance="distilled", core="whole"),
    Case(
        "hunyuan-video-true-cfg",
        hunyuan_video,
        lambda: hunyuan_call(is_guided=True),
        task="text-to-video",
        guidance="true, two named calls",
    ),
    Case(
        "framepack",
        framepack,
        lambda: hunyuan_call(image=picture(side=32), height=32, width=32, num_frames=17, latent_window_size=2),
        task="image-to-video",
        guidance="distilled",
        exercises="chunks, each with a run of its own",
        core="whole",
    ),
    Case(
        "framepack-true-cfg",
        framepack,
        lambda: hunyuan_call(
            is_guided=True, image=picture(side=32), height=32, width=32, num_frames=9, latent_window_size=2
        ),
        task="image-to-video",
        guidance="true, two calls",
        exercises="chunks, each with a run of its own",
    ),
)


def hunyuan_video15() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    return diffusers.HunyuanVideo15Pipeline(
        transformer=build(
            diffusers.HunyuanVideo15Transformer3DModel,
            1,
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        vae=build(
            diffusers.AutoencoderKLHunyuanVideo15,
            21,
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.0, stop=0.5),
        **LLAMA,
    )


HUNYUAN15S = (
    Case(
        "hunyuan-video-1.5",
        hunyuan_video15,
        lambda: {**hunyuan_image_call(), "num_frames": 5},
        task="text-to-video",
        guidance="a guider, two named calls",
        exercises="guidance that stops midway",
    ),
)

# ---------------------------------------------------------------------- LTX-2: video and sound at once


def ltx2() -> Any:
    return diffusers.LTX2Pipeline(
        transformer=build(
            diffusers.LTX2VideoTransformer3DModel,
            1,
            in_channels=4,
            out_channels=4,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=3,
            qk_norm="rms_norm_across_heads",
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
        ),
        connectors=build(
            LTX2TextConnectors,
            2,
            caption_channels=WIDTH,
            text_proj_in_factor=1,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
            rope_type="split",
        ),
        vae=build(
            diffusers.AutoencoderKLLTX2Video,
            21,
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        audio_vae=build(
            diffusers.AutoencoderKLLTX2Audio,
            22,
            base_channels=4,
            output_channels=2,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=None,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            norm_type="pixel",
            causality_axis="height",
            dropout=0.0,
            mid_block_add_attention=False,
            sample_rate=16000,
            mel_hop_length=160,
            is_causal=True,
            mel_bins=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **without("text_encoder", "tokenizer", "vocoder"),
    )


LTX2S = (
    Case(
        "ltx2",
        ltx2,
        lambda: {
            **embedded(side=32, guidance_scale=3.0),
            "num_frames": 5,
            "frame_rate": 25.0,
            "stg_scale": 1.0,
            "modality_scale": 2.0,
            "spatio_temporal_guidance_blocks": [1],
        },
        task="text-to-video with sound",
        guidance="three named calls: batched, a block perturbed, modalities apart",
        exercises="two modalities",
    ),
)

# ---------------------------------------------------------------------- sound


def stable_audio() -> Any:
    return diffusers.StableAudioPipeline(
        transformer=build(
            diffusers.StableAudioDiTModel,
            1,
            sample_size=16,
            in_channels=3,
            out_channels=3,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=WIDTH,
            cross_attention_input_dim=WIDTH,
            time_proj_dim=8,
            global_states_input_dim=2 * WIDTH,
        ),
        vae=build(
            diffusers.AutoencoderOobleck,
            21,
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        projection_model=build(
            diffusers.StableAudioProjectionModel,
            2,
            text_encoder_dim=WIDTH,
            conditioning_dim=WIDTH,
            min_value=0,
            max_value=32,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
        **t5_text(),
    )


def longcat_audio() -> Any:
    import transformers

    return diffusers.LongCatAudioDiTPipeline(
        transformer=build(
            diffusers.LongCatAudioDiTTransformer,
            1,
            dit_dim=64,
            dit_depth=3,
            dit_heads=4,
            dit_text_dim=WIDTH,
            latent_dim=8,
            text_conv=False,
        ),
        vae=build(
            diffusers.LongCatAudioDiTVae,
            21,
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=24000,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
        tokenizer=tokenizer(has_start=False),
        text_encoder=t5(transformers.UMT5EncoderModel),
    )


SOUNDS = (
    Case(
        "stable-audio",
        stable_audio,
        lambda: {"prompt": "a blue star", **NEGATIVE, "guidance_scale": 4.0, "audio_end_in_s": 4.0},
        task="text-to-audio",
        guidance="batched",
        core="span",
    ),
    Case(
        "longcat-audio",
        longcat_audio,
        lambda: {"prompt": "a blue star", **NEGATIVE, "guidance_scale": 4.0, "audio_duration_s": 0.002},
        task="text-to-audio",
        guidance="two calls without names",
        exercises="a timestep that rises",
    ),
)

CASES = (*WANS, *OTHERS, *HUNYUANS, *HUNYUAN15S, *LTX2S, *SOUNDS)
