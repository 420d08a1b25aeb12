"""Where: parts that are computed on fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import PartKind, Site


@dataclass(frozen=True)
class Reduced(Site):
    """The parts of every block, computed on fewer tokens: nothing is kept from step to step but plans of tokens.

    A token rule that makes such plans says which tokens are left, and the gate at which steps; all parts of a block
    follow one plan. Parts that text enters along with the image, and attention that is given positions, are left out.

    Args:
        kinds: which parts.
        max_downsample: only blocks whose grid is at most so many times coarser, per side, than the finest one.

    Raises:
        SettingError: an unknown kind, or none; a number below 1.
    """

    name: ClassVar[str] = "reduced"
    words: ClassVar[str] = "parts on fewer tokens"

    kinds: tuple[PartKind, ...] = ("attn",)
    max_downsample: float = 1.0

    @classmethod
    def around_attention(cls, *, ffn: bool, cross_attn: bool, max_downsample: float) -> Reduced:
        """Self-attention, and with it MLPs or cross-attention where they are asked for."""
        asked: dict[PartKind, bool] = {"attn": True, "ffn": ffn, "cross_attn": cross_attn}
        return cls(tuple(kind for kind, is_asked in asked.items() if is_asked), max_downsample)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - {"attn", "cross_attn", "ffn"} or not self.max_downsample >= 1:
            raise SettingError(
                f"Reduced(kinds={self.kinds}, max_downsample={self.max_downsample}): kinds are one or more of attn, "
                "cross_attn, ffn, and max_downsample is 1 or more."
            )


@dataclass(frozen=True)
class ReducedAttention(Reduced):
    """The self-attention of every block, computed for fewer queries, and with fewer keys and values.

    Within the attention, where queries and keys have been normalised and carry their positions: projections run on all
    tokens. Queries have one plan; values have another, and keys follow it. Of a joint attention, the tokens of the
    image are reduced and those of the text stay.

    Args:
        kinds: always self-attentions, those inside fused parts among them.
        max_downsample: as in `Reduced`.

    Raises:
        SettingError: other kinds; a number below 1.
    """

    name: ClassVar[str] = "reduced_attention"
    words: ClassVar[str] = "attention on fewer tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kinds != ("attn",):
            raise SettingError(f"ReducedAttention(kinds={self.kinds}): only self-attentions, ('attn',).")
