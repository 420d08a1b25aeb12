"""What a gate is: it decides, before or early in a denoiser call, whether features are computed or predicted.

The contract, drawn once::

    state = gate.begin(num_steps)                 # once per run, branch and unit
    for each call of the denoiser:
        score  = <what gate.watch observes>       # by the engine; None for a static gate
        cached = gate.propose(state, step, score) # pure: may be asked twice, changes nothing
        cached = <guards may overrule>
        gate.commit(state, step, cached, score)   # exactly once, also when overruled

A *unit* is what takes one decision: the whole batch, or one row of it (``decide="row" | "any"``). A gate is scalar
logic for one unit; the engine keeps one state per unit, so rows never see each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable


@dataclass(frozen=True)
class Step:
    """Where in the run a decision is taken. All a gate may know of time."""

    index: int  # 0 .. num_steps - 1
    num_steps: int | None  # None when the run's length is not known

    @property
    def is_last(self) -> bool:
        """Whether this is known to be the last step (False where the length is unknown)."""
        return self.num_steps is not None and self.index == self.num_steps - 1


@dataclass(frozen=True)
class Signal:
    """Watch the first block's modulated input: what its first part would read. The block itself does not run.

    The score is ``mean|now - before| / mean|before|`` in float32, where *before* is the previous step.
    """

    reference: ClassVar[str] = "last_step"


@dataclass(frozen=True)
class Front:
    """Watch the residual that the first ``blocks`` blocks add; they are computed on every step.

    The score is ``mean|now - then| / mean|then|`` in float32, where *then* is the last full step.
    """

    blocks: int = 1
    reference: ClassVar[str] = "last_full"


@dataclass(frozen=True)
class Verification:
    """Watch the prediction itself: on checked cached steps the last block is also computed from its own input.

    The score is the error of the prediction *at the step before*; ``None`` where nothing was checked.

    Args:
        metric: ``relative_l1`` is ``mean(|pred - true| / (|true| + eps))``, elementwise as in SpeCa's code; ``l1``,
            ``l2`` (root mean square), ``relative_l2`` (root mean square of the elementwise relative error) and
            ``cosine`` (1 - cosine similarity) are its other options.
        eps: added to the denominators; official code 1e-10 (FLUX, DiT) and 1e-8 (HunyuanVideo).
    """

    metric: Literal["relative_l1", "l1", "l2", "relative_l2", "cosine"] = "relative_l1"
    eps: float = 1e-10


Watch = Signal | Front | Verification


@runtime_checkable
class Gate(Protocol):
    """Decides full or cached, for one unit. The object is frozen settings; its state belongs to the engine."""

    @property
    def watch(self) -> Watch | None:
        """What the engine must observe before it can ask; None for a schedule known before sampling."""
        ...

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    def begin(self, num_steps: int | None) -> Any:
        """Return the state of one unit at the start of a run."""
        ...

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Whether this step should be cached. Pure."""
        ...

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Take note of what was decided, by this gate or over its head."""
        ...


@dataclass(frozen=True)
class StaticGate:
    """Base of gates that watch nothing: the step index alone decides, and no host sync is ever needed."""

    @property
    def watch(self) -> Watch | None:
        """Nothing is watched."""
        return None

    @property
    def needs_num_steps(self) -> bool:
        """Most schedules do not need the length of the run."""
        return False

    def begin(self, num_steps: int | None) -> Any:
        """No state."""
        return None

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Nothing to remember."""
