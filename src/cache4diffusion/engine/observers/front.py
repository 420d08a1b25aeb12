"""Observing what the first blocks make (FBCache, DBCache, DiCache)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from cache4diffusion.engine.decide import relative_change
from cache4diffusion.engine.decisions import Decisions
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.observers.base import Observer, Seen
from cache4diffusion.engine.passage import Passage
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import Front
from cache4diffusion.sites import Span


class FrontObserver(Observer):
    """Sees what the first blocks (of each list that decides for itself) make, behind the last of them."""

    watch: Front

    def __init__(self, host: Host, driver: Driver, decisions: Decisions) -> None:
        super().__init__(host, driver, decisions)
        self.sees_streams = self.watch.of == "stream"
        self._starts: dict[int, int] = {}  # first position of each watched list -> decision key

    @property
    def _sees_all(self) -> bool:
        """Whether the predictor asks what the front added to every stream."""
        return self.host.sees == "front"

    @property
    def reference(self) -> Literal["last_full", "last_step"]:
        """As the watch says."""
        return self.watch.reference

    def install(self) -> None:
        """There must be so many blocks."""
        anatomy = self.host.anatomy
        assert anatomy is not None
        if self.watch.blocks > len(self.host.blocks):
            raise AnatomyError(
                f"{self.words} watches the first {self.watch.blocks} blocks, and {anatomy.denoiser} has "
                f"{len(self.host.blocks)}: use fewer."
            )
        site = self.host.composition.site
        per_list = isinstance(site, Span) and site.per_list
        start = 0
        for key, stack in enumerate(anatomy.main):
            if key == 0 or per_list:
                self._starts[start] = key
            start += len(stack.blocks)

    def before(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notice where a list begins, and what the host adds between its watched blocks."""
        start = max((start for start in self._starts if start <= position), default=None)
        if start is None:
            return
        key, scratch = self._starts[start], context.scratch
        if position - start >= self.watch.blocks:
            if key in self.driver.keys and key not in context.verdicts:
                self.miss(context, key)
            return
        streams = self._watched(self.host.stream_inputs(position, args, kwargs))
        if "front" in scratch and scratch["front"][1] == start:
            scratch["front"][2].enter(streams)
        else:
            scratch["front"] = (key, start, self.host.passage(streams))

    def after(
        self, context: Context, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Behind the last watched block: decide."""
        if "front" not in context.scratch:
            return
        key, start, passage = context.scratch["front"]
        if position - start >= self.watch.blocks:
            return
        passage.leave(self._watched(self.host.stream_outputs(position, args, kwargs, output)))
        if position - start == self.watch.blocks - 1 and key in self.driver.keys:
            is_sound = self.host.is_sound(passage)
            if self._sees_all and is_sound:
                context.scratch["front_residuals"] = [passage.residual(i) for i in range(len(passage.out))]
            self.meet(context, key, lambda: self._seen(key, passage) if is_sound else None)

    def _watched(self, streams: list[Tensor]) -> list[Tensor]:
        """The image stream; all of them for a predictor that asks what the front added."""
        return streams if self._sees_all else streams[:1]

    def _seen(self, key: int, passage: Passage) -> Seen:
        seen: Seen = {key: passage.left[0] if self.watch.of == "stream" else passage.residual(0)}
        if self.watch.is_excess:
            seen[key, "input"] = passage.entered[0]
        return seen

    def score(self, now: Seen, then: Seen) -> Tensor:
        """Its relative change, or by how much that differs from the input's."""
        what, *entered = now
        change = relative_change(now[what], then[what], self.per_row, group=self.host.group)
        for name in entered:
            change = (change - relative_change(now[name], then[name], self.per_row, group=self.host.group)).abs()
        return change
