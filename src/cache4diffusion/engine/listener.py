"""Listening to a run without taking part in it: what calibration and its like see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cache4diffusion.engine.state import Context


class Listener(Protocol):
    """Hears of every full call of a denoiser: first each feature, at the site where it is recorded, then the call."""

    def hear_feature(
        self, context: Context, site: str, decision: str, leaves: Sequence[Tensor], seen: Sequence[Tensor]
    ) -> None:
        """A site has recorded ``leaves``. The host may still write into them: copy what is kept.

        Args:
            context: the call.
            site: its name.
            decision: the name of the decision that it follows; empty where there is only one.
            leaves: what was recorded.
            seen: what the predictor saw with it, if it asks for that.
        """
        ...

    def hear_call(self, context: Context, outputs: Sequence[Tensor]) -> None:
        """The call is complete: all its features were heard, its verdicts are final.

        Args:
            context: the call; of the trajectory, the call of the step's first branch.
            outputs: the tensors of the denoiser's output; of the trajectory, none.
        """
        ...
