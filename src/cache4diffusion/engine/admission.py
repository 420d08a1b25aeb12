"""Nothing is stored before what it will take was weighed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cache4diffusion.run import Call

USUAL_STEPS = 50  # of a run whose length is not known
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Weigh = Callable[[Sequence[Arguments], "int | None", bool], None]


@dataclass
class Waiting:
    """Calls of one step that have not been weighed; branches by name."""

    step: int
    num_steps: int | None
    kinds: dict[str, Hashable] = field(default_factory=dict)
    arguments: dict[str, Arguments] = field(default_factory=dict)


class Admission:
    """Holds calls of new shapes back from the cache until those of a whole step are known, and has them weighed.

    Calls that are held back are computed plainly. How many branches there are shows only when a step is over, so what
    came in it is weighed at the first call after it. What was weighed together in a run of as many steps or more is let
    through at once in later runs.

    Args:
        weigh: told the arguments of the calls, the number of steps, and whether these come on top of what was weighed
            earlier in the run; raises to refuse.
    """

    def __init__(self, weigh: Weigh) -> None:
        self.weigh = weigh
        self._known: list[tuple[Counter[Hashable], int]] = []  # kinds of calls that fit together, in how many steps
        self._present: dict[int, dict[str, Hashable]] = {}  # by run: kind of every branch that was let through
        self._waiting: dict[int, Waiting] = {}  # by run

    def holds(self, call: Call, kind: Hashable, arguments: Arguments) -> bool:
        """Whether this call must be computed plainly.

        Args:
            call: which one.
            kind: the shapes of what goes in.
            arguments: all of it; kept until the step is over.

        Raises:
            Cache4DiffusionError: what was held back does not fit.
        """
        run = call.run.id
        waiting = self._waiting.get(run)
        if waiting is not None and waiting.step != call.step:
            del self._waiting[run]
            self._admit(run, waiting)
        present = self._present.setdefault(run, {})
        together = Counter({**present, call.branch: kind}.values())
        if present.get(call.branch) == kind or self._is_known(together, call.run.num_steps):
            present[call.branch] = kind
            return False
        waiting = self._waiting.setdefault(run, Waiting(call.step, call.run.num_steps))
        waiting.kinds[call.branch], waiting.arguments[call.branch] = kind, arguments
        return True

    def prepare(self, kind: Hashable, arguments: Arguments) -> None:
        """Weigh one call before any run.

        Raises:
            Cache4DiffusionError: it does not fit.
        """
        if not self._is_known(Counter([kind]), None):
            self.weigh([arguments], None, False)
            self._known.append((Counter([kind]), USUAL_STEPS))

    def _is_known(self, together: Counter[Hashable], num_steps: int | None) -> bool:
        steps = num_steps or USUAL_STEPS
        return any(together <= kinds and steps <= weighed for kinds, weighed in self._known)

    def forget(self, run: int | None) -> None:
        """Drop what is remembered of a run (of all for None)."""
        for memory in (self._present, self._waiting):
            for key in list(memory):
                if run is None or key == run:
                    memory.pop(key, None)

    def _admit(self, run: int, waiting: Waiting) -> None:
        present = self._present.setdefault(run, {})
        self.weigh(list(waiting.arguments.values()), waiting.num_steps, bool(present))
        present.update(waiting.kinds)
        self._known.append((Counter(present.values()), waiting.num_steps or USUAL_STEPS))
