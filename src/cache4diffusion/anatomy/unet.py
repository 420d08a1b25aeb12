"""The levels of a U-Net: which layers make a skip tensor, which layers use it up, what is in the middle."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cache4diffusion.anatomy.facts import Layer, Level, UNet
from cache4diffusion.anatomy.flow import Trunk, dependents
from cache4diffusion.anatomy.tape import Call, Recording, TensorSerial
from cache4diffusion.anatomy.tree import LeafPath, map_leaves


@dataclass(frozen=True)
class _Use:
    """An up block's argument that is a skip tensor."""

    call: Call
    leaf: LeafPath
    source: int  # serial of what the down side left


class UNetFinder:
    """Finds a U-Net in a recorded forward: a list whose blocks use up, in reverse, what the blocks of another left.

    Args:
        denoiser: the module that was recorded.
        recording: its tape.
    """

    def __init__(self, denoiser: nn.Module, recording: Recording) -> None:
        self.recording = recording
        self.notes: list[str] = []
        calls = recording.by_path()
        self.lists: list[list[Call]] = []
        for name, module in denoiser.named_children():
            if isinstance(module, nn.ModuleList):
                found = [calls[f"{name}.{key}"][0] for key, _ in module.named_children() if f"{name}.{key}" in calls]
                if found:
                    self.lists.append(sorted(found, key=lambda call: call.index))

    def find(self) -> UNet | None:
        """The U-Net, or None if no two lists are linked like one."""
        best: tuple[int, UNet] | None = None
        for down in self.lists:
            for up in self.lists:
                if down[-1].index < up[0].index:
                    found = self._pair(down, up)
                    if found is not None and (best is None or found.skips > best[0]):
                        best = (found.skips, found)
        return best[1] if best else None

    def _pair(self, down: list[Call], up: list[Call]) -> UNet | None:
        children = self.recording.children(self.recording.root)
        head = self._head([call for call in children if call.end <= down[0].index], down[0])
        between = [call for call in children if call.index >= down[-1].end and call.end <= up[0].index]
        mid = max(between, key=lambda call: call.last - call.first, default=None)
        sources: dict[int, tuple[Call, LeafPath]] = {}
        for call in [*([head] if head else []), *down]:
            for path, serial in call.outputs.items():
                if serial not in sources or len(path) > len(sources[serial][1]):
                    sources[serial] = (call, path)
        before = mid or down[-1]
        entries: dict[int, LeafPath] = {}
        uses: list[_Use] = []
        for call in up:
            entries[call.index] = self._entry(call, before)
            uses += self._uses(call, entries[call.index], frozenset(sources))
            before = call
        used = sorted({use.source for use in uses})
        order = [self._when_used(use) for use in sorted(uses, key=lambda use: use.source)]
        makers = {id(sources[source][0]) for source in used}
        if len(makers) < 2 or len(used) != len(uses) or order != sorted(order, reverse=True):
            return None  # streams that pass from one list to the next look like skips of one maker
        numbers = {source: number for number, source in enumerate(used)}
        is_head_used = head is not None and any(sources[source][0] is head for source in used)
        chain = [*down, *([mid] if mid else []), *up]
        exits = {a.index: self._exit(a, b, entries) for a, b in zip(chain, [*chain[1:], None], strict=True)}
        return UNet(
            head=head.path if head and is_head_used else None,
            down=tuple(
                self._down_level(call, before, exits, sources, numbers)
                for before, call in zip([head, *down], down, strict=False)
            ),
            mid=mid.path if mid else None,
            up=tuple(self._up_level(call, uses, entries, exits, numbers) for call in up),
            skips=len(used),
        )

    def _head(self, able: list[Call], first: Call) -> Call | None:
        """The last call in front of the down side whose output, a map, enters it."""
        for call in reversed(able):
            trunk = Trunk(self.recording, frozenset(call.outputs.values()))
            maps = [serial for serial in first.arguments.values() if len(self.recording.shape(serial)) >= 3]
            if any(trunk.reach(serial) for serial in maps):
                return call
        return None

    # Arguments and outputs ----

    def _entry(self, call: Call, before: Call | None) -> LeafPath:
        """Where what ``before`` left enters: the first such argument that is not inside a container, else the first."""
        if before is not None:
            trunk = Trunk(self.recording, frozenset(before.outputs.values()))
            able = [path for path, serial in call.arguments.items() if trunk.reach(serial)]
            if able:
                return min(able, key=len)
        maps = [path for path, serial in call.arguments.items() if len(self.recording.shape(serial)) >= 4]
        return min(maps or list(call.arguments), key=len)

    def _exit(self, call: Call, after: Call | None, entries: dict[int, LeafPath]) -> LeafPath:
        """Where what ``after`` continues with leaves this call."""
        if after is not None:
            leaf = entries.get(after.index) or self._entry(after, call)
            left = {serial: path for path, serial in reversed(call.outputs.items())}
            for target in Trunk(self.recording, frozenset(left)).reach(after.arguments[leaf]):
                return left[target]
        return min(call.outputs, key=len)

    def _uses(self, call: Call, entry: LeafPath, sources: frozenset[int]) -> list[_Use]:
        trunk = Trunk(self.recording, sources)
        found = []
        for path, serial in call.arguments.items():
            reached = trunk.reach(serial)
            if path == entry and (len(reached) != 1 or self.recording.producer[serial] < 0 or serial in sources):
                reached = ()
            found += [_Use(call, path, target) for target in reached]
        return found

    # Layers ----

    def _when_used(self, use: _Use) -> tuple[int, int]:
        """Number of the first direct sub-module that depends on the skip tensor, after that of the block."""
        call = use.call
        depends = dependents(self.recording, [call.arguments[use.leaf]], call.first, call.last)
        for number, child in enumerate(self.recording.children(call)):
            if not depends.isdisjoint(child.arguments.values()):
                return call.index, number
        return call.index, -1

    def _down_level(
        self,
        call: Call,
        before: Call | None,
        exits: dict[int, LeafPath],
        sources: dict[int, tuple[Call, LeafPath]],
        numbers: dict[int, int],
    ) -> Level:
        children = self.recording.children(call)
        made = [(serial, path) for serial, (owner, path) in sources.items() if owner is call and serial in numbers]
        layers: list[Layer] = []
        tail: tuple[str, ...] = ()
        tail_skip, tail_leaf, start = None, None, 0
        for serial, path in sorted(made):
            producer = self.recording.producer[serial]
            stop = 1 + max((n for n, child in enumerate(children) if child.first <= producer), default=-1)
            modules = tuple(child.path for child in children[start:stop])
            if stop > start and self._resizes(children[stop - 1]):
                tail, tail_skip, tail_leaf = modules, numbers[serial], path
            else:
                layers.append(Layer(modules, numbers[serial], path))
            start = stop
        rest = tuple(child.path for child in children[start:])
        return Level(
            path=call.path,
            argument=self._entry(call, before),
            output=exits[call.index],
            layers=tuple(layers),
            tail=(*tail, *rest),
            tail_skip=tail_skip,
            tail_leaf=tail_leaf,
            output_template=self._template(call),
        )

    def _up_level(
        self,
        call: Call,
        uses: list[_Use],
        entries: dict[int, LeafPath],
        exits: dict[int, LeafPath],
        numbers: dict[int, int],
    ) -> Level:
        children = self.recording.children(call)
        mine = sorted((self._when_used(use)[1], use) for use in uses if use.call is call) if uses else []
        starts = [start for start, _ in mine] + [len(children)]
        layers = []
        tail: list[str] = []
        for number, (start, use) in enumerate(mine):
            own = children[0 if number == 0 else start : starts[number + 1]]
            if number == len(mine) - 1:
                cut = next((n for n, child in enumerate(own) if n and self._resizes(child)), len(own))
                own, tail = own[:cut], [child.path for child in own[cut:]]
            layers.append(Layer(tuple(child.path for child in own), numbers[use.source], use.leaf))
        return Level(
            path=call.path,
            argument=entries[call.index],
            output=exits[call.index],
            layers=tuple(layers),
            tail=tuple(tail) if mine else tuple(child.path for child in children),
            output_template=self._template(call),
        )

    def _resizes(self, call: Call) -> bool:
        """Whether a module returns a map of another height or width than it gets."""
        before = [self.recording.shape(s) for s in call.arguments.values() if len(self.recording.shape(s)) >= 4]
        after = [self.recording.shape(s) for s in call.outputs.values() if len(self.recording.shape(s)) >= 4]
        return bool(before and after) and before[0][-2:] != after[0][-2:]

    def _template(self, call: Call) -> object:
        return map_leaves(lambda _, leaf: None if isinstance(leaf, TensorSerial) else leaf, call.template)
