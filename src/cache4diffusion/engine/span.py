"""The span site: blocks pass their input through and the last one adds (or returns) what is predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.driver import Driver, Inner, Rested
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_output, own, select_rows
from cache4diffusion.engine.passage import Passage
from cache4diffusion.engine.state import Context, Verdict
from cache4diffusion.engine.stretches import Stretch, breaks_of, broken, stretches, why_not_bypassed
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import Blocks, Span, SwitchingSpan


class SpanDriver(Driver):
    """Predicts what spans of blocks add to each stream, or what they make of it.

    The residual is ``last_out - first_in - glue``: the sum of the *blocks' own* residuals. What the host adds between
    two blocks (noticed because the tensor is another one) is added by the host again on cached steps.

    A host may leave blocks out in one of its branches (skip-layer guidance): then the feature is the residual of those
    that it calls, and their positions, the *route*, are remembered with it.
    """

    needs_blocks = splits_rows = True
    site: Span

    def __init__(self, host: Host, site: Span) -> None:
        super().__init__(host, site)
        self.stretches: list[Stretch] = []
        self._by_position: dict[int, Stretch] = {}
        self._passing: dict[tuple[Any, ...], frozenset[int]] = {}  # by decision and stretches
        self.form: str = getattr(site, "form", "residual")
        self._rested: dict[Any, Rested] = {}  # by what rested: one object for many records

    def install(self, anatomy: Anatomy | None) -> None:
        """Cut the main lists into stretches and check that every block's output can be rebuilt."""
        assert anatomy is not None
        if not anatomy.main:
            raise AnatomyError(
                f"{anatomy.denoiser} has no stack of blocks that carries the latent, so there is no span to cache. "
                "Methods for the whole denoiser ('taylorseer-lite') or for U-Net levels ('deepcache') may work."
            )
        whole = self.cut([len(stack.blocks) for stack in anatomy.main], anatomy.seams)
        self.stretches = self._in_pieces(whole, set(breaks_of(anatomy)))
        self._check_predictor(anatomy)
        self._passing = {}
        if not self.stretches:
            count = sum(len(stack.blocks) for stack in anatomy.main)
            self.host.note(f"{self.site} leaves none of the {count} blocks to cache, so nothing is cached.")
        self._by_position = {p: s for s in self.stretches for p in range(s.first, s.last + 1)}
        for position in sorted({p for s in self.stretches for p in range(s.first, s.last + 1)}):
            why = why_not_bypassed(self.host.blocks[position].block)
            if why is not None:
                raise AnatomyError(why)

    def _in_pieces(self, whole: Sequence[Stretch], starts: set[int]) -> list[Stretch]:
        """Cut stretches where a block does not go on with what the one before left, and behind every block whose output
        somebody reads who runs on cached steps: what leaves a stretch is predicted, what passes through it is not.

        Args:
            whole: the stretches.
            starts: positions at which a piece must begin.
        """
        while True:
            pieces = [piece for stretch in whole for piece in broken(stretch, sorted(starts))]
            more = {p + 1 for piece in pieces for p in self._read_outside(piece, pieces)} - starts
            if not more:
                return pieces
            starts = starts | more

    def _read_outside(self, piece: Stretch, pieces: Sequence[Stretch]) -> list[int]:
        """Positions in a piece, but for its last, whose output is read by what runs, or by what a piece begins with."""
        blocks = self.host.blocks
        together = [other for other in pieces if other.key == piece.key]
        rest = {blocks[p].name for other in together for p in range(other.first + 1, other.last + 1)}
        rest.add(blocks[piece.first].name)
        return [p for p in range(piece.first, piece.last) if not rest.issuperset(blocks[p].block.read_by)]

    def _check_predictor(self, anatomy: Anatomy) -> None:
        """Leave out what the predictor does not serve; see whether what it sees is there at all."""
        words = type(self.host.predictor).__name__
        if self.host.sees == "front" and len(self.stretches) > 1:
            raise AnatomyError(
                f"{words} reads what the first blocks add, but in {anatomy.denoiser} no "
                "span runs from there to the last block: its lists of blocks hand over their streams in another shape. "
                "Use predictor='reuse'."
            )
        served = [stretch for stretch in self.stretches if self.serves(stretch.name)]
        if self.stretches and not served:
            raise AnatomyError(
                f"{words} has numbers for none of the sites {', '.join(s.name for s in self.stretches)} of "
                f"{anatomy.denoiser}: its calibration was made for another site or denoiser. Calibrate anew."
            )
        if len(served) < len(self.stretches):
            self.host.note(
                f"{words} has numbers for {len(served)} of {len(self.stretches)} sites; the others always run."
            )
        self.stretches = served

    def cut(self, lengths: list[int], seams: tuple[bool, ...]) -> list[Stretch]:
        """The stretches, once it is known how many blocks there are."""
        return stretches(self.site, lengths, seams)

    @property
    def keys(self) -> tuple[int, ...]:
        """One decision, or one per list."""
        return tuple(dict.fromkeys(stretch.key for stretch in self.stretches))

    def passing(self, context: Context, key: int) -> frozenset[int]:
        """All blocks of its stretches but the last ones, which go on with what is predicted."""
        mine = [stretch for stretch in self.active(context) if stretch.key == key]
        if context.state.routes:
            return self._inside(context, mine)
        known = (key, *(stretch.name for stretch in mine))
        if known not in self._passing:
            self._passing[known] = self._inside(context, mine)
        return self._passing[known]

    def _inside(self, context: Context, chosen: Sequence[Stretch]) -> frozenset[int]:
        """Blocks of stretches that nobody looks at: a corrector is shown what enters the first one."""
        shown = int(self.sees_input)
        return frozenset(p for stretch in chosen for p in self._route(context, stretch)[shown:-1])

    def _route(self, context: Context, stretch: Stretch) -> Sequence[int]:
        """The blocks of a stretch whose residual is recorded."""
        return context.state.routes.get(stretch.name, range(stretch.first, stretch.last + 1))

    def _called(self, context: Context, stretch: Stretch) -> list[int]:
        """The blocks of a stretch that came by in this call (on a cached one, those that pass are only counted)."""
        return context.scratch.setdefault(("called", stretch.name), [])

    def path_of(self, site: str) -> str:
        """The last block's."""
        return next(self.host.blocks[stretch.last].path for stretch in self.stretches if stretch.name == site)

    def was_reached(self, context: Context) -> bool:
        """Whether a stretch was entered (its residual is not kept where the host wrote into the streams)."""
        return any(stretch.name in context.scratch for stretch in self.stretches)

    def active(self, context: Context) -> list[Stretch]:
        """The stretches that may be cached at this step."""
        return self.stretches

    def stretch_at(self, context: Context, position: int) -> Stretch | None:
        """The stretch a block belongs to at this step."""
        return self._by_position.get(position)

    def is_ready(self, context: Context, key: int) -> bool:
        """Once the residual of every stretch of this decision was recorded."""
        sites = context.state.sites
        mine = [stretch for stretch in self.active(context) if stretch.key == key]
        if self.host.sees == "front" and "front_residuals" not in context.scratch:
            return False  # what the front added could not be told
        return bool(mine) and all(s.name in sites and self.host.predictor.is_ready(sites[s.name]) for s in mine)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's own code runs; everything happens in the blocks.

        Where it left out the last block of a stretch, that the stretch is over shows only now.
        """
        output = inner(*args, **kwargs)
        for stretch in self.active(context):
            called = context.scratch.get(("called", stretch.name))
            if called and called[-1] != stretch.last and context.verdicts[stretch.key].is_full:
                self._record(context, stretch, context.scratch[stretch.name])
        return output

    def was_followed(self, context: Context) -> bool:
        """Whether the blocks that were called are those whose residual was added."""
        expected, by = 0, context.passed
        for stretch in self.active(context):
            verdict = context.verdicts.get(stretch.key)
            if verdict is not None and not verdict.is_full:
                route, called = self._route(context, stretch), self._called(context, stretch)
                if not set(called) <= set(route):
                    return False
                expected, by = expected + len(route), by + len(called)
        return expected == by

    def kept(self, position: int) -> list[int]:
        """Indices of a stretch's last block's streams whose residual is worth keeping: somebody reads them later on.

        Args:
            position: of that block.
        """
        streams = self.host.blocks[position].streams
        kept = [i for i, s in enumerate(streams) if s.output is not None and s.feeds_output]
        return kept or [i for i, s in enumerate(streams) if s.output is not None]

    def on_block(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run and measure, pass through, or do either for some rows."""
        stretch = self.stretch_at(context, position)
        if stretch is None:
            return inner(*args, **kwargs)
        verdict = context.verdicts[stretch.key]
        self._called(context, stretch).append(position)
        if verdict.is_cached:
            return self._bypass(context, stretch, position, args, kwargs)
        streams = self.host.stream_inputs(position, args, kwargs)
        passage = self._enter(context, stretch, streams)
        if verdict.is_full:
            output = inner(*args, **kwargs)
        else:
            output = self._some_rows(context, verdict, position, inner, args, kwargs, streams)
        passage.leave(self.host.stream_outputs(position, args, kwargs, output))
        if verdict.is_full and position == stretch.last:
            self._record(context, stretch, passage)
        elif not verdict.is_full and position == self._route(context, stretch)[-1]:
            self._finish_rows(context, stretch, passage, verdict)
        return output

    def _enter(self, context: Context, stretch: Stretch, streams: list[Tensor]) -> Passage:
        if stretch.name not in context.scratch:
            context.scratch[stretch.name] = self.host.passage(streams)
        else:
            context.scratch[stretch.name].enter(streams)
        return context.scratch[stretch.name]

    def _is_known(self, passage: Passage) -> bool:
        """Whether what the blocks made can be told."""
        return self.host.is_sound(passage) or (self.form == "output" and not self.sees_input)

    def _record(self, context: Context, stretch: Stretch, passage: Passage) -> None:
        """The stretch ran in full: take in its feature, and by which blocks it was made."""
        state, called = context.state, tuple(self._called(context, stretch))
        if called != tuple(self._route(context, stretch)):
            state.sites.pop(stretch.name, None)
            state.broadcast.pop(stretch.name, None)
            state.routes[stretch.name] = called
        features, seen = self._measured(context, stretch, passage) if self._is_known(passage) else ([], None)
        if seen is None:
            state.sites.pop(stretch.name, None)
        else:
            self.keep(context, stretch.name, features, seen)

    def _measured(
        self, context: Context, stretch: Stretch, passage: Passage
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """What is recorded of each stream, and what a corrector sees of them."""
        features = [self._feature(passage, i) for i in self.kept(self._route(context, stretch)[-1])]
        if self.sees_input:
            self._note_broadcast(context, stretch, passage.entered, features)
        return features, self._seen(context, stretch, passage.entered)

    def _finish_rows(self, context: Context, stretch: Stretch, passage: Passage, verdict: Verdict) -> None:
        """Behind the last block, of which some rows ran: write the others' predictions into what it returned."""
        is_known = self._is_known(passage)  # before anything is written
        features, seen = self._measured(context, stretch, passage)
        assert seen is not None  # or nothing would be ready
        rows = [context.rows[r] if context.rows else r for r in verdict.full_rows]
        cached = [context.rows[r] if context.rows else r for r in verdict.cached_rows]
        there = verdict.cached_rows
        predicted = self.forecast(context, stretch.name, [select_rows(leaf, there) for leaf in seen], cached)
        for i, leaf in zip(self.kept(self._route(context, stretch)[-1]), predicted, strict=True):
            if self.form == "residual":
                leaf = passage.out[i][there] + leaf
            passage.out[i][there] = leaf
        if is_known:
            fresh = [select_rows(feature, verdict.full_rows) for feature in features]
            self.keep(context, stretch.name, fresh, [select_rows(leaf, verdict.full_rows) for leaf in seen], rows)

    def _feature(self, passage: Passage, i: int) -> Tensor:
        """What is recorded of one stream."""
        return passage.left[i] if self.form == "output" else passage.residual(i)

    def _seen(self, context: Context, stretch: Stretch, entered: Sequence[Tensor]) -> list[Tensor] | None:
        """What a corrector sees of the streams that the stretch keeps; None where it cannot be told.

        Args:
            context: the call.
            stretch: of blocks.
            entered: what entered it, one tensor per stream.
        """
        sees = self.host.sees
        if sees is None:
            return []
        kept = self.kept(self._route(context, stretch)[-1])
        if sees == "front":
            residuals = context.scratch.get("front_residuals")
            return None if residuals is None else [residuals[i] for i in kept]
        count = len(context.rows) if context.rows is not None else context.batch
        broadcast = context.state.broadcast[stretch.name]
        streams = zip((entered[i] for i in kept), broadcast, strict=True)
        return [leaf.expand(count, *leaf.shape[1:]) if is_one and len(leaf) == 1 else leaf for leaf, is_one in streams]

    def _note_broadcast(
        self, context: Context, stretch: Stretch, entered: Sequence[Tensor], features: Sequence[Tensor]
    ) -> None:
        """Note which streams enter with one row for all, such as the text of one negative prompt, and leave with many.

        A map of what enters would leave as few.
        """
        known = context.state.broadcast.get(stretch.name, (False,) * len(features))
        kept = self.kept(self._route(context, stretch)[-1])
        pairs = zip(known, (entered[i] for i in kept), features, strict=True)
        context.state.broadcast[stretch.name] = tuple(was or len(x) < len(feature) for was, x, feature in pairs)

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
        return self.host.rebuild(position, values, args, kwargs)

    def _bypass(
        self, context: Context, stretch: Stretch, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values, route = self.host.stream_inputs(position, args, kwargs), self._route(context, stretch)
        if position == route[0] and self.sees_input:  # now, for the host may write into the streams on their way
            context.scratch["predicted", stretch.name] = self._predict(context, stretch, values)
        if position != route[-1]:
            return self.host.rebuild(position, values, args, kwargs)
        leaves = context.scratch.pop(("predicted", stretch.name), None) or self._predict(context, stretch, values)
        if self.form == "output":
            leaves = own(leaves, context.state.sites[stretch.name])
        for i, leaf in zip(self.kept(position), leaves, strict=True):
            values[i] = values[i] + leaf if self.form == "residual" else leaf
        return self.host.rebuild(position, values, args, kwargs)

    def _predict(self, context: Context, stretch: Stretch, entered: Sequence[Tensor]) -> list[Tensor]:
        seen = self._seen(context, stretch, entered)
        assert seen is not None  # or nothing would be ready
        return self.forecast(context, stretch.name, seen)

    def rested(self, context: Context) -> Rested | None:
        """The blocks of the stretches, with the share of the rows for which each did not run."""
        shares = []
        for stretch in self.active(context):
            verdict = context.verdicts.get(stretch.key)  # None: a block that decides for itself was left out
            if verdict is not None and any(verdict.cached):
                route = tuple(self._route(context, stretch))
                shares.append((route, sum(verdict.cached) / len(verdict.cached)))
        key = tuple(shares)
        if key not in self._rested:
            found: dict[str, float] = {}
            for route, share in shares:
                for view in (self.host.blocks[p] for p in route):
                    found[view.path] = found.get(view.path, 0.0) + share / view.block.calls
            self._rested[key] = tuple(found.items())
        return self._rested[key]

    def bypassed(self) -> list[str]:
        """The blocks of the stretches."""
        return self._always(self._by_position)

    def _always(self, positions: Iterable[int]) -> list[str]:
        """The modules of which all calls are among these blocks."""
        views = [self.host.blocks[position] for position in positions]
        calls = Counter(view.path for view in views)
        return list(dict.fromkeys(view.path for view in views if calls[view.path] == view.block.calls))


class SwitchingSpanDriver(SpanDriver):
    """Predicts what the rear blocks add early in a run, and what the front blocks add later."""

    site: SwitchingSpan  # type: ignore[assignment]

    def __init__(self, host: Host, site: SwitchingSpan) -> None:
        super().__init__(host, site)  # type: ignore[arg-type]
        self.rear: list[Stretch] = []
        self.front: list[Stretch] = []

    def cut(self, lengths: list[int], seams: tuple[bool, ...]) -> list[Stretch]:
        """Both sides' stretches."""
        rest = sum(lengths) - round(self.site.share * sum(lengths))
        self.rear, self.front = (
            [
                replace(stretch, name=f"{side}.{number}")
                for number, stretch in enumerate(stretches(span, lengths, seams))
            ]
            for side, span in (("rear", Span(front=rest)), ("front", Span(back=rest)))
        )
        return self.rear + self.front

    def active(self, context: Context) -> list[Stretch]:
        """The side of this step."""
        step, switch = context.step, self.site.switch
        if switch in (0, 1):
            is_early = switch == 1
        else:
            assert step.num_steps is not None  # the engine refuses to begin without it
            is_early = step.index < switch * step.num_steps
        return [stretch for stretch in (self.rear if is_early else self.front) if stretch in self.stretches]

    def stretch_at(self, context: Context, position: int) -> Stretch | None:
        """The stretch a block belongs to at this step."""
        return next((s for s in self.active(context) if s.first <= position <= s.last), None)

    def was_reached(self, context: Context) -> bool:
        """Whether a stretch of this side was entered."""
        return any(stretch.name in context.scratch for stretch in self.active(context))

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the other side added is of no use any more."""
        names = {stretch.name for stretch in self.active(context)}
        for name in [name for name in context.state.sites if name not in names]:
            del context.state.sites[name]
        return super().run(context, inner, args, kwargs)

    def bypassed(self) -> list[str]:
        """The blocks that belong to both sides."""
        sides = [{p for s in side for p in range(s.first, s.last + 1)} for side in (self.rear, self.front)]
        return self._always(sorted(sides[0] & sides[1]))


class BlocksDriver(SpanDriver):
    """Predicts what each block adds, under a decision of its own."""

    site: Blocks  # type: ignore[assignment]

    def cut(self, lengths: list[int], seams: tuple[bool, ...]) -> list[Stretch]:
        """Each block that need not run is a stretch."""
        count = sum(lengths)
        if self.site.front + self.site.back > count:
            raise AnatomyError(
                f"{self.site} keeps the first {self.site.front} and the last {self.site.back} blocks, and there are "
                f"{count}: use fewer."
            )
        chosen = [p for p in range(self.site.front, count - self.site.back) if p not in self.site.keep]
        return [Stretch(f"block.{position}", position, position, position) for position in chosen]

    def name_of(self, key: int) -> str:
        """The block's."""
        return f"block.{key}"

    def decision_of(self, site: str) -> str:
        """Its own."""
        return site

    def was_followed(self, context: Context) -> bool:
        """Each adds what is its own: one that the host leaves out is not missed."""
        return True

    def bypassed(self) -> list[str]:
        """None for certain: each block decides for itself."""
        return []
