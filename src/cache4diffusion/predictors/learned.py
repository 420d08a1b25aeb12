"""A learned combination of all past full steps. Source: L2P, arXiv:2604.26365."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.history import History, Track
from cache4diffusion.storage import PLAIN, Store


class Stretched(History):
    """A history, and how many measured steps go to one of the run."""

    def __init__(self, capacity: int, rows: int | None, scale: float, store: Store = PLAIN) -> None:
        super().__init__(capacity, rows, store)
        self.scale = scale


@dataclass(frozen=True)
class LearnedCombination(LinearPredictor):
    """Predict ``F_s = sum over full steps j < s of W[s, j] F_j``, with the W of least squares on measured runs.

    With the Gram matrix ``G_ij = <F_i, F_j>`` of uncached runs, the row of a step s behind the full steps J solves
    ``(G_JJ + ridge * mean(diag G_JJ) I) w = G_Js``: the smallest mean squared error over those runs, for exactly the
    full steps there are. So one matrix serves every schedule, also one that is found while sampling. Exact where the
    features of the J steps span the step's (trajectories of rank |J|), up to the ridge. Without a matrix: plain reuse.

    Args:
        gram: ``[T, T]``, by step; only its ratios matter.
        ridge: 0 or more.
        history: most full steps that are kept, the newest ones; None keeps all of the run's.
        stretch: whether a run of another length is served: each of its steps by the measured one at the same share of
            the run.

    Raises:
        SettingError: the ridge is negative, the matrix is not square, or no step is kept.

    Memory: one copy of the feature per full step of the run, or ``history``.
    """

    keeps_constants: ClassVar[bool] = False  # the ridge shrinks them

    gram: tuple[tuple[float, ...], ...] = ()
    ridge: float = 1e-5
    history: int | None = None
    stretch: bool = False

    def __post_init__(self) -> None:
        if not self.ridge >= 0 or any(len(row) != len(self.gram) for row in self.gram):
            raise SettingError(
                f"LearnedCombination(ridge={self.ridge}): ridge must be 0 or more, and the matrix as many rows as "
                "columns."
            )
        if self.history is not None and self.history < 1:
            raise SettingError(f"LearnedCombination(history={self.history}): history must be 1 or more, or None.")

    @property
    def capacity(self) -> int:
        """All full steps of a run, or the newest."""
        return self.history or max(len(self.gram), 1)

    @property
    def needs_num_steps(self) -> bool:
        """A share of what?"""
        return self.stretch

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> Stretched:
        """An empty history that knows how long the run is."""
        is_known = self.stretch and num_steps is not None and num_steps > 1
        scale = (len(self.gram) - 1) / (num_steps - 1) if is_known else 1.0  # type: ignore[operator]
        return Stretched(self.capacity, rows, scale, store)

    def row_weights(self, state: Stretched, track: Track, row: int, time: float) -> list[float]:  # type: ignore[override]
        """The row of the measured step."""
        return self.weights([t * state.scale for t in track.times], time * state.scale)

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """The row of this step for these full steps."""
        if not self.gram:
            return [1.0]
        return solved(torch.tensor(self.gram, dtype=torch.float64), [round(t) for t in times], round(time), self.ridge)


def solved(gram: torch.Tensor, full: Sequence[int], step: int, ridge: float) -> list[float]:
    """Least-squares weights of full steps for a later one, in the order given."""
    last = len(gram) - 1
    chosen, step = [min(i, last) for i in full], min(step, last)
    kept = gram[chosen][:, chosen]
    scale = kept.diagonal().mean().clamp_min(1e-300)
    system = kept / scale + ridge * torch.eye(len(chosen), dtype=gram.dtype)
    right = gram[chosen, step] / scale
    return torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:, 0].tolist()
