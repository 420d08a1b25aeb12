"""What an observer is: it sees what a gate watches, and has the decision taken where that is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from cache4diffusion.engine.decisions import Decisions
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.state import Context
from cache4diffusion.gates import Watch

Observe = Callable[[], Sequence[Any]]
Seen = dict[Any, Tensor]  # what is watched, by name


class Observer:
    """Sees one kind of `Watch`. What it remembers is in the branch's ``references``, never in itself.

    The runner calls, per denoiser call: `look`, if the decision is taken before it; `before` and `after` around each
    main block; `finish` with what is returned. Where a predicted output was not finite, ``references`` is empty and the
    blocks run once more, all of them (``context.is_recomputed``): what is seen then is kept as on any full step.

    Args:
        host: the denoiser that is watched.
        driver: told when a decision was taken inside its call.
        decisions: takes them.
    """

    sees_streams = False  # whether what is seen is a stream itself, into which the host may write later on

    def __init__(self, host: Host, driver: Driver, decisions: Decisions) -> None:
        self.host, self.driver, self.decisions = host, driver, decisions
        watch = host.gate.watch if host.gate is not None else None
        self.watch: Any = watch if watch is not None else Watch()

    @property
    def decides_inside(self) -> bool:
        """Whether the decision is taken inside the call, at a block."""
        return self.watch.is_inside

    @property
    def needs_blocks(self) -> bool:
        """Whether `before` and `after` must be called."""
        return self.watch.is_inside

    @property
    def reference(self) -> Literal["last_full", "last_step"]:
        """The step that what is seen is compared with."""
        return "last_full"

    @property
    def per_row(self) -> bool:
        """Whether there is one unit per row."""
        return self.host.composition.decide != "batch"

    @property
    def words(self) -> str:
        """Who watches."""
        return type(self.host.gate).__name__

    def install(self) -> None:
        """Find the watch points.

        Raises:
            AnatomyError: the denoiser lacks them.
        """

    def look(self, context: Context) -> Observe | None:
        """Before the call: how to get the scores, one per unit."""
        return None

    def before(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A block is about to run."""

    def after(
        self, context: Context, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A block has run, or passed its input through."""

    def finish(self, context: Context, output: Any) -> None:
        """The call is over; ``output`` is what the host gets."""

    # -- for those that decide inside ------------------------------------------------------------------------------

    def score(self, now: Seen, then: Seen) -> Tensor:
        """How much changed, one figure per unit; both have the same names."""
        raise NotImplementedError(f"{type(self).__name__} compares nothing")  # only those that meet their watch point

    def measured(self, context: Context, key: int, now: Seen, then: Seen) -> Tensor:
        """All that is read of the device for a decision, in one go: the score, and what else the gate is told."""
        return self.score(now, then)

    def tell(self, context: Context, scores: list[Any]) -> list[Any]:
        """What the gate is told for these scores."""
        return scores

    def meet(self, context: Context, key: int, see: Callable[[], Seen | None]) -> None:
        """The watch point of a decision is reached: take it and keep what later steps are compared with.

        Args:
            context: the call.
            key: which decision.
            see: returns what is watched, or None where it cannot be told: then there is no score, and nothing is kept.
        """
        references = context.state.references
        if key in context.verdicts:
            if context.is_recomputed:
                self.keep(references, see() or {})
            return
        seen = see()
        known = {name: then for name in seen or () if (then := references.get(name)) is not None}
        is_known = bool(seen) and all(
            name in known and known[name].shape == now.shape and known[name].dtype == now.dtype
            for name, now in (seen or {}).items()
        )

        def observe() -> list[Any]:
            if seen is None or not is_known:
                return [None] * len(context.state.units[key])
            self.host.trace.syncs += 1
            return self.tell(context, self.measured(context, key, seen, known).tolist())

        verdict = self.decisions.take(context, key, observe)
        if seen is None:
            references.clear()
        elif verdict.is_full or not is_known or self.reference == "last_step":
            self.keep(references, seen)
        elif not verdict.is_cached:
            self.keep(references, seen, verdict.full_rows)
        self.driver.on_decided(context, key)

    def miss(self, context: Context, key: int) -> None:
        """The host left out what is watched: there is no score."""
        self.host.note(f"the host left out blocks that {self.words} watches; what it cannot see, it computes.")
        self.meet(context, key, lambda: None)

    def keep(self, references: Seen, seen: Seen, rows: list[int] | None = None) -> None:
        """Compare later steps with this one, in some rows or in all."""
        for name, now in seen.items():
            remember(references, name, now, rows, self.sees_streams)


def remember(references: Seen, name: Any, now: Tensor, rows: list[int] | None = None, is_shared: bool = True) -> None:
    """Keep ``now`` under ``name``: of the given rows, or of all; a copy if others hold it (or some rows) as well."""
    if rows is not None and name in references:
        updated = references[name].clone()
        updated[rows] = now[rows]
        references[name] = updated
    else:
        references[name] = now.clone() if is_shared else now
