"""The networks of the reference pipelines: stock classes of diffusers and transformers, in miniature.

    caption -> tokenizer   -> CLIP text encoder -> pooled vector [B, 128], tokens [B, 16, 128]
            -> tokenizer_2 -> T5 encoder        -> text tokens   [B, 16, 128]

    scenes-flux    latents [B, 8, 16, 16], packed 2x2 -> 64 image tokens, beside 16 of T5; CLIP's vector
    scenes-dit     latents [B, 8, 16, 16], patches of 2x2 -> 64 tokens; the number of a class
    scenes-pixart  latents [B, 8, 16, 16], patches of 1x1 -> 256 tokens, which look at 16 of T5
    scenes-sd      latents [B, 8, 16, 16] -> a U-Net of three levels, 16 to 4 wide, which looks at CLIP's 16 tokens
    scenes-video   latents [B, 8, 8, 12, 12] -> 36 tokens in each of 8 frames, which look at 120 of T5

Tokenizers split at spaces and know the words of the scenes, no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from cache4diffusion.reference.scenes import BACKGROUNDS, COLOURS, COUNTS, PLURALS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

TEXT_LENGTH = 16
"""Length of a tokenised caption, the end marker included: what the pipeline's ``max_sequence_length`` must be."""

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<s>", "</s>"

VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 128,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""0.95 M parameters: images ``[B, 3, 128, 128]`` in -1..1, latents ``[B, 8, 16, 16]``."""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 14, 14),
}
"""7.6 M parameters: 3 double-stream and 6 single-stream blocks of width 192."""

DIT_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "num_embeds_ada_norm": 1000,
}
"""8 blocks of width 192. Every block has a table of 1,001 classes: the pipeline's number for none is 1000."""

PIXART_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 1,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "cross_attention_dim": 160,
    "caption_channels": 128,
    "use_additional_conditions": False,
}
"""8 blocks of width 160."""

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [64, 96, 144],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}
"""Three levels of 64, 96 and 144 channels; cross-attention at 256 and 64 tokens, and in the middle at 16."""

LATTE_CONFIG: dict[str, Any] = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "cross_attention_dim": 160,
    "caption_channels": 128,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "video_length": 8,
}
"""5 spatial and 5 temporal blocks of width 160. The pipeline drops the second half of the channels: a variance."""

T5_CONFIG: dict[str, Any] = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def vocabulary(more: Sequence[str] = ()) -> list[str]:
    """Every token; the position is its id. Ids 0 to 3 are padding, unknown word, start and end; ``more`` come last."""
    words = ["a", "an", "on", "and", "background", *COUNTS, *SHAPES, *PLURALS.values(), *COLOURS, *BACKGROUNDS]
    words += [word for relation in RELATIONS for word in relation.split()]
    return [PAD, UNKNOWN, START, END, *dict.fromkeys([*words, *more])]


def build_tokenizer(with_start: bool, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ``[START] words END PAD ...``, lower-cased, unknown words become one token.

    Args:
        with_start: whether a start marker comes first, as CLIP has it and T5 does not.
        more: words beside those of still scenes.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary(more))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}" if with_start else f"$A {END}",
        special_tokens=[(START, ids[START]), (END, ids[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
    )


def build_vae(seed: int = 0, **overrides) -> AutoencoderKL:
    """A new autoencoder with random weights; ``overrides`` replace entries of `VAE_CONFIG`."""
    torch.manual_seed(seed)
    return AutoencoderKL(**(VAE_CONFIG | overrides))


def build_transformer(seed: int = 0, **overrides) -> FluxTransformer2DModel:
    """A new transformer that predicts 0: gates and the last layer start at zero, the rest is random.

    ``overrides`` replace entries of `TRANSFORMER_CONFIG`.
    """
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**(TRANSFORMER_CONFIG | overrides))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if (".norm" in f".{name}" and ".linear." in name) or name.startswith("proj_out."):
                parameter.zero_()
    return transformer


def build_dit(seed: int = 0, **overrides) -> DiTTransformer2DModel:
    """A new class-conditional transformer that predicts 0; ``overrides`` replace entries of `DIT_CONFIG`."""
    torch.manual_seed(seed)
    dit = DiTTransformer2DModel(**(DIT_CONFIG | overrides))
    return _zeroed(dit, lambda name: ".norm1.linear." in name or name.startswith("proj_out_2."))


def build_pixart(seed: int = 0, **overrides) -> PixArtTransformer2DModel:
    """A new cross-attention transformer that predicts 0; ``overrides`` replace entries of `PIXART_CONFIG`."""
    torch.manual_seed(seed)
    return _zeroed(PixArtTransformer2DModel(**(PIXART_CONFIG | overrides)), _is_shut)


def build_latte(seed: int = 0, **overrides) -> LatteTransformer3DModel:
    """A new video transformer that predicts 0; ``overrides`` replace entries of `LATTE_CONFIG`."""
    torch.manual_seed(seed)
    return _zeroed(LatteTransformer3DModel(**(LATTE_CONFIG | overrides)), _is_shut)


def build_unet(seed: int = 0, **overrides) -> UNet2DConditionModel:
    """A new U-Net that predicts 0; ``overrides`` replace entries of `UNET_CONFIG`."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**(UNET_CONFIG | overrides))
    last = ("conv_out.", ".conv2.", ".proj_out.")  # of the network, of a residual block, of a transformer in it
    return _zeroed(unet, lambda name: any(part in name for part in last))


def _is_shut(name: str) -> bool:
    # Shifts, scales and gates of the blocks; cross-attention has no gate, so its last layer serves as one.
    if name.startswith(("adaln_single.linear.", "proj_out.")) or ".attn2.to_out." in name:
        return True
    return name.endswith("scale_shift_table")


def _zeroed(network: Any, is_zero: Callable[[str], bool]) -> Any:
    """The network with these parameters 0, in evaluation mode: what it draws at random comes from outside."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if is_zero(name):
                parameter.zero_()
    return network.eval()


def with_more_words(encoder: T5EncoderModel, more: Sequence[str], seed: int = 0) -> T5EncoderModel:
    """The same T5 encoder, in place, with rows for ``more`` words: random, of the size of those it has."""
    known: nn.Embedding = encoder.get_input_embeddings()  # type: ignore[assignment]
    words = vocabulary(more)
    if len(vocabulary()) != known.num_embeddings:
        raise ValueError(f"the text encoder knows {known.num_embeddings} words, not the {len(vocabulary())} of scenes.")
    new = len(words) - known.num_embeddings
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        rows = torch.randn(new, known.embedding_dim, generator=generator) * known.weight.std() + known.weight.mean(0)
        table = nn.Embedding(len(words), known.embedding_dim)
        table.weight.copy_(torch.cat([known.weight, rows.to(known.weight)]))
    encoder.set_input_embeddings(table.to(known.weight.dtype))
    encoder.config.vocab_size = len(words)
    return encoder


def build_text_encoder(seed: int = 0) -> CLIPTextModel:
    """A new CLIP text encoder; the pipeline takes its pooled output ``[B, 128]``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    words = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(words),
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(START),
        eos_token_id=words.index(END),
        **CLIP_CONFIG,
    )
    return CLIPTextModel(config)


def build_text_encoder_2(seed: int = 0) -> T5EncoderModel:
    """A new T5 encoder; the pipeline takes its last hidden state ``[B, 16, 128]``.

    Three of its four heads start out looking at the word before, the word after, and three words back: which colour
    belongs to which shape is a matter of neighbours, and found late, if at all, from heads that look everywhere.
    """
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = vocabulary()
    config = T5Config(
        vocab_size=len(words),
        dropout_rate=0.0,
        pad_token_id=words.index(PAD),
        eos_token_id=words.index(END),
        use_cache=False,
        **T5_CONFIG,
    )
    encoder = T5EncoderModel(config)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # type: ignore[union-attr]
    with torch.no_grad():
        for head, bucket in enumerate((1, 17, 3)):  # T5's buckets of the offsets -1, +1 and -3
            bias[bucket, head] += 5.0
    return encoder


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler flow matching with evenly spaced noise levels."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)
