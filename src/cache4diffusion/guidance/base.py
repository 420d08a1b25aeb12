"""Predicting one CFG branch from another: the contract of the outermost site.

Batched guidance runs both branches in one call; sequential guidance in two. A `BranchRule` says at which steps the
predicted branch is not run, and how its output is made from the source branch's output of the *same* step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from cache4diffusion.gates.base import Step
from cache4diffusion.storage import PLAIN, Store


@runtime_checkable
class BranchRule(Protocol):
    """Frozen settings; the state belongs to the engine.

    A class says which branch always runs (``source``; the other one is predicted from it), whether the first of two
    calls is the source, whichever it is (``takes_either``), and whether outputs are handed over as maps, also where
    they come as tokens in a row (``needs_maps``).
    """

    source: ClassVar[Literal["cond", "uncond"]]
    takes_either: ClassVar[bool]
    needs_maps: ClassVar[bool]

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    @property
    def layout(self) -> Literal["auto", "batched", "sequential"]:
        """How the host calls the branches: both in one call, one call each, or to be seen from the calls."""
        ...

    @property
    def batch_order(self) -> Literal["auto", "uncond-cond", "cond-uncond"]:
        """Which half of a batched call is which."""
        ...

    @property
    def begins(self) -> int:
        """The first step at which a branch may be skipped."""
        ...

    @property
    def shares_history(self) -> bool:
        """Whether the site's features that were computed for both branches serve the source when it runs alone."""
        ...

    @property
    def merges(self) -> bool:
        """Whether it then goes on with the mean of both branches' features, where both were computed last at one
        step."""
        ...

    def init(self, store: Store = PLAIN) -> Any:
        """Empty state of one run.

        Args:
            store: how what lasts longer than a step is kept.
        """
        ...

    def is_cached(self, state: Any, step: Step) -> bool:
        """Whether the predicted branch is skipped at this step. Pure; False while nothing is known."""
        ...

    def update(self, state: Any, step: Step, source: list[Tensor], predicted: list[Tensor]) -> None:
        """Take in both branches' outputs (flat leaves) of a step where both were run."""
        ...

    def commit(self, state: Any, step: Step) -> None:
        """Take note that the predicted branch is not run at this step. Once per step, before `predict`."""
        ...

    def predict(self, state: Any, step: Step, source: list[Tensor]) -> list[Tensor]:
        """The predicted branch's output from the source branch's, at a step where it was not run. Pure."""
        ...

    def prefetch(self, state: Any) -> None:
        """Begin to bring what `predict` will read, where it lies on another device."""
        ...

    def tensors(self, state: Any) -> Iterator[Tensor]:
        """What the state holds, for the ledger."""
        ...
