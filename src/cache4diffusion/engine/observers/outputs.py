"""Observing what blocks make on full steps (AdaCache, BWCache)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache4diffusion.engine.decide import change_and_size, mean_sizes, quotient
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.observers.base import Observer, remember
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import Outputs, Sated


class OutputsObserver(Observer):
    """Sees what blocks make on full steps; what changed since the full step before is the score of the next step."""

    watch: Outputs

    @property
    def needs_blocks(self) -> bool:
        """Blocks are seen, although the decision is taken before the call."""
        return True

    @property
    def positions(self) -> range:
        """The watched blocks."""
        count = len(self.host.blocks)
        if self.watch.blocks == "all":
            return range(count)
        place = min(int(self.watch.blocks * count), count - 1)
        return range(place, place + 1)

    def _is_made(self, context: Context, position: int) -> bool:
        """Whether this block is watched and computes something, for some row."""
        verdict = context.verdicts.get(0)
        return position in self.positions and verdict is not None and not verdict.is_cached

    def _is_sated(self, context: Context) -> bool:
        gate = self.host.gate
        return isinstance(gate, Sated) and all(gate.is_sated(unit.gate) for unit in context.state.units[0])

    def before(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """What enters is needed to tell what a block adds."""
        if self.watch.of == "residual" and self._is_made(context, position):
            entered = self.host.stream_inputs(position, args, kwargs)[:1]
            context.scratch["watched", position] = self.host.passage(entered)

    def after(
        self, context: Context, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Compare with the full step before."""
        if not self._is_made(context, position):
            return
        now = None if self._is_sated(context) else self._made(context, position, args, kwargs, output)
        if now is None:
            context.state.references.pop(position, None)
            return
        kept, then = context.state.references, context.state.references.get(position)
        if then is not None and (then.shape[1:] != now.shape[1:] or then.dtype != now.dtype):
            then = None
        rows = self._rows(context)
        fresh = now if rows is None or context.rows is not None else now[rows]
        if then is not None:
            change = change_and_size(fresh, then if rows is None else then[rows], self.per_row)
            context.scratch.setdefault("changes", []).append(change)
            if self.watch.frames:
                context.scratch.setdefault("motions", []).append(self.motion(context, fresh))
        if rows is None:
            remember(kept, position, now, is_shared=self.watch.of == "stream")
        elif then is not None:
            updated = then.clone()
            updated[rows] = fresh
            kept[position] = updated
        if position == self.positions[-1] and len(context.scratch.get("changes", ())) == len(self.positions):
            self.report(context, rows)

    @staticmethod
    def _rows(context: Context) -> list[int] | None:
        """Rows of the batch that are computed here; None for all of them."""
        if context.rows is not None:
            return context.rows
        return None if context.verdicts[0].is_full else context.verdicts[0].full_rows

    def _made(
        self, context: Context, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        """What the block made of the image stream; None where that cannot be told."""
        streams = self.host.stream_outputs(position, args, kwargs, output)
        if self.watch.of == "stream":
            return streams[0]
        passage = context.scratch["watched", position]
        passage.leave(streams[:1])
        return passage.residual(0) if self.host.is_sound(passage) else None

    def report(self, context: Context, rows: list[int] | None) -> None:
        """Leave the mean over the watched blocks for the next step."""
        self.host.trace.syncs += 1
        changes, sizes = (torch.stack(sums) for sums in zip(*context.scratch["changes"], strict=True))
        scores: list[Any] = quotient(*self.host.group.total(changes, sizes)).mean(0).tolist()
        if self.watch.frames:
            motions = torch.stack(context.scratch["motions"]).mean(0).tolist()
            scores = list(zip(scores, motions, strict=True))
        units = context.state.units[0]
        concerned = range(len(units)) if rows is None or not self.per_row else rows
        for unit, score in zip(concerned, scores, strict=True):
            units[unit].feedback = score

    def motion(self, context: Context, tokens: Tensor) -> Tensor:
        """Relative difference of neighbouring frames, tokens being laid out frame by frame."""
        assert context.latent is not None
        frames = context.latent.shape[2] if context.latent.ndim == 5 else 0
        if frames < 2 or tokens.shape[1] % frames:
            raise AnatomyError(
                f"{self.words} measures the motion between latent frames, and a latent of shape "
                f"{tuple(context.latent.shape)} with {tokens.shape[1]} tokens has none that could be told apart. "
                "Switch the motion off."
            )
        stride = tokens.shape[1] // frames
        later, earlier = tokens[:, stride:], tokens[:, :-stride]
        *sizes, moved = mean_sizes(later, earlier, later.float() - earlier.float(), per_row=self.per_row)
        size = sizes[0] + sizes[1]
        return torch.where(size == 0, torch.zeros_like(size), moved / size)
