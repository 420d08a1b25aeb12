"""Where: the places of a denoiser whose feature is recorded on full steps and predicted on cached ones.

A site is a frozen description. Finding it in a denoiser is the anatomy's work, putting it to use the engine's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

PartKind = Literal["attn", "cross_attn", "ffn", "fused", "other"]
PART_KINDS: tuple[PartKind, ...] = ("attn", "cross_attn", "ffn", "fused", "other")
MapKind = Literal["transformer", "conv"]
MAP_KINDS: tuple[MapKind, ...] = ("transformer", "conv")
"""What a U-Net's levels have besides the parts of transformer blocks."""


# Names under which a site can be given in a composition, as in site="span(front=1)". Filled by `Site`.
SITES: dict[str, type[Site]] = {}


class Site:
    """Base of every site: a frozen dataclass whose driver is named in ``engine/drivers.py``.

    A subclass says what it is called in a composition (``name``) and in a sentence (``words``).
    """

    name: ClassVar[str]
    words: ClassVar[str]

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        return False

    def __init_subclass__(cls) -> None:
        SITES[cls.name] = cls
