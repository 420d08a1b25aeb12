"""The networks of the reference pipeline ``scenes-flux``: stock classes of diffusers and transformers, in miniature.

    caption -> tokenizer   -> CLIP text encoder -> pooled vector [B, 128]
            -> tokenizer_2 -> T5 encoder        -> text tokens   [B, 16, 128]
    latents [B, 8, 16, 16], packed 2x2 -> image tokens [B, 64, 32] -> FLUX transformer -> velocity [B, 64, 32]

Both tokenizers split at spaces and know the words of the scenes, no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

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


def vocabulary() -> list[str]:
    """Every token; the position is its id. Ids 0 to 3 are padding, unknown word, start and end."""
    words = ["a", "an", "on", "and", "background", *COUNTS, *SHAPES, *PLURALS.values(), *COLOURS, *BACKGROUNDS]
    words += [word for relation in RELATIONS for word in relation.split()]
    return [PAD, UNKNOWN, START, END, *dict.fromkeys(words)]


def build_tokenizer(with_start: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ``[START] words END PAD ...``, lower-cased, unknown words become one token.

    Args:
        with_start: whether a start marker comes first, as CLIP has it and T5 does not.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
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
