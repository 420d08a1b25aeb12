"""Tiny random denoisers with arguments of a real call; widths and lengths differ, so that no axis is ambiguous."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn

from cache4diffusion.zoo import Case, tiny
from weights import ready


def flux(batch: int = 2, *, controlnet: bool = False, ip_adapter: bool = False, guidance: bool = True) -> Case:
    torch.manual_seed(0)
    module = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "pooled_projections": torch.randn(batch, 10),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.rand(9, 3),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    if guidance:
        kwargs["guidance"] = torch.full((batch,), 3.5)
    if controlnet:
        kwargs["controlnet_block_samples"] = [torch.randn(batch, 9, 16) for _ in range(2)]
        kwargs["controlnet_single_block_samples"] = [torch.randn(batch, 9, 16) for _ in range(2)]
    if ip_adapter:
        for block in module.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=16, cross_attention_dim=14))
        kwargs["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(batch, 4, 14)]}
    return ready(module), (), kwargs


def of_class(kind: str) -> Callable[..., Case]:
    """Makes the denoiser of this class and a call of it, by batch size."""
    return lambda batch=2: tiny(kind).make(batch)


dit = of_class("DiTTransformer2DModel")
pixart = of_class("PixArtTransformer2DModel")
sd3 = of_class("SD3Transformer2DModel")
wan = of_class("WanTransformer3DModel")
qwen = of_class("QwenImageTransformer2DModel")
hunyuan_video = of_class("HunyuanVideoTransformer3DModel")
cogvideox = of_class("CogVideoXTransformer3DModel")
hunyuan_dit = of_class("HunyuanDiT2DModel")
lumina2 = of_class("Lumina2Transformer2DModel")
unet2d = of_class("UNet2DModel")


def unet(batch: int = 2, *, mid: bool = True, controlnet: bool = False) -> Case:
    torch.manual_seed(0)
    module = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 24),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if mid else None,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    kwargs: dict[str, Any] = {"encoder_hidden_states": torch.randn(batch, 5, 12)}
    if controlnet:
        shapes = [(8, 16), (8, 16), (8, 16), (8, 8), (24, 8), (24, 8)]
        kwargs["down_block_additional_residuals"] = [torch.randn(batch, c, n, n) for c, n in shapes]
        kwargs["mid_block_additional_residual"] = torch.randn(batch, 24, 8, 8)
    return ready(module), (torch.randn(batch, 4, 16, 16), torch.tensor(3)), kwargs


# A denoiser in the style of a research repository: nothing here is known to any library ----


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width, elementwise_affine=False)
        self.mixer = SelfAttention(width, 2)
        self.second = nn.LayerNorm(width, elementwise_affine=False)
        self.mapper = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.mixer(modulate(self.first(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mapper(modulate(self.second(x), shift2, scale2))


class PlainDiT(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3, block: type[nn.Module] = PlainBlock) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.clock = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(10, width)
        self.layers = nn.ModuleList(block(width) for _ in range(depth))
        self.last = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angles = t[:, None].float() * torch.exp(-torch.arange(4, device=x.device))
        c = self.clock(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.classes(y)
        side = x.shape[-1] // 2
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, c)
        x = self.last(x).unflatten(1, (side, side)).unflatten(-1, (4, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def plain(batch: int = 2, block: type[nn.Module] = PlainBlock) -> Case:
    torch.manual_seed(0)
    args = (torch.randn(batch, 4, 8, 8), torch.full((batch,), 3), torch.ones(batch, dtype=torch.long))
    return ready(PlainDiT(block=block)), args, {}
