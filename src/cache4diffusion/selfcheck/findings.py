"""What a selfcheck finds: one finding per method and invariant."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable"]

INVARIANTS = {
    "off_is_off": "at its off settings the output is bit-equal to the plain denoiser's",
    "frozen_input": "for the same input at every step cached steps equal full ones, and what they bypass runs 0 times",
    "linear_feature": "features affine in the step are predicted exactly by order 1 and above",
    "remove_restores": "remove() restores what was found; copies are plain; an exception leaves no trace",
    "repeatable": "the same seed gives the same result, run after run",
    "kept_type": "type, dtype, device and shape of the output are kept",
    "nan_guard": "what is not finite is noticed and computed anew",
    "bad_settings_fail": "settings that are unknown or out of range are refused, with nothing attached",
    "ledger_equals_held": "the ledger's bytes are those really held, and none after the run",
}


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
    """All findings on one pipeline or denoiser; true if nothing failed."""

    denoiser: str
    findings: list[Finding] = field(default_factory=list)

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
        lines = [f"selfcheck of {self.denoiser}"]
        for name in dict.fromkeys(finding.method for finding in self.findings):
            lines.append(name)
            mine = [finding for finding in self.findings if finding.method == name]
            if len({(f.status, f.detail) for f in mine}) == 1 and mine[0].status == "not applicable":
                lines.append(f"  not applicable  {mine[0].detail}")
                continue
            for f in mine:
                where = f" [{f.site}]" if f.site else ""
                lines.append(f"  {f.number} {f.invariant:<18} {f.status:<14}  {f.detail}{where}")
        count = len(self.failed)
        lines.append("nothing failed" if not count else f"{count} failed")
        return "\n".join(lines)
