"""Where: the places of a denoiser at which features are recorded and predicted."""

from cache4diffusion.sites.base import (
    PART_KINDS,
    SITES,
    Attentions,
    Blocks,
    Denoiser,
    GatedParts,
    Linears,
    MixedScore,
    PartKind,
    Parts,
    ScaledParts,
    Site,
    Span,
    SwitchingSpan,
    Trajectory,
    UNetLevel,
)

__all__ = [
    "PART_KINDS",
    "SITES",
    "Attentions",
    "Blocks",
    "Denoiser",
    "GatedParts",
    "Linears",
    "MixedScore",
    "PartKind",
    "Parts",
    "ScaledParts",
    "Site",
    "Span",
    "SwitchingSpan",
    "Trajectory",
    "UNetLevel",
]
