"""Looking at the attention of a full step, for rules that rank tokens by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What is noted of an attention, by the kind of part it is.
OBSERVED: dict[str, tuple[Literal["attention", "value_norm", "cross_attention"], ...]] = {
    "attn": ("attention", "value_norm"),
    "cross_attn": ("cross_attention",),
}


class AttentionCapture(TorchFunctionMode):
    """Sees the first scaled-dot-product attention within, which runs as always, and notes one thing about it.

    One that runs in pieces, on some rows of the batch at a time, is seen until all of them have been; where the pieces
    have other lengths (Mochi leaves out what pads a text), what is missing at the end of a row is 0.

    With ``a = softmax(q k^T)`` per head, all in float32 and in chunks of queries:

    - ``"attention"``: what each key token receives, ``mean over heads and queries of a``, ``[B, M]``;
    - ``"cross_attention"``: the entropy ``-sum_j a_ij log(a_ij + 1e-7)`` of each query's attention, heads averaged
      first, ``[B, N]``; where B is even, also that of the mean over rows b and b + B/2;
    - ``"value_norm"``: ``sum over heads of 1 - ||v||``, ``[B, M]``; no attention map is made;
    - ``"map"``: ``a`` itself, heads averaged, ``[B, N, M]``.

    Args:
        what: which of them.
        chunk: queries at a time.
        rows: of the batch.

    Attributes:
        seen: by name.
        flops: that it took, in products.
    """

    def __init__(
        self, what: Literal["attention", "value_norm", "cross_attention", "map"], chunk: int = 512, rows: int = 1
    ) -> None:
        super().__init__()
        self.what, self.chunk, self.rows, self.flops = what, chunk, rows, 0
        self._pieces: list[dict[str, Tensor]] = []
        self._missing = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._missing > 0:
            names = ("query", "key", "value", "attn_mask")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if all(isinstance(given.get(name), Tensor) for name in names[:3]):
                self._look(given["query"], given["key"], given["value"], given.get("attn_mask"), given.get("scale"))
                self._missing -= given["query"].shape[0]
        return func(*args, **kwargs)

    @property
    def seen(self) -> dict[str, Tensor]:
        """What was noted, by name."""
        names = self._pieces[0] if self._pieces else ()
        return {name: _one_behind_the_other([piece[name] for piece in self._pieces]) for name in names}

    def _look(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> None:
        seen = {}
        self._pieces.append(seen)
        if self.what == "value_norm":
            seen["value_norm"] = (1 - value.float().norm(dim=-1)).sum(1)
        elif self.what == "map":
            seen["map"] = torch.cat([maps.mean(1) for maps in self._maps(query, key, mask, scale)], 1)
        elif self.what == "attention":
            received = torch.zeros(key.shape[0], key.shape[2], device=key.device)
            for maps in self._maps(query, key, mask, scale):
                received += maps.sum((1, 2))
            seen["attention"] = received / (query.shape[1] * query.shape[2])
        else:
            own, of_twins = [], []
            for maps in self._maps(query, key, mask, scale):
                mean = maps.mean(1)
                own.append(entropy(mean))
                if mean.shape[0] % 2 == 0:
                    of_twins.append(entropy((mean + mean.roll(mean.shape[0] // 2, 0)) / 2))
            seen["cross_attention"] = torch.cat(own, 1)
            if of_twins:
                seen["cross_attention_of_twins"] = torch.cat(of_twins, 1)

    def _maps(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Iterator[Tensor]:
        """``softmax(q k^T)``, ``[B, heads, chunk, M]``, chunk by chunk."""
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        self.flops += 2 * query.numel() * key.shape[2]
        for start in range(0, query.shape[2], self.chunk):
            logits = query[:, :, start : start + self.chunk].float() @ key.float().transpose(-1, -2) * factor
            if mask is not None:
                part = mask if mask.shape[-2] == 1 else mask[..., start : start + self.chunk, :]
                logits = logits.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits + part
            yield logits.softmax(-1)


def _one_behind_the_other(pieces: list[Tensor]) -> Tensor:
    """``[b, N]`` of each piece as ``[B, N]``, with 0 behind the shorter ones."""
    if len(pieces) == 1:
        return pieces[0]
    longest = max(piece.shape[1] for piece in pieces)
    return torch.cat([torch.nn.functional.pad(piece, (0, longest - piece.shape[1])) for piece in pieces])


def entropy(maps: Tensor) -> Tensor:
    """``-sum_j a_j log(a_j + 1e-7)`` over the last axis; the guard is that of ToCa's code."""
    return -(maps * (maps + 1e-7).log()).sum(-1)
