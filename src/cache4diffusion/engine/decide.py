"""Asking gates and guards, unit by unit, and telling them what was decided."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from cache4diffusion.composition import Composition
from cache4diffusion.engine.group import ALONE, Alone
from cache4diffusion.engine.state import Context, Unit, Verdict
from cache4diffusion.gates import Place, Placed, Verification


def new_units(composition: Composition, place: Place, batch: int) -> list[Unit]:
    """Fresh units for a decision of a branch: one for the batch, or one per row."""
    gate = composition.gate
    assert gate is not None
    count = 1 if composition.decide == "batch" else batch

    def begin() -> Any:
        return gate.begin_at(place) if isinstance(gate, Placed) else gate.begin(place.num_steps)

    return [Unit(begin(), [guard.begin() for guard in composition.guards]) for _ in range(count)]


def decide(
    composition: Composition,
    context: Context,
    key: int,
    is_ready: bool,
    observe: Callable[[], Sequence[Any]] | None = None,
    follow: Verdict | None = None,
) -> Verdict:
    """Take one decision and commit it.

    Args:
        composition: gate, guards and policy.
        context: the call.
        key: which decision of the call.
        is_ready: whether anything could be predicted; if not, the step is full whatever the gate says.
        observe: returns one score per unit; only called if some unit is not settled by a guard (it may cost a sync).
        follow: verdict of the leading branch, if this branch is tied to it.
    """
    gate, step = composition.gate, context.step
    assert gate is not None
    units = context.state.units[key]
    forced: list[bool | None] = []
    reasons: list[str] = []
    for unit in units:
        opinion, reason = None, ""
        for guard, state in zip(composition.guards, unit.guards, strict=True):
            opinion = guard.overrule(state, step)
            if opinion is not None:
                reason = type(guard).__name__
                break
        forced.append(opinion)
        reasons.append(reason)
    scores: list[Any] = [None] * len(units)
    if is_ready and follow is None and any(opinion is None for opinion in forced):
        if gate.watch is not None and gate.watch.is_feedback:
            scores = [unit.feedback for unit in units]
        elif observe is not None:
            scores = list(observe())
    scores = [score if opinion is None else None for score, opinion in zip(scores, forced, strict=True)]
    cached = [
        gate.propose(unit.gate, step, score) if opinion is None else opinion
        for unit, score, opinion in zip(units, scores, forced, strict=True)
    ]
    if follow is not None:
        cached, reasons = list(follow.cached), ["tied to the first branch"] * len(units)
    if not is_ready:
        cached, reasons = [False] * len(units), ["nothing cached yet"] * len(units)
    if composition.decide == "any" and not all(cached):
        cached = [False] * len(units)
    for unit, final, score in zip(units, cached, scores, strict=True):
        unit.before = copy.deepcopy((unit.gate, unit.guards)) if final else None
        _commit(composition, unit, context, final, score)
    reason = reasons[0] or (type(gate).__name__ if gate.watch is None else "score")
    return Verdict(tuple(cached), reason, tuple(scores))


def mean_sizes(*tensors: Tensor, per_row: bool, group: Alone = ALONE) -> list[Tensor]:
    """``mean|x|`` of each in float32, per row or over all rows; shape [rows] or [1]."""
    counts = [max(x[0].numel(), 1) for x in tensors]
    sizes = group.means([_total(x.float().abs(), True) for x in tensors], counts)
    return list(sizes) if per_row else [size.mean().reshape(1) for size in sizes]


def revoke(composition: Composition, context: Context, key: int, reason: str) -> Verdict:
    """Return the verdict of a step that was to be cached, at least in part, and was then computed in full.

    Gate and guards are put back to where they were, and told of a full step instead.
    """
    verdict = context.verdicts[key]
    for unit, score in zip(context.state.units[key], verdict.scores, strict=True):
        if unit.before is not None:
            unit.gate, unit.guards = unit.before
            unit.before = None
            _commit(composition, unit, context, False, score)
    return dataclasses.replace(verdict, cached=(False,) * len(verdict.cached), reason=reason)


def _commit(composition: Composition, unit: Unit, context: Context, cached: bool, score: Any) -> None:
    assert composition.gate is not None
    composition.gate.commit(unit.gate, context.step, cached, score)
    change = score[0] if isinstance(score, tuple) else score
    for guard, state in zip(composition.guards, unit.guards, strict=True):
        guard.commit(state, context.step, cached, change)
    if not cached:
        unit.feedback = None  # what an earlier run of cached steps was worth says nothing of the next


def relative_change(
    now: Tensor, before: Tensor, per_row: bool, norm: Literal["l1", "l2"] = "l1", group: Alone = ALONE
) -> Tensor:
    """``|now - before| / |before|`` in float32, per row or over all rows; shape [rows] or [1].

    0 where nothing changed and nothing was there, infinite where something came from nothing.
    """
    share = quotient(*group.total(*change_and_size(now, before, per_row, norm)))
    return share if norm == "l1" else share.sqrt()


def turned(entered: Tensor, left: Tensor, per_row: bool, group: Alone = ALONE) -> Tensor:
    """``1 - cos`` between two tensors in float32, per row or over all rows; shape [rows] or [1]. NaN where one is 0."""
    x, y = entered.float(), left.float()
    dims = tuple(range(1, x.ndim)) if per_row else tuple(range(x.ndim))
    sums = [(a * b).sum(dims).reshape(-1) for a, b in ((x, y), (x, x), (y, y))]
    dot, *squares = group.total(*sums)
    return 1 - dot / math.prod(square.sqrt() for square in squares)


def change_and_size(
    now: Tensor, before: Tensor, per_row: bool, norm: Literal["l1", "l2"] = "l1"
) -> tuple[Tensor, Tensor]:
    """Sums of ``|now - before|`` and of ``|before|`` (or of their squares) over what is here, as `relative_change`."""
    before = before.float()
    change = now.float() - before
    change, size = (change.abs_(), before.abs()) if norm == "l1" else (change.square_(), before.square())
    return _total(change, per_row), _total(size, per_row)


def quotient(num: Tensor, den: Tensor) -> Tensor:
    """``num / den``; 0 where both are."""
    return num / den.masked_fill(num == 0, 1)


def _total(sizes: Tensor, per_row: bool) -> Tensor:
    """Sum of what is not negative. On the CPU ``vector_norm(ord=1)`` takes five times as long as ``abs`` and this."""
    return sizes.sum(tuple(range(1, sizes.ndim))) if per_row else sizes.sum().reshape(1)


def prediction_error(
    predicted: Tensor, true: Tensor, verification: Verification, per_row: bool = True, group: Alone = ALONE
) -> Tensor:
    """Error in float32 by the verification's metric, per row or over all rows; shape [rows] or [1]."""
    rows = predicted.shape[0] if per_row else 1
    pred, real = (x.float().reshape(rows, -1) for x in (predicted, true))
    eps = verification.eps
    if verification.metric == "cosine":
        dot, *squares = group.total((pred * real).sum(1), pred.square().sum(1), real.square().sum(1))
        return 1 - dot / math.prod(square.sqrt().clamp_min(eps) for square in squares)
    error = (pred - real).abs()
    if verification.metric.startswith("relative"):
        error = error / (real.abs() + eps)
    is_square = verification.metric.endswith("l2")
    (mean,) = group.means([(error.square() if is_square else error).sum(1)], [error.shape[1]])
    return mean.sqrt() if is_square else mean
