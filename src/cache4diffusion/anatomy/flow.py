"""Following tensors through a recording: what a tensor was made from, and what is made from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from cache4diffusion.anatomy.tape import Op, Recording
from cache4diffusion.anatomy.vocabulary import (
    CREATIONS,
    FIRST_ONLY,
    JOINS,
    NORMS,
    PASSES,
    PRODUCTS,
    SUMS,
    WRITES,
    Pieces,
)

Window = tuple[int, int, int] | None
"""``(axis, start, stop)``: the range of a tensor that is followed; None: all of it."""


def value_inputs(op: Op) -> tuple[int, ...]:
    """The operands whose values reach the result (not those that only give a shape, a type or a place)."""
    if op.name in CREATIONS:
        return ()
    return op.inputs[:1] if op.name in FIRST_ONLY else op.inputs


def dependents(recording: Recording, sources: Iterable[int], first: int, last: int) -> set[int]:
    """Every serial whose value depends on ``sources`` through ``ops[first:last]``, the sources included."""
    found = set(sources)
    for op in recording.ops[first:last]:
        if any(serial in found for serial in value_inputs(op)):
            found.update(op.outputs)
    return found


def ancestors(recording: Recording, targets: Iterable[int], stop: Iterable[int] = (), first: int = 0) -> set[int]:
    """Every serial that the values of ``targets`` depend on, through operations from number ``first`` on.

    The targets are included; what lies behind a serial in ``stop`` is not.
    """
    stops, found, todo = set(stop), set[int](), list(targets)
    while todo:
        serial = todo.pop()
        if serial in found:
            continue
        found.add(serial)
        producer = recording.producer[serial]
        if serial not in stops and producer >= first:
            todo.extend(value_inputs(recording.ops[producer]))
    return found


@dataclass
class Sum:
    """An addition on the way of a residual stream: the side that is the stream, and what was added to it."""

    op: int
    trunk: int
    added: tuple[int, ...]
    reaches: tuple[int, ...]  # the targets that the trunk side leads to, in the order of their tokens


@dataclass
class Trunk:
    """Walks back from a tensor along a residual stream: through looks, copies, joins and the stream side of sums.

    A stream whose padding is masked out is still that stream; so is one that is normalised as a whole, where norms
    stand behind the sums.

    Args:
        recording: the tape.
        targets: serials at which the walk ends (a block's arguments, or what earlier blocks left).
        first: operations before this one are not followed.
    """

    recording: Recording
    targets: frozenset[int]
    first: int = 0
    sums: dict[int, Sum] = field(default_factory=dict)
    _known: dict[tuple[int, Window], tuple[int, ...]] = field(default_factory=dict)

    def reach(self, serial: int, window: Window = None) -> tuple[int, ...]:
        """The targets that (this window of) the tensor is the same stream as, in the order of a concatenation."""
        if serial in self.targets:
            return (serial,)
        key = (serial, window)
        if key not in self._known:
            self._known[key] = ()  # for tapes with a loop, which should not exist
            self._known[key] = self._reach(serial, window)
        return self._known[key]

    def _reach(self, serial: int, window: Window) -> tuple[int, ...]:
        number = self.recording.producer[serial]
        if number < self.first:
            return ()
        op = self.recording.ops[number]
        if not op.inputs:
            return ()
        if op.name in JOINS:
            if op.detail == len(self.recording.shape(serial)) - 1 and len(op.inputs) > 1:
                return ()  # wider tokens are others
            return _unique(t for operand, w in joined(self.recording, op, window) for t in self.reach(operand, w))
        if op.name in WRITES:  # what was there before, and what was written into it
            return _unique(t for operand in (op.inputs[0], op.inputs[-1]) for t in self.reach(operand))
        if op.name in PASSES:
            return self.reach(op.inputs[0], looked_at(self.recording, op, serial, window))
        if op.name in SUMS or op.name == "addcmul":
            return self._through_sum(number, op, window)
        if op.name in NORMS or (op.name in PRODUCTS and self._is_masking(op)):
            return self.reach(op.inputs[0], window)
        return ()

    def _is_masking(self, op: Op) -> bool:
        return len(op.inputs) > 1 and all(map(self._is_mask, op.inputs[1:]))

    def _is_mask(self, serial: int) -> bool:
        """Whether a tensor holds truths, maybe as numbers and in another shape than they came in."""
        while self.recording.facts[serial].dtype is not torch.bool:
            number = self.recording.producer[serial]
            if number < 0 or self.recording.ops[number].name not in PASSES:
                return False
            serial = self.recording.ops[number].inputs[0]
        return True

    def _through_sum(self, number: int, op: Op, window: Window) -> tuple[int, ...]:
        operands = op.inputs[:1] if op.name == "addcmul" else op.inputs
        reached = {operand: self.reach(operand, window) for operand in operands}
        trunk = [operand for operand in operands if reached[operand]]
        if not trunk:
            return ()
        # Two streams that are added to each other: the one of the sum's own shape leads on.
        shape = self.recording.shape(op.outputs[0])
        main = next((operand for operand in trunk if self.recording.shape(operand) == shape), trunk[0])
        added = tuple(operand for operand in op.inputs if operand not in trunk)
        if number not in self.sums:
            self.sums[number] = Sum(number, main, added, self.reach(main))
        return reached[main]


def joined(recording: Recording, op: Op, window: Window) -> list[tuple[int, Window]]:
    """The operands of a concatenation that the window covers, each with its own window."""
    axis = op.detail
    if window is None or axis is None:
        return [(operand, None) for operand in op.inputs]
    if window[0] != axis:
        return [(operand, window) for operand in op.inputs]
    found, start = [], 0
    for operand in op.inputs:
        length = recording.shape(operand)[axis]
        low, high = max(window[1], start) - start, min(window[2], start + length) - start
        if low < high:
            found.append((operand, None if (low, high) == (0, length) else (axis, low, high)))
        start += length
    return found


def looked_at(recording: Recording, op: Op, serial: int, window: Window) -> Window:
    """The window of the operand that a window of its view ``serial`` shows."""
    source, shape = recording.shape(op.inputs[0]), recording.shape(serial)
    if isinstance(op.detail, Pieces):
        axis, pieces = op.detail
        start, length = pieces[op.outputs.index(serial)]
        if window is None:
            return (axis, start, start + length)
        return (axis, start + window[1], start + window[2]) if window[0] == axis else window
    return window if shape == source else None


def _unique(items: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(items))
