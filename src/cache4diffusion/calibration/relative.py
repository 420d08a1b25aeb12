"""How much a feature changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def relative_l1(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """``sum|now - before| / sum|before|`` over several tensors, in float32; NaN where the denominator is 0."""
    pairs = list(zip(now, before, strict=True))
    change = sum(float((a.float() - b.float()).abs().sum()) for a, b in pairs)
    size = sum(float(b.float().abs().sum()) for _, b in pairs)
    return change / size if size > 0 else float("nan")
