"""Tiny random U-Nets, own sampling loops and pipelines around them, and a count of which modules ran."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

WIDTHS = (8, 16, 16)
SKIPS = [(8, 8), (8, 8), (8, 8), (8, 4), (16, 4), (16, 4), (16, 2), (16, 2), (16, 2)]
"""Channels and size of every skip tensor of the U-Nets below at 8 x 8, the outermost first."""


def _ready(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def sd_like(mid: str | None = "UNetMidBlock2DCrossAttn", **changes) -> UNet2DConditionModel:
    """Stable Diffusion's shape: attention on one level, two layers per block."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": WIDTHS,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": mid,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    return _ready(UNet2DConditionModel(**{**settings, **changes}))


def sdxl_like() -> UNet2DConditionModel:
    """SDXL's: pooled text and sizes come with ``added_cond_kwargs``."""
    return sd_like(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
        transformer_layers_per_block=(1, 2, 1),
        use_linear_projection=True,
    )


def freeu_like() -> UNet2DConditionModel:
    unet = sd_like()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return unet


def ip_adapter_like() -> UNet2DConditionModel:
    """With an IP-adapter of random weights, loaded as diffusers does it: parts get the text along with images."""
    unet = sd_like()
    rng = torch.Generator().manual_seed(3)

    def weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {name.replace("__", "."): torch.randn(*shape, generator=rng) for name, shape in shapes.items()}

    projection = weights(proj__weight=(4 * 12, 10), proj__bias=(4 * 12,), norm__weight=(12,), norm__bias=(12,))
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    widths = [unet.get_submodule(name).inner_dim for name in attentions]
    sizes = {f"{2 * i + 1}__to_{kind}_ip__weight": (width, 12) for i, width in enumerate(widths) for kind in "kv"}
    unet._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": weights(**sizes)}, low_cpu_mem_usage=False)
    return _ready(unet)


def unconditional() -> UNet2DModel:
    """DDPM's, of class `UNet2DModel`."""
    torch.manual_seed(0)
    return _ready(
        UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=WIDTHS,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    )


def two_paths() -> UNet2DModel:
    """NCSN++'s: an image runs along with the feature map, so up blocks hand on two tensors."""
    torch.manual_seed(0)
    return _ready(
        UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 32, 32),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
            up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        )
    )


def controlnet() -> ControlNetModel:
    torch.manual_seed(1)
    module = ControlNetModel(
        in_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(4,),
    )
    for parameter in module.parameters():
        if not parameter.any():  # zero convolutions would hide what they gate
            nn.init.normal_(parameter, std=0.2)
    return _ready(module)


def vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return _ready(AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8))


def inputs(kind: str = "sd", batch: int = 2, step: int = 0, size: int = 8) -> dict:
    """Keyword arguments of one call; those of another step hold other values."""
    rng = torch.Generator().manual_seed(100 + step)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    fixed = torch.Generator().manual_seed(7)
    given = {"sample": randn(batch, 4, size, size), "timestep": torch.tensor(900 - 10 * step)}
    if kind == "unconditional":
        return given
    given["encoder_hidden_states"] = torch.randn(batch, 5, 12, generator=fixed)
    scale = size / 8
    maps = [(batch, c, int(n * scale), int(n * scale)) for c, n in SKIPS]
    if kind == "sdxl":
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 10, generator=fixed),
            "time_ids": torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]] * batch),
        }
    elif kind == "ip-adapter":
        given["added_cond_kwargs"] = {"image_embeds": [torch.randn(batch, 1, 10, generator=fixed)]}
    elif kind == "controlnet":  # another value for every block
        given["down_block_additional_residuals"] = [randn(*shape) * (1 + i) for i, shape in enumerate(maps)]
        given["mid_block_additional_residual"] = randn(*maps[-1])
    elif kind == "t2i":
        shapes = [
            (batch, 8, size // 2, size // 2),
            (batch, 16, size // 2, size // 2),
            (batch, 16, size // 4, size // 4),
        ]
        given["down_intrablock_additional_residuals"] = [randn(*shape) for shape in shapes]
    return given


WORDS = ("a", "on", "and", "background", "red", "blue", "circle", "star")


def text_parts() -> dict:
    """CLIP's tokenizer and text encoder in miniature, of random weights: tokens ``[B, 6]`` to ``[B, 6, 12]``."""
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    ids = {word: i for i, word in enumerate(("<s>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(mark, ids[mark]) for mark in ("<s>", "</s>")]
    )
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=6,
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
        pad_token_id=ids["</s>"],
    )
    return {
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=6, **marks),
        "text_encoder": _ready(CLIPTextModel(config)),
    }


@contextmanager
def counting(denoiser: nn.Module):
    """Counts how often each module's ``forward`` really runs."""
    ran: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: ran.update([path]))
        for path, module in denoiser.named_modules()
        if path
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def cast(value, dtype: torch.dtype):
    """Arguments with every floating-point tensor in another type."""
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def clone(given: dict) -> dict:
    """The same arguments in containers of their own: T2I adapters' lists are used up by the call."""
    return {key: list(value) if isinstance(value, list) else value for key, value in given.items()}


@torch.no_grad()
def call(denoiser: nn.Module, given: dict) -> torch.Tensor:
    return denoiser(**clone(given)).sample


CASES = {
    "sd": (sd_like, "sd"),
    "sdxl": (sdxl_like, "sdxl"),
    "unconditional": (unconditional, "unconditional"),
    "ip-adapter": (ip_adapter_like, "ip-adapter"),
    "no-mid": (lambda: sd_like(mid=None), "sd"),
    "freeu": (freeu_like, "sd"),
    "controlnet": (sd_like, "controlnet"),
    "t2i": (sd_like, "t2i"),
    "freeu-controlnet": (freeu_like, "controlnet"),
}
LEVELS = [(block, layer) for block in range(3) for layer in range(3)]
