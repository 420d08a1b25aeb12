"""What is known of a method before any sampling: its published settings and its strip."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cache4diffusion.gates import Step
from cache4diffusion.method import Method, MethodInfo

NOT_REMEASURED = "not re-measured on real weights"


def published_of(info: MethodInfo) -> list[dict[str, Any]]:
    """The published settings of a method, and whether their effect was measured again."""
    return [
        {"name": name, "settings": dict(settings), "remeasured": name in info.remeasured}
        for name, settings in info.published.items()
    ]


def source_of(row: dict[str, Any]) -> str:
    """Where a method of the registry is from, in a word: its paper's number, or what there is instead."""
    if row["arxiv"]:
        return f"arXiv:{row['arxiv']}"
    return str({"code": "released code", "ours": "ours"}.get(row["fidelity"], row["citation"]))


def methods_table(rows: list[dict[str, Any]]) -> str:
    """The registry as a markdown table, as it stands in the README."""
    lines = ["| name | when to take it | site x gate x predictor | fidelity | source |", "|---|---|---|---|---|"]
    for row in rows:
        axes = [row[axis] for axis in ("site", "gate", "predictor", "tokens") if row[axis]]
        source = source_of(row)
        if row["arxiv"]:
            source = f"[{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']})"
        cells = (f"`{row['name']}`", row["use"], " x ".join(axes), row["fidelity"], source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quotes_published(settings: list[dict[str, Any]]) -> bool:
    """Whether the line of a setting quotes a paper or its code."""
    return any(source in entry["doc"] for entry in settings for source in ("Code:", "Paper:"))


def strip_of(method: Method, steps: int) -> str | None:
    """One letter per step of a run without surprises; None where it depends on what is sampled or was calibrated."""
    if method.info.needs_calibration and method.loaded is None:
        return None
    composition = method.compose()
    letters = []
    if composition.gate is not None:
        gate = composition.gate
        if gate.watch is not None:
            return None
        state = gate.begin(steps)
        guards = [(guard, guard.begin()) for guard in composition.guards]
        for index in range(steps):
            step = Step(index, steps)
            opinions = (guard.overrule(kept, step) for guard, kept in guards)
            opinion = next((opinion for opinion in opinions if opinion is not None), None)
            cached = index > 0 and (gate.propose(state, step, None) if opinion is None else opinion)
            gate.commit(state, step, cached, None)
            for guard, kept in guards:
                guard.commit(kept, step, cached, None)
            letters.append(("p" if composition.tokens is not None else "c") if cached else "F")
        return "".join(letters)
    assert composition.cfg is not None
    letters = []
    known = SimpleNamespace(low=[], step=0)  # what the rule keeps of the last step at which both branches ran
    for index in range(steps):
        is_cached = index > 0 and composition.cfg.is_cached(known, Step(index, steps))
        known.step = known.step if is_cached else index
        letters.append("h" if is_cached else "F")
    return "".join(letters)
