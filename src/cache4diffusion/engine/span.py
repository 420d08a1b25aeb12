"""The span site: blocks pass their input through and the last one adds (or returns) what is predicted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_output, own, select_rows, version
from cache4diffusion.engine.state import Context, Verdict
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks ``first .. last`` (positions among all main blocks) whose residual is one feature."""

    name: str
    key: int  # which decision it follows
    first: int
    last: int


@dataclass
class Passage:
    """One call's way through a stretch: what entered, and what the host added between its blocks.

    A host or a block may also write into a stream. That shows in the tensor's version, but the values are then gone:
    such streams are looked at through copies (of the next full step on; this one is not recorded).
    """

    entered: list[Tensor]
    glue: list[Tensor | None]
    versions: list[int | None]
    out: list[Tensor] = field(default_factory=list)  # what left the last block that ran
    left: list[Tensor] = field(default_factory=list)  # the same, or copies
    left_versions: list[int | None] = field(default_factory=list)
    is_spoilt: bool = False  # something was written into a stream and cannot be told from the blocks' work


def stretches(site: Span, lengths: list[int], seams: tuple[bool, ...]) -> list[Stretch]:
    """Cut the main block lists into stretches.

    One over all lists where the streams keep their shape at the seams; else one per list, all under one decision;
    with ``per_list`` one per list, each under its own.

    Args:
        site: counts of blocks at the front and the back that always run.
        lengths: number of blocks of each list.
        seams: whether list i and list i + 1 can be spanned together.
    """
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    if site.per_list:
        return [
            Stretch(f"span.{i}", i, starts[i] + site.front, starts[i + 1] - site.back - 1)
            for i in range(len(lengths))
            if site.front + site.back < lengths[i]
        ]
    groups: list[list[int]] = [[0]]
    for i, is_open in enumerate(seams):
        if is_open:
            groups[-1].append(i + 1)
        else:
            groups.append([i + 1])
    lowest, highest = site.front, starts[-1] - site.back - 1
    found = []
    for number, group in enumerate(groups):
        first, last = max(starts[group[0]], lowest), min(starts[group[-1] + 1] - 1, highest)
        if first <= last:
            found.append(Stretch(f"span.{number}", 0, first, last))
    return found


class SpanDriver(Driver):
    """Predicts what spans of blocks add to each stream, or what they make of it.

    The residual is ``last_out - first_in - glue``: the sum of the *blocks' own* residuals. What the host adds between
    two blocks (noticed because the tensor is another one) is added by the host again on cached steps.
    """

    needs_blocks = splits_rows = True
    site: Span

    def __init__(self, host: Host, site: Span) -> None:
        super().__init__(host, site)
        self.stretches: list[Stretch] = []
        self._by_position: dict[int, Stretch] = {}
        self._copies = False  # whether streams are written into, so that copies must be compared

    def install(self, anatomy: Anatomy | None) -> None:
        """Cut the main lists into stretches and check that every block's output can be rebuilt."""
        assert anatomy is not None
        if not anatomy.main:
            raise AnatomyError(
                f"{anatomy.denoiser} has no stack of blocks that carries the latent, so there is no span to cache. "
                "Methods for the whole denoiser ('taylorseer-lite') or for U-Net levels ('deepcache') may work."
            )
        self.stretches = stretches(self.site, [len(stack.blocks) for stack in anatomy.main], anatomy.seams)
        if not self.stretches:
            count = sum(len(stack.blocks) for stack in anatomy.main)
            self.host.note(f"{self.site} leaves none of the {count} blocks to cache, so nothing is cached.")
        self._copies = any(block.mutates for stack in anatomy.main for block in stack.blocks)
        self._by_position = {p: s for s in self.stretches for p in range(s.first, s.last + 1)}
        for position in self._by_position:
            block = self.host.blocks[position]
            if not block.can_rebuild or any(s.output is None and s.feeds_output for s in block.streams):
                raise AnatomyError(f"{block.path} returns more than its streams, so it cannot be bypassed.")

    @property
    def keys(self) -> tuple[int, ...]:
        """One decision, or one per list."""
        return tuple(dict.fromkeys(stretch.key for stretch in self.stretches))

    def was_reached(self, context: Context) -> bool:
        """Whether a stretch was entered (its residual is not kept where the host wrote into the streams)."""
        return any(stretch.name in context.scratch for stretch in self.stretches)

    def is_ready(self, context: Context, key: int) -> bool:
        """Once the residual of every stretch of this decision was recorded."""
        sites = context.state.sites
        mine = [stretch for stretch in self.stretches if stretch.key == key]
        return bool(mine) and all(s.name in sites and self.host.predictor.is_ready(sites[s.name]) for s in mine)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's own code runs; everything happens in the blocks."""
        return inner(*args, **kwargs)

    def _kept(self, stretch: Stretch) -> list[int]:
        """Indices of the last block's streams whose residual is worth keeping: somebody reads them afterwards."""
        streams = self.host.blocks[stretch.last].streams
        kept = [i for i, s in enumerate(streams) if s.output is not None and s.feeds_output]
        return kept or [i for i, s in enumerate(streams) if s.output is not None]

    def on_block(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run and measure, pass through, or do either for some rows."""
        stretch = self._by_position.get(position)
        if stretch is None:
            return inner(*args, **kwargs)
        verdict = context.verdicts[stretch.key]
        if verdict.is_cached:
            return self._bypass(context, stretch, position, args, kwargs)
        streams = self.host.stream_inputs(position, args, kwargs)
        passage = self._enter(context, stretch, position, streams)
        if verdict.is_full:
            output = inner(*args, **kwargs)
        else:
            output = self._some_rows(context, verdict, position, inner, args, kwargs, streams)
        self._leave(passage, position, output, streams)
        if position == stretch.last:
            output = self._finish(context, stretch, passage, verdict, output)
        return output

    def _enter(self, context: Context, stretch: Stretch, position: int, streams: list[Tensor]) -> Passage:
        if position == stretch.first:
            passage = Passage(self._seen(streams), [None] * len(streams), [version(stream) for stream in streams])
            context.scratch[stretch.name] = passage
            return passage
        passage = context.scratch[stretch.name]
        for i, (now, before) in enumerate(zip(streams, passage.left, strict=True)):
            if now is not before:  # the host added something between two blocks
                added = now - before
                passage.glue[i] = added if passage.glue[i] is None else passage.glue[i] + added
            elif version(now) != passage.left_versions[i]:
                passage.is_spoilt = True
        return passage

    def _seen(self, streams: list[Tensor]) -> list[Tensor]:
        is_blind = self._copies or any(version(stream) is None for stream in streams)
        return [stream.clone() for stream in streams] if is_blind else list(streams)

    def _leave(self, passage: Passage, position: int, output: Any, streams: list[Tensor]) -> None:
        block = self.host.blocks[position]
        passage.out = [
            entered if stream.output is None else get_output(output, stream.output)
            for stream, entered in zip(block.streams, streams, strict=True)
        ]
        passage.left, passage.left_versions = self._seen(passage.out), [version(stream) for stream in passage.out]

    def _finish(self, context: Context, stretch: Stretch, passage: Passage, verdict: Verdict, output: Any) -> Any:
        if not self._copies and any(version(x) != v for x, v in zip(passage.entered, passage.versions, strict=True)):
            passage.is_spoilt = True
        if passage.is_spoilt:
            self._copies = True
            self.host.note("streams are written into between blocks; copies are compared.")
        if passage.is_spoilt and verdict.is_full and self.site.form == "residual":
            context.state.sites.pop(stretch.name, None)
            return output
        features = [self._feature(passage, i) for i in self._kept(stretch)]
        if verdict.is_full:
            self.keep(context, stretch.name, features)
            return output
        rows = [context.rows[r] if context.rows else r for r in verdict.full_rows]
        cached = [context.rows[r] if context.rows else r for r in verdict.cached_rows]
        for i, leaf in zip(self._kept(stretch), self.forecast(context, stretch.name, cached), strict=True):
            if self.site.form == "residual":
                leaf = passage.out[i][verdict.cached_rows] + leaf
            passage.out[i][verdict.cached_rows] = leaf
        if not passage.is_spoilt or self.site.form == "output":
            fresh = [select_rows(feature, verdict.full_rows) for feature in features]
            self.keep(context, stretch.name, fresh, rows)
        return output

    def _feature(self, passage: Passage, i: int) -> Tensor:
        """What is recorded of one stream."""
        if self.site.form == "output":
            return passage.left[i]
        residual, glue = passage.left[i] - passage.entered[i], passage.glue[i]
        return residual if glue is None else residual - glue

    def _some_rows(
        self,
        context: Context,
        verdict: Verdict,
        position: int,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        streams: list[Tensor],
    ) -> Any:
        """Run the block on the full rows only; the others pass through. The host sees the whole batch."""
        rows = verdict.full_rows
        sub_args, sub_kwargs = self.host.block_rows(position, args, kwargs, rows)
        output = inner(*sub_args, **sub_kwargs)
        values = []
        for stream, entered in zip(self.host.blocks[position].streams, streams, strict=True):
            whole = entered.expand(len(verdict.cached), *entered.shape[1:]).clone()  # one row for all is broadcast
            if stream.output is not None:
                whole[rows] = get_output(output, stream.output)
            values.append(whole)
        return self.host.blocks[position].rebuild(values)

    def _bypass(
        self, context: Context, stretch: Stretch, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if position != stretch.last:
            return self.host.pass_through(position, args, kwargs)
        values = self.host.stream_inputs(position, args, kwargs)
        leaves = self.forecast(context, stretch.name)
        if self.site.form == "output":
            leaves = own(leaves, context.state.sites[stretch.name])
        for i, leaf in zip(self._kept(stretch), leaves, strict=True):
            values[i] = values[i] + leaf if self.site.form == "residual" else leaf
        return self.host.blocks[position].rebuild(values)

    def bypassed(self) -> list[str]:
        """The blocks of the stretches."""
        return [self.host.blocks[position].path for position in self._by_position]
