"""Cases of transformers that make images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from pipelines.case import Case
from pipelines.parts import (
    LENGTH,
    WIDTH,
    build,
    flux_text,
    mask,
    noise,
    picture,
    qwen_vae,
    sd3_text,
    t5,
    t5_text,
    tokenizer,
    vae,
    without,
)

PROMPT = {"prompt": "a red circle", "height": 16, "width": 16}
NEGATIVE = {"negative_prompt": "a blue star"}

# ---------------------------------------------------------------------- FLUX

FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
}


def flux_like(kind: str = "FluxPipeline", transformer: Any = None, scheduler: Any = None, **more: Any) -> Any:
    """Any of FLUX's pipelines; ``more`` is further components, or settings of the transformer."""
    settings = {name: more.pop(name) for name in list(more) if name not in _FLUX_COMPONENTS}
    return getattr(diffusers, kind)(
        transformer=transformer or build(diffusers.FluxTransformer2DModel, 1, **{**FLUX, **settings}),
        vae=vae(levels=2),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        **flux_text(),
        **more,
    )


_FLUX_COMPONENTS = {"controlnet"}


def flux_controlnet(seed: int = 2, **changes: Any) -> Any:
    return build(diffusers.FluxControlNetModel, seed, **{**FLUX, **changes})


def flux_ip_adapter() -> Any:
    transformer = build(diffusers.FluxTransformer2DModel, 1, **FLUX)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for block in transformer.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, WIDTH, num_tokens=(4,)))
        transformer.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(image_embed_dim=12, cross_attention_dim=WIDTH, num_image_text_embeds=4)]
        )
    return flux_like(transformer=transformer.requires_grad_(False))


def flux_call(**more: Any) -> dict[str, Any]:
    return {**PROMPT, "max_sequence_length": LENGTH, "guidance_scale": 3.5, **more}


TRUE_CFG = {**NEGATIVE, "true_cfg_scale": 3.0}


def control(side: int = 16) -> torch.Tensor:
    return noise(5, 1, 3, side, side).sigmoid()


def pipe_of_two_controlnets() -> Any:
    return flux_like("FluxControlNetPipeline", controlnet=[flux_controlnet(2), flux_controlnet(3, num_layers=1)])


def edited(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Another prompt of equal length, from the third step on."""
    return {"prompt_embeds": kwargs["prompt_embeds"].flip(1)} if step == 1 else {}


FLUXES = (
    Case(
        "flux",
        lambda: flux_like(guidance_embeds=True),
        flux_call,
        guidance="distilled",
        core="part",
    ),
    Case("flux-true-cfg", flux_like, lambda: flux_call(**TRUE_CFG), guidance="true, two named calls", core="whole"),
    Case(
        "flux-sigmas",
        flux_like,
        lambda: flux_call(sigmas=[1.0, 0.9, 0.7, 0.4, 0.2, 0.1, 0.05]),
        steps=None,
        exercises="custom sigmas",
    ),
    Case(
        "flux-dynamic-shift",
        lambda: flux_like(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
        flux_call,
        exercises="sigmas shifted by resolution",
    ),
    Case(
        "flux-edited-prompt",
        flux_like,
        lambda: flux_call(
            **TRUE_CFG, callback_on_step_end=edited, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        ),
        guidance="true, two named calls",
        exercises="a callback edits the conditioning midway",
        core="span",
    ),
    Case(
        "flux-img2img",
        lambda: flux_like("FluxImg2ImgPipeline"),
        lambda: flux_call(image=picture(), strength=0.6),
        task="image-to-image",
        steps=10,
        core="whole",
    ),
    Case(
        "flux-inpaint",
        lambda: flux_like("FluxInpaintPipeline"),
        lambda: flux_call(image=picture(), mask_image=mask(), strength=0.7),
        task="inpaint",
        steps=9,
    ),
    Case(
        "flux-fill",
        lambda: flux_like("FluxFillPipeline", in_channels=16 + 16 + 16, out_channels=16),
        lambda: flux_call(image=picture(), mask_image=mask(), guidance_scale=30.0),
        task="fill",
        core="whole",
    ),
    Case(
        "flux-control",
        lambda: flux_like("FluxControlPipeline", in_channels=32, out_channels=16),
        lambda: flux_call(control_image=picture()),
        task="control",
    ),
    Case(
        "flux-control-img2img",
        lambda: flux_like("FluxControlImg2ImgPipeline", in_channels=32, out_channels=16),
        lambda: flux_call(image=picture(1), control_image=picture(), strength=0.6),
        task="control, image-to-image",
        steps=10,
    ),
    Case(
        "flux-controlnet",
        lambda: flux_like("FluxControlNetPipeline", controlnet=flux_controlnet()),
        lambda: flux_call(control_image=control(), controlnet_conditioning_scale=0.7),
        task="ControlNet",
        core="span",
    ),
    Case(
        "flux-controlnet-true-cfg",
        lambda: flux_like("FluxControlNetPipeline", controlnet=flux_controlnet()),
        lambda: flux_call(control_image=control(), control_guidance_end=0.5, **TRUE_CFG),
        task="ControlNet",
        guidance="true, two calls",
        exercises="ControlNet that stops midway",
    ),
    Case(
        "flux-controlnets",
        pipe_of_two_controlnets,
        lambda: flux_call(control_image=[control(), control().flip(2)], controlnet_conditioning_scale=[0.7, 0.4]),
        task="ControlNet",
        exercises="two ControlNets of different depth",
    ),
    Case(
        "flux-controlnet-img2img",
        lambda: flux_like("FluxControlNetImg2ImgPipeline", controlnet=flux_controlnet(num_single_layers=0)),
        lambda: flux_call(image=picture(), control_image=control(), strength=0.6),
        task="ControlNet, image-to-image",
        steps=10,
    ),
    Case(
        "flux-controlnet-inpaint",
        lambda: flux_like("FluxControlNetInpaintPipeline", controlnet=flux_controlnet()),
        lambda: flux_call(image=picture(), mask_image=mask(), control_image=control(), strength=0.7),
        task="ControlNet, inpaint",
        steps=9,
    ),
    Case(
        "flux-ip-adapter",
        flux_ip_adapter,
        lambda: flux_call(
            ip_adapter_image_embeds=[noise(6, 1, 1, 12)],
            negative_ip_adapter_image_embeds=[noise(7, 1, 1, 12)],
            **TRUE_CFG,
        ),
        task="IP-adapter",
        guidance="true, two named calls",
        core="part",
    ),
    Case(
        "flux-kontext",
        lambda: flux_like("FluxKontextPipeline"),
        lambda: flux_call(image=picture(), max_area=256, _auto_resize=False),
        task="edit",
        core="whole",
    ),
)


def flux2() -> Any:
    return diffusers.Flux2KleinPipeline(
        transformer=build(
            diffusers.Flux2Transformer2DModel,
            1,
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        vae=build(
            diffusers.AutoencoderKLFlux2,
            21,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **without("text_encoder", "tokenizer"),
    )


def embeds(seed: int, width: int = WIDTH, length: int = 5, batch: int = 1) -> torch.Tensor:
    return noise(seed, batch, length, width)


FLUX2S = (
    Case(
        "flux2-klein",
        flux2,
        lambda: {
            "prompt_embeds": embeds(1),
            "negative_prompt_embeds": embeds(2),
            "height": 16,
            "width": 16,
            "guidance_scale": 4.0,
        },
        guidance="two named calls",
    ),
    Case(
        "flux2-klein-edit",
        flux2,
        lambda: {
            "image": picture(side=64),
            "prompt_embeds": embeds(1),
            "negative_prompt_embeds": embeds(2),
            "height": 16,
            "width": 16,
            "guidance_scale": 4.0,
        },
        task="edit",
        guidance="two named calls",
    ),
)

# ---------------------------------------------------------------------- Stable Diffusion 3

SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 2 * WIDTH,
    "pooled_projection_dim": 2 * WIDTH,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}


def sd3_like(kind: str = "StableDiffusion3Pipeline", scheduler: Any = None, controlnet: Any = None, **more: Any) -> Any:
    settings = {**SD3, **more}
    return getattr(diffusers, kind)(
        transformer=build(diffusers.SD3Transformer2DModel, 1, **settings),
        vae=vae(settings["in_channels"], levels=2),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **sd3_text(),
        **({"controlnet": controlnet} if controlnet is not None else {}),
    )


def sd3_controlnet() -> Any:
    return build(diffusers.SD3ControlNetModel, 2, **{**SD3, "num_layers": 2})


def sd3_call(**more: Any) -> dict[str, Any]:
    return {**PROMPT, **NEGATIVE, "guidance_scale": 4.0, "max_sequence_length": LENGTH, **more}


SLG = {"skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
SD3S = (
    Case("sd3", sd3_like, sd3_call, guidance="batched", core="part"),
    Case(
        "sd3-two-attentions",
        lambda: sd3_like(dual_attention_layers=(0, 1)),
        sd3_call,
        guidance="batched",
        exercises="blocks with a second attention (SD 3.5)",
    ),
    Case(
        "sd3-heun",
        lambda: sd3_like(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0)),
        sd3_call,
        guidance="batched",
        exercises="two calls per step",
        core="whole",
    ),
    Case(
        "sd3-skip-layer",
        sd3_like,
        lambda: sd3_call(skip_guidance_layers=[1], **SLG),
        guidance="batched, and a third call that leaves a block out",
        exercises="a branch that begins late and ends early",
        core="span",
    ),
    Case(
        "sd3-skip-first-layer",
        sd3_like,
        lambda: sd3_call(skip_guidance_layers=[0], **SLG),
        guidance="batched, and a third call that leaves a block out",
        exercises="the block that is left out is the first",
    ),
    Case(
        "sd3-skip-last-layer",
        sd3_like,
        lambda: sd3_call(skip_guidance_layers=[2], **SLG),
        guidance="batched, and a third call that leaves a block out",
        exercises="the block that is left out is the last",
    ),
    Case(
        "sd3-img2img",
        lambda: sd3_like("StableDiffusion3Img2ImgPipeline"),
        lambda: sd3_call(image=picture(), strength=0.6),
        task="image-to-image",
        guidance="batched",
        steps=10,
    ),
    Case(
        "sd3-inpaint",
        lambda: sd3_like("StableDiffusion3InpaintPipeline", in_channels=16, out_channels=16),
        lambda: sd3_call(image=picture(), mask_image=mask(), strength=0.7),
        task="inpaint",
        guidance="batched",
        steps=9,
    ),
    Case(
        "sd3-controlnet",
        lambda: sd3_like("StableDiffusion3ControlNetPipeline", controlnet=sd3_controlnet()),
        lambda: sd3_call(control_image=control(), controlnet_conditioning_scale=0.7),
        task="ControlNet",
        guidance="batched",
    ),
    Case(
        "sd3-pag",
        lambda: sd3_like("StableDiffusion3PAGPipeline"),
        lambda: sd3_call(pag_scale=2.0),
        guidance="three branches in one batch",
        exercises="perturbed attention",
    ),
)

# ---------------------------------------------------------------------- cross-attention and joint transformers


def pixart(scheduler: Any = None, kind: str = "PixArtSigmaPipeline", **more: Any) -> Any:
    return getattr(diffusers, kind)(
        transformer=build(
            diffusers.PixArtTransformer2DModel,
            1,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
        vae=vae(levels=2),
        scheduler=scheduler or diffusers.DDIMScheduler(),
        **t5_text(),
        **more,
    )


def pixart_call(**more: Any) -> dict[str, Any]:
    plain = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": LENGTH}
    return {**PROMPT, **NEGATIVE, "guidance_scale": 4.0, **plain, **more}


def sana() -> Any:
    autoencoder = build(
        diffusers.AutoencoderDC,
        21,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return diffusers.SanaPipeline(
        transformer=build(
            diffusers.SanaTransformer2DModel,
            1,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=8,
        ),
        vae=autoencoder,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **without("text_encoder", "tokenizer"),
    )


def embedded(side: int = 16, mask_name: str = "{}prompt_attention_mask", **more: Any) -> dict[str, Any]:
    """Two prompts as embeddings with masks."""
    ones = torch.ones(1, 5, dtype=torch.long)
    found = {"prompt_embeds": embeds(1), "negative_prompt_embeds": embeds(2), "height": side, "width": side}
    if mask_name:
        found |= {mask_name.format(""): ones, mask_name.format("negative_"): ones.clone()}
    return {**found, **more}


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=build(
            diffusers.Lumina2Transformer2DModel,
            1,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            cap_feat_dim=WIDTH,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(32, 32, 32),
        ),
        vae=vae(levels=2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **without("text_encoder", "tokenizer"),
    )


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        transformer=build(
            diffusers.ChromaTransformer2DModel,
            1,
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=32,
            approximator_layers=1,
            approximator_num_channels=16,
        ),
        vae=vae(levels=2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **t5_text(),
    )


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        transformer=build(
            diffusers.CogView4Transformer2DModel,
            1,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
        ),
        vae=vae(levels=2),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        **without("text_encoder", "tokenizer"),
    )


def aura_flow() -> Any:
    import transformers

    return diffusers.AuraFlowPipeline(
        transformer=build(
            diffusers.AuraFlowTransformer2DModel,
            1,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=WIDTH,
            pos_embed_max_size=64,
        ),
        vae=vae(levels=2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        tokenizer=tokenizer(has_start=False),
        text_encoder=t5(transformers.UMT5EncoderModel),
    )


def dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=build(
            diffusers.DiTTransformer2DModel,
            1,
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        ),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
    )


QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_like(kind: str = "QwenImagePipeline", **more: Any) -> Any:
    return getattr(diffusers, kind)(
        transformer=build(diffusers.QwenImageTransformer2DModel, 1, **QWEN),
        vae=qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **without("text_encoder", "tokenizer"),
        **more,
    )


def qwen_call(**more: Any) -> dict[str, Any]:
    return {**embedded(mask_name="{}prompt_embeds_mask"), "true_cfg_scale": 3.0, **more}


def hunyuan_image(guider: Any = None, **more: Any) -> Any:
    return diffusers.HunyuanImagePipeline(
        transformer=build(
            diffusers.HunyuanImageTransformer2DModel,
            1,
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            rope_axes_dim=(4, 4),
            **more,
        ),
        vae=build(
            diffusers.AutoencoderKLHunyuanImage,
            21,
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=guider,
        ocr_guider=guider,
        **without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )


def hunyuan_image_call() -> dict[str, Any]:
    found = embedded(mask_name="{}prompt_embeds_mask")
    ones = torch.ones(1, 4, dtype=torch.long)
    for head, seed in (("", 3), ("negative_", 4)):
        found |= {f"{head}prompt_embeds_2": embeds(seed, length=4), f"{head}prompt_embeds_mask_2": ones.clone()}
    return found


def z_image(kind: str = "ZImagePipeline") -> Any:
    return getattr(diffusers, kind)(
        transformer=build(
            diffusers.ZImageTransformer2DModel,
            1,
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            rope_theta=256.0,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        vae=vae(levels=2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **without("text_encoder", "tokenizer"),
    )


def z_image_call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": [embeds(1)[0]],
        "negative_prompt_embeds": [embeds(2, length=7)[0]],
        "height": 16,
        "width": 16,
        "guidance_scale": 3.0,
        **more,
    }


def kandinsky5() -> Any:
    found = diffusers.Kandinsky5T2IPipeline(
        transformer=build(
            diffusers.Kandinsky5Transformer3DModel,
            1,
            in_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=16,
            out_visual_dim=4,
            patch_size=(1, 2, 2),
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=(1, 1, 2),
            visual_cond=False,
            attention_type="regular",
        ),
        vae=vae(levels=2),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    found.resolutions = [(16, 16)]
    return found


def kandinsky5_call() -> dict[str, Any]:
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    found: dict[str, Any] = {"height": 16, "width": 16, "guidance_scale": 4.0}
    for head, seed in (("", 1), ("negative_", 2)):
        found |= {
            f"{head}prompt_embeds_qwen": embeds(seed),
            f"{head}prompt_embeds_clip": noise(seed + 2, 1, WIDTH),
            f"{head}prompt_cu_seqlens": lengths.clone(),
        }
    return found


def guided() -> Any:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    return AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2)


OTHERS = (
    Case("dit", dit, lambda: {"class_labels": [1], "guidance_scale": 3.0}, guidance="batched", output="np"),
    Case("pixart", pixart, pixart_call, guidance="batched", core="part"),
    Case(
        "pixart-timesteps",
        lambda: pixart(diffusers.DDPMScheduler()),
        lambda: pixart_call(timesteps=[990, 900, 700, 400, 200, 100, 10]),
        guidance="batched",
        steps=None,
        exercises="custom timesteps",
    ),
    Case(
        "pixart-pag",
        lambda: pixart(kind="PixArtSigmaPAGPipeline", pag_applied_layers=["blocks.1"]),
        lambda: pixart_call(pag_scale=2.0),
        guidance="three branches in one batch",
        exercises="perturbed attention",
    ),
    Case(
        "sana",
        sana,
        lambda: embedded(side=32, guidance_scale=4.0, use_resolution_binning=False, negative_prompt=None),
        guidance="batched",
    ),
    Case(
        "lumina2",
        lumina2,
        lambda: embedded(side=64, guidance_scale=4.0, cfg_trunc_ratio=0.5),
        guidance="two calls without names",
        exercises="guidance that stops midway",
        core="span",
    ),
    Case(
        "chroma",
        chroma,
        lambda: {**PROMPT, **NEGATIVE, "guidance_scale": 4.0, "max_sequence_length": LENGTH},
        guidance="two named calls",
    ),
    Case(
        "cogview4",
        cogview4,
        lambda: embedded(guidance_scale=4.0, mask_name=""),
        guidance="two named calls",
    ),
    Case(
        "aura-flow",
        aura_flow,
        lambda: {**PROMPT, **NEGATIVE, "guidance_scale": 4.0, "max_sequence_length": LENGTH},
        guidance="batched",
    ),
    Case("qwen-image", qwen_like, qwen_call, guidance="true, two named calls", core="whole"),
    Case(
        "qwen-image-img2img",
        lambda: qwen_like("QwenImageImg2ImgPipeline"),
        lambda: qwen_call(image=picture(), strength=0.6),
        task="image-to-image",
        guidance="true, two named calls",
        steps=10,
    ),
    Case(
        "qwen-image-inpaint",
        lambda: qwen_like("QwenImageInpaintPipeline"),
        lambda: qwen_call(image=picture(), mask_image=mask(), strength=0.7),
        task="inpaint",
        guidance="true, two named calls",
        steps=9,
    ),
    Case(
        "qwen-image-controlnet",
        lambda: qwen_like(
            "QwenImageControlNetPipeline",
            controlnet=build(diffusers.QwenImageControlNetModel, 2, **{**QWEN, "num_layers": 1}),
        ),
        lambda: qwen_call(control_image=control(), controlnet_conditioning_scale=0.7),
        task="ControlNet",
        guidance="true, two named calls",
    ),
    Case(
        "hunyuan-image",
        lambda: hunyuan_image(guided()),
        hunyuan_image_call,
        guidance="a guider, two named calls",
        exercises="guidance that changes its form midway",
    ),
    Case("z-image", z_image, z_image_call, guidance="lists, both branches in one call", core="span"),
    Case(
        "z-image-truncated",
        z_image,
        lambda: z_image_call(cfg_truncation=0.5),
        guidance="lists, both branches in one call",
        exercises="guidance that stops midway",
    ),
    Case(
        "z-image-img2img",
        lambda: z_image("ZImageImg2ImgPipeline"),
        lambda: z_image_call(image=picture(), strength=0.6),
        task="image-to-image",
        guidance="lists, both branches in one call",
        steps=10,
    ),
    Case("kandinsky5", kandinsky5, kandinsky5_call, guidance="two calls without names"),
)

CASES = (*FLUXES, *FLUX2S, *SD3S, *OTHERS)
