"""Probe-aligned extrapolation: the first blocks say how far to go. DiCache, arXiv:2508.17356."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.corrector import Corrector, Sight
from cache4diffusion.predictors.history import History
from cache4diffusion.storage import PLAIN, Store


@dataclass(frozen=True)
class ProbeAligned(Corrector):
    """Extrapolate the residual of all blocks along its last change, as far as the first blocks' residual moved.

    With ``R`` the residual of the whole stack, ``Q`` that of the watched blocks in front, -1 and -2 the last two full
    steps: ``gamma = clip(mean|Q - Q_-2| / mean|Q_-1 - Q_-2|, 1, limit)`` and ``R = R_-2 + gamma * (R_-1 - R_-2)``;
    after one full step ``R = R_-1``. The span's own residual is then ``R - Q``. Exact where R and Q move along lines at
    the same relative speed, within the limit. ``gamma`` is one number per row where rows decide for themselves or the
    batch has one row; else one for the batch. Needs a gate that watches the first blocks.

    Args:
        limit: largest ``gamma``, 1 (plain reuse of ``R_-1``) or more. Code: 1.5 (FLUX), 2 (Wan).
        per_row: whether each row has its own ``gamma``.

    Raises:
        SettingError: the limit is below 1.

    Memory: two copies of R and Q per stream that is read afterwards.
    """

    sees: ClassVar[Sight] = "front"
    mixes_tokens: ClassVar[bool] = True  # gamma is a mean over all of them

    limit: float = 1.5
    per_row: bool = True

    def __post_init__(self) -> None:
        if not self.limit >= 1:
            raise SettingError(f"ProbeAligned(limit={self.limit}): limit must be 1 (plain reuse) or more.")

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> History:
        """Two snapshots of R and Q."""
        return History(2, rows, store)

    def is_ready(self, state: History) -> bool:
        """After one full step."""
        return not state.is_empty

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """A feature without a front: it is all there is."""
        self.update_seeing(state, leaves, [torch.zeros_like(leaf) for leaf in leaves], time, rows)

    def predict(self, state: History, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Without a front nothing is known to have moved: the last feature."""
        count = len(state.rings) // 2
        newest = [leaf[0] for leaf in self._snapshots(state, rows)[:count]]
        return [leaf.to(ring.dtype) for leaf, ring in zip(newest, state.rings[:count], strict=True)]

    def prefetch(self, state: History, time: float) -> None:
        """Begin to bring both snapshots."""
        if not state.is_empty:
            state.prefetch(sorted({slot for track in state.of(range(state.rings[0].shape[0])) for slot in track.slots}))

    def update_seeing(
        self,
        state: History,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor],
        time: float,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Keep R, the span's residual and the front's together, and Q."""
        state.write([*[leaf + front for leaf, front in zip(leaves, seen, strict=True)], *seen], time, rows)

    def material(self, state: History, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """R and then Q, the newest and the oldest of each."""
        return [tensor for pair in self._snapshots(state, rows) for tensor in pair]

    def correct(self, material: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """``R_-2 + gamma * (R_-1 - R_-2) - Q``."""
        count = 2 * len(seen)
        gamma = self.gamma(seen[0], *material[count : count + 2])
        predicted = []
        for i, front in enumerate(seen):
            newest, oldest = material[2 * i : 2 * i + 2]
            whole = oldest.float() + gamma.reshape(-1, *[1] * (oldest.ndim - 1)) * (newest.float() - oldest.float())
            predicted.append((whole - front.float()).to(front.dtype))
        return predicted

    def gamma(self, now: Tensor, newest: Tensor, oldest: Tensor) -> Tensor:
        """How far to go, shape [rows] or [1]; 1 where the probe did not move."""
        dims = tuple(range(1, now.ndim))
        far = (now.float() - oldest.float()).abs().mean(dims)
        near = (newest.float() - oldest.float()).abs().mean(dims)
        if not self.per_row:
            far, near = far.mean().reshape(1), near.mean().reshape(1)
        return torch.where(near == 0, torch.ones_like(near), far / near).clamp(1, self.limit)

    @staticmethod
    def _snapshots(state: History, rows: Sequence[int] | None) -> list[tuple[Tensor, Tensor]]:
        """Newest and oldest snapshot of every leaf; the same one twice where there is only one."""
        chosen = range(state.rings[0].shape[0]) if rows is None else rows
        tracks = state.of(chosen)
        used, pairs = {slot for track in tracks for slot in (track.slots[0], track.slots[-1])}, []
        for ring in state.rings:
            opened = {slot: ring.read(slot) for slot in used}
            if state.shared is not None and rows is None:
                pairs.append((opened[state.shared.slots[0]], opened[state.shared.slots[-1]]))
                continue
            newest, oldest = (
                torch.stack([opened[track.slots[age]][row] for row, track in zip(chosen, tracks, strict=True)])
                for age in (0, -1)
            )
            pairs.append((newest, oldest))
        return pairs
