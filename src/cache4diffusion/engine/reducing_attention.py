"""The reduced-attention site: an attention looks for fewer queries, and at fewer keys and values.

The call of PyTorch's attention is met within the module that makes it: there queries and keys are normalised and carry
their positions, whatever the module is called and wherever its projections are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cache4diffusion.anatomy import Anatomy, Block
from cache4diffusion.anatomy.facts import BESIDE
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.part_lookup import blocks_of
from cache4diffusion.engine.reducing import ReductionDriver
from cache4diffusion.engine.state import Context
from cache4diffusion.engine.tokens import is_text_first
from cache4diffusion.errors import AnatomyError
from cache4diffusion.tokens import Plan, TokenPlace
from cache4diffusion.wrap import ForwardWrapper

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AttentionReducer(TorchFunctionMode):
    """Hands every scaled-dot-product attention within to a function, with its arguments by name."""

    def __init__(self, attend: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return self.attend({**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


@dataclass
class Meeting:
    """One run of an attention module: rows are attended to together, or in several calls, one after the other.

    Args:
        place: where plans are made.
        is_image_last: whether text comes first.
        rows: how many were attended to so far.
        told: queries and values of these, for a listener.
        plans: of these, by what they are for and the first of their rows.
    """

    place: TokenPlace
    is_image_last: bool
    rows: int = 0
    told: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    plans: dict[tuple[str, int], Plan] = field(default_factory=dict)


class AttentionReductionDriver(ReductionDriver):
    """Wraps blocks, to see how long their streams are, and their self-attentions."""

    def install(self, anatomy: Anatomy | None) -> None:
        """Wrap self-attentions, and their blocks.

        Raises:
            AnatomyError: there are none.
        """
        assert anatomy is not None
        modules = dict(self.host.plain.named_modules())
        for _, block in blocks_of(self.host):
            found = self._attentions_of(block, anatomy) if block.calls == 1 else {}
            if not found:
                continue
            self._layers[block.path] = len(self._layers)
            self._wrappers.append(ForwardWrapper(modules[block.path], self._seeing(block, modules[block.path])))
            for path, is_image_last in found.items():
                self._wrappers.append(ForwardWrapper(modules[path], self._within(block, path, is_image_last)))
        if not self._wrappers:
            raise AnatomyError(
                f"{anatomy.denoiser} has no self-attention in which the image's tokens can be told from others, so "
                "none can be left out. Methods for parts as a whole ('fora', 'toca') may work."
            )

    @staticmethod
    def _attentions_of(block: Block, anatomy: Anatomy) -> dict[str, bool]:
        """Paths of a block's self-attentions, and whether the image comes last in them, where there is text as well."""
        if all(stream.kind in (*BESIDE, "joint") for stream in block.streams):
            return {}
        found = {}
        for part in block.parts:
            is_image_last = is_text_first(anatomy)
            if part.segments and len(part.segments[0]) > 1:  # a fused part says in which order its tokens are
                is_image_last = block.streams[part.segments[0][0]].kind in BESIDE
            if part.kind == "attn" and part.calls == 1:
                found[part.path] = is_image_last
            if part.kind == "fused":
                found |= {inner.path: is_image_last for inner in part.inner if inner.kind == "attn"}
        return found

    def _within(self, block: Block, path: str, is_image_last: bool) -> Callable[..., Any]:
        """Around a self-attention."""

        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                context = self._context
                place = self._here(context, block, path)
                if context is None or place is None:
                    return found(*args, **kwargs)
                meeting = Meeting(place, is_image_last)
                with AttentionReducer(lambda given: self._attend(context, meeting, given)):
                    output = found(*args, **kwargs)
                if meeting.rows < place.batch:
                    self.host.note(f"no attention to all tokens at once was met in {path}, so nothing is left out.")
                elif meeting.told and self.host.listener is not None:
                    query, value = (torch.cat(rows) for rows in zip(*meeting.told, strict=True))
                    grid = torch.tensor(place.segments[0].grid)
                    self.host.listener.hear_feature(context, path, "", [query, value, grid], [])
                return output

            return forward

        return make

    def _here(self, context: Context | None, block: Block, path: str) -> TokenPlace | None:
        """Where plans are made in this call; None where there is nothing to do."""
        if context is None or context.verdict is None:
            return None
        if not context.verdict.is_cached and self.host.listener is None:
            return None
        entering = context.scratch.get(("entering", block.path))
        place = self._place(context, block, entering) if isinstance(entering, Tensor) else None
        return None if place is None else dataclasses.replace(place, part=path)

    def _attend(self, context: Context, meeting: Meeting, given: dict[str, Any]) -> Tensor:
        """One call of attention."""
        query, key, value = (given[name] for name in _NAMES[:3])
        (batch, _, length, _), count, first = query.shape, meeting.place.length, meeting.rows
        is_whole = key.shape[2] == length >= count and not given.get("is_causal", False)
        if not is_whole or first + batch > meeting.place.batch:  # of others, as an adapter's
            return scaled_dot_product_attention(**given)
        meeting.rows += batch
        start = length - count if meeting.is_image_last else 0
        images = [x[:, :, start : start + count].flatten(0, 1) for x in (query, value)]
        verdict = context.verdict
        if verdict is None or not verdict.is_cached:
            meeting.told.append((images[0], images[1]))
            return scaled_dot_product_attention(**given)
        asked = self._plan_of(context, meeting, first, batch, "query", images[0])
        seen = self._plan_of(context, meeting, first, batch, "value", images[1])
        output, saved = attended(given, asked if asked is not None and asked.restores else None, seen, start, count)
        context.scratch["saved"] = context.scratch.get("saved", 0) + saved
        return output

    def _plan_of(
        self, context: Context, meeting: Meeting, first: int, batch: int, kind: str, image: Tensor
    ) -> Plan | None:
        """The plan of queries, or of values, of some rows: a row of a plan is a head.

        Of halves of guidance that are attended to one after the other, the second goes by the first one's.
        """
        place, heads, name = meeting.place, image.shape[0] // batch, f"{meeting.place.part} {kind}"
        is_split = batch < place.batch
        twins = None if place.twins is None else place.twins.repeat_interleave(heads)
        here = dataclasses.replace(
            place, kind=kind, batch=image.shape[0], twins=None if is_split else twins, signal=None
        )
        plan = self.plan_at(context, here, f"{name} {first}" if is_split else name, image)
        if plan is None:
            return None
        other = meeting.plans.get((kind, first - place.batch // 2))
        if other is not None and twins is not None and is_split:
            plan = plan.where(~twins[first * heads : (first + batch) * heads], other)
        meeting.plans[kind, first] = plan
        times = 1 if kind == "query" else 2  # keys follow the plan of values
        context.scratch["planning"] = context.scratch.get("planning", 0) + times * plan.applying(image.shape[-1])
        return plan


def attended(
    given: dict[str, Any], asked: Plan | None, seen: Plan | None, start: int, count: int
) -> tuple[Tensor, int]:
    """Attention on fewer queries, keys and values, with outputs for all queries.

    Args:
        given: the arguments of the attention on all tokens, by name.
        asked: the plan of queries, of which every row is a head; None: all.
        seen: of keys and values, likewise.
        start, count: which of the tokens the plans are for.

    Returns:
        The output, and how many FLOPs fewer that took.
    """
    query, key, value = (given[name] for name in _NAMES[:3])
    short = {"query": _short(query, asked, start, count)}
    short |= {"key": _short(key, seen, start, count), "value": _short(value, seen, start, count)}
    if isinstance(given.get("attn_mask"), Tensor):
        short["attn_mask"] = _masked(given["attn_mask"], query.shape[:2], asked, seen, start, count)
    output = scaled_dot_product_attention(**{**given, **short})
    saved = _flops(query, key, value) - _flops(short["query"], short["key"], short["value"])
    if asked is None:
        return output, saved
    middle = output[:, :, start : start + asked.length].flatten(0, 1)
    restored = asked.give(middle).unflatten(0, output.shape[:2])
    return torch.cat([output[:, :, :start], restored, output[:, :, start + asked.length :]], 2), saved


def _flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    return 2 * rows * key.shape[2] * (query.shape[3] + value.shape[3])


def _short(x: Tensor, plan: Plan | None, start: int, count: int) -> Tensor:
    """``[B, heads, tokens, D]`` with the image's tokens as a plan says."""
    if plan is None:
        return x
    taken = plan.take(x[:, :, start : start + count].flatten(0, 1)).unflatten(0, x.shape[:2])
    return torch.cat([x[:, :, :start], taken, x[:, :, start + count :]], 2)


def _masked(mask: Tensor, shape: torch.Size, asked: Plan | None, seen: Plan | None, start: int, count: int) -> Tensor:
    """The mask of the queries and keys that are left; a slot has that of the token at whose place it stands."""
    for plan, axis in ((asked, -2), (seen, -1)):
        if plan is None or mask.shape[axis] == 1:
            continue
        wide = mask.expand(*shape, *mask.shape[-2:])
        kept = plan.kept.unflatten(0, (shape[0], -1))
        kept = kept.repeat_interleave(shape[1] // kept.shape[1], 1) + start  # several heads may share their keys
        every = torch.arange(wide.shape[axis], device=mask.device).expand(*shape, -1)
        index = torch.cat([every[..., :start], kept, every[..., start + count :]], -1)
        if axis == -1:
            mask = wide.gather(-1, index[:, :, None].expand(-1, -1, wide.shape[-2], -1))
        else:
            mask = wide.gather(-2, index[..., None].expand(-1, -1, -1, wide.shape[-1]))
    return mask
