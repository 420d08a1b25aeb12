"""One block: the streams that run through it, and its output as a template around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cache4diffusion.anatomy.facts import Handed, OtherLeaf, Stream, StreamKind, StreamRef, call_name
from cache4diffusion.anatomy.flow import Sum, Trunk, ancestors, dependents
from cache4diffusion.anatomy.tape import Call, Recording, TensorSerial
from cache4diffusion.anatomy.tree import LeafPath, leaves, map_leaves
from cache4diffusion.anatomy.vocabulary import VIEWS, is_attention


@dataclass
class Thread:
    """A stream of one block while it is being established (`Stream` is the finished fact).

    ``enters`` is the argument, ``root`` the tensor to which parts are added: the argument too, or what a projection
    in front of the first part made of it (where a long skip is joined in).
    """

    argument: LeafPath
    enters: int
    root: int
    output: LeafPath | None
    leaves: int | None
    kind: StreamKind = "unknown"
    feeds_output: bool = False

    def finished(self) -> Stream:
        """The fact."""
        return Stream(self.argument, self.output, self.kind, self.feeds_output)


@dataclass
class BlockView:
    """A block's call, with what the analysis has found of it."""

    call: Call
    calls: int  # of the module, per forward
    threads: list[Thread] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)
    read_by: tuple[str, ...] = ()
    is_written: bool = False
    axes: list[int] = field(default_factory=list)  # number of axes of every stream

    def look(self, recording: Recording) -> None:
        """Find the streams: outputs that are an argument plus something, of the same shape or one row for all."""
        arguments: dict[int, LeafPath] = {}
        for path, serial in self.call.arguments.items():
            arguments.setdefault(serial, path)
        trunk = Trunk(recording, frozenset(arguments), first=self.call.first)
        sums: dict[int, Sum] = trunk.sums
        taken: set[int] = set()
        axes = 2 if self._is_packed(recording) else 3
        for path, serial in self.call.outputs.items():
            shape = recording.shape(serial)
            if len(shape) < axes or not recording.facts[serial].dtype.is_floating_point:
                continue
            reached = [t for t in trunk.reach(serial) if _leads_to(recording.shape(t), shape) and t not in taken]
            if reached:
                taken.add(reached[0])
                self.threads.append(Thread(arguments[reached[0]], reached[0], reached[0], path, serial))
            elif len(shape) == 3 and serial not in arguments:
                sums = {**sums, **self._look_inside(recording, path, serial, taken)}
        self.sums = sorted(sums.values(), key=lambda item: item.op)
        self.axes = [len(recording.shape(thread.enters)) for thread in self.threads]

    @property
    def name(self) -> str:
        """Of this call."""
        return call_name(self.call.path, self.call.turn)

    @property
    def is_of_tokens(self) -> bool:
        """Whether what runs through is tokens, ``[B, N, D]`` or all in one row ``[N, D]``, and no map."""
        return any(axes in (2, 3) for axes in self.axes)

    def _is_packed(self, recording: Recording) -> bool:
        """Whether tokens of all samples lie in one row: an attention among rows of vectors."""
        ranks = {len(recording.shape(serial)) for serial in self.call.outputs.values()}
        return ranks == {2} and any(is_attention(op.name) for op in recording.ops[self.call.first : self.call.last])

    def _look_inside(self, recording: Recording, path: LeafPath, serial: int, taken: set[int]) -> dict[int, Sum]:
        """Find a stream that starts at the output of one of the block's own modules; return the sums on its way."""
        shape = recording.shape(serial)
        able = [(a, s) for a, s in self.call.arguments.items() if recording.shape(s) == shape and s not in taken]
        for child in recording.children(self.call):
            root = child.outputs.get((), serial)
            made_of = [(a, s) for a, s in able if s in child.arguments.values() or s in ancestors(recording, [root])]
            if root == serial or recording.shape(root) != shape or not made_of:
                continue
            trunk = Trunk(recording, frozenset({root}), first=child.last)
            if trunk.reach(serial) and trunk.sums:
                taken.add(made_of[0][1])
                self.threads.append(Thread(*made_of[0], root, path, serial))
                self.restarts.append(child.path)
                return trunk.sums
        return {}

    def stream_dependents(self, recording: Recording) -> set[int]:
        """Every serial made inside the block that depends on its streams, and the streams themselves."""
        roots = [serial for thread in self.threads for serial in (thread.enters, thread.root)]
        return dependents(recording, roots, self.call.first, self.call.last)

    def kind_of(self, targets: tuple[int, ...]) -> StreamKind:
        """The kind of what leads to these stream arguments."""
        return one_kind(thread.kind for thread in self.threads if thread.root in targets)

    def output_template(self) -> Any:
        """The output with a `StreamRef` for each stream, a `Handed` for what it got, an `OtherLeaf` for the rest."""
        places = {thread.output: StreamRef(index) for index, thread in enumerate(self.threads)}
        given = {serial: path for path, serial in reversed(self.call.arguments.items())}

        def change(path: LeafPath, leaf: Any) -> Any:
            if path in places:
                return places[path]
            if leaf is None:
                return None
            if isinstance(leaf, TensorSerial):
                return Handed(given[leaf]) if leaf in given else OtherLeaf(is_tensor=True)
            same = (p for p, value in self.call.constants.items() if value is leaf and p[1:] == path and path)
            place = next(same, None)
            return OtherLeaf(is_tensor=False) if place is None else Handed(place)

        return map_leaves(change, self.call.template)

    def mutated(self, recording: Recording) -> tuple[LeafPath, ...]:
        """The stream arguments that the block writes into."""
        return tuple(
            thread.argument
            for thread in self.threads
            if written(recording, {thread.enters}, self.call.first, self.call.last)
        )


def one_kind(several: Iterable[StreamKind]) -> StreamKind:
    """The kind itself, ``joint`` for several, ``unknown`` for none."""
    kinds: list[StreamKind] = list(dict.fromkeys(several))
    if len(kinds) > 1:
        return "joint"
    return kinds[0] if kinds else "unknown"


def written(recording: Recording, serials: set[int], first: int, last: int) -> bool:
    """Whether one of ``ops[first:last]`` writes into these tensors or into a view of them."""
    aliases = set(serials)
    for op in recording.ops[first:last]:
        if not op.inputs or op.inputs[0] not in aliases:
            continue
        if op.is_in_place:
            return True
        if op.name in VIEWS:
            aliases.update(op.outputs)
    return False


def tensor_leaves(call: Call) -> list[LeafPath]:
    """Where tensors are in a call's output."""
    return [path for path, leaf in leaves(call.template) if isinstance(leaf, TensorSerial)]


def _leads_to(enters: tuple[int, ...], leaves: tuple[int, ...]) -> bool:
    """Whether what leaves is of the shape that enters, or has many rows where one entered for all."""
    return enters == leaves or (enters[:1] == (1,) and enters[1:] == leaves[1:])
