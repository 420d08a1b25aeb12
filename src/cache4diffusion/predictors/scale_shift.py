"""Reuse that is scaled and shifted per channel.

By numbers that were trained (Block Caching, arXiv:2312.03209) or fitted (CacheQuant, arXiv:2503.01323).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.history import History
from cache4diffusion.storage import PLAIN, Store

Table = tuple[Tensor, Tensor]  # scale and shift, each [steps, channels], or [steps, channels, 1, 1] of maps


class MendedHistory(History):
    """A `History` that knows how its feature is scaled and shifted: a `Table` for each leaf, or None."""

    def __init__(
        self,
        capacity: int,
        rows: int | None,
        tables: Sequence[Table],
        full: Sequence[int] | None = None,
        store: Store = PLAIN,
    ) -> None:
        super().__init__(capacity, rows, store)
        self.tables, self.full = tables, full
        self.has_own = False  # numbers of its own, where the feature is; before, they are everybody's

    def tensors(self) -> Iterator[Tensor]:
        """The feature, and the numbers."""
        yield from super().tensors()
        for table in self.tables:
            yield from table


@dataclass(frozen=True, eq=False)
class ScaleShift(LinearPredictor):
    """``y(i) = a_i * y(i0) + d_i`` with vectors ``a_i``, ``d_i`` per channel, for each step and site.

    Always from the feature as it was computed, so that errors do not add up. In float32.
    With ``a = 1`` and ``d = 0``, and at sites without numbers, it is plain reuse, bit for bit. So it is where the
    feature was computed at another step than the one that ``a_i`` and ``d_i`` go on from (guidance ended, or a
    prediction was not finite): for that there are no numbers.

    Args:
        tables: by the name of the site, for each tensor of its feature, scale and shift by step. Channels are the last
            axis; where the feature has others behind them, the tables have axes of length 1 there.
        full_steps: by the name of the site, the full steps of the schedule that the numbers are for, rising. None: they
            are for any.

    Memory: one copy of the feature, and the numbers.
    """

    keeps_constants: ClassVar[bool] = False  # it is trained, or fitted

    tables: Mapping[str, tuple[Table, ...]] = field(default_factory=dict)
    full_steps: Mapping[str, tuple[int, ...]] | None = None

    @property
    def capacity(self) -> int:
        """The newest one."""
        return 1

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """All on the newest."""
        return [1.0]

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> MendedHistory:
        """Of a site without numbers."""
        return MendedHistory(self.capacity, rows, (), store=store)

    def serves(self, site: str) -> bool:
        """Every site: those without numbers are reused as they are."""
        return True

    def init_at(self, site: str, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> MendedHistory:
        """Of this site."""
        full = None if self.full_steps is None else self.full_steps.get(site)
        return MendedHistory(self.capacity, rows, self.tables.get(site, ()), full, store)

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Copy the feature, and the first time the numbers, to where it is."""
        super().update(state, leaves, time, rows)
        assert isinstance(state, MendedHistory)
        if not state.has_own:
            where = {"device": leaves[0].device, "dtype": torch.float32, "copy": True}
            state.tables, state.has_own = [(a.to(**where), d.to(**where)) for a, d in state.tables], True

    def predict(self, state: History, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The newest feature, mended for this step."""
        assert isinstance(state, MendedHistory)
        leaves, step = super().predict(state, time, rows), int(time)
        if not state.tables or not self._is_for(state, time):
            return leaves
        return [scaled_and_shifted(leaf, a[step], d[step]) for leaf, (a, d) in zip(leaves, state.tables, strict=True)]

    @staticmethod
    def _is_for(state: MendedHistory, time: float) -> bool:
        """Whether the numbers of a step go on from the step at which the feature was computed."""
        tracks = state.tracks if state.shared is None else [state.shared]
        computed = {track.times[0] for track in tracks if track.times}
        if state.full is None:
            return time not in computed
        last = max((step for step in state.full if step <= time), default=None)
        return last != time and computed == {last}


def scaled_and_shifted(leaf: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * leaf + shift``, both per channel and broadcast from there, in float32, in the leaf's dtype."""
    return (leaf.float() * scale + shift).to(leaf.dtype)
