"""Dynamic mode decomposition: extrapolate a feature by the exponentials that its last snapshots follow.

Source: the DMD calibrator of cache-dit 2026, after HiCache++ (engrXiv 7309); not distribution matching distillation.
"""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.devices import in_double
from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import lagrange
from cache4diffusion.predictors.history import History, Track
from cache4diffusion.storage import PLAIN, Store


@dataclass(frozen=True)
class Modes:
    """One row's fit: ``y(i0 + k)`` is ``sum over j of Re(modes[j] . (values^(k/gap) * amplitudes)) y_j``, newest first.

    Args:
        values: eigenvalues of the map from one snapshot to the next.
        modes: per snapshot, its weight in every mode.
        amplitudes: of the modes in the newest snapshot.
        gap: distance of the snapshots.
    """

    values: list[complex]
    modes: list[list[complex]]
    amplitudes: list[complex]
    gap: float

    def weights(self, k: float) -> list[float]:
        """Weights of the snapshots for ``k`` steps ahead, a fraction of the gap or more."""
        try:
            moved = [
                amplitude * (cmath.exp(k / self.gap * cmath.log(value)) if value else 0.0)
                for value, amplitude in zip(self.values, self.amplitudes, strict=True)
            ]
        except OverflowError:  # a fit to noise that explodes: plain reuse
            return [1.0]
        return [sum(m * a for m, a in zip(row, moved, strict=True)).real for row in self.modes]


class FittedHistory(History):
    """Snapshots, and every row's fit to them (None where the window cannot be fitted)."""

    def __init__(self, capacity: int, rows: int | None, store: Store = PLAIN) -> None:
        super().__init__(capacity, rows, store)
        self.fits_by_row: dict[int, Modes | None] = {}


@dataclass(frozen=True)
class DynamicModes(LinearPredictor):
    """Predict ``y(i0 + k) = Re(Phi (lambda^(k/g) * b))``: damped and oscillating exponentials.

    The last full steps at equal distances ``g`` are the columns of ``X`` and, one later, of ``X'``. With the economy
    SVD ``X = U S V^T``, cut off at ``1e-4 S_0``: the small matrix ``U^T X' V (S + ridge)^-1`` has eigenvalues
    ``lambda`` and vectors ``W``, ``Phi = X' V (S + ridge)^-1 W``, and ``b`` fits ``Phi b`` to the newest snapshot.
    ``Phi`` is a combination of the snapshots, so the prediction is a weighted sum of them and ``Phi`` itself is never
    made. Fitted once per full step, in float64, for every row of the batch by itself.
    With fewer than 4 such snapshots: the line through the last two. Where no fit is possible: plain reuse.
    Exact for sums of at most ``(n - 1) / 2`` oscillations (or ``n - 1`` real exponentials) in n snapshots.

    Args:
        history: full steps kept, 4 or more. Code: 6.
        rank: modes at most; 0 takes all above the cut-off. Code: 0.
        ridge: added to the singular values. Code: 1e-8.

    Raises:
        SettingError: a value is out of range.

    Memory: ``history`` copies of the feature per site and branch, and while fitting one in float64. One host sync per
    feature and full step.
    """

    is_row_wise: ClassVar[bool] = True
    mixes_tokens: ClassVar[bool] = True  # the modes are fitted to all of them

    history: int = 6
    rank: int = 0
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        if self.history < 4:
            raise SettingError(f"DynamicModes(history={self.history}): history must be 4 full steps or more.")
        if self.rank < 0:
            raise SettingError(f"DynamicModes(rank={self.rank}): rank must be 0 (automatic) or more.")
        if self.ridge < 0:
            raise SettingError(f"DynamicModes(ridge={self.ridge}): ridge must be 0 or more.")

    @property
    def capacity(self) -> int:
        """The window."""
        return self.history

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> FittedHistory:
        """An empty history without fits."""
        return FittedHistory(self.capacity, rows, store)

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Take the feature in and fit anew."""
        assert isinstance(state, FittedHistory)
        state.write(leaves, time, rows)
        chosen = range(state.rings[0].shape[0]) if rows is None else rows
        windows = [track.slots[: _uniform(track.times)] for track in state.of(chosen)]
        used = sorted({slot for window in windows if len(window) >= 4 for slot in window})
        opened = {slot: [ring.read(slot) for ring in state.rings] for slot in used}
        for row, window, track in zip(chosen, windows, state.of(chosen), strict=True):
            state.fits_by_row[row] = None
            if len(window) >= 4:
                columns = [torch.cat([in_double(leaf[row]).flatten() for leaf in opened[slot]]) for slot in window]
                state.fits_by_row[row] = self._fit(columns, track.times[0] - track.times[1])

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Where too few snapshots are at equal distances: the line through the last two."""
        return lagrange(times[:2], time)

    def row_weights(self, state: History, track: Track, row: int, time: float) -> list[float]:
        """Of the fit, of the line before there is one, or of the newest snapshot where none is possible."""
        assert isinstance(state, FittedHistory)
        rest = len(track.times)
        if _uniform(track.times) < 4:
            return self.weights(track.times, time) + [0.0] * (rest - min(rest, 2))
        fit = state.fits_by_row[row]
        found = fit.weights(time - track.times[0]) if fit is not None else [1.0]
        return found + [0.0] * (rest - len(found))

    def _fit(self, window: list[Tensor], gap: float) -> Modes | None:
        """Everything in the coordinates of an orthonormal basis of the window: matrices of the window's size only.

        Args:
            window: one row's snapshots, newest first.
            gap: their distance.
        """
        triangle = torch.linalg.qr(torch.stack(window[::-1], 1), mode="r").R.cpu()
        if not bool(triangle.isfinite().all()) or not bool(triangle.any()):
            return None
        before, after = triangle[:, :-1], triangle[:, 1:]
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        rank = int((s > 1e-4 * s[0]).sum()) if self.rank == 0 else min(self.rank, s.numel())
        u, s, v = u[:, :rank], s[:rank], vh[:rank].mH
        back = v / (s + self.ridge)
        values, vectors = torch.linalg.eig(u.mH @ after @ back)
        modes = back.to(vectors.dtype) @ vectors  # Phi = X' modes
        phi = after.to(modes.dtype) @ modes
        b = torch.linalg.pinv(phi) @ triangle[:, -1].to(phi.dtype)
        if not bool(torch.isfinite(torch.view_as_real(modes)).all() & torch.isfinite(torch.view_as_real(b)).all()):
            return None
        return Modes(values.tolist(), modes.flip(0).tolist(), b.tolist(), gap)


def _uniform(times: Sequence[float]) -> int:
    """How many of the newest snapshots lie at equal distances."""
    if len(times) < 2:
        return len(times)
    gap, count = times[0] - times[1], 2
    while count < len(times) and times[count - 1] - times[count] == gap:
        count += 1
    return count
