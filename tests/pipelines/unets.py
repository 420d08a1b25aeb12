"""Cases of U-Nets: images, short videos, and every kind of scheduler."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from pipelines.case import UNET, Case
from pipelines.images import NEGATIVE, PROMPT, control, pixart, pixart_call
from pipelines.parts import (
    WIDTH,
    build,
    clip_images,
    clip_text,
    clip_vision,
    clip_with_projection,
    mask,
    noise,
    picture,
    tokenizer,
    vae,
    without,
)

SD = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}
UNCHECKED = {**without("safety_checker", "feature_extractor"), "requires_safety_checker": False}


def unet(**changes: Any) -> Any:
    return build(diffusers.UNet2DConditionModel, 1, **{**SD, **changes})


def sd_like(kind: str = "StableDiffusionPipeline", scheduler: Any = None, denoiser: Any = None, **more: Any) -> Any:
    return getattr(diffusers, kind)(
        unet=denoiser or unet(),
        vae=vae(levels=2),
        scheduler=scheduler or DDIMScheduler(),
        **clip_text(),
        **UNCHECKED,
        **more,
    )


def sd_call(**more: Any) -> dict[str, Any]:
    return {**PROMPT, **NEGATIVE, "guidance_scale": 4.0, **more}


def sd_controlnet() -> Any:
    kinds = {"down_block_types": SD["down_block_types"], "conditioning_embedding_out_channels": (4, 4)}
    shape = {name: SD[name] for name in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    return build(diffusers.ControlNetModel, 2, **shape, **kinds, cross_attention_dim=WIDTH, attention_head_dim=2)


def sd_ip_adapter() -> Any:
    """Loaded as diffusers does it, from random weights."""
    denoiser, seeds = unet(), iter(range(100, 200))

    def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name.replace("__", "."): noise(next(seeds), *shape) for name, shape in shapes.items()}

    projection = weights(
        proj__weight=(4 * WIDTH, 10), proj__bias=(4 * WIDTH,), norm__weight=(WIDTH,), norm__bias=(WIDTH,)
    )
    attentions = [name.removesuffix(".processor") for name in denoiser.attn_processors if "attn2" in name]
    widths = [denoiser.get_submodule(name).inner_dim for name in attentions]
    sizes = {f"{2 * i + 1}__to_{kind}_ip__weight": (width, WIDTH) for i, width in enumerate(widths) for kind in "kv"}
    state = {"image_proj": projection, "ip_adapter": weights(**sizes)}
    denoiser._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
    return sd_like(denoiser=denoiser.eval().requires_grad_(False))


def sdxl_like(kind: str = "StableDiffusionXLPipeline", **more: Any) -> Any:
    return getattr(diffusers, kind)(
        unet=unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            cross_attention_dim=2 * WIDTH,
            transformer_layers_per_block=(2, 1),
            use_linear_projection=True,
        ),
        vae=vae(levels=2),
        scheduler=diffusers.EulerDiscreteScheduler(),
        **clip_text(),
        tokenizer_2=tokenizer(),
        text_encoder_2=clip_with_projection(),
        **more,
    )


def guidance_off(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What diffusers' documentation calls dynamic classifier-free guidance."""
    if step != 2:
        return kwargs
    pipe._guidance_scale = 0.0
    return {name: value.chunk(2)[-1] for name, value in kwargs.items()}


SDXL_KEPT = ["prompt_embeds", "add_text_embeds", "add_time_ids"]


def lcm() -> Any:
    return diffusers.LatentConsistencyModelPipeline(
        unet=unet(time_cond_proj_dim=16),
        vae=vae(levels=2),
        scheduler=diffusers.LCMScheduler(),
        **clip_text(),
        **UNCHECKED,
    )


def animatediff(kind: str = "AnimateDiffPipeline") -> Any:
    adapter = build(
        diffusers.MotionAdapter,
        3,
        block_out_channels=SD["block_out_channels"],
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    return getattr(diffusers, kind)(
        unet=unet(), motion_adapter=adapter, vae=vae(levels=2), scheduler=DDIMScheduler(), **clip_text()
    )


def svd() -> Any:
    return diffusers.StableVideoDiffusionPipeline(
        unet=build(
            diffusers.UNetSpatioTemporalConditionModel,
            1,
            block_out_channels=(32, 32),
            layers_per_block=1,
            sample_size=8,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=WIDTH,
            num_attention_heads=2,
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        vae=build(
            diffusers.AutoencoderKLTemporalDecoder,
            21,
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
            sigma_max=700.0, interpolation_type="linear",
        ),
        image_encoder=clip_vision(16),
        feature_extractor=clip_images(16),
    )  # fmt: skip


IMAGES = (
    Case(
        "sd",
        sd_like,
        sd_call,
        guidance="batched",
        sites=(*UNET, "span"),
        without={"span": "has no stack of blocks that carries the latent"},
        core="level",
    ),
    Case(
        "sd-rows",
        sd_like,
        lambda: sd_call(prompt=["a red circle", "a star"], negative_prompt=["a", "blue"]),
        guidance="batched",
        sites=UNET,
        exercises="two prompts",
    ),
    Case(
        "sd-timesteps",
        lambda: sd_like(scheduler=diffusers.EulerDiscreteScheduler()),
        lambda: sd_call(timesteps=[990, 900, 700, 400, 200, 100, 10]),
        guidance="batched",
        steps=None,
        sites=UNET,
        exercises="custom timesteps",
    ),
    Case(
        "sd-sigmas",
        lambda: sd_like(scheduler=diffusers.EulerDiscreteScheduler()),
        lambda: sd_call(sigmas=[14.0, 8.0, 3.0, 1.0, 0.5, 0.1]),
        guidance="batched",
        steps=None,
        sites=UNET,
        exercises="custom sigmas",
    ),
    Case(
        "sd-img2img",
        lambda: sd_like("StableDiffusionImg2ImgPipeline"),
        lambda: {**sd_call(image=picture(), strength=0.6), "height": None, "width": None},
        task="image-to-image",
        guidance="batched",
        steps=10,
        sites=UNET,
    ),
    Case(
        "sd-inpaint",
        lambda: sd_like("StableDiffusionInpaintPipeline", denoiser=unet(in_channels=9)),
        lambda: sd_call(image=picture(), mask_image=mask(), strength=0.7),
        task="inpaint",
        guidance="batched",
        steps=9,
        sites=UNET,
    ),
    Case(
        "sd-controlnet",
        lambda: sd_like("StableDiffusionControlNetPipeline", controlnet=sd_controlnet()),
        lambda: sd_call(image=control(), control_guidance_end=0.5),
        task="ControlNet",
        guidance="batched",
        sites=UNET,
        exercises="ControlNet that stops midway",
    ),
    Case(
        "sd-ip-adapter",
        sd_ip_adapter,
        lambda: sd_call(ip_adapter_image_embeds=[noise(6, 2, 1, 10)]),
        task="IP-adapter",
        guidance="batched",
        sites=UNET,
    ),
    Case(
        "sd-pag",
        lambda: sd_like("StableDiffusionPAGPipeline", pag_applied_layers=["down"]),
        lambda: sd_call(pag_scale=2.0),
        guidance="three branches in one batch",
        sites=UNET,
        exercises="perturbed attention",
        core="whole",
    ),
    Case(
        "sd-instruct-pix2pix",
        lambda: sd_like("StableDiffusionInstructPix2PixPipeline", denoiser=unet(in_channels=8)),
        lambda: {"prompt": "a star", "image": picture(), "guidance_scale": 4.0, "image_guidance_scale": 1.5},
        task="edit",
        guidance="three branches in one batch",
        sites=UNET,
    ),
    Case("lcm", lcm, lambda: {**PROMPT, "guidance_scale": 6.0}, guidance="distilled", sites=UNET),
    Case("sdxl", sdxl_like, sd_call, guidance="batched", sites=UNET),
    Case(
        "sdxl-guidance-off",
        sdxl_like,
        lambda: sd_call(callback_on_step_end=guidance_off, callback_on_step_end_tensor_inputs=SDXL_KEPT),
        guidance="batched",
        sites=UNET,
        exercises="a callback ends guidance midway",
        core="whole",
    ),
    Case(
        "sdxl-denoising-end",
        sdxl_like,
        lambda: sd_call(denoising_end=0.6),
        guidance="batched",
        steps=10,
        sites=UNET,
        exercises="a loop that ends early, before a refiner",
    ),
    Case(
        "sdxl-img2img-part",
        lambda: sdxl_like("StableDiffusionXLImg2ImgPipeline"),
        lambda: {**sd_call(image=picture(), denoising_start=0.4), "height": None, "width": None},
        task="image-to-image",
        guidance="batched",
        steps=10,
        sites=UNET,
        exercises="a loop that starts late, as a refiner",
    ),
)

VIDEOS = (
    Case(
        "animatediff",
        animatediff,
        lambda: sd_call(num_frames=3),
        task="text-to-video",
        guidance="batched",
        sites=UNET,
    ),
    Case(
        "animatediff-video2video",
        lambda: animatediff("AnimateDiffVideoToVideoPipeline"),
        lambda: sd_call(video=[picture(i) for i in range(3)], strength=0.6),
        task="video-to-video",
        guidance="batched",
        steps=10,
        sites=UNET,
    ),
    Case(
        "svd",
        svd,
        lambda: {"image": noise(1, 1, 3, 16, 16).sigmoid(), "height": 16, "width": 16, "num_frames": 3, "fps": 7},
        task="image-to-video",
        guidance="batched",
        sites=UNET,
    ),
)

# ---------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++2m-karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm++2m-sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm-singlestep": diffusers.DPMSolverSinglestepScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2-ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "sa-solver": diffusers.SASolverScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "pndm-prk": diffusers.PNDMScheduler,
    "ipndm": diffusers.IPNDMScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
CORE_SCHEDULERS = {"heun": "part", "pndm-prk": "whole", "dpm-singlestep": "whole", "lms": "whole", "lcm": "whole"}

ON_SCHEDULERS = tuple(
    Case(
        f"pixart, {name}",
        lambda make=make: pixart(make()),
        pixart_call,
        guidance="batched",
        exercises="a scheduler",
        core=CORE_SCHEDULERS.get(name),
    )
    for name, make in SCHEDULERS.items()
)

CASES = (*IMAGES, *VIDEOS, *ON_SCHEDULERS)
