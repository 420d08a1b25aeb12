"""What was done, step by step, and what it cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.devices import has_clock

FULL, CACHED, PARTIAL, MIXED, HALF, REDUCED = "F", "c", "p", "m", "h", "r"


def letter_of_level(output: bool, level: bool, tokens: bool) -> str:
    """The letter of a call at a U-Net's reduced level, by which of its decisions are cached."""
    if output:
        return CACHED
    return PARTIAL if level else REDUCED if tokens else FULL


@dataclass(frozen=True)
class Reductions:
    """What one call computed on fewer tokens.

    Args:
        parts: path of each part, tokens that entered it, tokens there are.
        planning: FLOPs of looking at it, of the plans that were made in this call, and of following them.
        saved: FLOPs that attention on fewer queries, keys and values did not take.
    """

    parts: tuple[tuple[str, int, int], ...]
    planning: int = 0
    saved: int = 0


@dataclass
class Record:
    """One call of one denoiser.

    `symbol` is ``F`` (full), ``c`` (cached), ``p`` (cached, with some tokens computed, or the U-Net's outermost
    level), ``m`` (some rows full, some cached), ``h`` (only one of two batched CFG branches ran) or ``r`` (everything
    ran, some parts on fewer tokens).
    """

    denoiser: str
    run: int
    step: int
    branch: str
    symbol: str
    reason: str
    rows: tuple[bool, ...] | None = None  # per row: cached? None when the batch decided as one
    scores: tuple[Any, ...] = ()  # per unit: a number, several where several things are watched, or None
    wall_ms: float | None = None
    cached: float | None = None  # share of what can be cached that was, over rows and decisions
    rested: tuple[tuple[str, float], ...] | None = None  # what did not run, for which share of the rows
    reduced: Reductions | None = None  # what ran on fewer tokens
    is_verified: bool = False  # whether the prediction was checked by computing the last block


@dataclass
class Trace:
    """The records of all runs since `accelerate`, oldest first, and the notes of what went wrong or was unusual."""

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # what is unusual only if it is frequent, and how often
    syncs: int = 0  # scalar transfers from the device that decisions needed
    limit: int = 100_000

    def add(self, record: Record) -> None:
        """Append a record; the oldest half is dropped when there are too many."""
        if len(self.records) >= self.limit:
            del self.records[: self.limit // 2]
        self.records.append(record)

    def note(self, text: str) -> None:
        """Append a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def count(self, text: str) -> None:
        """Note that something happened once more."""
        self.counts[text] = self.counts.get(text, 0) + 1

    def runs(self) -> list[int]:
        """Identifiers of the runs that have records, oldest first."""
        return list(dict.fromkeys(record.run for record in self.records))

    def of(self, run: int | None = None, branch: str | None = None, denoiser: str | None = None) -> list[Record]:
        """The records of one run (the newest by default), branch and denoiser."""
        if run is None:
            runs = self.runs()
            if not runs:
                return []
            run = runs[-1]
        return [
            record
            for record in self.records
            if record.run == run
            and (branch is None or record.branch == branch)
            and (denoiser is None or record.denoiser == denoiser)
        ]

    def strip(self, run: int | None = None, branch: str | None = None, denoiser: str | None = None) -> str:
        """Symbols of one run, step by step, e.g. ``FFFccccFcccc``.

        With several branches and none named: the first branch of the run.
        """
        records = self.of(run, None, denoiser)
        if branch is None and records:
            branch = records[0].branch
        return "".join(record.symbol for record in records if record.branch == branch)


Places = dict[tuple[str, str], int]  # bytes by device and dtype


def bytes_by_place(tensors: Iterable[Tensor], place_of: Callable[[Tensor], tuple[str, str]]) -> Places:
    """Bytes of the distinct storages behind ``tensors``, by device and dtype.

    Args:
        tensors: what is held.
        place_of: names the device and the dtype of one.
    """
    seen: set[int] = set()
    places: Places = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage._cdata in seen:  # not the address: tensors without data have none
            continue
        seen.add(storage._cdata)
        place = place_of(tensor)
        places[place] = places.get(place, 0) + storage.nbytes()
    return places


@dataclass
class Ledger:
    """Bytes of cached tensors: what is held now, and the most that was ever held."""

    held: int = 0
    peak: int = 0
    places: Places = field(default_factory=dict)  # what was held when it was the most
    most_on: dict[str, int] = field(default_factory=dict)  # the most that a device ever held

    def set(self, places: Places) -> None:
        """Note what is held now."""
        self.held = sum(places.values())
        if self.held > self.peak:
            self.peak, self.places = self.held, dict(places)
        devices: dict[str, int] = {}
        for (device, _), count in places.items():
            devices[device] = devices.get(device, 0) + count
        for device, count in devices.items():
            self.most_on[device] = max(self.most_on.get(device, 0), count)


class Timer:
    """Wall time of calls. On an accelerator by events that are read later, so that timing never waits.

    Where a device has no such events it is the time until everything was given to it.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Record, Any, Any]] = deque()  # oldest first

    def events(self, device: torch.device) -> Any:
        """A fresh recorded event on ``device``, or None on the CPU and where events tell no time."""
        if not has_clock(device):
            return None
        event = torch.Event(device, enable_timing=True)
        event.record()
        return event

    def add(self, record: Record, start: Any, end: Any) -> None:
        """Fill in ``record.wall_ms`` from two events, once they are over."""
        self._pending.append((record, start, end))
        while self._pending and self._pending[0][2].query():  # or they would pile up where nobody asks for a report
            self._read()

    def settle(self) -> None:
        """Read all pending events (waits for the device)."""
        while self._pending:
            self._pending[0][2].synchronize()
            self._read()

    def _read(self) -> None:
        record, start, end = self._pending.popleft()
        record.wall_ms = start.elapsed_time(end)
