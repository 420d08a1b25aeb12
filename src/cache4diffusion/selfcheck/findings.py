"""What a selfcheck finds: one finding per method and invariant."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable"]

INVARIANTS = {
    "off_is_off": "Set to cache nothing, the method changes nothing: the result is the same, bit by bit, as without.",
    "frozen_input": "Given the same input at every step, cached steps return what computed ones return, and what they "
    "skip really does not run.",
    "linear_feature": "What changes by the same amount from step to step is predicted exactly, by methods that draw "
    "lines through earlier steps.",
    "remove_restores": "remove() leaves everything as it was found, copies are not accelerated, and a run that failed "
    "leaves nothing behind.",
    "repeatable": "The same seed gives the same result, run after run: nothing survives from one run to the next.",
    "kept_type": "The denoiser returns what it returns without caching: same type, number format, device and shape.",
    "nan_guard": "Broken numbers (NaN, infinity) in the cache are noticed and computed anew, so they reach no image.",
    "bad_settings_fail": "Unknown or impossible settings are refused with an error, and nothing stays attached.",
    "ledger_equals_held": "The memory that the method reports is the memory it holds, and after a run it holds none.",
}
"""What is promised of every method on every pipeline, by the name of its check."""
_WORDS: dict[Status, str] = {"passed": "holds", "failed": "FAILED", "not applicable": "does not apply"}
_COUNTED: dict[Status, str] = {"passed": "hold", "failed": "failed", "not applicable": "do not apply"}


@dataclass(frozen=True)
class Finding:
    """What was found for one method and one invariant (a key of `INVARIANTS`); ``site``: where it fails, if known."""

    method: str
    invariant: str
    status: Status
    detail: str
    site: str | None = None

    @property
    def number(self) -> int:
        """Of the invariant, from 1."""
        return list(INVARIANTS).index(self.invariant) + 1


@dataclass
class SelfCheck:
    """All findings on one pipeline or denoiser; true if nothing failed.

    Args:
        denoiser: class names.
        findings: by method and invariant.
        steps: of each run.
        labels: the methods with their settings, by name.
    """

    denoiser: str
    findings: list[Finding] = field(default_factory=list)
    steps: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def failed(self) -> list[Finding]:
        """What failed."""
        return [finding for finding in self.findings if finding.status == "failed"]

    def of(self, method: str, invariant: str) -> Finding:
        """The finding for a method and an invariant."""
        return next(f for f in self.findings if (f.method, f.invariant) == (method, invariant))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = list(dict.fromkeys(finding.method for finding in self.findings))
        return {
            "denoiser": self.denoiser,
            "steps": self.steps,
            "ok": self.ok,
            "invariants": INVARIANTS,
            "methods": {
                name: {
                    f.invariant: {"status": f.status, "detail": f.detail, "site": f.site}
                    for f in self.findings
                    if f.method == name
                }
                for name in names
            },
        }

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        names = list(dict.fromkeys(finding.method for finding in self.findings))
        by_method = {name: [finding for finding in self.findings if finding.method == name] for name in names}
        lines = [f"selfcheck of {self.denoiser}, in runs of {self.steps} steps"]
        if len(names) == 1:
            lines += self._in_full(names[0], by_method[names[0]])
        else:
            lines += [f"  {number} {name}: {INVARIANTS[name]}" for number, name in enumerate(INVARIANTS, start=1)]
            lines += [line for name in names for line in self._in_brief(name, by_method[name])]
        count = Counter(finding.status for finding in self.findings)
        told = ", ".join(f"{count[status]} {word}" for status, word in _COUNTED.items() if count[status])
        verdict = "something failed: do not use it here, and please report it" if self.failed else "nothing failed"
        return "\n".join([*lines, f"{verdict} ({told})"])

    def _in_full(self, name: str, mine: list[Finding]) -> list[str]:
        """Every promise in words, with what was seen."""
        lines = [f"method: {self.labels.get(name, name)}"]
        if _is_unfit(mine):
            return [*lines, f"it cannot run here: {mine[0].detail}"]
        for f in mine:
            where = f" (at {f.site})" if f.site else ""
            lines += ["", f"{f.number} {_WORDS[f.status]}: {INVARIANTS[f.invariant]}"]
            lines.append(f"    {'why' if f.status == 'not applicable' else 'seen'}: {f.detail}{where}")
        return [*lines, ""]

    @staticmethod
    def _in_brief(name: str, mine: list[Finding]) -> list[str]:
        """A line per promise."""
        if _is_unfit(mine):
            return [name, f"  cannot run here: {mine[0].detail}"]
        sites = [f" (at {f.site})" if f.site else "" for f in mine]
        rows = zip(mine, sites, strict=True)
        return [name, *(f"  {f.number} {f.invariant:<18} {_WORDS[f.status]:<14}  {f.detail}{site}" for f, site in rows)]


def _is_unfit(mine: list[Finding]) -> bool:
    """Whether a method cannot serve the denoiser at all."""
    return len({(f.status, f.detail) for f in mine}) == 1 and mine[0].status == "not applicable"
