"""The part sites: residual sub-layers of every block, predicted before their adaLN gate.

A part's ``forward`` is wrapped, and so are the modules that run only to feed parts (`part_sites`). The driver sets the
switch that the wrappers read, and keeps and predicts what they ask for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

from torch import Tensor

from cache4diffusion.anatomy import Anatomy, Block, Inner, Part
from cache4diffusion.anatomy.facts import InnerRole
from cache4diffusion.engine.compiling import TURNS, is_compiled
from cache4diffusion.engine.decide import prediction_error
from cache4diffusion.engine.driver import Driver, Rested
from cache4diffusion.engine.driver import Inner as InnerCall
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_output, own, take_apart
from cache4diffusion.engine.part_lookup import blocks_of, parts_of, units_of
from cache4diffusion.engine.part_sites import PartSite, RestingModule, Switch, Turns
from cache4diffusion.engine.predictions import Predictions
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.engine.tokens import TokenDriver
from cache4diffusion.errors import AnatomyError, CompositionError
from cache4diffusion.gates import Verification
from cache4diffusion.predictors import LinearPredictor, Predictor
from cache4diffusion.predictors.corrector import paired
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import TokenRule
from cache4diffusion.wrap import CallWrapper, ForwardWrapper


class PartsDriver(Driver):
    """Predicts the outputs of parts."""

    site: Parts
    part_site: type[PartSite] = PartSite
    resting_module: type[RestingModule] = RestingModule
    rests: tuple[InnerRole, ...] = get_args(InnerRole)  # inner modules that need not run while parts do not
    serves_turns = True  # whether a module may have several parts, one for each of its calls

    def __init__(self, host: Host, site: Parts) -> None:
        super().__init__(host, site)
        self.switch = Switch()
        self.sites: list[PartSite] = []
        self.resting: list[RestingModule] = []
        self.turns: list[Turns] = []  # of modules that run several times in a call
        self._names: list[str] = []  # of the decisions
        self._traced: list[PartSite] = []  # sites in compiled blocks, as seen at the last full step
        rule = host.composition.tokens
        self.tokens = TokenDriver(self, rule) if isinstance(rule, TokenRule) else None
        self._watches = (host.gate is not None and host.gate.watch is not None) or rule is not None
        self.needs_blocks = self._watches

    @property
    def predictor(self) -> Predictor:
        """The predictor of the composition."""
        return self.host.predictor

    def install(self, anatomy: Anatomy | None) -> None:
        """Wrap the parts and the modules that rest with them."""
        assert anatomy is not None
        modules = dict(self.host.plain.named_modules())
        unserved: list[str] = []
        shared: list[str] = []
        tells_turns = self._tells_turns()
        for position, name, part in self.all_sites():
            if not self.serves(name):
                unserved.append(name)
                continue
            if part.calls > 1 and not tells_turns:
                shared.append(part.path)
                continue
            decision = self.decision_for(name, part)
            if decision not in self._names:
                self._names.append(decision)
            key = self._names.index(decision)
            self.sites.append(self.part_site(name, part, position, modules[part.path], self, key))
        self._leave_out(shared, anatomy)
        self._wrap_turns()
        wrapped = self._served_wholly()
        resting: dict[str, Inner] = {}
        for site in self.sites:
            for inner in site.part.inner:
                # What enters a part is what its norm makes: for those who look at it, norms run.
                is_read = self.sees_input and (inner.role != "zero_width" or site.part.calls > 1)
                if inner.role in self.rests and not is_read and all(path in wrapped for path in inner.feeds):
                    resting[inner.path] = inner
        self.resting = [self.resting_module(inner, modules[path], self) for path, inner in resting.items()]
        if self.sees_input:
            self._find_entrances()
        words = type(self.predictor).__name__
        if unserved and not self.sites:
            raise AnatomyError(
                f"{words} has numbers for none of the sites of {anatomy.denoiser} ({unserved[0]} and "
                f"{len(unserved) - 1} more): its calibration was made for another site or denoiser. Calibrate anew."
            )
        if unserved:
            self.host.note(f"{words} has no numbers for {len(unserved)} sites ({unserved[0]} ...): they always run.")
        missing = set(self.site.required) - {site.part.kind for site in self.sites}
        if missing and self.sites:
            raise AnatomyError(
                f"{anatomy.denoiser} has no parts of the kind {' or '.join(sorted(missing))}, and "
                f"{type(self.host.gate).__name__} is for those. Where text runs along with the image (joint attention) "
                "there is no cross-attention: methods for all parts ('fora', 'taylorseer') may work."
            )
        if not self.sites:
            raise self.nothing_found(anatomy)
        if self.tokens is not None:
            self.tokens.install(anatomy, {r.inner.path: r for r in self.resting})

    def _wrap_turns(self) -> None:
        """Wrap the modules that run several times in a call: each call is a site."""
        shared: dict[str, list[PartSite]] = {}
        for site in self.sites:
            if site.part.calls > 1:
                shared.setdefault(site.part.path, []).append(site)
        self.turns = [Turns(sites, self.switch) for sites in shared.values()]
        self.needs_blocks = self._watches or bool(self.turns)  # so that a block that is compiled later on is refused

    def _tells_turns(self) -> bool:
        """Whether calls of one module can be told apart: not where a module is looked at as one part, nor in graphs."""
        is_one = not self.serves_turns or self.tokens is not None
        return not is_one and not any(is_compiled(module) for module in self.host.plain.modules())

    def _leave_out(self, shared: list[str], anatomy: Anatomy) -> None:
        """Say that these parts always run, since their module runs several times in a call.

        Raises:
            AnatomyError, CompositionError: there are no others.
        """
        if not shared:
            return
        fact = f"{shared[0]} runs several times in a call of {anatomy.denoiser}, and {self.host.words}"
        if self.sites:
            self.host.note(f"{fact} cannot tell such calls apart: {len(shared)} parts always run.")
        elif self.serves_turns and self.tokens is None:
            raise CompositionError(f"{self.host.name}: {TURNS}")
        else:
            raise AnatomyError(
                f"{fact} treats the calls of a module alike. Use 'fora' or 'taylorseer', which keep them apart."
            )

    @property
    def forbids_compiled_blocks(self) -> str | None:
        """Why blocks must not be compiled while this is installed; None if they may be."""
        return TURNS if self.turns else None

    def nothing_found(self, anatomy: Anatomy) -> AnatomyError:
        """What is said where the denoiser has none of them."""
        return AnatomyError(
            f"{anatomy.denoiser} has no parts of the kinds {', '.join(self.site.kinds)} that can be told apart. "
            "Methods for spans ('fbcache', 'teacache') or the whole denoiser ('taylorseer-lite') may work. If its "
            "blocks have parts, say which: c4d.declare(denoiser, parts={'mix': 'attn', 'map': 'ffn'})."
        )

    def all_sites(self) -> Iterator[tuple[int, str, Part]]:
        """What is cached, with the position of its block and the name of its site."""
        position = 0
        for position, block in blocks_of(self.host):
            for name, part in self.sites_of(block):
                yield position, name, part
        for number, unit in enumerate(units_of(self.host, self.site), start=position + 1):
            yield number, unit.name, unit

    def sites_of(self, block: Block) -> list[tuple[str, Part]]:
        """What is cached of a block, each with the name of its site."""
        return [(part.name, part) for part in parts_of(block, self.site, units_of(self.host, self.site))]

    def decision_for(self, name: str, part: Part) -> str:
        """What the decision is called that a part follows."""
        return {"one": "", "kind": part.kind, "part": name}[self.site.decisions]

    def _find_entrances(self) -> None:
        """Where modules in front of a part rest with it, what enters the first of them is what enters the part."""
        resting = {rest.inner.path: rest for rest in self.resting if rest.inner.role == "zero_width"}
        for site in self.sites:
            first = next((resting[inner.path] for inner in site.part.inner if inner.path in resting), None)
            if first is not None:
                first.shows, site.is_fed = site, True

    def uninstall(self) -> None:
        """Unwrap everything.

        A wrapper that something else was put in front of stays where it is, and must not hear of what is installed
        later on: its switch stays off.
        """
        self.switch.turn(on=False)
        self.switch.context = None
        for wrapper in self.wrappers:
            wrapper.remove()
        if self.tokens is not None:
            self.tokens.uninstall()
        self.switch = Switch()
        self.sites, self.resting, self.turns, self._traced, self._names = [], [], [], [], []

    @property
    def wrappers(self) -> list[CallWrapper | ForwardWrapper]:
        """Of the parts, of what rests with them, and of what a token rule looks at."""
        mine = [wrapped.wrapper for wrapped in (*self.resting, *self.turns, *self.sites) if wrapped.wrapper is not None]
        return [*mine, *(self.tokens.wrappers if self.tokens is not None else ())]

    @property
    def keys(self) -> tuple[int, ...]:
        """One, or one per kind or part."""
        return tuple(range(max(len(self._names), 1)))

    def name_of(self, key: int) -> str:
        """A kind, or the path of a part."""
        return self._names[key] if key < len(self._names) else ""

    def path_of(self, site: str) -> str:
        """The part's; it has another name than its site where an adapter is wrapped around it."""
        return next((known.part.path for known in self.sites if known.name == site), site)

    def decision_of(self, site: str) -> str:
        """Likewise."""
        return next((self._names[known.key] for known in self.sites if known.name == site), "")

    def is_ready(self, context: Context, key: int) -> bool:
        """Once every part of this decision was recorded that runs at all."""
        kept = context.state.sites
        mine = [kept[site.name] for site in self.sites if site.key == key and site.name in kept]
        return bool(mine) and all(self.predictor.is_ready(state) for state in mine)

    def was_reached(self, context: Context) -> bool:
        """Also where nothing that was recorded could be kept."""
        return super().was_reached(context) or "is_reached" in context.scratch

    def run(self, context: Context, inner: InnerCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Set the switch, run the host's code, collect what compiled blocks kept."""
        switch = self.switch
        switch.context, context.scratch["call"] = context, (args, kwargs)
        for turns in self.turns:
            turns.begin()
        try:
            if context.verdict is not None:
                self._turn(context)
            output = inner(*args, **kwargs)
            if switch.is_on:
                self._collect()
                context.state.extra["shapes"] = {rest.inner.path: rest.shapes for rest in self.resting}
            if switch.is_on and not switch.is_cached and self.tokens is not None:
                self.tokens.finish_full(context)
            return output
        finally:
            self._conclude(context)

    def _conclude(self, context: Context) -> None:
        """What a call has put off is done, what it has made ahead or left at the sites is dropped."""
        try:
            self.host.store.writes.make()
        finally:
            context.scratch.pop("predictions", None)
            self.switch.turn(on=False)
            self.switch.context = None
            for site in self.sites:
                site.fresh = site.prepared = site.entered = None
                site.fresh_seen = []
                site.must_run = False

    def on_block(
        self, context: Context, position: int, inner: InnerCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Blocks run; a token rule must know how long their streams are."""
        if self.tokens is not None:
            return self.tokens.on_block(context, position, args, kwargs, inner)
        return inner(*args, **kwargs)

    def on_decided(self, context: Context, key: int) -> None:
        """The gate has seen what it watches: the parts that follow go the way it said."""
        self._turn(context)

    def _turn(self, context: Context) -> None:
        is_cached = any(verdict.is_cached for verdict in context.verdicts.values())
        self.switch.turn(on=True, cached=is_cached)
        shapes = context.state.extra.get("shapes", {})  # branches may differ in length
        for rest in self.resting:
            rest.shapes = shapes.get(rest.inner.path, ())
        if not is_cached:
            return
        known = context.state.sites
        for site in self.sites:
            site.must_run = not context.verdicts[site.key].is_cached
        running = {site.part.path for site in self.sites if site.must_run or site.name not in known}
        for rest in self.resting:
            rest.must_run = bool(running) and not running.isdisjoint(rest.inner.feeds)
        for site in self._traced:
            site.prepared = self.prepare(site) if site.name in known and not site.must_run else None
        ready = next((site.prepared for site in self._traced if site.prepared is not None), None)
        if ready is not None:
            like, rows = take_apart(ready)[0][0], context.batch if context.rows is None else len(context.rows)
            for rest in self.resting:
                if rest.inner.role != "nan_token":
                    rest.blank = rest.blanks(like, rows)

    def _collect(self) -> None:
        """Record what compiled blocks left at their parts."""
        for site in self.sites:
            if site.fresh is None:
                continue
            if not site.is_traced:
                site.is_traced = True
                self._traced.append(site)
            self.record(site, site.fresh, site.fresh_seen)

    def record(self, site: PartSite, output: Any, seen: list[Tensor]) -> None:
        """Take in the feature of a full step, and what entered with it.

        Raises:
            AnatomyError: a corrector is to see what entered, and nothing of the output's shape did.
        """
        context = self.switch.context
        assert context is not None
        tensors, layout = take_apart(output)
        if layout != context.state.layouts.get(site.name):  # first time, or its structure changed: start anew
            self.forget(site)
            context.state.layouts[site.name] = layout
        if self.sees_input:
            pairs = paired(tensors, seen)
            if pairs is None:
                raise AnatomyError(
                    f"{type(self.predictor).__name__} maps what enters to what leaves, and {site.name} returns tokens "
                    "that it was not given. Use a predictor that sees only the feature, such as 'reuse'."
                )
            site.pairs, seen = pairs, [seen[i] for i in pairs]
        context.scratch["is_reached"] = True
        with self._copying(site):
            self.keep(context, site.name, tensors, seen)

    def _copying(self, site: PartSite) -> AbstractContextManager[None]:
        """While a part's feature is kept: its copy may wait for those of others, unless the host writes into it.

        Nothing is known of how the host goes on with what entered a part.
        """
        if site.part.is_mutated or self.sees_input:
            return nullcontext()
        return self.host.store.writes.waiting(site.distrust)

    def prepare(self, site: PartSite) -> Any:
        """What a compiled block finds at the part: its output, or what a corrector makes the output from in there."""
        if site.corrector is None:
            return self.predict(site, [])
        context = self.switch.context
        assert context is not None
        site.layout = context.state.layouts[site.name]
        material = site.corrector.material(context.state.sites[site.name], context.time, context.rows)
        return [tensor.detach() for tensor in material]

    def predict(self, site: PartSite, seen: list[Tensor]) -> Any:
        """The output of this cached step; a copy of its own where the host writes into it."""
        context = self.switch.context
        assert context is not None
        if self.sees_input:
            seen = [seen[i] for i in site.pairs]
        tensors = self.forecast(context, site.name, seen)
        if site.is_traced:  # a snapshot handed out as it is would be a view, which a compiled block tells from others
            tensors = [tensor.detach() for tensor in tensors]
        return site.rebuild(own(tensors, context.state.sites[site.name]) if site.part.is_mutated else tensors)

    def predicted(
        self, context: Context, name: str, seen: Sequence[Tensor] = (), rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Made along with the predictions of the parts that follow, where they are alike."""
        predictor = self.predictor
        if isinstance(predictor, LinearPredictor) and context.rows is None and rows is None:
            if "predictions" not in context.scratch:
                context.scratch["predictions"] = Predictions(predictor, self.coming(context), context.time)
            leaves = context.scratch["predictions"].take(name)
            if leaves is not None:
                return leaves
        return super().predicted(context, name, seen, rows)

    def coming(self, context: Context) -> dict[str, Any]:
        """What is remembered of the parts that will be predicted in this call, in order."""
        known = context.state.sites
        return {site.name: known[site.name] for site in self.sites if site.name in known and not site.must_run}

    def forget(self, site: PartSite) -> None:
        """Start anew with this part, in the branch that runs."""
        context = self.switch.context
        if context is not None:
            context.state.sites.pop(site.name, None)
            context.state.layouts.pop(site.name, None)
            context.state.tokens.pop(site.name, None)

    def verify(self, context: Context, inner: InnerCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute the last block from its own input and compare its last part (or its output) with the prediction.

        As in SpeCa's code: the fused part's feature where the last block is one fused part (FLUX), else the block's
        output (DiT).
        """
        assert self.host.gate is not None
        watch = self.host.gate.watch
        assert isinstance(watch, Verification)
        last = max(site.position for site in self.sites)
        mine = [site for site in self.sites if site.position == last]
        predicted = context.scratch["last_output"]
        self.switch.is_cached, self.switch.is_watching = False, True
        for turns in self.turns:  # the block runs once more
            turns.begin(min((site.part.turn for site in turns.sites if site.position == last), default=turns.next))
        true = inner(*args, **kwargs)
        kept, seen = mine[-1].fresh, mine[-1].fresh_seen
        self.switch.is_cached, self.switch.is_watching = True, False
        for site in mine:
            site.fresh, site.fresh_seen = None, []
        if len(mine) == 1 and mine[0].part.kind == "fused" and kept is not None:
            before, after = take_apart(self.predict(mine[0], seen))[0][0], take_apart(kept)[0][0]
        else:
            path = next(s.output for s in self.host.blocks[last].streams if s.output is not None)
            before, after = get_output(predicted, path), get_output(true, path)
        per_row = self.host.composition.decide != "batch"
        return prediction_error(before, after, watch, per_row, self.host.group)

    def bring(self, state: BranchState, name: str, time: float) -> None:
        """Also what a token rule needs there."""
        super().bring(state, name, time)
        if self.tokens is not None:
            self.tokens.bring(state, name)

    def rested(self, context: Context) -> Rested | None:
        """Where there are several decisions: the parts that were predicted, and what rested with them. With a token
        rule: the share of the tokens that was not computed.
        """
        if self.tokens is not None:
            return self.tokens.rested(context)
        if self.site.decisions == "one":
            return None
        shares: dict[str, float] = {}
        for site in self.sites:
            if context.verdicts[site.key].is_cached:
                shares[site.part.path] = shares.get(site.part.path, 0.0) + 1 / site.part.calls
        cached = sorted(shares.items())
        whole = {path for path, share in cached if share > 1 - 1e-9}
        resting = [rest.inner.path for rest in self.resting if whole.issuperset(rest.inner.feeds)]
        return (*cached, *((path, 1.0) for path in dict.fromkeys(resting) if path not in shares))

    def bypassed(self) -> list[str]:
        """The parts and what rests with them; none for certain where there are several decisions."""
        if self.site.decisions != "one":
            return []
        return [*self._served_wholly(), *[rest.inner.path for rest in self.resting]]

    def _served_wholly(self) -> list[str]:
        """The modules of which every call is a site; of others, what feeds them must run."""
        calls = Counter(site.part.path for site in self.sites)
        whole = [site.part.path for site in self.sites if calls[site.part.path] == site.part.calls]
        return list(dict.fromkeys(whole))
