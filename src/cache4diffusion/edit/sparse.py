"""Convolutions, linear layers and attention for some places only; all others keep what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Places:
    """The places of a map that are computed.

    Args:
        mask: truths ``[h, w]``.
        tokens: indices of the True ones, row by row.
        side: of the square tiles in which convolutions compute: 2, or 1 where the map has an odd side.
        rows, columns: of the tiles with a True place in them.
    """

    mask: Tensor
    tokens: Tensor
    side: int
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Places:
        """Those of a mask. One transfer to the host."""
        side = 1 if mask.shape[0] % 2 or mask.shape[1] % 2 else 2
        tiles = F.max_pool2d(mask.float()[None, None], side)[0, 0] > 0
        rows, columns = tiles.nonzero(as_tuple=True)
        return cls(mask, mask.flatten().nonzero()[:, 0], side, rows, columns)

    @property
    def are_none(self) -> bool:
        """Whether nothing is computed."""
        return self.tokens.numel() == 0

    @property
    def are_all(self) -> bool:
        """Whether everything is."""
        return self.tokens.numel() == self.mask.numel()


def conv2d(conv: nn.Conv2d, x: Tensor, old: Tensor, places: Places) -> Tensor:
    """The convolution of ``x`` in the tiles of ``places``, and ``old`` elsewhere.

    A tile of ``s x s`` outputs reads ``(s - 1) stride + dilation (kernel - 1) + 1`` inputs per side, among them
    neighbours that are not computed anew. Each tile is one sample of a dense convolution without padding.

    Args:
        conv: zero padding only.
        x: its input ``[B, C, H, W]``, whole.
        old: its output as it was, ``[B, D, h, w]``; left as it is.
        places: of the output.
    """
    new = old.clone()
    if places.are_none:
        return new
    (stride, _), (dilation, _), side = conv.stride, conv.dilation, places.side
    padding = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    reach = [(side - 1) * stride + dilation * (size - 1) + 1 for size in conv.kernel_size]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    step = side * stride
    windows = padded.unfold(2, reach[0], step).unfold(3, reach[1], step)  # [B, C, tiles, tiles, ., .]
    batch, count = x.shape[0], places.rows.numel()
    tiles = windows[:, :, places.rows, places.columns].transpose(1, 2).flatten(0, 1)  # [B n, C, ., .]
    made = F.conv2d(tiles, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)  # [B n, D, s, s]
    grid = new.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, D, rows, s, columns, s], a view
    grid = grid.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, D, s, s]
    grid[:, places.rows, places.columns] = made.unflatten(0, (batch, count))
    return new


def fits(conv: nn.Conv2d) -> bool:
    """Whether `conv2d` computes what the layer does."""
    is_square = len(set(conv.stride)) == 1 and len(set(conv.dilation)) == 1
    return conv.padding_mode == "zeros" and is_square and isinstance(conv.padding, tuple)


def linear(layer: Any, x: Tensor, old: Tensor, places: Places) -> Tensor:
    """What ``layer`` makes of the tokens at ``places`` of ``x [B, N, C]``, and ``old [B, N, D]`` elsewhere."""
    if places.are_none:
        return old.clone()
    return old.index_copy(1, places.tokens, layer(x[:, places.tokens]))


def queries(attend: Any, query: Tensor, places: Places) -> Tensor:
    """Attention of the queries at ``places`` of ``query [B, heads, N, D]``; elsewhere 0, which nobody reads."""
    made = attend(query[:, :, places.tokens])
    return made.new_zeros(*query.shape[:-1], made.shape[-1]).index_copy(2, places.tokens, made)


@dataclass(frozen=True)
class Moments:
    """What a group normalisation did in the recorded run, as ``y = x * scale + shift``, each ``[B, C]``."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: nn.GroupNorm, x: Tensor) -> Moments:
        """From its input ``[B, C, ...]``, in float32."""
        groups = x.float().flatten(2).unflatten(1, (norm.num_groups, -1)).flatten(2)
        scale = (groups.var(-1, correction=0) + norm.eps).rsqrt()
        mean, each = groups.mean(-1), x.shape[1] // norm.num_groups
        scale, mean = scale.repeat_interleave(each, 1), mean.repeat_interleave(each, 1)
        if norm.weight is not None:
            scale = scale * norm.weight.float()
        shift = -mean * scale
        return cls(scale, shift if norm.bias is None else shift + norm.bias.float())

    def apply(self, x: Tensor) -> Tensor:
        """The same map of another input."""
        shape = (*self.scale.shape, *[1] * (x.ndim - 2))
        return (x.float() * self.scale.view(shape) + self.shift.view(shape)).to(x.dtype)
