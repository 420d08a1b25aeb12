"""Partial steps: some tokens of a part are computed, the others keep the prediction.

Attention is predicted as a whole. MLPs, cross-attention queries and the projections of fused blocks act per token, so
they run on gathered tokens. In a fused block the un-projected attention output is kept from the last full step, because
its projection is shared with the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.leaves import get_argument, own, with_arguments
from cache4diffusion.engine.state import Context
from cache4diffusion.gates import Step
from cache4diffusion.predictors import Reuse
from cache4diffusion.tokens import Segment, TokenPlace, TokenRule
from cache4diffusion.wrap import ForwardWrapper

if TYPE_CHECKING:
    from cache4diffusion.engine.parts import PartsDriver, PartSite, RestingModule

# Denoisers whose two-stream blocks attend to [image, text]; the others to [text, image].
_IMAGE_FIRST = ("HunyuanVideo", "Mochi", "SD3")


class AttentionCapture(TorchFunctionMode):
    """Sees every scaled-dot-product attention within, and notes how much attention each key token receives.

    ``received[b, j] = mean over heads and queries of softmax(q k^T)[b, h, i, j]``, float32, in chunks of queries. The
    attention itself runs as always.
    """

    def __init__(self, chunk: int = 512) -> None:
        super().__init__()
        self.received: Tensor | None = None
        self.chunk = chunk

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self.received is None:
            query = kwargs.get("query", args[0] if args else None)
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            if isinstance(query, Tensor) and isinstance(key, Tensor):
                mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
                self.received = self._column_mean(query, key, mask, kwargs.get("scale"))
        return func(*args, **kwargs)

    def _column_mean(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
        for start in range(0, query.shape[2], self.chunk):
            logits = query[:, :, start : start + self.chunk].float() @ key.float().transpose(-1, -2) * factor
            if mask is not None:
                part = mask if mask.shape[-2] == 1 else mask[..., start : start + self.chunk, :]
                logits = logits.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits + part
            total += logits.softmax(-1).sum((1, 2))
        return total / (query.shape[1] * query.shape[2])


class WatchedAttention:
    """An attention that is not cached itself; on full steps its map is captured to rank the tokens of other parts."""

    def __init__(self, module: nn.Module, position: int, tokens: TokenDriver) -> None:
        switch = tokens.driver.switch

        def make(found: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if switch.is_on and not switch.is_cached:
                    return tokens.capture(position, found, args, kwargs)
                return found(*args, **kwargs)

            return forward

        self.wrapper = ForwardWrapper(module, make)


class TokenDriver:
    """Runs a token rule in the parts of one denoiser."""

    def __init__(self, driver: PartsDriver, rule: TokenRule) -> None:
        self.driver, self.rule = driver, rule
        self._layers: dict[int, tuple[int, int]] = {}  # block position -> (index in its list, length of the list)
        self._site_of_inner: dict[str, PartSite] = {}
        self._is_text_first = True
        self._watched: list[WatchedAttention] = []

    def install(self, anatomy: Anatomy, resting: dict[str, RestingModule]) -> None:
        """Note where blocks and fused parts are."""
        self._is_text_first = not anatomy.denoiser.startswith(_IMAGE_FIRST)
        position = 0
        for stack in anatomy.main:
            for index in range(len(stack.blocks)):
                self._layers[position] = (index, len(stack.blocks))
                position += 1
        for site in self.driver.sites:
            if site.part.kind == "fused":
                for inner in site.part.inner:
                    self._site_of_inner[inner.path] = site

        if "attention" in self.rule.observes:
            self._watch_attention(anatomy)

    def _watch_attention(self, anatomy: Anatomy) -> None:
        """Attentions whose map ranks tokens, but which are not among the cached parts."""
        positions = {site.position for site in self.driver.sites if self.handles(site)}
        wrapped = {site.part.path for site in self.driver.sites}
        blocks = [block for stack in anatomy.main for block in stack.blocks]
        for position in sorted(positions):
            for part in blocks[position].parts:
                if part.kind == "attn" and part.path not in wrapped:
                    module = self.driver.host.denoiser.get_submodule(part.path)
                    self._watched.append(WatchedAttention(module, position, self))

    def uninstall(self) -> None:
        """Unwrap."""
        for watched in self._watched:
            watched.wrapper.remove()
        self._watched = []

    def handles(self, site: PartSite) -> bool:
        """Parts whose tokens can be computed one by one: cross-attention's queries, and what maps each by itself."""
        part = site.part
        is_tokenwise = part.kind == "cross_attn" or (part.kind in ("ffn", "fused") and part.is_tokenwise)
        return site.position in self._layers and is_tokenwise

    def layer_of(self, site: PartSite) -> tuple[int, int]:
        """Index of the part's block in its list, and the length of the list."""
        return self._layers[site.position]

    def captures(self, kind: str) -> bool:
        """Whether to capture attention on full steps in modules of this kind."""
        return kind == "attn" and "attention" in self.rule.observes

    def capture(self, position: int, found: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an attention module and keep what it shows, for the parts of the same block."""
        context = self.driver.switch.context
        assert context is not None
        with AttentionCapture() as seen:
            output = found(*args, **kwargs)
        if seen.received is not None:
            context.state.extra[f"attention.{position}"] = seen.received
        return output

    # -- full steps ------------------------------------------------------------------------------------------------

    def position_of(self, rest: RestingModule) -> int | None:
        """Block position of a resting module of a fused part."""
        site = self._site_of_inner.get(rest.inner.path)
        return site.position if site is not None else None

    def took_inner(self, rest: RestingModule, output: Any) -> None:
        """Keep the un-projected attention output of a fused block."""
        context = self.driver.switch.context
        if context is not None and rest.inner.kind == "attn" and isinstance(output, Tensor):
            context.state.extra[f"inner.{rest.inner.path}"] = output.clone()

    def finish_full(self, context: Context) -> None:
        """After a full step: hand the captured scores to the rule; every token is fresh."""
        for site in self.driver.sites:
            if self.handles(site) and site.name in context.state.sites:
                place = self._place(context, site)
                state = context.state.tokens.setdefault(site.name, self.rule.init())
                received = context.state.extra.get(f"attention.{site.position}")
                if received is None and "attention" in self.rule.observes:
                    self.driver.host.note(
                        f"no attention map was seen around {site.name}, so its tokens are ranked by age alone."
                    )
                seen = {} if received is None else {"attention": self._own_tokens(received, place, site, context)}
                self.rule.observe(state, place, seen)
        for key in [key for key in context.state.extra if str(key).startswith("attention.")]:
            del context.state.extra[key]

    def _own_tokens(self, received: Tensor, place: TokenPlace, site: PartSite, context: Context) -> Tensor:
        """Of a joint attention's tokens, those of the part's own stream."""
        if received.shape[1] == place.length:
            return received
        is_first = (place.segments[0].kind == "text") == self._is_text_first
        return received[:, : place.length] if is_first else received[:, -place.length :]

    def _place(self, context: Context, site: PartSite) -> TokenPlace:
        history = context.state.sites[site.name]
        batch, length = history.buffers[0].shape[1:3]
        image, text = context.state.extra.get(f"lengths.{site.position}", (length, 0))
        kind = site.part.outputs[0][1]
        segments = (Segment("text" if kind == "text" else "image", 0, length),)
        if kind == "joint" and text and image + text == length:
            streams = self.driver.host.blocks[site.position].block.streams
            first = "text" if streams[site.part.segments[0][0]].kind == "text" else "image"
            seam = text if first == "text" else image
            second = "image" if first == "text" else "text"
            segments = (Segment(first, 0, seam), Segment(second, seam, length))
        layer, layers = self._layers[site.position]
        step: Step = context.step
        return TokenPlace(site.name, site.part.kind, layer, layers, step, segments, batch)

    # -- partial steps ---------------------------------------------------------------------------------------------

    def _index(self, context: Context, site: PartSite) -> Tensor:
        """The selection of this step, made once."""
        plans = context.scratch.setdefault("plans", {})
        if site.name not in plans:
            place = self._place(context, site)
            state = context.state.tokens.setdefault(site.name, self.rule.init())
            device = context.state.sites[site.name].buffers[0].device
            plans[site.name] = self.rule.select(state, place, device)
        return plans[site.name]

    def run(self, site: PartSite, found: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute the selected tokens of a part and write them into its prediction."""
        context = self.driver.switch.context
        assert context is not None
        state = context.state.sites[site.name]
        leaves = self.driver.predictor.predict(state, context.time, context.rows)
        index = self._index(context, site)
        if index.shape[1] == 0:
            self.driver.predictor.commit(state, leaves, context.time, context.rows)
            return site.rebuild(own(leaves, state) if site.part.is_mutated else leaves)
        path = site.part.inputs[0]
        x = get_argument(site.module, args, kwargs, path)
        if x.shape[1] != index.shape[1]:
            args, kwargs = with_arguments(site.module, args, kwargs, {path: take(x, index)})
        fresh = found(*args, **kwargs)
        values = [fresh] if isinstance(fresh, Tensor) else [leaf for leaf in fresh if isinstance(leaf, Tensor)]
        if isinstance(self.driver.predictor, Reuse):
            written = [put(leaf, index, value) for leaf, value in zip(leaves, values, strict=True)]
            return site.rebuild(own(written, state) if site.part.is_mutated else written)
        written = [put(leaf.clone(), index, value) for leaf, value in zip(leaves, values, strict=True)]
        self.driver.predictor.commit(state, written, context.time, context.rows)
        return site.rebuild(written)

    def run_inner(self, rest: RestingModule, found: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module inside or in front of a part, on a partial step."""
        context = self.driver.switch.context
        assert context is not None
        if all(not self.handles(site) or self._index(context, site).shape[1] == 0 for site in rest.fed):
            return rest.placeholder(args, kwargs)
        if rest.inner.kind == "norm" or rest.inner.path not in self._site_of_inner:
            return found(*args, **kwargs)
        index = self._index(context, self._site_of_inner[rest.inner.path])
        if rest.inner.kind == "attn":
            return take(context.state.extra[f"inner.{rest.inner.path}"], index)
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        if x.shape[1] == index.shape[1]:
            return found(*args, **kwargs)
        return found(take(x, index))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: ``[B, N, D]`` and ``[B, k]`` to ``[B, k, D]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write tokens back, in place: ``x[b, index[b, j]] = values[b, j]``."""
    return x.scatter_(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), values)
