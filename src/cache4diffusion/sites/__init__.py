"""Where: the places of a denoiser at which features are recorded and predicted."""

from cache4diffusion.sites.base import MAP_KINDS, PART_KINDS, SITES, MapKind, PartKind, Site
from cache4diffusion.sites.blocks import Blocks, Span, SwitchingSpan
from cache4diffusion.sites.parts import Attentions, GatedParts, Linears, Parts, PromptModules, SingleContext
from cache4diffusion.sites.parts_and_more import MixedScore, PartsAndStream, ScaledParts
from cache4diffusion.sites.past_frames import PastFrames
from cache4diffusion.sites.reduced import Reduced, ReducedAttention
from cache4diffusion.sites.unet import ReducedLevel, UNetEncoder, UNetLevel
from cache4diffusion.sites.whole import Denoiser, Trajectory

__all__ = [
    "MAP_KINDS",
    "PART_KINDS",
    "SITES",
    "Attentions",
    "Blocks",
    "Denoiser",
    "GatedParts",
    "Linears",
    "MapKind",
    "MixedScore",
    "PartKind",
    "Parts",
    "PartsAndStream",
    "PastFrames",
    "PromptModules",
    "Reduced",
    "ReducedAttention",
    "ReducedLevel",
    "ScaledParts",
    "SingleContext",
    "Site",
    "Span",
    "SwitchingSpan",
    "Trajectory",
    "UNetEncoder",
    "UNetLevel",
]
