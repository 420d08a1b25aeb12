"""Which steps a composition computes, as far as that is known before any sampling."""

from __future__ import annotations

from cache4diffusion.composition import Composition
from cache4diffusion.gates import Place, Placed, Step
from cache4diffusion.sites import PartsAndStream, PastFrames, Reduced, ReducedLevel
from cache4diffusion.trace import CACHED, FULL, HALF, PARTIAL, REDUCED, letter_of_level


def planned_strip(composition: Composition, steps: int) -> str | None:
    """One letter per step of a run, as in `Trace.strip`; None where the gate looks at what is sampled.

    Args:
        composition: gate, guards, token rule and branch rule.
        steps: of the run.
    """
    gate = composition.gate
    if gate is None:
        return _of_branches(composition, steps)
    return None if gate.watch is not None else _of_gate(composition, steps)


def best_strip(composition: Composition, steps: int) -> str:
    """One letter per step of the run with the fewest full steps: where a gate looks, it likes what it sees.

    Args:
        composition: gate, guards, token rule and branch rule.
        steps: of the run.
    """
    if composition.gate is None:
        return _of_branches(composition, steps)
    strip = _of_gate(composition, steps)
    if composition.cfg is None:
        return strip
    halves = _of_branches(composition, steps)
    return "".join(HALF if (a, b) == (FULL, HALF) else a for a, b in zip(strip, halves, strict=True))


def _of_gate(composition: Composition, steps: int) -> str:
    if isinstance(composition.site, ReducedLevel):
        flags = [_flags(composition, steps, decision) for decision in composition.site.decisions]
        return "".join(letter_of_level(*(not is_full for is_full in each)) for each in zip(*flags, strict=True))
    is_full = _flags(composition, steps)
    return "".join(FULL if full else _cached(composition, is_full, index) for index, full in enumerate(is_full))


def _flags(composition: Composition, steps: int, decision: str = "") -> list[bool]:
    """Whether a decision is full, step by step."""
    gate, is_full = composition.gate, []
    assert gate is not None
    looks = gate.watch is not None
    if looks:
        state = None
    elif decision and isinstance(gate, Placed):
        state = gate.begin_at(Place(steps, decision=decision))
    else:
        state = gate.begin(steps)
    guards = [(guard, guard.begin()) for guard in composition.guards]
    for index in range(steps):
        step = Step(index, steps)
        opinions = (guard.overrule(kept, step) for guard, kept in guards)
        opinion = next((opinion for opinion in opinions if opinion is not None), None)
        if opinion is None:
            opinion = looks or gate.propose(state, step, None)
        cached = opinion and (index > 0 or isinstance(composition.site, Reduced) or decision == "tokens")
        if not looks:
            gate.commit(state, step, cached, None)
        for guard, kept in guards:
            guard.commit(kept, step, cached, None)
        is_full.append(not cached)
    return is_full


def _cached(composition: Composition, is_full: list[bool], index: int) -> str:
    """What a cached step is."""
    if isinstance(composition.site, Reduced):
        return REDUCED
    if isinstance(composition.site, PastFrames):
        return PARTIAL
    if composition.tokens is None:
        return CACHED
    site = composition.site
    return CACHED if isinstance(site, PartsAndStream) and site.jumps(is_full, index) else PARTIAL


def full_steps_of(composition: Composition, steps: int) -> list[bool]:
    """Whether each step of a run is full, for a gate that watches nothing."""
    return [letter == FULL for letter in _of_gate(composition, steps)]


def _of_branches(composition: Composition, steps: int) -> str:
    rule, letters = composition.cfg, []
    assert rule is not None
    state = rule.init()
    for step in (Step(index, steps) for index in range(steps)):
        is_cached = rule.is_cached(state, step)
        if not is_cached:
            rule.update(state, step, [], [])  # both branches ran
        letters.append(HALF if is_cached else FULL)
    return "".join(letters)
