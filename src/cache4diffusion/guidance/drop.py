"""Guidance that ends in the middle of a run: from there on both branches have the output of one.

Source: T-GATE, arXiv:2404.02747, and its released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Step
from cache4diffusion.storage import PLAIN, Store


@dataclass
class DropState:
    """What is known of one run."""

    has_both: bool = False  # whether both branches ran in a step, under the conditioning there is


@dataclass(frozen=True)
class DropBranch:
    """From step ``gate_step`` on the unconditional branch alone runs, and its output is the conditional one's as well.

    Guidance then leaves it as it is, whatever its scale: ``u + g (u - u) = u``. Where each branch has a call of its
    own, the first one runs and answers the second, whichever it is. Where guidance begins later than that, or the
    conditioning is replaced, both branches run once more: one of them knows nothing of the other's.

    Args:
        gate_step: first step without guidance; 0: there is none.
        layout: whether the host runs both branches in one call, or one call each; ``"auto"`` sees it from the calls.
        batch_order: which half of a batched call is which.
        shares_history: whether parts' features that were computed for both branches serve the one that is left.
        merges: whether it goes on with their mean, where both were computed last at one step.

    Raises:
        SettingError: a value is out of range, or branches are merged that share nothing.
    """

    gate_step: int = 10
    layout: Literal["auto", "batched", "sequential"] = "auto"
    batch_order: Literal["auto", "uncond-cond", "cond-uncond"] = "auto"
    shares_history: bool = False
    merges: bool = False

    source: ClassVar[Literal["cond", "uncond"]] = "uncond"
    takes_either: ClassVar[bool] = True
    needs_maps: ClassVar[bool] = False
    keeps_guidance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.gate_step < 0:
            raise SettingError(f"DropBranch(gate_step={self.gate_step}): gate_step must be 0 (never) or more.")
        if self.layout not in ("auto", "batched", "sequential"):
            raise SettingError(f"DropBranch(layout={self.layout!r}): use 'auto', 'batched' or 'sequential'.")
        if self.batch_order not in ("auto", "uncond-cond", "cond-uncond"):
            raise SettingError(
                f"DropBranch(batch_order={self.batch_order!r}): use 'auto', 'uncond-cond' or 'cond-uncond'."
            )
        if self.merges and not self.shares_history:
            raise SettingError("DropBranch(merges=True): what is not shared cannot be merged; use shares_history=True.")

    @property
    def needs_num_steps(self) -> bool:
        """The gate step is an index."""
        return False

    @property
    def never_caches(self) -> bool:
        """Whether guidance never ends."""
        return self.gate_step == 0

    @property
    def begins(self) -> int:
        """The gate step."""
        return self.gate_step

    def init(self, store: Store = PLAIN) -> DropState:
        """No branch has run."""
        return DropState()

    def is_cached(self, state: DropState, step: Step) -> bool:
        """Whether guidance is over."""
        return state.has_both and 0 < self.gate_step <= step.index

    def update(self, state: DropState, step: Step, source: list[Tensor], predicted: list[Tensor]) -> None:
        """Both have run."""
        state.has_both = True

    def commit(self, state: DropState, step: Step) -> None:
        """Nothing to note."""

    def predict(self, state: DropState, step: Step, source: list[Tensor]) -> list[Tensor]:
        """The source branch's own output."""
        return source

    def prefetch(self, state: DropState) -> None:
        """Nothing is kept."""

    def tensors(self, state: Any) -> Iterator[Tensor]:
        """None."""
        return iter(())
