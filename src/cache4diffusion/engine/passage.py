"""A call's way through consecutive blocks: what they add to each stream, apart from what the host adds between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cache4diffusion.engine.leaves import version


@dataclass
class Passage:
    """What entered, what left so far, and what the host added in between.

    A host or a block may also write into a stream. That shows in the tensor's version, but the values are then gone:
    such streams must be looked at through copies. In inference mode, where nobody counts writes, they always are.

    Args:
        entered: what entered the first block, or copies.
        copies: whether streams are known to be written into.
    """

    entered: list[Tensor]
    copies: bool
    glue: list[Tensor | None] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)  # what left the last block that ran
    left: list[Tensor] = field(default_factory=list)  # the same, or copies
    is_spoilt: bool = False  # something was written into a stream and cannot be told from the blocks' work
    _entered_versions: list[int | None] = field(default_factory=list)
    _left_versions: list[int | None] = field(default_factory=list)

    @classmethod
    def begin(cls, streams: Sequence[Tensor], copies: bool) -> Passage:
        """In front of the first block."""
        passage = cls([], copies, [None] * len(streams))
        passage.entered = passage._seen(streams)
        passage._entered_versions = [version(stream) for stream in passage.entered]
        return passage

    def enter(self, streams: Sequence[Tensor]) -> None:
        """In front of a later block: note what the host added since the one before."""
        for i, (now, before) in enumerate(zip(streams, self.left, strict=True)):
            if now is not before:
                added = now - before
                known = self.glue[i]
                self.glue[i] = added if known is None else known + added
            elif version(now) != self._left_versions[i]:
                self.is_spoilt = True

    def leave(self, streams: Sequence[Tensor]) -> None:
        """Behind a block."""
        self.out, self.left = list(streams), self._seen(streams)
        self._left_versions = [version(stream) for stream in self.left]

    def end(self) -> bool:
        """Behind the last block: whether what was seen is what it was, so that `residual` can be told."""
        for streams, versions in ((self.entered, self._entered_versions), (self.left, self._left_versions)):
            self.is_spoilt = self.is_spoilt or [version(stream) for stream in streams] != versions
        return not self.is_spoilt

    def residual(self, i: int) -> Tensor:
        """What the blocks themselves added to stream ``i``; a new tensor."""
        residual, glue = self.left[i] - self.entered[i], self.glue[i]
        return residual if glue is None else residual - glue

    def _seen(self, streams: Sequence[Tensor]) -> list[Tensor]:
        is_blind = self.copies or any(version(stream) is None for stream in streams)
        return [stream.clone() for stream in streams] if is_blind else list(streams)
