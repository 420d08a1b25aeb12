"""The trained parts of each reference pipeline: a denoiser, what conditions it, and how a training step calls both.

A subclass of `Parts` holds the modules under the names that the pipeline gives them. Text encoders that do not learn
take no gradient, and are then in no checkpoint: they come from ``scenes-flux``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cache4diffusion.reference.motion import WORDS
from cache4diffusion.reference.networks import (
    END,
    PAD,
    START,
    TEXT_LENGTH,
    build_dit,
    build_latte,
    build_pixart,
    build_text_encoder,
    build_text_encoder_2,
    build_tokenizer,
    build_transformer,
    build_unet,
    vocabulary,
    with_more_words,
)
from cache4diffusion.reference.tasks import CLASS_NAMES

LATTE_TEXT_LENGTH = 120
"""Text tokens of `LattePipeline`, which takes no other number."""

NO_CLASS = 1000
"""What `DiTPipeline` gives to its denoiser for no class."""


class Parts(nn.Module, ABC):
    """Denoiser and text encoders of a pipeline."""

    tokenizers: ClassVar[dict[str, bool]] = {}  # name in the pipeline: whether a start marker comes first
    length: ClassVar[int] = TEXT_LENGTH
    more_words: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._ids = {word: i for i, word in enumerate(vocabulary(self.more_words))}

    def tokens(self, prompt: Any) -> list[list[int]]:
        """Ids of a prompt, a row per tokenizer, in its order.

        The tokenizers' own rule, without their locks and threads, which do not survive a fork.
        """
        words = [self._ids[word] for word in prompt.split()]
        start, end, pad = (self._ids[word] for word in (START, END, PAD))
        rows = [[*([start] if with_start else []), *words, end] for with_start in self.tokenizers.values()]
        return [row + [pad] * (self.length - len(row)) for row in rows]

    def nothing(self) -> list[list[int]]:
        """Ids of what guidance subtracts."""
        return self.tokens("")

    def arrange(self, latents: Tensor) -> Tensor:
        """Latents ``[B, F, 8, h, w]``, one frame for images, as the denoiser takes them."""
        return latents.squeeze(1)

    @abstractmethod
    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """What the denoiser predicts, of the shape of ``noisy``; ``time`` ``[B]``, ``tokens`` ``[B, rows, length]``."""

    def modules_of_pipeline(self) -> dict[str, Any]:
        """What the pipeline takes of them by name: these modules, and tokenizers."""
        return dict(self.named_children()) | {
            name: build_tokenizer(with_start, self.more_words) for name, with_start in self.tokenizers.items()
        }

    def options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class."""
        return {}

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter follows Muon: the matrices of the blocks.

        Not those of queries and keys, which these networks do not normalise: Muon's steps would soon make attention
        look at one token with all its weight.
        """
        is_layer = any(part in name for part in (".to_v.", ".to_out.", ".ff.net.", ".conv1.", ".conv2."))
        return is_layer and not name.startswith("text_encoder")

    def lr_scale(self, name: str) -> float:
        """Share of the learning rate that a parameter gets; those that follow Muon get all of it."""
        if name.startswith("text_encoder"):
            return 0.02
        return 1.0 if self.is_matrix(name, torch.empty(0)) else 0.3


class FluxParts(Parts):
    """FLUX transformer, CLIP (a vector) and T5 (tokens); all learn."""

    tokenizers: ClassVar = {"tokenizer": True, "tokenizer_2": False}

    def __init__(self, seed: int = 0, **transformer_overrides) -> None:
        super().__init__()
        self.transformer = build_transformer(seed, **transformer_overrides)
        self.text_encoder = build_text_encoder(seed)
        self.text_encoder_2 = build_text_encoder_2(seed)

    def arrange(self, latents: Tensor) -> Tensor:
        """``[B, 1, 8, 16, 16]`` to ``[B, 64, 32]``, as the pipeline does."""
        b, _, c, h, w = latents.shape
        return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)

    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Velocity ``[B, N, 32]`` at packed latents and noise levels ``[B]``."""
        ids, ids_2 = tokens.unbind(1)
        side = math.isqrt(noisy.shape[1])
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        image_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(noisy)
        return self.transformer(
            hidden_states=noisy,
            timestep=time,
            pooled_projections=self.text_encoder(ids).pooler_output,
            encoder_hidden_states=self.text_encoder_2(ids_2)[0],
            txt_ids=noisy.new_zeros(ids_2.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter follows Muon: the matrices of attention and feed-forward layers of the transformer.

        Not those of the text encoders: their attention has no norm on queries and keys (T5's not even a scale), so that
        Muon's steps soon make it look at one word with all its weight, and then it learns no more.
        """
        return "transformer_blocks." in name and ".norm" not in name

    def lr_scale(self, name: str) -> float:
        """Share of the learning rate that a parameter gets; those that follow Muon get all of it.

        The text encoders hardly move: as initialised they tell every word's neighbours, so which colour belongs to
        which shape can be read off, and the noise of larger steps washes just that away long before the denoiser asks
        for it.
        """
        if name.startswith(("transformer.context_embedder.", "transformer.time_text_embed.text_embedder.")):
            return 0.1
        return super().lr_scale(name)


class DitParts(Parts):
    """DiT, told the number of a class."""

    def __init__(self, seed: int = 0, **overrides) -> None:
        super().__init__()
        self.transformer = build_dit(seed, **overrides)

    def tokens(self, prompt: int) -> list[list[int]]:
        """The class."""
        return [[prompt]]

    def nothing(self) -> list[list[int]]:
        """The number that stands for none."""
        return [[NO_CLASS]]

    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Prediction ``[B, 8, 16, 16]``."""
        return self.transformer(noisy, timestep=time, class_labels=tokens[:, 0, 0], return_dict=False)[0]

    def options(self) -> dict[str, Any]:
        """Names of the classes."""
        return {"id2label": dict(enumerate(CLASS_NAMES))}


class PixArtParts(Parts):
    """PixArt, which looks at the tokens of a T5 that does not learn."""

    tokenizers: ClassVar = {"tokenizer": False}

    def __init__(self, seed: int = 0, **overrides) -> None:
        super().__init__()
        self.transformer = build_pixart(seed, **overrides)
        self.text_encoder = _of_scenes_flux("text_encoder_2")

    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Prediction ``[B, 8, 16, 16]``."""
        ids = tokens[:, 0]
        mask = (ids != self._ids[PAD]).long()
        return self.transformer(
            noisy,
            encoder_hidden_states=self.text_encoder(ids, attention_mask=mask)[0],
            encoder_attention_mask=mask,
            timestep=time,
            return_dict=False,
        )[0]


class SdParts(Parts):
    """Stable Diffusion's U-Net and CLIP, whose tokens ``scenes-flux`` makes no use of: it learns along."""

    tokenizers: ClassVar = {"tokenizer": True}

    def __init__(self, seed: int = 0, **overrides) -> None:
        super().__init__()
        self.unet = build_unet(seed, **overrides)
        self.text_encoder = _of_scenes_flux("text_encoder").requires_grad_(True)

    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Prediction ``[B, 8, 16, 16]``."""
        text = self.text_encoder(tokens[:, 0])[0]
        return self.unet(noisy, time, encoder_hidden_states=text, return_dict=False)[0]

    def options(self) -> dict[str, Any]:
        """There is nothing unsafe to be found."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class LatteParts(Parts):
    """Latte, which looks at the tokens of a T5 that does not learn.

    The words that captions of motion have and others lack are random rows of its table: that tells them apart.
    """

    tokenizers: ClassVar = {"tokenizer": False}
    length = LATTE_TEXT_LENGTH
    more_words = WORDS

    def __init__(self, seed: int = 0, **overrides) -> None:
        super().__init__()
        self.transformer = build_latte(seed, **overrides)
        encoder = _of_scenes_flux("text_encoder_2")
        self.text_encoder = with_more_words(encoder, self.more_words).requires_grad_(False)

    def arrange(self, latents: Tensor) -> Tensor:
        """``[B, F, 8, h, w]`` to ``[B, 8, F, h, w]``."""
        return latents.transpose(1, 2)

    def forward(self, noisy: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Prediction ``[B, 8, F, h, w]``, without the variance that the pipeline drops as well."""
        ids = tokens[:, 0]
        text = self.text_encoder(ids, attention_mask=(ids != self._ids[PAD]).long())[0]
        predicted = self.transformer(noisy, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
        return predicted[:, : noisy.shape[1]]


def _of_scenes_flux(name: str) -> Any:
    """A text encoder of ``scenes-flux``, which takes no gradient."""
    from transformers import CLIPTextModel, T5EncoderModel

    from cache4diffusion.reference.folder import folder_of, without_progress_bars

    made = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}[name]
    with without_progress_bars():
        encoder = made.from_pretrained(folder_of("scenes-flux") / name, local_files_only=True)
    return encoder.float().eval().requires_grad_(False)
