"""How a denoiser is built, found by observing one forward. Nothing here knows any model class."""

from cache4diffusion.anatomy.describe import Outline, describe
from cache4diffusion.anatomy.facts import (
    Anatomy,
    Axes,
    Block,
    Inner,
    Layer,
    Level,
    OtherLeaf,
    Part,
    Signal,
    Stack,
    Stream,
    StreamRef,
    UNet,
)
from cache4diffusion.anatomy.observe import observe
from cache4diffusion.anatomy.summary import summary
from cache4diffusion.anatomy.tree import LeafPath

__all__ = [
    "Anatomy",
    "Axes",
    "Block",
    "Inner",
    "Layer",
    "LeafPath",
    "Level",
    "OtherLeaf",
    "Outline",
    "Part",
    "Signal",
    "Stack",
    "Stream",
    "StreamRef",
    "UNet",
    "describe",
    "observe",
    "summary",
]
