"""Tiny random guided pipelines, and what a denoiser was really called with."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn

from weights import ready


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return ready(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=10,
            patch_size=2,
            num_embeds_ada_norm=1000,  # DiTPipeline's null class is 1000
        )
    )


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return ready(
        UNet2DConditionModel(
            sample_size=10,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
        )
    )


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return ready(
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(2, 2, 4),
        )
    )


def vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return ready(AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=10))


class Guided:
    """A stock pipeline with one way to sample from it."""

    def __init__(self, kind: str):
        self.kind = kind
        if kind == "sd":
            self.pipe = StableDiffusionPipeline(
                vae=vae(),
                unet=unet(),
                scheduler=DDIMScheduler(),
                text_encoder=None,
                tokenizer=None,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        elif kind == "dit":
            self.pipe = DiTPipeline(transformer=dit(), vae=vae(), scheduler=DDIMScheduler())
        else:
            self.pipe = FluxPipeline(
                transformer=flux(),
                vae=vae(),
                scheduler=FlowMatchEulerDiscreteScheduler(),
                text_encoder=None,
                text_encoder_2=None,
                tokenizer=None,
                tokenizer_2=None,
            )
        self.pipe.set_progress_bar_config(disable=True)
        self.denoiser = self.pipe.unet if kind == "sd" else self.pipe.transformer

    def sample(self, batch=1, steps=10, guidance=3.0, seed=0, callback=None, prompts="different"):
        rng = torch.Generator().manual_seed(seed)
        common = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
        }
        if self.kind == "dit":
            common["output_type"] = "np"
            labels = list(range(batch))
            out = self.pipe(class_labels=labels, guidance_scale=guidance, **common)
            return torch.from_numpy(out.images)
        embeds = [torch.randn(batch, 5, 12, generator=rng) for _ in range(2)]
        if prompts == "equal":
            embeds[1] = embeds[0].clone()
        common |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "callback_on_step_end": callback}
        if self.kind == "sd":
            return self.pipe(**common, guidance_scale=guidance, height=16, width=16).images
        pooled = [torch.randn(batch, 10, generator=rng) for _ in range(2)]
        if prompts == "equal":
            pooled[1] = pooled[0].clone()
        return self.pipe(
            **common,
            pooled_prompt_embeds=pooled[0],
            negative_pooled_prompt_embeds=pooled[1],
            true_cfg_scale=guidance,
            height=12,
            width=20,
        ).images


@contextmanager
def rows(denoiser: nn.Module):
    """How many rows each real run of the denoiser had."""
    seen: list[int] = []
    name = "hidden_states" if hasattr(denoiser, "transformer_blocks") else "sample"
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs[name]).shape[0]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()
