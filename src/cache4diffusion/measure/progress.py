"""How far a benchmark has come."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunBar:
    """A bar on stderr that learns of more work as it goes."""

    def __init__(self, *, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("bench", total=0)
        self._total, self._begun = 0, 0

    def expect(self, runs: int) -> None:
        """So many more runs will follow."""
        self._total += runs
        self._bar.update(self._task, total=self._total)

    def step(self, what: str) -> None:
        """A run of ``what`` begins; the one before is done."""
        self._bar.update(self._task, description=what, completed=self._begun)
        self._begun += 1

    def __enter__(self) -> RunBar:
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None:
            self._bar.update(self._task, description="measured", completed=self._total)
        self._bar.stop()
