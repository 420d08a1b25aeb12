"""Where an edit changes the picture: a mask from how far two runs have come apart, and its coarser copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def from_differences(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """The mask of FISEdit: ``m = sum over steps of minmax(sum over channels of |x_new - x_old|)``, cut by Otsu.

    Specks are taken away by an erosion and a dilation of 2 x 2. Latents that do not differ have an empty mask.

    Args:
        old: latents of the recorded run after its first steps, each ``[B, C, H, W]``; what is changed in one row of the
            batch is changed in all.
        new: those of the edit, from the same noise.

    Returns:
        Truths ``[H, W]``.
    """
    apart = [(b.float() - a.float()).abs().sum(1).amax(0) for a, b in zip(old, new, strict=True)]
    levels = (255 * minmax(torch.stack([minmax(one) for one in apart]).sum(0))).to(torch.uint8)
    if not levels.any():
        return torch.zeros_like(levels, dtype=torch.bool)
    return dilated(eroded(levels > otsu(levels)))


def minmax(x: Tensor) -> Tensor:
    """``(x - min) / (max - min)``; all 0 where nothing differs."""
    low, high = x.aminmax()
    return (x - low) / (high - low) if bool(high > low) else torch.zeros_like(x)


def otsu(levels: Tensor) -> int:
    """The level of 0 .. 254 that parts two classes of pixels with the largest variance between them.

    The upper class is what lies above it. Of equal ones the first, as in OpenCV.
    """
    share = torch.bincount(levels.flatten().long(), minlength=256).double() / levels.numel()
    below = share.cumsum(0)  # weight of the lower class
    mean = (share * torch.arange(256, dtype=torch.float64, device=levels.device)).cumsum(0)
    between = (mean[-1] * below - mean) ** 2 / (below * (1 - below)).clamp_min(1e-12)
    return int(between[:-1].argmax())


def eroded(mask: Tensor) -> Tensor:
    """True where the pixel, its left, its upper and its upper left neighbour are; outside of the picture all are."""
    return ~_any_of_four(~mask, (1, 0, 1, 0))


def dilated(mask: Tensor) -> Tensor:
    """True where the pixel, its right, its lower or its lower right neighbour is: what is left is where it was."""
    return _any_of_four(mask, (0, 1, 0, 1))


def _any_of_four(mask: Tensor, border: tuple[int, ...]) -> Tensor:
    return F.max_pool2d(F.pad(mask.float()[None, None], border), 2, stride=1)[0, 0] > 0


def resized(mask: Tensor, height: int, width: int) -> Tensor:
    """The mask at another resolution: True where anything it covers is."""
    return F.adaptive_max_pool2d(mask.float()[None, None], (height, width))[0, 0] > 0
