"""Partial steps: some tokens of a part are computed, the others keep the prediction.

Attention is predicted as a whole (or computed as a whole, where a rule is `Wholesale`). MLPs, cross-attention queries
and the projections of fused blocks act per token, so they run on gathered tokens. In a fused block the un-projected
attention output is kept from when it was computed last, because its projection is shared with the MLP.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import pad

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.facts import BESIDE
from cache4diffusion.engine.attention import OBSERVED, AttentionCapture
from cache4diffusion.engine.leaves import get_argument, own, with_arguments
from cache4diffusion.engine.maps import image_grid
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.predictors import Reuse
from cache4diffusion.predictors.history import History
from cache4diffusion.tokens import Segment, Spreading, Surveying, TokenPlace, TokenRule, Wholesale
from cache4diffusion.wrap import ForwardWrapper

if TYPE_CHECKING:
    from cache4diffusion.engine.part_sites import PartSite, RestingModule
    from cache4diffusion.engine.parts import PartsDriver

# Denoisers whose two-stream blocks attend to [image, text]; the others to [text, image].
_IMAGE_FIRST = ("HiDream", "HunyuanImage", "HunyuanVideo", "JoyImage", "Mochi", "MotifVideo", "NucleusMoE", "SD3")
_SURVEY = ""  # under which name a rule's state of the whole branch is kept, beside those of the parts


def is_text_first(anatomy: Anatomy) -> bool:
    """Whether two-stream blocks attend to text and image in this order."""
    return not anatomy.denoiser.startswith(_IMAGE_FIRST)


class WatchedAttention:
    """An attention that is not cached itself; on full steps it is looked at to rank the tokens of other parts."""

    def __init__(self, module: nn.Module, position: int, kind: str, tokens: TokenDriver) -> None:
        switch = tokens.driver.switch

        def make(found: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if switch.is_on and not switch.is_cached:
                    return tokens.capture(position, kind, found, args, kwargs)
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
        self._surveyed: int | None = None  # position of the block behind which the rule looks at the streams
        self._lead: tuple[int, weakref.ref[BranchState]] | None = None  # run and state of the branch that selected last

    def install(self, anatomy: Anatomy, resting: dict[str, RestingModule]) -> None:
        """Note where blocks and fused parts are."""
        self._is_text_first = is_text_first(anatomy)
        position = 0
        for stack in anatomy.main:
            for index in range(len(stack.blocks)):
                self._layers[position] = (index, len(stack.blocks))
                position += 1
        for site in self.driver.sites:
            # Some tokens of what is concatenated are computed, if all of it is known to be of tokens one by one.
            is_open = any(inner.role == "zero_width" and inner.kind == "tokenwise" for inner in site.part.inner)
            if is_open and self.handles(site) and self._is_tokenwise(site):
                for inner in site.part.inner:
                    self._site_of_inner[inner.path] = site

        handled = [site.position for site in self.driver.sites if self.handles(site)]
        self._surveyed = max(handled, default=None) if isinstance(self.rule, Surveying) else None
        if any(self.captures(kind) for kind in OBSERVED):
            self._watch_attention(anatomy)

    def _watch_attention(self, anatomy: Anatomy) -> None:
        """Attentions that rank tokens, but are not among the cached parts.

        Raises:
            AnatomyError: tokens are to be ranked by cross-attention, and there is none.
        """
        positions = {site.position for site in self.driver.sites if self.handles(site)}
        wrapped = {site.part.path for site in self.driver.sites}
        blocks = [block for stack in anatomy.main for block in stack.blocks]
        if self.captures("cross_attn") and not any(p.kind == "cross_attn" for block in blocks for p in block.parts):
            raise AnatomyError(
                f"{type(self.rule).__name__} ranks tokens by their cross-attention to the text, and {anatomy.denoiser} "
                "has none: text and image meet in one attention, or there is no text. Use cross_weight=0."
            )
        for position in sorted(positions):
            for part in blocks[position].parts:
                if self.captures(part.kind) and part.path not in wrapped:
                    module = self.driver.host.plain.get_submodule(part.path)
                    self._watched.append(WatchedAttention(module, position, part.kind, self))

    def uninstall(self) -> None:
        """Unwrap."""
        for wrapper in self.wrappers:
            wrapper.remove()
        self._watched = []

    @property
    def wrappers(self) -> list[ForwardWrapper]:
        """Of the attentions that are looked at."""
        return [watched.wrapper for watched in self._watched]

    def handles(self, site: PartSite) -> bool:
        """Parts that run on cached steps, if the rule says so: on some tokens, or as a whole."""
        if isinstance(self.rule, Surveying) and site.part.kind not in self.rule.kinds:
            return False
        return site.position in self._layers and (self._is_tokenwise(site) or isinstance(self.rule, Wholesale))

    @staticmethod
    def _is_tokenwise(site: PartSite) -> bool:
        """Whether tokens can be computed one by one: of cross-attention's queries, and of what maps each by itself."""
        part = site.part
        return part.kind == "cross_attn" or (part.kind in ("ffn", "fused") and part.is_tokenwise)

    def _is_whole(self, context: Context, site: PartSite) -> bool:
        """Whether a rule that may have a part computed as a whole does so in this step."""
        return (
            isinstance(self.rule, Wholesale)
            and self._index(context, site).shape[1] == context.state.sites[site.name].rings[0].shape[1]
        )

    def layer_of(self, site: PartSite) -> tuple[int, int]:
        """Index of the part's block in its list, and the length of the list."""
        return self._layers[site.position]

    def captures(self, kind: str) -> bool:
        """Whether to look at attention on full steps in modules of this kind."""
        return not self.rule.observes.isdisjoint(OBSERVED.get(kind, ()))

    def capture(self, position: int, kind: str, found: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an attention module and keep what it shows, for the parts of the same block."""
        context = self.driver.switch.context
        assert context is not None
        with AttentionCapture(
            next(what for what in OBSERVED[kind] if what in self.rule.observes), rows=context.batch
        ) as capture:
            output = found(*args, **kwargs)
        context.scratch.setdefault(("attention", position), {}).update(capture.seen)
        return output

    def on_block(self, context: Context, position: int, args: Any, kwargs: Any, inner: Callable[..., Any]) -> Any:
        """A main block runs: note how long its streams are; a rule may look at what leaves it on a full step."""
        host, lengths = self.driver.host, {"image": 0, "text": 0}
        kinds = ["text" if stream.kind in BESIDE else "image" for stream in host.blocks[position].streams]
        for kind, value in zip(kinds, host.stream_inputs(position, args, kwargs), strict=True):
            lengths[kind] += value.shape[1]
        context.state.extra[f"lengths.{position}"] = (lengths["image"], lengths["text"])
        output = inner(*args, **kwargs)
        switch = self.driver.switch
        if position == self._surveyed and switch.is_on and not switch.is_cached and not switch.is_watching:
            assert isinstance(self.rule, Surveying)
            state = context.state.tokens.setdefault(_SURVEY, self.rule.init())
            left = host.stream_outputs(position, args, kwargs, output)
            self.rule.survey(state, dict(zip(kinds, left, strict=True)), self._twins(context))
        return output

    # -- full steps ------------------------------------------------------------------------------------------------

    def position_of(self, rest: RestingModule) -> int | None:
        """Block position of a resting module of a fused part."""
        site = self._site_of_inner.get(rest.inner.path)
        return site.position if site is not None else None

    def took_inner(self, rest: RestingModule, output: Any) -> None:
        """Keep the un-projected attention output of a fused block.

        Where it comes in several pieces, as of HunyuanVideo, all of it runs on partial steps too.
        """
        context = self.driver.switch.context
        if context is None or rest.inner.kind != "attn" or rest.inner.path not in self._site_of_inner:
            return
        if isinstance(output, Tensor):
            self.driver.host.store.remember(context.state.extra, _inner(rest), output)
        else:
            for inner in self._site_of_inner[rest.inner.path].part.inner:
                self._site_of_inner.pop(inner.path, None)

    def finish_full(self, context: Context) -> None:
        """After a full step: hand what was seen to the rule; every token is fresh."""
        wanted = [what for kinds in OBSERVED.values() for what in kinds if what in self.rule.observes]
        for site in self.driver.sites:
            if self.handles(site) and site.name in context.state.sites:
                place = self._place(context, site)
                state = context.state.tokens.setdefault(site.name, self.rule.init())
                seen = context.scratch.get(("attention", site.position), {})
                # An attention that runs on some tokens at a time shows those only.
                is_whole = {what: v.shape[0] == place.batch and v.shape[1] >= place.length for what, v in seen.items()}
                seen = {what: values for what, values in seen.items() if is_whole[what]}
                for what in wanted:
                    if what not in seen:
                        self.driver.host.note(
                            f"no {what.replace('_', '-')} was seen around {site.name}, so its tokens are ranked "
                            "without it."
                        )
                own = {what: self._own_tokens(values, place, site, context) for what, values in seen.items()}
                self.rule.observe(state, place, own)

    def _own_tokens(self, received: Tensor, place: TokenPlace, site: PartSite, context: Context) -> Tensor:
        """Of a joint attention's tokens, those of the part's own stream."""
        if received.shape[1] == place.length:
            return received
        is_text = place.segments[0].kind == "text"
        if is_text == self._is_text_first:
            return received[:, : place.length]
        if not is_text:
            return received[:, -place.length :]
        image = context.state.extra[f"lengths.{site.position}"][0]
        behind = received[:, image : image + place.length]  # all of the text, or what no mask leaves out of it
        return pad(behind, (0, place.length - behind.shape[1]))

    def _place(self, context: Context, site: PartSite) -> TokenPlace:
        history = context.state.sites[site.name]
        batch, length = history.rings[0].shape[:2]
        image, text = context.state.extra.get(f"lengths.{site.position}", (length, 0))
        kind = site.part.outputs[0][1]
        segments = (Segment("text" if kind in BESIDE else "image", 0, length),)
        if kind == "joint" and text and image + text == length:
            streams = self.driver.host.blocks[site.position].block.streams
            first = "text" if streams[site.part.segments[0][0]].kind in BESIDE else "image"
            seam = text if first == "text" else image
            second = "image" if first == "text" else "text"
            segments = (Segment(first, 0, seam), Segment(second, seam, length))
        if "grid" in self.rule.observes:
            segments = tuple(
                dataclasses.replace(s, grid=self._grid(context, s.stop - s.start)) if s.kind == "image" else s
                for s in segments
            )
        layer, layers = self._layers[site.position]
        return TokenPlace(
            site.name,
            site.part.kind,
            layer,
            layers,
            context.step,
            segments,
            batch,
            block=site.position,
            num_blocks=len(self._layers),
        )

    def _grid(self, context: Context, count: int) -> tuple[int, int, int]:
        """Frames, rows and columns of the image tokens; found once per branch and run."""
        known = context.state.extra.setdefault("grids", {})
        if count not in known:
            host, (args, kwargs) = self.driver.host, context.scratch["call"]
            host.trace.syncs += isinstance(get_argument(host.inputs.module, args, kwargs, ("img_ids",)), Tensor)
            wanted = "no bonus can be given by neighbourhood; use bonus=0"
            known[count] = image_grid(host.inputs, args, kwargs, count, wanted)
        return known[count]

    def bring(self, state: BranchState, name: str) -> None:
        """Begin to bring what is kept of the inside of a fused part."""
        for inner, site in self._site_of_inner.items():
            kept = state.extra.get(f"inner.{inner}") if site.name == name else None
            if kept is not None:
                kept.prefetch()

    # -- partial steps ---------------------------------------------------------------------------------------------

    def _index(self, context: Context, site: PartSite, entering: Tensor | None = None) -> Tensor:
        """The selection of this step, made once; branches that are tied take that of the first one.

        Args:
            context: the call.
            site: of which part.
            entering: what enters it, where that is known.
        """
        plans = context.scratch.setdefault("plans", {})
        if site.name not in plans:
            place, is_tied = self._place(context, site), self.driver.host.composition.branches == "tied"
            index = self._selection_of_the_lead(context, place) if is_tied else None
            if index is None:
                levels = context.call.run.timesteps
                seen = dataclasses.replace(place, twins=self._twins(context), entering=entering, levels=levels)
                seen = dataclasses.replace(seen, survey=context.state.tokens.get(_SURVEY))
                state = context.state.tokens.setdefault(site.name, self.rule.init())
                index = self.rule.select(state, seen, context.state.sites[site.name].rings[0].device)
                if not self._is_tokenwise(site) and index.shape[1] < place.length:
                    index = index[:, :0]
                if is_tied:
                    self._lead = (context.call.run.id, weakref.ref(context.state))
                    context.state.extra.setdefault("selected", {})[site.name] = index
                    context.state.extra.setdefault("selected_at", {})[site.name] = place
            plans[site.name] = index
        return plans[site.name]

    def _rests(self, context: Context, site: PartSite, entering: Tensor | None) -> bool:
        """Whether no token of a part is computed in this step. In front of a norm, a rule that goes by what enters the
        part cannot say, and the norm runs.
        """
        if not self.handles(site):
            return True
        if entering is None and "input" in self.rule.observes and site.name not in context.scratch.get("plans", {}):
            return False
        return self._index(context, site, entering).shape[1] == 0

    def _selection_of_the_lead(self, context: Context, place: TokenPlace) -> Tensor | None:
        """What the first branch of this step selected in a part, if it did and the tokens are the same ones."""
        if self._lead is None or self._lead[0] != context.call.run.id:
            return None
        lead = self._lead[1]()
        if lead is None or lead is context.state or lead.extra.get("selected_at", {}).get(place.part) != place:
            return None
        return lead.extra["selected"][place.part]

    def _twins(self, context: Context) -> Tensor | None:
        """Which rows of this call are the halves of batched guidance: two that denoise the same latent. No sync."""
        if "twins" not in context.scratch:
            args, kwargs = context.scratch["call"]
            latent = self.driver.host.inputs.split(args, kwargs)[1]
            half, odd = divmod(latent.shape[0], 2)
            context.scratch["twins"] = None
            if half and not odd:
                context.scratch["twins"] = (latent[:half] == latent[half:]).flatten(1).all(1).repeat(2)
        return context.scratch["twins"]

    def run(self, site: PartSite, found: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Compute the selected tokens of a part and write them into its prediction."""
        context = self.driver.switch.context
        assert context is not None
        state = context.state.sites[site.name]
        leaves = self.driver.predicted(context, site.name)
        self.driver.bring_after(context, site.name)
        path = site.part.inputs[0]
        x = get_argument(site.module, args, kwargs, path)
        index = self._index(context, site, x)
        if index.shape[1] == 0:
            self.driver.predictor.commit(state, leaves, context.time, context.rows)
            return site.rebuild(own(leaves, state) if site.part.is_mutated else leaves)
        is_whole = self._is_whole(context, site)
        if not is_whole and x.shape[1] != index.shape[1]:
            args, kwargs = with_arguments(site.module, args, kwargs, {path: take(x, index)})
        fresh = found(*args, **kwargs)
        values = [fresh] if isinstance(fresh, Tensor) else [leaf for leaf in fresh if isinstance(leaf, Tensor)]
        # What was computed stays in the cache, unless the rule itself remembers how tokens were moved.
        is_kept = isinstance(self.driver.predictor, Reuse) and not isinstance(self.rule, Spreading)
        if isinstance(self.rule, Spreading):
            place = dataclasses.replace(self._place(context, site), survey=context.state.tokens.get(_SURVEY))
            kept = context.state.tokens.setdefault(site.name, self.rule.init())
            written = self.rule.spread(kept, place, leaves, lambda: _last(state), index, values)
        elif is_whole:
            written = values
        else:
            before = leaves if is_kept else [leaf.clone() for leaf in leaves]
            written = [put(leaf, index, value) for leaf, value in zip(before, values, strict=True)]
        if is_kept:
            state.amend(written)
            return site.rebuild(own(written, state) if site.part.is_mutated else written)
        self.driver.predictor.commit(state, written, context.time, context.rows)
        return site.rebuild(written)

    def rested(self, context: Context) -> tuple[tuple[str, float], ...]:
        """After a partial step: which modules did not run, and for which share of their tokens."""
        plans = context.scratch.get("plans", {})
        shares: dict[str, float] = {}
        for site in self.driver.sites:
            if site.name in context.state.sites:
                length = context.state.sites[site.name].rings[0].shape[1]
                computed = plans[site.name].shape[1] / length if site.name in plans else 0.0
                shares[site.part.path] = 1 - computed
        for rest in self.driver.resting:
            least = min((shares.get(path, 0.0) for path in rest.inner.feeds), default=0.0)
            if least == 1 or rest.inner.path in self._site_of_inner:
                is_whole = isinstance(self.rule, Wholesale) and least == 0
                shares[rest.inner.path] = 1.0 if rest.inner.kind == "attn" and not is_whole else least
        return tuple((path, share) for path, share in shares.items() if share)

    def run_inner(self, rest: RestingModule, found: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module inside or in front of a part, on a partial step."""
        context = self.driver.switch.context
        assert context is not None
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        is_norm = rest.inner.role != "zero_width"  # or runs in front of a part as norms do
        if all(self._rests(context, site, None if is_norm else x) for site in rest.fed):
            return rest.placeholder(args, kwargs)
        if is_norm or rest.inner.path not in self._site_of_inner:
            return found(*args, **kwargs)
        site = self._site_of_inner[rest.inner.path]
        index = self._index(context, site)
        if self._is_whole(context, site):
            output = found(*args, **kwargs)
            self.took_inner(rest, output)
            return output
        if rest.inner.kind == "attn":
            return take(context.state.extra[_inner(rest)].read(), index)
        if x.shape[1] == index.shape[1]:
            return found(*args, **kwargs)
        return found(take(x, index))


def _last(history: History) -> list[Tensor]:
    """The feature of the last full step."""
    return history.newest()


def _inner(rest: RestingModule) -> str:
    """Under which name the output of a module inside a fused part is kept."""
    return f"inner.{rest.inner.path}"


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: ``[B, N, D]`` and ``[B, k]`` to ``[B, k, D]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write tokens back, in place: ``x[b, index[b, j]] = values[b, j]``."""
    return x.scatter_(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), values)
