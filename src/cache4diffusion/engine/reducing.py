"""The reduced-parts site: parts compute fewer tokens, and every token gets an output back.

A plan is made per block, from the stream that enters it in front of its norm, when the first part of the block runs;
all its parts follow it. Nothing is recorded and nothing predicted, so a run may begin with a reduced step, unless the
rule goes by the attention of full steps (`Ranking`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cache4diffusion.anatomy import Anatomy, Block, Part
from cache4diffusion.anatomy.facts import BESIDE
from cache4diffusion.engine.attention import AttentionCapture
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import (
    get_argument,
    map_tensors,
    parameter_names,
    specs_of,
    take_apart,
    with_arguments,
)
from cache4diffusion.engine.maps import image_grid
from cache4diffusion.engine.part_lookup import blocks_of
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import Reduced
from cache4diffusion.tokens import Plan, Ranking, Reduction, Segment, TokenPlace
from cache4diffusion.trace import REDUCED, Reductions
from cache4diffusion.wrap import ForwardWrapper

_KEYS = ("encoder_hidden_states",)  # under which name an attention takes keys and values of their own
_MAPS = ("ip_adapter_masks",)  # maps of the image, which a cross-attention scales to a grid of as many tokens as ask
_MASK = ("attention_mask",)


class ReductionDriver(Driver):
    """Wraps blocks, to see what enters them, and their parts."""

    site: Reduced

    def __init__(self, host: Host, site: Reduced) -> None:
        super().__init__(host, site)
        rule = host.composition.tokens
        assert isinstance(rule, Reduction)
        self.rule = rule
        self.specs: dict[tuple[str, int, int], Any] = {}  # arguments of parts, by path and tokens that enter
        self._rows: dict[tuple[str, int, int], int] = {}  # of what batch these are
        self._layers: dict[str, int] = {}  # number of a block among those that are reduced, by path
        self._wrappers: list[ForwardWrapper] = []
        self._context: Context | None = None  # a reduced call in progress

    def install(self, anatomy: Anatomy | None) -> None:
        """Wrap parts of one stream, and their blocks.

        Raises:
            AnatomyError: there are none.
        """
        assert anatomy is not None
        modules = dict(self.host.plain.named_modules())
        found = {block.path: self._parts_of(block) for _, block in blocks_of(self.host)}
        kinds = {part.kind for parts in found.values() for part in parts}
        if not kinds or ("attn" in self.site.kinds and "attn" not in kinds):
            raise AnatomyError(
                f"{anatomy.denoiser} has no parts of the kinds {', '.join(self.site.kinds)} that one stream of tokens "
                "enters: where text and image meet in one attention, tokens cannot be left out of it here. Methods for "
                "parts as a whole ('fora', 'toca') may work."
            )
        for _, block in blocks_of(self.host):
            parts = found[block.path]
            if not parts:
                continue
            self._layers[block.path] = len(self._layers)
            self._wrappers.append(ForwardWrapper(modules[block.path], self._seeing(block, modules[block.path])))
            for part in parts:
                self._wrappers.append(
                    ForwardWrapper(modules[part.path], self._reducing(block, part, modules[part.path]))
                )

    def _parts_of(self, block: Block) -> list[Part]:
        """The parts of a block that can be computed on fewer tokens of the image."""
        if block.calls > 1:
            return []
        return [part for part in block.parts if part.kind in self.site.kinds and _is_plain(part)]

    def uninstall(self) -> None:
        """Unwrap everything."""
        for wrapper in reversed(self._wrappers):
            wrapper.remove()
        self._wrappers, self._layers, self._context = [], {}, None

    def is_ready(self, context: Context, key: int) -> bool:
        """Nothing has to be recorded before, unless the rule goes by full steps."""
        return not isinstance(self.rule, Ranking) or bool(context.state.tokens)

    def was_reached(self, context: Context) -> bool:
        """A full step leaves nothing behind but that blocks were entered."""
        return "reached" in context.scratch

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's code runs; everything happens in blocks and parts."""
        context.scratch["call"], self._context = (args, kwargs), context
        try:
            output = inner(*args, **kwargs)
            if self.rule.signal is not None:
                keep = self._keep_guidance if self.rule.signal == "guidance" else self._keep_dynamics
                keep(context, take_apart(output)[0][0])
            return output
        finally:
            self._context = None

    def _seeing(self, block: Block, module: nn.Module) -> Callable[..., Any]:
        """Around a block: what enters it is known while it runs, and no longer, as the host lets go of it."""
        stream = next((s for s in block.streams if s.kind not in BESIDE), block.streams[0])

        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                context = self._context
                if context is None:
                    return found(*args, **kwargs)
                context.scratch["reached"] = True
                context.scratch["entering", block.path] = get_argument(module, args, kwargs, stream.argument)
                try:
                    return found(*args, **kwargs)
                finally:
                    context.scratch.pop(("entering", block.path), None)

            return forward

        return make

    def _reducing(self, block: Block, part: Part, module: nn.Module) -> Callable[..., Any]:
        """Around a part."""

        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                context = self._context
                if context is None or context.verdict is None:
                    return found(*args, **kwargs)
                if not context.verdict.is_cached:
                    is_looked_at = isinstance(self.rule, Ranking) and part.kind == "attn"
                    if not is_looked_at or self.host.composition.is_off:
                        return found(*args, **kwargs)
                    x = get_argument(module, args, kwargs, part.inputs[0])
                    return self._ranking(context, block, x, lambda: found(*args, **kwargs))
                x = get_argument(module, args, kwargs, part.inputs[0])
                plan = self._plan(context, block, part, x)
                if plan is None or (not plan.restores and part.kind != "attn"):
                    return found(*args, **kwargs)
                if part.kind == "cross_attn" and _is_mapped(module, args, kwargs, x):
                    self.host.note(f"{part.path} is given a map of the image, so all its tokens are computed.")
                    return found(*args, **kwargs)
                given, short = self._given(part, module, args, kwargs, plan, x)
                context.scratch["planning"] = context.scratch.get("planning", 0) + plan.applying(x.shape[-1])
                taken = context.scratch.setdefault("reductions", [])
                key = (part.path, short, x.shape[1])
                taken.append(key)
                if self._rows.get(key) != x.shape[0]:
                    self._rows[key], self.specs[key] = x.shape[0], specs_of(*given)
                return map_tensors(plan.give, found(*given[0], **given[1]))

            return forward

        return make

    def _ranking(self, context: Context, block: Block, x: Tensor, compute: Callable[[], Any]) -> Any:
        """Run a self-attention and show it to the rule."""
        entering = context.scratch.pop(("entering", block.path), x)
        place = self._place(context, block, entering)
        if place is None:
            return compute()
        with AttentionCapture("map") as capture:
            output = compute()
        maps = capture.seen.get("map")
        if maps is None or maps.shape != (place.batch, place.length, place.length):  # PAG's last rows have none
            self.host.note(f"no attention was seen in {block.path} for all rows, so all its tokens are computed.")
        else:
            assert isinstance(self.rule, Ranking)
            state = context.state.tokens.setdefault(block.path, self.rule.init())
            flops = capture.flops + self.rule.rank(state, place, entering, maps)
            context.scratch["planning"] = context.scratch.get("planning", 0) + flops
        return output

    def _given(
        self, part: Part, module: nn.Module, args: Any, kwargs: Any, plan: Plan, x: Tensor
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], int]:
        """The arguments of a part on fewer tokens, and on how many."""
        if part.kind == "attn" and _is_told_of_tokens(args, kwargs, x):
            raise AnatomyError(
                f"{part.path} is given something for each of its {x.shape[1]} tokens besides these (positions, a "
                "mask), and tokens of several places have none. Methods for parts as a whole ('fora', 'toca') may work."
            )
        changes = {part.inputs[0]: plan.take(x)}
        if not plan.restores:
            names = parameter_names(type(module))
            if _KEYS[0] not in names or get_argument(module, args, kwargs, _KEYS) is not None:
                raise AnatomyError(
                    f"{part.path} does not take keys of their own, so they cannot be fewer than the queries. Methods "
                    "that leave out queries as well ('tome') may work."
                )
            return (args, {**kwargs, _KEYS[0]: changes[part.inputs[0]]}), plan.length
        return with_arguments(module, args, kwargs, changes), plan.length

    def _plan(self, context: Context, block: Block, part: Part, x: Tensor) -> Plan | None:
        """The plan of a block in this call, if it is one for what enters the part."""
        plans = context.scratch.setdefault("plans", {})
        if block.path not in plans:
            entering = context.scratch.pop(("entering", block.path), x)
            entering = entering if entering.shape[:2] == x.shape[:2] else x
            plans[block.path] = entering.shape[:2], self._made(context, block, entering)
        shape, plan = plans[block.path]
        if plan is None or (x.ndim == 3 and x.shape[:2] == shape):
            return plan
        self.host.note(f"{part.path} is given other rows than the tokens of its block, so it is computed whole.")
        return None

    def _made(self, context: Context, block: Block, entering: Tensor) -> Plan | None:
        place = self._place(context, block, entering)
        return None if place is None else self.plan_at(context, place, block.path, entering)

    def plan_at(self, context: Context, place: TokenPlace, name: str, entering: Tensor) -> Plan | None:
        """The rule's plan, with the state that is kept under a name; what it took is noted."""
        state = context.state.tokens.setdefault(name, self.rule.init())
        held = list(self.rule.tensors(state))
        plan = self.rule.plan(state, place, entering)
        if plan is not None and not all(any(tensor is kept for kept in held) for tensor in plan.tensors()):
            context.scratch["planning"] = context.scratch.get("planning", 0) + plan.flops
            self.host.trace.syncs += plan.syncs
        return plan

    def _place(self, context: Context, block: Block, entering: Tensor) -> TokenPlace | None:
        """Where a plan is made; None where all tokens are to be computed."""
        grid = self._grid(context, entering.shape[1])
        if grid is None:
            return None
        most = context.state.extra["most"] = max(context.state.extra.get("most", 0), entering.shape[1])
        if math.sqrt(most / entering.shape[1]) > self.site.max_downsample + 1e-6:
            return None
        segments = (Segment("image", 0, entering.shape[1], grid),)
        layer, layers, batch = self._layers[block.path], len(self._layers), entering.shape[0]
        place = TokenPlace(
            block.path, "block", layer, layers, context.step, segments, batch, self._twins(context, batch)
        )
        place = dataclasses.replace(place, levels=context.call.run.timesteps)
        signal = self._signal(context, grid)
        if signal is not None and signal.shape[0] == batch:
            place = dataclasses.replace(place, signal=signal)
        return place

    def _latent(self, context: Context) -> Tensor:
        args, kwargs = context.scratch["call"]
        return self.host.inputs.split(args, kwargs)[1]

    def _twins(self, context: Context, batch: int) -> Tensor | None:
        """Which rows are the halves of batched guidance: two that denoise the same latent, or the same frame of it. No
        sync.
        """
        latent = self._latent(context)
        half, odd = divmod(latent.shape[0], 2)
        if odd or not half or batch % latent.shape[0]:
            return None
        are_alike = (latent[:half] == latent[half:]).flatten(1).all(1).repeat(2)
        return are_alike.repeat_interleave(batch // latent.shape[0])

    def _keep_guidance(self, context: Context, output: Tensor) -> None:
        """How far the halves are apart, ``[B, rows, columns]``; of rows that are no halves, nothing.

        By what is subtracted: channels beyond the latent's are a variance.
        """
        if output.ndim != 4:
            self.host.note("the output is no image, so no token is known to be more important than another.")
            return
        twins = self._twins(context, output.shape[0])
        if twins is None:
            self.host.note("the halves of guidance are not in one call, so no token is more important than another.")
            return
        output = output[:, : self._latent(context).shape[1]].float()
        apart = (output - output.roll(len(output) // 2, 0)).abs().mean(1)
        context.state.extra["guidance"] = torch.where(twins[:, None, None], apart, torch.zeros_like(apart))

    def _keep_dynamics(self, context: Context, output: Tensor) -> None:
        """How far the output moved since the call before, ``[B, rows, columns]``; the first time, nothing."""
        if output.ndim != 4:
            self.host.note("the output is no image, so no token is known to move more than another.")
            return
        before = context.state.extra.get("before")
        if before is not None and before.shape == output.shape:
            context.state.extra["dynamics"] = (output.float() - before.float()).abs().mean(1)
        context.state.extra["before"] = output.clone()

    def _signal(self, context: Context, grid: tuple[int, int, int]) -> Tensor | None:
        """What is known of the tokens of a grid: means over what each token covers."""
        known = context.state.extra.get(self.rule.signal or "")
        if known is None or grid[0] != 1:
            return None
        return torch.nn.functional.adaptive_avg_pool2d(known[:, None], grid[1:]).flatten(1)

    def _grid(self, context: Context, count: int) -> tuple[int, int, int] | None:
        """Frames, rows and columns; None where tokens lie in no image (attention over time), which is noted."""
        known = context.state.extra.setdefault("grids", {})
        if count not in known:
            args, kwargs = context.scratch["call"]
            ids = get_argument(self.host.inputs.module, args, kwargs, ("img_ids",))
            self.host.trace.syncs += isinstance(ids, Tensor)
            try:
                known[count] = image_grid(self.host.inputs, args, kwargs, count, "they are all computed")
            except AnatomyError as error:
                known[count] = None
                self.host.note(str(error))
        return known[count]

    def symbol(self, context: Context) -> str:
        """Every part is computed, on fewer tokens."""
        return REDUCED

    def reductions(self, context: Context) -> Reductions | None:
        """What a reduced call computed, and what a full one looked at."""
        parts, planning = context.scratch.get("reductions", ()), context.scratch.get("planning", 0)
        if context.verdict is None or (context.verdict.is_full and not planning):
            return None
        return Reductions(tuple(parts), planning, context.scratch.get("saved", 0))

    def bypassed(self) -> list[str]:
        """Nothing rests."""
        return []


def _is_told_of_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> bool:
    """Whether a part is given something for each of the tokens ``x`` besides these, on whatever axis."""
    others: list[Tensor] = []
    map_tensors(others.append, (args, {name: value for name, value in kwargs.items() if name not in _MAPS}))
    others = [other for other in others if other is not x]
    return any(x.shape[1] in (other.shape[1:] if other.shape[:1] == x.shape[:1] else other.shape) for other in others)


def _is_mapped(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> bool:
    """Whether a cross-attention is given something that lies over the whole image: a map, or a mask per query."""
    mask = get_argument(module, args, kwargs, _MASK)
    has_queries = isinstance(mask, Tensor) and mask.ndim > 2 and mask.shape[-2] == x.shape[1] > 1
    return has_queries or any(kwargs.get(name) is not None for name in _MAPS)


def _is_plain(part: Part) -> bool:
    """Whether one stream enters and one leaves, and it is not text."""
    is_single = len(part.inputs) == 1 and len(part.outputs) == 1 and part.calls == 1 and part.kind != "fused"
    return is_single and part.outputs[0][1] not in BESIDE
