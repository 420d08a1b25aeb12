"""Tiny random denoisers with arguments of a real call; widths and lengths differ, so that no axis is ambiguous."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn

from weights import ready

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


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


def dit(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    kwargs = {"timestep": torch.full((batch,), 3), "class_labels": torch.ones(batch, dtype=torch.long)}
    return ready(module), (torch.randn(batch, 4, 8, 8),), kwargs


def pixart(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    kwargs = {
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.full((batch,), 3),
        "encoder_attention_mask": torch.ones(batch, 5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return ready(module), (torch.randn(batch, 4, 8, 8),), kwargs


def sd3(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    kwargs = {
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "pooled_projections": torch.randn(batch, 10),
        "timestep": torch.full((batch,), 3.0),
    }
    return ready(module), (torch.randn(batch, 4, 8, 8),), kwargs


def wan(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=14,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    kwargs = {
        "hidden_states": torch.randn(batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 3),
        "encoder_hidden_states": torch.randn(batch, 5, 14),
    }
    return ready(module), (), kwargs


def qwen(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": torch.randn(batch, 20, 16),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "encoder_hidden_states_mask": torch.ones(batch, 5),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 4, 5)]] * batch,
    }
    return ready(module), (), kwargs


def hunyuan_video(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    kwargs = {
        "hidden_states": torch.randn(batch, 4, 3, 4, 4),
        "timestep": torch.full((batch,), 3),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "encoder_attention_mask": torch.ones(batch, 5),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.ones(batch),
    }
    return ready(module), (), kwargs


def cogvideox(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=6,
        text_embed_dim=12,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    kwargs = {
        "hidden_states": torch.randn(batch, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "timestep": torch.full((batch,), 3),
        "image_rotary_emb": (torch.randn(48, 8), torch.randn(48, 8)),
    }
    return ready(module), (), kwargs


def hunyuan_dit(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2,
        cross_attention_dim=12,
        cross_attention_dim_t5=24,
        pooled_projection_dim=12,
        text_len=5,
        text_len_t5=6,
    )
    kwargs = {
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "text_embedding_mask": torch.ones(batch, 5),
        "encoder_hidden_states_t5": torch.randn(batch, 6, 24),
        "text_embedding_mask_t5": torch.ones(batch, 6),
        "image_meta_size": torch.randn(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
    }
    return ready(module), (torch.randn(batch, 4, 8, 8), torch.full((batch,), 3.0)), kwargs


def lumina2(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        cap_feat_dim=12,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
    )
    kwargs = {
        "hidden_states": torch.randn(batch, 4, 8, 8),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "encoder_attention_mask": torch.ones(batch, 5, dtype=torch.bool),
    }
    return ready(module), (), kwargs


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


def unet2d(batch: int = 2) -> Case:
    torch.manual_seed(0)
    module = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 24),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return ready(module), (torch.randn(batch, 4, 16, 16), torch.tensor(3)), {}


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
