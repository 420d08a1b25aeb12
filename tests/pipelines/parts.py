"""What pipelines are made of, in miniature and made on the spot: text and image encoders, tokenizers, autoencoders."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WIDTH = 32  # of every text
LENGTH = 8  # of every prompt, in tokens
WORDS = ("a", "on", "and", "background", "red", "blue", "circle", "star", "moves")
MARKS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
IDS = {word: i for i, word in enumerate((*MARKS.values(), *WORDS))}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Biases, gates and norms that start at 0 or 1 are made visible: fresh blocks would add nothing.

    Nothing is left to what a fresh tensor happens to hold.
    """
    for parameter in module.parameters():
        if parameter.ndim == 1 or not parameter.isfinite().all() or not parameter.any():
            nn.init.normal_(parameter, std=std)
    return module.eval().requires_grad_(False)


def build(kind: type[nn.Module], seed: int = 0, **config: Any) -> nn.Module:
    """A module of random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ready(kind(**config))


# ---------------------------------------------------------------------- text


def tokenizer(has_start: bool = True, length: int = LENGTH) -> transformers.PreTrainedTokenizerFast:
    """Splits at spaces; CLIP's has a start mark, T5's has not."""
    words = Tokenizer(models.WordLevel(IDS, unk_token=MARKS["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if has_start else "$A </s>",
        special_tokens=[(mark, IDS[mark]) for mark in ("<s>", "</s>")],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **MARKS)


def _clip_config() -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(IDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=IDS["<s>"],
        eos_token_id=IDS["</s>"],
        pad_token_id=IDS["<pad>"],
    )


def clip() -> nn.Module:
    return build(transformers.CLIPTextModel, 11, config=_clip_config())


def clip_with_projection() -> nn.Module:
    return build(transformers.CLIPTextModelWithProjection, 12, config=_clip_config())


def t5(kind: type[nn.Module] = transformers.T5EncoderModel, **changes: Any) -> nn.Module:
    config = transformers.T5Config if kind is transformers.T5EncoderModel else transformers.UMT5Config
    small = {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return build(
        kind, 13, config=config(vocab_size=len(IDS), pad_token_id=IDS["<pad>"], use_cache=False, **{**small, **changes})
    )


def clip_vision(size: int = 32) -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    return build(transformers.CLIPVisionModelWithProjection, 14, config=config)


def clip_images(size: int = 32) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(crop_size=size, size=size)


def siglip_vision(size: int = 32) -> nn.Module:
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    return build(transformers.SiglipVisionModel, 15, config=config)


def siglip_images(size: int = 32) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": size, "width": size})


def clip_text() -> dict[str, Any]:
    """Tokenizer and encoder as `StableDiffusionPipeline` has them."""
    return {"tokenizer": tokenizer(), "text_encoder": clip()}


def t5_text(length: int = LENGTH, **changes: Any) -> dict[str, Any]:
    """Tokenizer and encoder as pipelines with nothing but a T5 have them."""
    return {"tokenizer": tokenizer(has_start=False, length=length), "text_encoder": t5(**changes)}


def flux_text() -> dict[str, Any]:
    return {**clip_text(), "tokenizer_2": tokenizer(has_start=False), "text_encoder_2": t5()}


def sd3_text() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "text_encoder": clip_with_projection(),
        "tokenizer_2": tokenizer(),
        "text_encoder_2": clip_with_projection(),
        "tokenizer_3": tokenizer(has_start=False),
        "text_encoder_3": t5(d_model=2 * WIDTH),
    }


def without(*names: str) -> dict[str, None]:
    """Components that are left out."""
    return dict.fromkeys(names)


# ---------------------------------------------------------------------- autoencoders


def vae(channels: int = 4, levels: int = 1, **changes: Any) -> nn.Module:
    """Of images; halves their sides ``levels - 1`` times."""
    config = {
        "block_out_channels": (4,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": channels,
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "sample_size": 16,
        "shift_factor": 0.1,
        "scaling_factor": 1.2,
    }
    return build(diffusers.AutoencoderKL, 21, **{**config, **changes})


def wan_vae() -> nn.Module:
    return build(
        diffusers.AutoencoderKLWan,
        22,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def qwen_vae() -> nn.Module:
    return build(
        diffusers.AutoencoderKLQwenImage,
        23,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def cogvideox_vae() -> nn.Module:
    return build(
        diffusers.AutoencoderKLCogVideoX,
        24,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def ltx_vae() -> nn.Module:
    found = build(
        diffusers.AutoencoderKLLTXVideo,
        25,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    found.use_framewise_encoding = found.use_framewise_decoding = False
    return found


def hunyuan_vae() -> nn.Module:
    return build(
        diffusers.AutoencoderKLHunyuanVideo,
        26,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


# ---------------------------------------------------------------------- what users bring


def picture(seed: int = 0, side: int = 16) -> Image.Image:
    values = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def mask(side: int = 16) -> Image.Image:
    """White, where something new shall be, on the right."""
    values = torch.zeros(side, side, dtype=torch.uint8)
    values[:, side // 2 :] = 255
    return Image.fromarray(values.numpy())


def film(frames: int, side: int = 16) -> list[Image.Image]:
    return [picture(seed, side) for seed in range(frames)]
