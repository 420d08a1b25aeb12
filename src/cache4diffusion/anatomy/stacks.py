"""The lists of blocks of a denoiser, how they are linked, and which of them carry the image."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from cache4diffusion.anatomy.arguments import parameter_names
from cache4diffusion.anatomy.blocks import BlockView, Thread, one_kind, written
from cache4diffusion.anatomy.facts import Block, Part, Stack, StreamKind
from cache4diffusion.anatomy.flow import Trunk, Window, ancestors, dependents, joined, looked_at, value_inputs
from cache4diffusion.anatomy.hints import hint_of, matching
from cache4diffusion.anatomy.inner import inner_modules
from cache4diffusion.anatomy.parts import BlockReader, with_inner
from cache4diffusion.anatomy.tape import Recording
from cache4diffusion.anatomy.tree import LeafPath
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.anatomy.vocabulary import JOINS, PASSES, SUMS, WRITES
from cache4diffusion.errors import AnatomyError

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_KINDS: tuple[StreamKind, ...] = ("image", "other", "text", "joint", "unknown")


def _left_by(block: BlockView) -> dict[int, StreamKind]:
    """The streams that a block returned, with their kinds."""
    return {thread.leaves: thread.kind for thread in block.threads if thread.leaves is not None}


@dataclass
class StackView:
    """A list of blocks while it is being established."""

    path: str
    blocks: list[BlockView]
    parts: list[list[Part]] = field(default_factory=list)
    is_nested: bool = False
    is_main: bool = False

    def shape(self, recording: Recording) -> tuple[int, ...]:
        """Shape of the first stream of the first block."""
        return recording.shape(self.blocks[0].threads[0].enters)


class StackFinder:
    """Finds the stacks of a recorded forward.

    Args:
        denoiser: the module that was recorded.
        recording: its tape.
        latents: serials of the latent argument (several if it is a list); none if not established.
        conditioning: serials of the conditioning arguments.
        others: serials of what else is denoised.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        recording: Recording,
        latents: frozenset[int],
        conditioning: frozenset[int],
        others: frozenset[int] = frozenset(),
    ) -> None:
        self.denoiser, self.recording, self.hint = denoiser, recording, hint_of(denoiser)
        self.latents, self.conditioning, self.others = latents, conditioning, others
        self.notes: list[str] = []
        self.live = ancestors(recording, recording.root.outputs.values())
        self._calls = recording.by_path()
        self._groups: dict[tuple[int, Window], list[frozenset[str]]] = {}
        self._left: dict[int, StreamKind] = {}

    def find(self) -> list[StackView]:
        """Every list of token blocks with at least one part, in the order in which they run."""
        if self.hint.blocks:
            stacks = sorted(self._declared(), key=lambda stack: stack.blocks[0].call.index)
            self._link(stacks)
            for stack in stacks:
                self._read_parts(stack)
            return stacks
        stacks = []
        lists: list[str] = []
        for path, module in self.denoiser.named_modules():
            if not isinstance(module, _CONTAINERS):
                continue
            if any(path.startswith(f"{block.call.path}.") for stack in stacks for block in stack.blocks):
                continue  # inside a block
            stack = self._stack(path, module)
            if stack is not None:
                stack.is_nested = any(path.startswith(f"{other}.") for other in lists)
                stacks.append(stack)
            lists.append(path)
        stacks.sort(key=lambda stack: stack.blocks[0].call.index)
        self._link(stacks)
        return [stack for stack in stacks if self._read_parts(stack)]

    def _declared(self) -> Iterable[StackView]:
        """A stack of each list that was declared, and of blocks declared one by one that follow one another.

        Raises:
            AnatomyError: what was declared is no list of blocks, or none that ran.
        """
        modules = {path: module for path, module in self.denoiser.named_modules() if path}
        single: list[BlockView] = []
        known: set[str] = set()
        for pattern in self.hint.blocks:
            paths = matching(modules, pattern)
            if not paths:
                raise not_so(self.denoiser, f"blocks={pattern!r}: there is no such module")
            for path in paths:
                members = self._members(path, modules[path])
                views = members or self._blocks(path, modules[path])
                self._check_blocks(pattern, path, views, known)
                known.update(view.name for view in views)
                if members:
                    yield StackView(path, sorted(views, key=lambda view: view.call.index))
                else:
                    single += views
        for run in self._runs(sorted(single, key=lambda view: view.call.index)):
            ends = [run[0].call.path, run[-1].call.path]
            yield StackView(" .. ".join(dict.fromkeys(ends)), run)

    def _members(self, path: str, module: nn.Module) -> list[BlockView]:
        """The blocks of a list; none of a module that is a block itself."""
        if not isinstance(module, _CONTAINERS):
            return []
        views = [view for name, child in module.named_children() for view in self._blocks(f"{path}.{name}", child)]
        return views if path not in self._calls or all(view.threads for view in views) else []

    def _check_blocks(self, pattern: str, path: str, views: list[BlockView], known: set[str]) -> None:
        if not views:
            raise not_so(self.denoiser, f"blocks={pattern!r}: {path} was not called in this forward")
        for view in views:
            if not view.threads:
                fact = f"nothing that {view.call.path} returns is one of its arguments plus something of the same shape"
                raise not_so(self.denoiser, f"blocks={pattern!r}: {fact}")
            if view.name in known:
                raise not_so(self.denoiser, f"blocks={pattern!r}: {view.call.path} was declared before")

    def _runs(self, views: list[BlockView]) -> Iterable[list[BlockView]]:
        """Blocks, taken apart where one does not go on with what the one before left."""
        run: list[BlockView] = []
        for view in views:
            if run and not self._goes_on(run[-1], view):
                yield run
                run = []
            run.append(view)
        if run:
            yield run

    def _stack(self, path: str, module: nn.Module) -> StackView | None:
        blocks = []
        for name, child in module.named_children():
            views = self._blocks(f"{path}.{name}", child)
            if not all(view.is_of_tokens for view in views):
                return None
            blocks += views
        blocks.sort(key=lambda block: block.call.index)
        return StackView(path, blocks) if blocks else None

    def _blocks(self, path: str, module: nn.Module) -> list[BlockView]:
        """The calls of a member of a list; of one that is a container itself, of what streams run through in it."""
        calls = self._calls.get(path, [])
        if calls:
            views = [BlockView(call, len(calls)) for call in calls]
            if any(True for _ in unwrapped(module).children()):
                for view in views:
                    view.look(self.recording)
            return views
        if not isinstance(module, nn.ModuleDict):
            return []
        inside = [self._blocks(f"{path}.{name}", child) for name, child in module.named_children()]
        found = [views for views in inside if views and all(view.is_of_tokens for view in views)]
        return found[0] if len(found) == 1 else []

    # Links between blocks, and what the streams stand for ----

    def _link(self, stacks: list[StackView]) -> None:
        left: dict[int, StreamKind] = {}  # what the last blocks of earlier stacks returned
        for stack in stacks:
            before: BlockView | None = None
            for block in stack.blocks:
                self._groups, self._left = {}, left if before is None else _left_by(before)
                for thread in block.threads:
                    thread.kind = self._kind(thread.enters)
                    thread.feeds_output = thread.leaves in self.live
                if before is not None:
                    self._add_ending_streams(before, block)
                before = block
            self._settle(stack)
            left = {**left, **_left_by(stack.blocks[-1])}

    def _add_ending_streams(self, before: BlockView, block: BlockView) -> None:
        """Streams of the block before that enter here and do not leave (the text of a last block)."""
        known = {thread.enters for thread in block.threads}
        kinds = {thread.kind for thread in block.threads}
        for earlier in before.threads:
            serial = block.call.arguments.get(earlier.argument)
            if serial is None or serial in known or earlier.leaves is None or earlier.kind in kinds:
                continue
            if Trunk(self.recording, frozenset({earlier.leaves}), first=before.call.first).reach(serial):
                block.threads.append(Thread(earlier.argument, serial, serial, None, None, earlier.kind))

    def _kind(self, serial: int) -> StreamKind:
        """What a stream stands for: what earlier blocks left, and for the rest by the denoiser's arguments."""
        kinds: list[StreamKind] = []
        for labels in self._token_groups(serial):
            told: list[StreamKind] = [kind for kind in _KINDS if f"={kind}" in labels]
            made: list[StreamKind] = [kind for kind in _KINDS if kind in labels]
            kinds += told or made[:1]
        return one_kind(kinds) if self.latents else "unknown"

    def _token_groups(self, serial: int, window: Window = None) -> list[frozenset[str]]:
        """What is behind the tokens of a tensor, for each group of tokens put in a row.

        ``=image`` (or another kind): tokens that an earlier block left. ``image``, ``text``: the latent, or
        conditioning, is among what they were made from.
        """
        key = (serial, window)
        if key not in self._groups:
            self._groups[key] = list(dict.fromkeys(self._read_groups(serial, window)))
        return self._groups[key]

    def _read_groups(self, serial: int, window: Window) -> list[frozenset[str]]:
        recording, number = self.recording, self.recording.producer[serial]
        if serial in self._left:
            return [frozenset({f"={self._left[serial]}"})]
        op = recording.ops[number] if number >= 0 else None
        if op is not None and op.inputs:
            is_wider = op.detail == len(recording.shape(serial)) - 1
            if op.name in JOINS and not is_wider and not self._is_map(serial):
                return [o for operand, w in joined(recording, op, window) for o in self._token_groups(operand, w)]
            if op.name in WRITES:
                return [o for operand in (op.inputs[0], op.inputs[-1]) for o in self._token_groups(operand)]
            if op.name in PASSES:
                return self._token_groups(op.inputs[0], looked_at(recording, op, serial, window))
            if op.name in SUMS or (op.name in JOINS and is_wider):
                groups = [self._token_groups(operand, window) for operand in op.inputs]
                longest = max(groups, key=len)
                others = [origin for group in groups if group is not longest for origin in group]
                return [origin.union(*others) for origin in longest]
        origin = ancestors(recording, [serial])
        made_of: tuple[tuple[StreamKind, frozenset[int]], ...] = (
            ("image", self.latents),
            ("other", self.others),
            ("text", self.conditioning),
        )
        labels = frozenset(kind for kind, sources in made_of if not sources.isdisjoint(origin))
        return [labels] if labels else []

    def _is_map(self, serial: int) -> bool:
        return len(self.recording.shape(serial)) > 3

    def _settle(self, stack: StackView) -> None:
        """Where a block has several streams that the latent is in, the image is the one that reaches the end."""
        last = stack.blocks[-1]
        for block in stack.blocks:
            mixed = [thread for thread in block.threads if thread.kind in ("image", "joint", "unknown")]
            if len(mixed) < 2:
                continue
            ending = {t.argument for t in last.threads if t.leaves is not None and t.leaves in self.live}
            if self.hint.image is not None:
                ending = {
                    t.argument
                    for t in mixed
                    if parameter_of(self.denoiser, block.call.path, t.argument) == self.hint.image
                }
            for thread in mixed:
                thread.kind = "unknown" if len(ending) != 1 else "image" if thread.argument in ending else "text"

    # Parts ----

    def _read_parts(self, stack: StackView) -> bool:
        for block in stack.blocks:
            reader = BlockReader(self.recording, block, self.hint.parts)
            views = reader.part_views()
            wrong = next(filter(None, (reader.contradiction(view.call) for view in views)), None)
            if wrong is not None:
                raise not_so(self.denoiser, f"parts={dict(self.hint.parts)!r}: {wrong}")
            parts = [reader.part(view) for view in views]
            stack.parts.append(list(with_inner(reader, parts, inner_modules(reader, parts))))
            self.notes.extend(dict.fromkeys(reader.notes))
            if not parts:
                self.notes.append(f"{block.call.path}: no part was found, only its whole output can be cached")
            for path in block.restarts:
                self.notes.append(f"{block.call.path}: its residual stream starts behind {path}")
            if block.calls > 1:
                self.notes.append(
                    f"{block.call.path}: runs {block.calls} times per forward; each is a block of its own"
                )
        return any(stack.parts)

    def main(self, stacks: list[StackView]) -> list[StackView]:
        """The stacks that carry the image through the denoiser, in order; marks them.

        Raises:
            AnatomyError: one that was declared does not.
        """
        if self.hint.blocks:
            idle = next((stack for stack in stacks if not self._carries_image(stack)), None)
            if idle is not None:
                raise not_so(
                    self.denoiser, f"blocks: what {idle.path} makes of the latent does not reach the denoiser's output"
                )
            for stack in stacks:
                stack.is_main = True
            return stacks
        able = [s for s in stacks if not s.is_nested and self._carries_image(s)]
        if able and self.conditioning:
            # A refiner that prepares the latent alone, before it meets any conditioning, is not the main road.
            meets = [self._meets_conditioning(stack) for stack in able]
            if any(meets):
                able = able[meets.index(True) :]
        for stack in able:
            stack.is_main = True
        return able

    def _carries_image(self, stack: StackView) -> bool:
        last = stack.blocks[-1]
        return any(t.kind in ("image", "joint") and t.leaves in self.live for t in last.threads)

    def _meets_conditioning(self, stack: StackView) -> bool:
        leaving = [t.leaves for t in stack.blocks[-1].threads if t.kind in ("image", "joint") and t.leaves is not None]
        return not self.conditioning.isdisjoint(ancestors(self.recording, leaving))

    # How the main blocks follow one another ----

    def turns(self, stacks: list[StackView]) -> list[StackView]:
        """The main stacks in the order in which their blocks run: lists that take turns are cut into their turns."""
        order = sorted(((block, stack) for stack in stacks for block in stack.blocks), key=lambda b: b[0].call.index)
        groups = [list(group) for _, group in itertools.groupby(order, key=lambda item: id(item[1]))]
        if len(groups) == len(stacks):
            return stacks
        return [self._turn(group[0][1], [block for block, _ in group]) for group in groups]

    def _turn(self, stack: StackView, blocks: list[BlockView]) -> StackView:
        parts = [parts for block, parts in zip(stack.blocks, stack.parts, strict=True) if block in blocks]
        return StackView(stack.path, blocks, parts, is_main=True)

    def note_readers(self, main: list[StackView]) -> None:
        """Note who reads what a main block left, besides the one after it, and whether that is written into before."""
        blocks = [block for stack in main for block in stack.blocks]
        readers: dict[int, list[int]] = {}
        inside: dict[int, str] = {}
        for number, op in enumerate(self.recording.ops):
            for serial in value_inputs(op):
                readers.setdefault(serial, []).append(number)
        for block in blocks:
            inside.update(dict.fromkeys(range(block.call.first, block.call.last), block.name))
        for block, after in itertools.pairwise(blocks):
            block.read_by = tuple(dict.fromkeys(self._read_besides(block, after, readers, inside)))
            left = {thread.leaves for thread in block.threads if thread.leaves is not None}
            block.is_written = written(self.recording, left, block.call.last, after.call.first)

    def _read_besides(
        self, block: BlockView, after: BlockView, readers: dict[int, list[int]], inside: dict[int, str]
    ) -> Iterable[str]:
        """Whom what a block left reaches otherwise than through the main block after it."""
        ends = set(self.recording.root.outputs.values())
        todo = [thread.leaves for thread in block.threads if thread.leaves is not None]
        seen = set(todo)
        while todo:
            serial = todo.pop()
            if serial in ends:
                yield ""
            for number in readers.get(serial, ()):
                if number < block.call.last or inside.get(number) == after.name:
                    continue
                if number in inside:
                    yield inside[number]
                    continue
                fresh = [output for output in self.recording.ops[number].outputs if output not in seen]
                seen.update(fresh)
                todo += fresh

    def is_kept(self, before: StackView, after: StackView) -> bool:
        """Whether the second stack goes on with what the first left, so that one span may cover both."""
        return self._goes_on(before.blocks[-1], after.blocks[0])

    def _goes_on(self, before: BlockView, after: BlockView) -> bool:
        """Whether every stream passes from one block to the next, with nothing but what is added from elsewhere."""
        left = {t.leaves for t in before.threads if t.leaves is not None}
        entering = {t.enters for t in after.threads}
        trunk = Trunk(self.recording, frozenset(left), first=before.call.last)
        matched = set()
        for serial in entering:
            reached = trunk.reach(serial)
            if len(reached) != 1 or self.recording.shape(reached[0]) != self.recording.shape(serial):
                return False
            matched.add(reached[0])
        if not len(matched) == len(entering) == len(left):
            return False
        if not trunk.sums:
            return True
        changed = dependents(self.recording, left, before.call.last, after.call.first)
        return not any(serial in changed for item in trunk.sums.values() for serial in item.added)

    def fact(self, stack: StackView) -> Stack:
        """The finished fact."""
        blocks = []
        for block, parts in zip(stack.blocks, stack.parts, strict=True):
            streams = tuple(thread.finished() for thread in block.threads)
            entering = {stream.argument for stream in streams}
            blocks.append(
                Block(
                    path=block.call.path,
                    streams=streams,
                    parts=tuple(parts),
                    output_template=block.output_template(),
                    mutates=block.mutated(self.recording),
                    puts=block.call.puts,
                    inputs=tuple(path for path in block.call.arguments if path not in entering),
                    calls=block.calls,
                    turn=block.call.turn,
                    read_by=block.read_by,
                    is_written=block.is_written,
                )
            )
        pairs = enumerate(itertools.pairwise(stack.blocks), start=1)
        breaks = tuple(number for number, (before, after) in pairs if not self._goes_on(before, after))
        return Stack(stack.path, tuple(blocks), stack.is_main, breaks)


def parameter_of(denoiser: nn.Module, path: str, argument: LeafPath) -> str:
    """The name of a module's argument, however it was passed."""
    names, head = parameter_names(unwrapped(denoiser.get_submodule(path))), argument[0]
    if isinstance(head, str):
        return head
    return names[head] if head < len(names) else f"args_{head}"


def not_so(denoiser: nn.Module, fact: str) -> AnatomyError:
    """The error where something that was declared does not hold."""
    return AnatomyError(
        f"What was declared of {type(denoiser).__name__} does not hold. {fact}. Remove that declaration and say what "
        "holds: c4d.declare(denoiser, ...)."
    )
