"""Where: a U-Net's levels and its encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cache4diffusion.errors import SettingError
from cache4diffusion.sites.base import PartKind, Site
from cache4diffusion.sites.reduced import Reduced


@dataclass(frozen=True)
class UNetLevel(Site):
    """The feature that enters one up-layer of a U-Net; everything deeper is bypassed on a cached step.

    Levels are counted from the output side, as in DeepCache: ``block=0, layer=0`` keeps only the last up-layer, fed by
    ``conv_in`` through the outermost skip connection.

    Args:
        block: up-block, counted from the output; 0 or more.
        layer: layer of that up-block, counted from its end; 0 or more.

    Raises:
        SettingError: a value is negative.
    """

    name: ClassVar[str] = "unet_level"
    words: ClassVar[str] = "a U-Net level"

    block: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        if self.block < 0 or self.layer < 0:
            raise SettingError(f"UNetLevel(block={self.block}, layer={self.layer}): both must be 0 or more.")


@dataclass(frozen=True)
class ReducedLevel(UNetLevel):
    """A U-Net level, the denoiser's output, and parts on fewer tokens: three decisions in a step.

    They are called ``"output"``: cached, nothing runs, and the output is the last one that was computed; ``"level"``:
    cached, what is deeper than the level is bypassed, as in `UNetLevel`; ``"tokens"``: cached, parts that run are
    computed on fewer tokens, as in `Reduced`. So they need a gate that watches nothing, and a token rule that leaves
    tokens out.

    Args:
        block, layer: as in `UNetLevel`.
        kinds, max_downsample: as in `Reduced`.

    Memory: the feature that enters the level, and the output, per branch.

    Raises:
        SettingError: as they do.
    """

    name: ClassVar[str] = "reduced_level"
    words: ClassVar[str] = "a U-Net level and parts on fewer tokens"
    decisions: ClassVar[tuple[str, ...]] = ("output", "level", "tokens")

    kinds: tuple[PartKind, ...] = ("attn",)
    max_downsample: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.reduced  # refuses what it does not take

    @property
    def level(self) -> UNetLevel:
        """Where the level is cut."""
        return UNetLevel(self.block, self.layer)

    @property
    def reduced(self) -> Reduced:
        """Which parts are computed on fewer tokens."""
        return Reduced(self.kinds, self.max_downsample)


@dataclass(frozen=True)
class UNetEncoder(Site):
    """What the encoder of a U-Net hands to its decoder: every skip tensor, and what leaves the middle.

    On a cached step the decoder alone runs, at the current timestep; the latent is not read.

    Args:
        parallel: cached steps up to the next full one are decoded together, each at its own timestep, in a batch so
            many times as large. Needs the timesteps of the run, and a gate that watches nothing.
    """

    name: ClassVar[str] = "unet_encoder"
    words: ClassVar[str] = "the encoder of a U-Net"

    parallel: bool = False
