"""The decisions of a denoiser's calls, each taken once, and those that tied branches follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from cache4diffusion.composition import Composition
from cache4diffusion.engine.decide import decide, revoke
from cache4diffusion.engine.driver import Driver
from cache4diffusion.engine.state import Context, Verdict
from cache4diffusion.gates import Step, Verification


class Decisions:
    """Takes the decisions of one driver.

    Args:
        composition: gate, guards, and whether branches are tied.
        driver: whose decisions they are.
    """

    def __init__(self, composition: Composition, driver: Driver) -> None:
        self.composition, self.driver = composition, driver
        self._leads: dict[tuple[int, int, int], Verdict] = {}  # by run, step and key: the first branch's

    def take(self, context: Context, key: int, observe: Callable[[], Sequence[Any]] | None = None) -> Verdict:
        """Ask guards and gate; tied branches follow the first of the step.

        Args:
            context: the call; the verdict is entered there.
            key: which of its decisions.
            observe: as in `decide`.
        """
        lead = (context.call.run.id, context.step.index, key)
        follow = self._leads.get(lead) if self.composition.branches == "tied" else None
        is_overdue = self._is_overdue(context, key)
        is_ready = self.driver.is_ready(context, key) and not is_overdue
        verdict = decide(self.composition, context, key, is_ready, observe, follow)
        if is_overdue:
            verdict = dataclasses.replace(verdict, reason="makes up for a full step this branch missed")
        if self.composition.branches == "tied" and follow is None:
            self._drop(lambda run, step: run == lead[0] and step != lead[1])
            self._leads[lead] = verdict
        context.verdicts[key] = verdict
        if verdict.is_cached:
            context.passing |= self.driver.passing(context, key)
        return verdict

    def take_all(self, context: Context, observe: Callable[[], Sequence[Any]] | None = None) -> None:
        """Take every decision before the call, where none needs to look inside; settle whether one is verified."""
        for key in self.driver.keys:
            self.take(context, key, observe)
        gate = self.composition.gate
        if gate is not None and isinstance(gate.watch, Verification):
            flags = [gate.is_checked(unit.gate) for unit in context.state.units[0]]  # type: ignore[attr-defined]
            context.is_checked = any(flags)
            context.scratch["checked"] = flags

    def revoke(self, context: Context, reason: str) -> None:
        """The call was computed in full after all: gates, guards and the branches that follow are told so."""
        for key, verdict in list(context.verdicts.items()):
            full = context.verdicts[key] = revoke(self.composition, context, key, reason)
            lead = (context.call.run.id, context.step.index, key)
            if self._leads.get(lead) is verdict:
                self._leads[lead] = full

    def forget(self, run: int | None) -> None:
        """Drop what branches of a run would follow (of all for None)."""
        self._drop(lambda other, step: run is None or other == run)

    def _drop(self, is_over: Callable[[int, int], bool]) -> None:
        for key in list(self._leads):  # one by one: another thread's run may be adding to them
            if is_over(key[0], key[1]):
                self._leads.pop(key, None)

    def _is_overdue(self, context: Context, key: int) -> bool:
        """Whether a schedule's full step fell where this branch was not called: its CFG rule skipped it, or guidance
        paused. Gates that watch something see by themselves how far things have moved.
        """
        last, gate = context.last_step, self.composition.gate
        if last is None or gate is None or gate.watch is not None:
            return False
        missed = [Step(index, context.step.num_steps) for index in range(last + 1, context.step.index)]
        return any(not gate.propose(unit.gate, step, None) for unit in context.state.units[key] for step in missed)
