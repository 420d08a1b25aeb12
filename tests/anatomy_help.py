"""The denoisers of the anatomy tests by name, their anatomies (observed once), and short forms of what is in them."""

from __future__ import annotations

import functools

import pytest
import torch

import anatomy_zoo as zoo
from cache4diffusion import anatomy
from cache4diffusion.anatomy.tree import leaves, map_leaves

TRANSFORMERS = {
    "flux": zoo.flux,
    "flux, batch 1": lambda: zoo.flux(1),
    "flux, batch 3, no guidance": lambda: zoo.flux(3, guidance=False),
    "flux, ControlNet": lambda: zoo.flux(controlnet=True),
    "flux, IP-adapter": lambda: zoo.flux(ip_adapter=True),
    "dit": zoo.dit,
    "pixart": zoo.pixart,
    "sd3": zoo.sd3,
    "wan": zoo.wan,
    "qwen": zoo.qwen,
    "hunyuan_video": zoo.hunyuan_video,
    "cogvideox": zoo.cogvideox,
    "hunyuan_dit": zoo.hunyuan_dit,
    "lumina2": zoo.lumina2,
    "plain": zoo.plain,
}
UNETS = {
    "unet": zoo.unet,
    "unet, no mid": lambda: zoo.unet(mid=False),
    "unet, ControlNet": lambda: zoo.unet(controlnet=True),
    "unet2d": zoo.unet2d,
}
EVERY = {**TRANSFORMERS, **UNETS}


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def run(module, args, kwargs) -> torch.Tensor:
    return tensors(module(*args, **map_leaves(lambda _, leaf: leaf, kwargs)))[0]


@functools.cache
def observed(name: str) -> anatomy.Anatomy:
    return anatomy.observe(*EVERY[name]())


every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)
one_of_each = pytest.mark.parametrize("name", [name for name in EVERY if "," not in name])
every_denoiser = pytest.mark.parametrize("name", EVERY)


def parts_of(block) -> dict[str, str]:
    return {part.path.removeprefix(f"{block.path}."): part.kind for part in block.parts}


def inner_of(block) -> dict[str, str]:
    found = {inner.path: inner.role for part in block.parts for inner in part.inner}
    return {path.removeprefix(f"{block.path}."): role for path, role in found.items()}
