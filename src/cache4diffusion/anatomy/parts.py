"""The parts of one block, what kind each is, and the inner modules that only feed them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from cache4diffusion.anatomy.blocks import BlockView, written
from cache4diffusion.anatomy.facts import Inner, Part, PartKind, StreamKind
from cache4diffusion.anatomy.flow import ancestors, dependents, value_inputs
from cache4diffusion.anatomy.tape import Call, Recording
from cache4diffusion.anatomy.tree import LeafPath
from cache4diffusion.anatomy.vocabulary import (
    CONVOLUTIONS,
    HEAVY,
    JOINS,
    MATRIX,
    PASSES,
    PRODUCTS,
    SUMS,
    WRITES,
    Pieces,
    is_attention,
)

# Any operation between a part's output and the sum it ends in, other than these, belongs to the part itself.
_AFTER_PART = PASSES | PRODUCTS | SUMS | JOINS | WRITES | {"addcmul"}


# What a single projection is the end of, by what feeds it.
_END_OF: dict[frozenset[str], PartKind] = {
    frozenset({"attn"}): "attn",
    frozenset({"tokenwise"}): "ffn",
}


@dataclass
class PartView:
    """A part while it is being established."""

    call: Call
    outputs: dict[LeafPath, dict[int, int]] = field(default_factory=dict)
    """For each leaf: the stream arguments it is added to, and from which of its tokens on."""


class BlockReader:
    """Reads the parts of one block from the tape.

    Args:
        recording: the tape.
        block: the block.
        declared: kinds of its parts by their path in it; empty: they are seen.
    """

    def __init__(self, recording: Recording, block: BlockView, declared: Mapping[str, PartKind] | None = None) -> None:
        self.recording, self.block, self.call = recording, block, block.call
        self.declared: dict[str, PartKind] = {
            f"{block.call.path}.{path}": kind for path, kind in (declared or {}).items()
        }
        self.inner_calls = recording.inside(block.call)
        self.depends = block.stream_dependents(recording)
        self.notes: list[str] = []
        # For each tensor, the outermost call that returns it (a call comes before those inside it).
        self._returned: dict[int, tuple[Call, LeafPath]] = {}
        first = [call for call in self.inner_calls if call.path in self.declared]
        for call in [*first, *self.inner_calls]:
            for path, serial in call.outputs.items():
                if serial not in call.arguments.values():
                    self._returned.setdefault(serial, (call, path))

    def part_views(self) -> list[PartView]:
        """The parts in the order in which they run."""
        found: dict[int, PartView] = {}
        for item in self.block.sums:
            for serial in item.added:
                if serial in self.depends:
                    before = len(found)
                    hits = self._parts_behind(serial, set(), 0)
                    for call, leaf, start in hits:
                        view = found.setdefault(call.index, PartView(call))
                        for order, target in enumerate(item.reaches):
                            view.outputs.setdefault(leaf, {}).setdefault(target, start + order)
                    if not hits and len(found) == before:
                        self.notes.append(
                            f"{self.call.path}: something that is no module's output is added to a stream"
                        )
        return [found[index] for index in sorted(found) if not self.declared or found[index].call.path in self.declared]

    def _parts_behind(self, serial: int, seen: set[int], start: int) -> list[tuple[Call, LeafPath, int]]:
        """The outermost working modules whose outputs (from token ``start`` on), scaled or summed, make this tensor."""
        if serial in seen or serial not in self.depends:
            return []
        seen.add(serial)
        returned = self._returned.get(serial)
        if returned is not None:
            call, leaf = returned
            if call.path in self.declared or self.is_working(call):
                return [(call, leaf, start)]
            behind = [s for s in call.arguments.values() if s in self.depends]  # a norm or a scale: step through
            return [hit for s in dict.fromkeys(behind) for hit in self._parts_behind(s, seen, start)]
        number = self.recording.producer[serial]
        if number < self.call.first:
            return []
        op = self.recording.ops[number]
        if op.name not in _AFTER_PART and (op.name in HEAVY or is_attention(op.name)):
            return []
        if isinstance(op.detail, Pieces) and op.detail[0] == 1:
            start += op.detail[1][op.outputs.index(serial)][0]
        return [hit for s in value_inputs(op) for hit in self._parts_behind(s, seen, start)]

    def is_working(self, call: Call) -> bool:
        """Whether the module does to a stream what is worth saving (and not only norms, scales or activates it)."""
        return any(
            (op.name in HEAVY or is_attention(op.name)) and any(serial in self.depends for serial in value_inputs(op))
            for op in self.recording.ops[call.first : call.last]
        )

    def kind(self, call: Call) -> PartKind:
        """``attn``, ``cross_attn``, ``ffn`` or ``other``; what was declared, else `seen_kind`."""
        return self.declared.get(call.path) or self.seen_kind(call)

    def contradiction(self, call: Call) -> str | None:
        """What speaks against the declared kind of a part, in words."""
        declared, seen = self.declared.get(call.path), self.seen_kind(call)
        if declared in ("attn", "cross_attn") and self.is_tokenwise(call):
            return f"{call.path} is no attention: it treats every token by itself"
        if declared == "ffn" and seen in ("attn", "cross_attn"):
            return f"{call.path} is an attention ({seen!r})"
        return None

    def seen_kind(self, call: Call) -> PartKind:
        """``attn``, ``cross_attn``, ``ffn`` or ``other``, by what runs inside."""
        crosses, linears = False, 0
        for op in self.recording.ops[call.first : call.last]:
            if is_attention(op.name) or op.name in MATRIX:
                left, right = self._query_and_key(op.name, op.inputs, op.detail)
                streams = (left in self.depends, right in self.depends)
                if all(streams):
                    return "attn"
                crosses = crosses or (any(streams) and self._is_input(right if streams[0] else left))
            if op.name in HEAVY and any(serial in self.depends for serial in op.inputs):
                linears += 1
        if crosses:
            return "cross_attn"
        return "ffn" if linears >= 2 else "other"

    def context(self, call: Call) -> int:
        """How many tokens from outside the streams the attentions inside attend to."""
        lengths: dict[frozenset[int], int] = {}  # by what the keys are made from, which may come in slices
        scores: set[int] = set()
        for op in self.recording.ops[call.first : call.last]:
            is_whole = is_attention(op.name)
            if not is_whole and op.name not in MATRIX:
                continue
            left, right = self._query_and_key(op.name, op.inputs, op.detail)
            if left not in self.depends or right in self.depends or not self._is_input(right):
                continue
            if not is_whole and not scores.isdisjoint(self._made_from(left, call)):
                continue  # values, weighted by what became of the scores
            shape = self.recording.shape(right if is_whole else op.outputs[0])
            lengths.setdefault(self._made_from(right, call), shape[-2] if is_whole else shape[-1])
            scores.update(op.outputs)
        return sum(lengths.values())

    def _made_from(self, serial: int, call: Call) -> frozenset[int]:
        """What the call was given, or made by heavy operations, of which a tensor is a view, a norm or the like."""
        found, seen, todo = set[int](), set[int](), [serial]
        while todo:
            serial = todo.pop()
            if serial in seen:
                continue
            seen.add(serial)
            number = self.recording.producer[serial]
            op = self.recording.ops[number] if number >= call.first else None
            if op is None or op.name in HEAVY or is_attention(op.name):
                found.add(serial)
            else:
                todo.extend(value_inputs(op))
        return frozenset(found)

    def _query_and_key(self, name: str, inputs: tuple[int, ...], detail: object) -> tuple[int, int]:
        if isinstance(detail, tuple) and len(detail) == 2 and is_attention(name):
            return detail
        operands = inputs[-2:] if name in ("baddbmm", "addbmm") else inputs[:2]
        return (operands[0], operands[-1]) if len(operands) > 1 else (-1, -1)

    def _is_input(self, serial: int) -> bool:
        """Whether the tensor depends on an argument of the denoiser (a weight does not)."""
        inputs = set(self.recording.root.arguments.values())
        return serial >= 0 and not inputs.isdisjoint(ancestors(self.recording, [serial]))

    def is_tokenwise(self, call: Call) -> bool:
        """Whether nothing inside lets one token see another: all work happens along the last axis."""
        depends = dependents(
            self.recording, (s for s in call.arguments.values() if s in self.depends), call.first, call.last
        )
        for op in self.recording.ops[call.first : call.last]:
            read = [serial for serial in value_inputs(op) if serial in depends]
            if not read or not op.outputs:
                continue
            before, after = self.recording.shape(read[0]), self.recording.shape(op.outputs[0])
            if is_attention(op.name) or op.name in CONVOLUTIONS or op.name == "opaque":
                return False
            if op.name in MATRIX and (len(read) > 1 or op.inputs[0] not in depends):
                return False
            if len(before) < 2 or before[:-1] != after[:-1]:
                return False
        return True

    def input_leaves(self, call: Call) -> tuple[LeafPath, ...]:
        """The arguments that depend on the block's streams."""
        return tuple(path for path, serial in call.arguments.items() if serial in self.depends)

    def linears(self, paths: list[str]) -> tuple[str, ...]:
        """The innermost modules in these ones that run once and do nothing to tokens but a linear map."""
        found: list[str] = []
        for outer in [call for call in self.inner_calls if call.path in paths]:
            for call in [outer, *self.recording.inside(outer)]:
                names = [op.name for op in self.recording.ops[call.first : call.last] if op.name not in PASSES]
                shapes = [self.recording.shape(serial) for serial in call.arguments.values()]
                if call.end == call.index + 1 and names == ["linear"] and len(shapes) == 1 and len(shapes[0]) >= 3:
                    found.append(call.path)
        return tuple(path for path in dict.fromkeys(found) if found.count(path) == 1)

    def part(self, view: PartView) -> Part:
        """The finished fact, without its inner modules."""
        call = view.call
        leaves = sorted(view.outputs, key=str)
        targets = [tuple(sorted(view.outputs[leaf], key=view.outputs[leaf].__getitem__)) for leaf in leaves]
        kinds: list[StreamKind] = [self.block.kind_of(several) for several in targets]
        streams = {thread.root: index for index, thread in enumerate(self.block.threads)}
        return Part(
            path=call.path,
            kind=self.kind(call),
            outputs=tuple(zip(leaves, kinds, strict=True)),
            segments=tuple(tuple(streams[t] for t in several if t in streams) for several in targets),
            is_tokenwise=self.is_tokenwise(call),
            inputs=self.input_leaves(call),
            is_mutated=written(self.recording, set(call.outputs.values()), call.last, self.call.last),
            calls=self.recording.times[call.path],
            turn=call.turn,
            context=self.context(call) if self.kind(call) == "cross_attn" else 0,
        )


def with_inner(reader: BlockReader, parts: list[Part], inner: list[Inner]) -> tuple[Part, ...]:
    """Give every part the inner modules that feed it, and all their linears.

    A projection of what an attention and others are joined to is fused; one that they feed otherwise is their end.

    A module that feeds several parts is counted with the first of them. Norms are left out: what is linear in them maps
    the timestep.
    """
    finished: list[Part] = []
    for part in parts:
        mine = tuple(item for item in inner if part.path in item.feeds)
        kind = part.kind
        if part.path in reader.declared:
            pass
        elif kind in ("other", "ffn") and any(item.kind == "attn" and item.role == "zero_width" for item in mine):
            kind = "fused"
        elif kind == "other":
            kind = _END_OF.get(frozenset(item.kind for item in mine if item.kind != "norm"), kind)
        known = {path for other in finished for path in other.linears}
        linears = reader.linears([part.path, *[item.path for item in mine if item.role != "nan_token"]])
        finished.append(
            dataclasses.replace(
                part,
                inner=mine,
                kind=kind,
                linears=tuple(path for path in linears if path not in known),
            )
        )
    return tuple(finished)
