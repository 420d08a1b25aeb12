"""Increment calibration: correct what a linear layer returned by a low-rank product with the change of its input.

Source: ICC, arXiv:2505.05829 (CVPR 2025); released code ccccczzy/icc.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.corrector import Corrector, Sight, Weights, along_channels, channels, product_flops
from cache4diffusion.predictors.history import History
from cache4diffusion.storage import PLAIN, Store


class Anchor(History):
    """Output and input of the last full step at one site, and its factors."""

    def __init__(self, site: str, rows: int | None, store: Store = PLAIN) -> None:
        super().__init__(1, rows, store)
        self.site = site
        self.factors: list[tuple[Tensor, Tensor]] = []  # A and B, for each leaf

    def tensors(self) -> Iterator[Tensor]:
        """Everything held, the factors too."""
        yield from super().tensors()
        for pair in self.factors:
            yield from pair


@dataclass(frozen=True)
class Increment(Corrector):
    """Predict ``Y' = Y + A (B (x - X))``: X and Y of the last full step, x what enters now, ``A B`` close to W.

    At a linear layer ``y = W x + b`` the bias cancels: with all of W's rank it is exact, however far x has moved; with
    rank 0 (or without factors) it is plain reuse. Errors do not add up over cached steps, because the anchor stays
    where it is. ``x = X`` gives Y to the last bit.

    Args:
        rank: at most so many columns of A are used, the largest first; None takes all there are.
        weights: the factors, ``SITE/LEAF/a`` ``[out, r]`` and ``SITE/LEAF/b`` ``[r, in]``; None for none.

    Raises:
        SettingError: the rank is negative, or above 0 without factors.

    Memory: one copy of input and output (of the output alone without factors) per site and branch, and the factors,
    which branches share. Cost: ``r (in + out)`` multiply-adds per token.
    """

    sees: ClassVar[Sight] = "input"

    rank: int | None = None
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (self.rank < 0 or (self.rank and self.weights is None)):
            raise SettingError(
                f"Increment(rank={self.rank}): rank must be 0 (plain reuse) or more, and more needs the factors that a "
                "calibration of 'icc' has: use the method."
            )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is corrected."""
        return self.weights is None or self.rank == 0

    def serves(self, site: str) -> bool:
        """Sites with factors; all, where there are none at all."""
        return self.weights is None or self.weights.serves(site)

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> Anchor:
        """Of a site that has no name."""
        return self.init_at("", rows, num_steps, store)

    def init_at(self, site: str, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> Anchor:
        """No anchor yet."""
        return Anchor(site, rows, store)

    def is_ready(self, state: Anchor) -> bool:
        """After one full step."""
        return not state.is_empty

    def update_seeing(
        self,
        state: Anchor,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor],
        time: float,
        rows: Sequence[int] | None = None,
    ) -> None:
        """The anchor moves here."""
        if self.is_plain:
            state.write(leaves, time, rows)
            return
        state.write([*leaves, *seen], time, rows)
        if not state.factors:
            assert self.weights is not None
            for i, (y, x) in enumerate(zip(leaves, seen, strict=True)):
                most = min(channels(y), channels(x))
                a = self.weights.get(f"{state.site}/{i}/a", (channels(y), None), y, most)
                b = self.weights.get(f"{state.site}/{i}/b", (None, channels(x)), y, most)
                state.factors.append((a, b))

    def prefetch(self, state: Anchor, time: float) -> None:
        """Begin to bring the anchor."""
        if not state.is_empty:
            state.prefetch([0])

    def flops(self, state: Anchor, leaves: Sequence[Tensor]) -> int:
        """``2 r (in + out)`` at every place."""
        pairs = zip(leaves, state.factors, strict=False)
        return sum(product_flops(y, a[:, : self.rank]) + product_flops(y, b[: self.rank]) for y, (a, b) in pairs)

    def material(self, state: Anchor, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Outputs, then inputs, then A and B of each leaf."""
        anchors = [ring.value(0) if rows is None else ring.value(0)[list(rows)] for ring in state.rings]
        cut = slice(None, self.rank)
        return [*anchors, *(tensor for a, b in state.factors for tensor in (a[:, cut], b[cut]))]

    def correct(self, material: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """``Y + A (B (x - X))``."""
        count = len(seen)
        if len(material) == count:
            return [y.clone() for y in material]
        corrected = []
        for i, x in enumerate(seen):
            y, before, a, b = material[i], material[count + i], *material[2 * (count + i) : 2 * (count + i) + 2]
            increment = (x - before).to(y.dtype)
            corrected.append(y + along_channels(along_channels(increment, b), a).to(y.dtype))
        return corrected
