"""Comparing what denoisers and pipelines return, whatever it is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache4diffusion.devices import in_double
from cache4diffusion.engine.leaves import flatten


def tensors(value: Any) -> list[Tensor]:
    """Copies of all tensors in an output (or images, as tensors)."""
    leaves = [torch.as_tensor(leaf) for leaf in flatten(value)[0] if not isinstance(leaf, (str, type(None)))]
    return [leaf.detach().clone() for leaf in leaves]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two outputs are the same to the bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ or something is not finite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = in_double(a.detach()), in_double(b.detach())
    value = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0
    return value if value == value else float("inf")


def distance(truth: Any, output: Any) -> float:
    """Largest `difference` between two outputs; infinite where they are made of different numbers of tensors."""
    a, b = tensors(truth), tensors(output)
    return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0) if len(a) == len(b) else float("inf")


def tolerance(truth: Any, kept_in: torch.dtype | None = None) -> float:
    """1e-5, or what rounding leaves in a narrower type, of an output or of what is cached."""
    types = [leaf.dtype for leaf in tensors(truth) if leaf.is_floating_point()]
    epsilons = [epsilon(dtype) for dtype in (*types, kept_in) if dtype is not None]
    return min(max(1e-5, 8 * max(epsilons, default=0.0)), 0.25)


def epsilon(dtype: torch.dtype) -> float:
    """How far apart numbers of a dtype are, relative to the largest that they are rounded with."""
    return torch.finfo(dtype).eps if dtype.is_floating_point else 1 / torch.iinfo(dtype).max


def kind(value: Any) -> str:
    """Type of an output; dtype, shape and device of its tensors."""
    leaves = [f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}" for leaf in tensors(value)]
    return f"{type(value).__name__}({', '.join(leaves)})"
