"""Adams-Bashforth predictor: the next output as a fixed combination of the previous ones.

Source: AB-Cache, arXiv:2504.10540.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import lagrange
from cache4diffusion.predictors.history import History


@dataclass(frozen=True)
class AdamsBashforth(LinearPredictor):
    """Predict ``y = sum over j = 1 .. order of (-1)^(j+1) C(order, j) f_j``, ``f_1`` being the newest of a queue.

    This sets the ``order``-th backward difference to zero, which is the difference between Adams-Bashforth schemes of
    consecutive order. What the queue holds decides what that means:

    - ``"all"``: the output of every step, predicted ones included, so that its entries are one step apart as the
      argument assumes. Exact for polynomials of degree ``order - 1`` once the queue is.
    - ``"full"``: full steps only. Every cached step of an interval gets the same output, one whole interval ahead.
      Exact for constants.
    - ``"newton"``: full steps only, with weights that know their distances (Lagrange's, as `Newton`). Exact for
      polynomials of degree ``order - 1`` on any spacing.

    Early on fewer outputs exist and the order is lower.

    Args:
        order: outputs combined, 1 or more; 1 is plain reuse. Code: 2. High orders amplify noise: the weights' absolute
            sum is ``2^order - 1`` for a single step.
        queue: see above.

    Raises:
        SettingError: a value is out of range.

    Memory: ``order`` copies of the feature per site and branch (the code keeps 5).
    """

    order: int = 2
    queue: Literal["all", "full", "newton"] = "all"

    def __post_init__(self) -> None:
        if self.order < 1:
            raise SettingError(f"AdamsBashforth(order={self.order}): order must be 1 (plain reuse) or more.")
        if self.queue not in ("all", "full", "newton"):
            raise SettingError(f"AdamsBashforth(queue={self.queue!r}): queue must be 'all', 'full' or 'newton'.")

    @property
    def capacity(self) -> int:
        """One entry per term."""
        return self.order

    def commit(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Queue what a cached step went on with, if the queue holds every step."""
        if self.queue == "all":
            state.write(leaves, time, rows, is_prediction=True)

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Binomial coefficients of alternating sign, or Lagrange's weights."""
        if self.queue == "newton":
            return lagrange(times, time)
        order = len(times)
        return [(-1) ** (j + 1) * math.comb(order, j) for j in range(1, order + 1)]
