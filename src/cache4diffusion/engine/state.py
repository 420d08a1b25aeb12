"""What the engine remembers: of one run, per branch, and of the call in progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cache4diffusion.gates import Step
from cache4diffusion.run import Call
from cache4diffusion.storage import Kept


@dataclass
class Unit:
    """What takes one decision (the batch, or one row): the states of its gate and guards."""

    gate: Any
    guards: list[Any]
    feedback: Any = None  # the score that was found at the step before, for a watch that gives feedback
    before: tuple[Any, list[Any]] | None = None  # gate and guards as they were before the step that is being cached


@dataclass(frozen=True)
class Verdict:
    """What was decided for one call.

    Args:
        cached: one flag per unit; a single one stands for the whole batch.
        reason: why, in a few words.
        scores: what the gate compared, per unit; None where it was not asked.
    """

    cached: tuple[bool, ...]
    reason: str
    scores: tuple[Any, ...] = ()

    @property
    def is_full(self) -> bool:
        """Everything is computed."""
        return not any(self.cached)

    @property
    def is_cached(self) -> bool:
        """Everything is predicted."""
        return all(self.cached)

    @property
    def full_rows(self) -> list[int]:
        """Rows that are computed (of a mixed verdict)."""
        return [row for row, cached in enumerate(self.cached) if not cached]

    @property
    def cached_rows(self) -> list[int]:
        """Rows that are predicted (of a mixed verdict)."""
        return [row for row, cached in enumerate(self.cached) if cached]


@dataclass
class BranchState:
    """All that is remembered of one CFG branch in one run. Born empty; dropped as a whole."""

    signature: Any
    units: dict[int, list[Unit]] = field(default_factory=dict)  # by decision (several only with one per block list)
    references: dict[Any, Tensor] = field(default_factory=dict)  # what the watch compares with
    sites: dict[str, Any] = field(default_factory=dict)  # predictor states, by site name
    layouts: dict[str, Any] = field(default_factory=dict)  # how the outputs there are made of tensors, likewise
    broadcast: dict[str, tuple[bool, ...]] = field(default_factory=dict)  # streams that enter with one row for all
    tokens: dict[str, Any] = field(default_factory=dict)  # token-rule states, by site name
    extra: dict[str, Any] = field(default_factory=dict)  # a driver's own
    folded: set[str] = field(default_factory=set)  # sites whose rows are several to a sample
    routes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # blocks that ran at a span, where not all did
    last_step: int | None = None  # at which the branch was called, with all rows
    last_of_rows: dict[tuple[int, ...], int] = field(default_factory=dict)  # likewise, with these rows alone
    unread_finite: Tensor | None = None  # finite check of the last cached output, not read yet

    def tensors(self) -> Iterator[Tensor]:
        """Every cached tensor held here. Another thread may ask in the middle of a call."""
        yield from list(self.references.values())
        for state in list(self.sites.values()):
            yield from state.tensors()
        for value in list(self.extra.values()):
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Kept):
                yield from value.tensors()
            elif isinstance(value, dict):
                yield from [leaf for leaf in list(value.values()) if isinstance(leaf, Tensor)]

    def forget_features(self) -> None:
        """Clear what predictions are made from; the next step will be full."""
        self.sites.clear()
        self.layouts.clear()
        self.broadcast.clear()
        self.tokens.clear()
        self.references.clear()
        self.extra.clear()
        self.routes.clear()


@dataclass
class Context:
    """One call of the denoiser (or the part of it that concerns some rows)."""

    call: Call
    step: Step
    state: BranchState
    batch: int  # rows of the whole call
    kwargs: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the denoiser's call
    latent: Tensor | None = None  # what is denoised (the rows that this part concerns)
    timestep: Any = None  # what the denoiser was told of the time
    rows: list[int] | None = None  # which of them this part concerns; None for all
    twin: tuple[BranchState, list[int] | None] | None = None  # where the features lie that go half into each prediction
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    is_checked: bool = False  # whether a verification is due
    is_recomputed: bool = False  # whether this is the second attempt, in full, at a prediction that was not finite
    passing: frozenset[int] = frozenset()  # main blocks that hand on what enters them
    passed: int = 0  # how many of them were called
    scratch: dict[Any, Any] = field(default_factory=dict)  # of this call only

    @property
    def time(self) -> float:
        """Coordinate of this step for predictors: its index."""
        return float(self.step.index)

    @property
    def last_step(self) -> int | None:
        """At which these rows were computed or predicted last."""
        last = self.state.last_step
        if self.rows is None:
            return last
        alone = self.state.last_of_rows.get(tuple(self.rows))
        return max((step for step in (last, alone) if step is not None), default=None)

    def end(self) -> None:
        """The call is over."""
        if self.rows is None:
            self.state.last_step = self.step.index
        else:
            self.state.last_of_rows[tuple(self.rows)] = self.step.index

    @property
    def verdict(self) -> Verdict | None:
        """The decision, where there is only one."""
        return self.verdicts.get(0)
