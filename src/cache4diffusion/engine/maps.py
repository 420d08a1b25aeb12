"""Seeing a denoiser's output as maps ``[..., H, W]``, whatever its layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cache4diffusion.engine.inputs import Inputs
from cache4diffusion.engine.leaves import get_argument
from cache4diffusion.errors import AnatomyError

# Denoisers whose output tokens hold 2x2 patches of the latent, channel-major: D = (channel, row, column).
_PACKED = ("Flux", "Qwen", "Bria", "Chroma", "LongCat", "Ovis")


@dataclass(frozen=True)
class Grid:
    """How tokens ``[B, N, D]`` lie in the image: ``height x width``, each a ``patch x patch`` piece of the latent.

    Of a video, one frame after the other.
    """

    height: int
    width: int
    patch: int
    frames: int = 1

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.frames * self.height * self.width

    def to_maps(self, tokens: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, frames * D / patch^2, H * patch, W * patch]``."""
        b, p = tokens.shape[0], self.patch
        maps = tokens.reshape(b * self.frames, self.height, self.width, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        return maps.reshape(b, -1, self.height * p, self.width * p)

    def to_tokens(self, maps: Tensor) -> Tensor:
        """The inverse of `to_maps`."""
        b, p = maps.shape[0], self.patch
        tokens = maps.reshape(b * self.frames, -1, self.height, p, self.width, p).permute(0, 2, 4, 1, 3, 5)
        return tokens.reshape(b, self.count, -1)


def grid_of(
    denoiser_name: str,
    tokens: Tensor,
    ids: Any = None,
    shapes: Any = None,
    wanted: str = "FasterCache cannot filter them by frequency",
    sizes: Sequence[Any] = (),
) -> Grid:
    """The grid of output tokens, row by row.

    Args:
        denoiser_name: class name.
        tokens: the output ``[B, N, D]``.
        ids: positions of the tokens ``[N, A]`` or ``[B, N, A]``, if the host passes any (``img_ids``: frame, row and
            column; of FLUX.2 a fourth, too). Of one image two of them vary. Reading them is a host sync.
        shapes: ``[[(frames, height, width), ...], ...]``, or without the inner list, if the host passes them
            (``img_shapes``).
        wanted: what cannot be done without it, for the error.
        sizes: frames, rows and columns, if the host passes them (``num_frames``, ``height``, ``width``: LTX-Video).

    Raises:
        AnatomyError: nothing tells the grid.
    """
    count = tokens.shape[1]
    patch = 2 if denoiser_name.startswith(_PACKED) and tokens.shape[2] % 4 == 0 else 1
    if sizes and all(isinstance(size, int) for size in sizes) and math.prod(sizes) == count:
        return Grid(sizes[1], sizes[2], patch, sizes[0])
    if isinstance(ids, Tensor):
        axes = (ids[0] if ids.ndim == 3 else ids).round().long().T.tolist()
        varying = [values for values in axes if len(set(values)) > 1]
        rows, columns = varying if len(varying) == 2 else axes[-2:]
        width = max(columns, default=0) + 1
        if len(rows) == count and [r * width + c for r, c in zip(rows, columns, strict=True)] == list(range(count)):
            return Grid(count // width, width, patch)
    elif shapes is not None:
        first = [sample if isinstance(sample[0], int) else sample[0] for sample in shapes]
        found = {tuple(int(size) for size in sample) for sample in first}
        frames, height, width = found.pop() if len(found) == 1 else (0, 0, 0)
        if frames == 1 and height * width == count:
            return Grid(height, width, patch)
    else:
        side = math.isqrt(count)
        if side * side == count:
            return Grid(side, side, patch)
    raise AnatomyError(
        f"{denoiser_name} has {count} image tokens, and how they lie in the image is not known (no position ids of one "
        f"image, row by row, and not a square), so {wanted}."
    )


def said_of_grid(
    denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, tuple[Any, ...]]:
    """What a host says of how image tokens lie: ``ids``, ``shapes`` and ``sizes`` of `grid_of`."""
    names = ("img_ids", "img_shapes", "num_frames", "height", "width")
    ids, shapes, *sizes = (get_argument(denoiser, args, kwargs, (name,)) for name in names)
    return ids, shapes, tuple(sizes)


def patch_grid(denoiser_name: str, latent: Tensor, count: int, patch: int | None, wanted: str) -> tuple[int, int, int]:
    """Frames, rows and columns of the ``count`` tokens a latent ``[..., H, W]`` was cut into.

    Args:
        denoiser_name: class name.
        latent: an image ``[B, C, H, W]``, or a video whose last two axes are rows and columns.
        count: number of tokens.
        patch: side of a token's patch, if the denoiser says it.
        wanted: what cannot be done without it, for the error.

    Raises:
        AnatomyError: no square patch gives that many tokens.
    """
    height, width = latent.shape[-2:]
    for side in (patch,) if patch is not None else (1, 2, 4, 8, 16):
        per_frame = (height // side) * (width // side)
        if height % side or width % side or per_frame == 0 or count % per_frame:
            continue
        if count == per_frame or (latent.ndim == 5 and patch is not None):
            return count // per_frame, height // side, width // side
    raise AnatomyError(
        f"{denoiser_name} cuts a latent of {height} x {width} into {count} tokens, and how they lie in the image is "
        f"not known, so {wanted}."
    )


def image_grid(
    inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], count: int, wanted: str
) -> tuple[int, int, int]:
    """Frames, rows and columns of the image tokens of a call.

    Args:
        inputs: roles of the denoiser's arguments.
        args, kwargs: of the call.
        count: number of image tokens.
        wanted: what cannot be done without it, for the error.

    Raises:
        AnatomyError: nothing tells the grid.
    """
    name, latent = type(inputs.module).__name__, inputs.split(args, kwargs)[1]
    if latent.ndim == 3:
        ids, shapes, _ = said_of_grid(inputs.module, args, kwargs)
        grid = grid_of(name, latent[:, :count], ids, shapes, wanted)
        return 1, grid.height, grid.width
    patch = getattr(getattr(inputs.module, "config", None), "patch_size", None)
    side = patch[-1] if isinstance(patch, (tuple, list)) else patch
    return patch_grid(name, latent, count, side if isinstance(side, int) else None, wanted)
