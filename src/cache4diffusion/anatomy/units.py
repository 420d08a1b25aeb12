"""What may be cached inside a U-Net's levels, on maps: whole transformers, and blocks' first convolutions."""

from __future__ import annotations

from collections.abc import Iterator

from cache4diffusion.anatomy.blocks import BlockView, written
from cache4diffusion.anatomy.facts import Inner, Part, UNet
from cache4diffusion.anatomy.flow import dependents
from cache4diffusion.anatomy.parts import BlockReader
from cache4diffusion.anatomy.tape import Call, Recording
from cache4diffusion.anatomy.vocabulary import CONVOLUTIONS, PASSES, UNARY, is_normalising


class UnitFinder:
    """Finds the units of a U-Net.

    A *transformer* is a module with an attention inside that adds something to the one map that it is given, and
    returns that alone. A *block of convolutions* has a norm that feeds a convolution, and a later one that works on
    what this makes (a ResNet block): its first convolution sees neither timestep nor prompt.

    Args:
        recording: of a forward.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def find(self, unet: UNet) -> tuple[Part, ...]:
        """The units, in the order in which they run."""
        calls = self.recording.by_path()
        levels = [level.path for level in (*unet.down, *unet.up)] + ([unet.mid] if unet.mid else [])
        found = [pair for path in levels for call in calls[path] for pair in self._inside(call)]
        return tuple(part for _, part in sorted(found, key=lambda pair: pair[0]))

    def _inside(self, outer: Call) -> Iterator[tuple[int, Part]]:
        """The units inside a call, each with when it runs."""
        for call in self.recording.children(outer):
            part = self._transformer(call)
            if part is not None:
                yield call.index, part
                continue
            inside = list(self._inside(call))
            yield from inside or self._first_convolution(call)

    def _transformer(self, call: Call) -> Part | None:
        """The whole module, if it is one."""
        view = BlockView(call, self.recording.times[call.path])
        view.look(self.recording)
        if len(view.threads) != 1 or len(call.outputs) != 1 or view.restarts or view.calls > 1 or call.puts:
            return None
        thread = view.threads[0]
        is_map = len(self.recording.shape(thread.enters)) >= 4
        if not is_map or thread.output is None or written(self.recording, {thread.enters}, call.first, call.last):
            return None
        if BlockReader(self.recording, view).seen_kind(call) not in ("attn", "cross_attn"):
            return None
        return Part(
            path=call.path,
            kind="transformer",
            outputs=((thread.output, "image"),),
            is_tokenwise=False,
            inputs=(thread.argument,),
            adds_to=thread.argument,
        )

    def _first_convolution(self, block: Call) -> Iterator[tuple[int, Part]]:
        """Of a block of convolutions."""
        children = self.recording.children(block)
        for number, call in enumerate(children):
            norm = self._norm_in_front(children[:number], call) if self._convolves(call) else None
            if norm is None or self.recording.times[call.path] > 1:
                continue
            depends = dependents(self.recording, call.outputs.values(), call.last, block.last)
            if not any(self._convolves(c) and depends & set(c.arguments.values()) for c in children[number + 1 :]):
                continue
            rest = Inner(norm.path, "nan_token", "norm", (call.path,))
            part = Part(
                path=call.path,
                kind="conv",
                outputs=tuple((leaf, "image") for leaf in call.outputs),
                is_tokenwise=False,
                inputs=tuple(call.arguments),
                inner=(rest,) if self._feeds_only(norm, call, block) else (),
                is_mutated=written(self.recording, set(call.outputs.values()), call.last, block.last),
            )
            yield call.index, part
            return

    def _convolves(self, call: Call) -> bool:
        return any(op.name in CONVOLUTIONS for op in self.recording.ops[call.first : call.last])

    def _norm_in_front(self, before: list[Call], conv: Call) -> Call | None:
        """The norm whose output the convolution is given, maybe activated or resized in between."""
        for call in reversed(before):
            names = [op.name for op in self.recording.ops[call.first : call.last]]
            if is_normalising(names) and not self._convolves(call):
                depends = dependents(self.recording, call.outputs.values(), call.last, conv.first)
                return call if depends & set(conv.arguments.values()) else None
        return None

    def _feeds_only(self, norm: Call, conv: Call, block: Call) -> bool:
        """Whether a map of one place serves the way from the norm to the convolution, and nothing else reads it."""
        depends = set(norm.outputs.values())
        for number, op in enumerate(self.recording.ops[norm.last : block.last], start=norm.last):
            if depends.isdisjoint(op.inputs) or conv.first <= number < conv.last:
                continue
            if number >= conv.last or op.name not in UNARY | PASSES:
                return False
            depends.update(op.outputs)
        return self.recording.times[norm.path] == 1
