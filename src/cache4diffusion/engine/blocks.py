"""Main blocks as the engine sees them: streams in one canonical order, whatever the block's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cache4diffusion.anatomy import Anatomy, Block, Stream, StreamRef
from cache4diffusion.anatomy.facts import Handed
from cache4diffusion.anatomy.tree import leaves
from cache4diffusion.engine.leaves import get_argument

_ORDER = {"image": 0, "joint": 1, "text": 2, "other": 2, "unknown": 3}


class BlockView:
    """A block whose streams are listed image first; lists of blocks may order them differently."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self._order = sorted(range(len(block.streams)), key=lambda i: (_ORDER[block.streams[i].kind], i))
        self.streams: list[Stream] = [block.streams[i] for i in self._order]  # in canonical order
        paths = [stream.argument for stream in self.streams]
        self._has_handed = any(isinstance(leaf, Handed) for _, leaf in leaves(block.output_template))
        self._names = [path[0] for path in paths if len(path) == 1 and isinstance(path[0], str)]
        self._is_plain = len(self._names) == len(paths)  # each stream is an argument with a name
        template = block.output_template
        refs = template if type(template) is tuple else ()
        self._places: list[int] | None = None  # for an output that is a plain tuple of streams: which, canonically
        if refs and all(isinstance(ref, StreamRef) for ref in refs):
            self._places = [self._order.index(ref.index) for ref in refs]

    @property
    def path(self) -> str:
        """Module path from the denoiser."""
        return self.block.path

    @property
    def name(self) -> str:
        """Of this call of the module."""
        return self.block.name

    @property
    def can_rebuild(self) -> bool:
        """Whether the output can be made from stream values alone."""
        return self.block.can_rebuild

    def inputs(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """What enters, one tensor per stream."""
        if self._is_plain and not args:
            try:
                return [kwargs[name] for name in self._names]
            except KeyError:
                pass  # one was left out
        return [get_argument(module, args, kwargs, stream.argument) for stream in self.streams]

    def rebuild(self, values: Sequence[Tensor], module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The block's output around ``values`` (canonical order), and what it hands on of its arguments."""
        if self._places is not None:
            return tuple(values[place] for place in self._places)
        own = [None] * len(values)
        for value, index in zip(values, self._order, strict=True):
            own[index] = value  # type: ignore[call-overload]
        if not self._has_handed:
            return self.block.rebuild(own)
        return self.block.rebuild(own, lambda path: get_argument(module, args, kwargs, path))


def views_of(anatomy: Anatomy) -> list[BlockView]:
    """The main blocks of all lists, in the order in which they run."""
    return [BlockView(block) for stack in anatomy.main for block in stack.blocks]
