"""The gated-parts site: each part decides by what enters it, for every row, while the host's code runs.

A part that is one module is asked in front of it. A fused part is asked in front of the first module that reads its
modulated input; the modules between that one and the part rest with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cache4diffusion.engine.driver import Inner, Rested
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import merge_rows, select_rows, take_apart
from cache4diffusion.engine.part_lookup import entering_of, entrance_of
from cache4diffusion.engine.part_sites import PartSite, RestingModule, shapes_of
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.state import Context, Verdict
from cache4diffusion.errors import RunError
from cache4diffusion.sites import GatedParts

Ask = Callable[[Context, int, str, Sequence[Tensor]], None]


class GatedPartSite(PartSite):
    """One part of one block, which is asked before it runs."""

    driver: GatedPartsDriver

    def around(self, found: Callable[..., Any]) -> Callable[..., Any]:
        """Ask, then predict, run, or do either for some rows."""
        site, driver, switch = self, self.driver, self.switch

        def forward(*args: Any, **kwargs: Any) -> Any:
            context = switch.context
            if context is None:
                return found(*args, **kwargs)
            verdict = driver.asked(context, site, args, kwargs)
            if verdict.is_cached:
                return site.given(args, kwargs)
            if verdict.is_full:
                output = found(*args, **kwargs)
                driver.record(site, output, [])
                return output
            return driver.some_rows(context, site, verdict, found, args, kwargs)

        return forward


class GatedModule(RestingModule):
    """A module inside a fused part. Where some rows of it are cached it computes the others only, if it can."""

    driver: GatedPartsDriver

    def _make(self, found: Callable[..., Any]) -> Callable[..., Any]:
        rest, driver, switch = self, self.driver, self.switch

        def forward(*args: Any, **kwargs: Any) -> Any:
            context = switch.context
            if context is None:
                return found(*args, **kwargs)
            verdicts = [driver.asked(context, site, args, kwargs) for site in rest.fed]
            if all(verdict.is_cached for verdict in verdicts):
                return rest.placeholder(args, kwargs)
            verdict = verdicts[0]
            if len(verdicts) > 1 or verdict.is_full:
                output = found(*args, **kwargs)
                rest.shapes = shapes_of(output)
                return output
            rows = verdict.full_rows
            if rest.inner.kind == "tokenwise" and len(args) == 1 and not kwargs:
                return found(args[0] if len(args[0]) == len(rows) else select_rows(args[0], rows))
            leaves, layout = take_apart(found(*args, **kwargs))
            return layout.fill([select_rows(leaf, rows) for leaf in leaves])

        return forward


class GatedPartsDriver(PartsDriver):
    """Predicts the outputs of parts, each under a decision that is taken in front of it."""

    site: GatedParts
    splits_rows = True
    part_site = GatedPartSite
    resting_module = GatedModule
    rests = ("zero_width",)  # a norm is read by the decision itself
    serves_turns = False

    def __init__(self, host: Host, site: GatedParts) -> None:
        super().__init__(host, site)
        self.needs_blocks = True  # so that a block that is compiled later on is refused
        self.ask: Ask | None = None  # set by the observer

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's code runs; everything happens in the parts."""
        known = context.state.extra.get("shapes", {})  # branches may differ in length
        for rest in self.resting:
            rest.shapes = known.get(rest.inner.path, ())
        self.switch.context = context
        try:
            output = inner(*args, **kwargs)
            context.state.extra["shapes"] = {rest.inner.path: rest.shapes for rest in self.resting}
            return output
        finally:
            self._conclude(context)

    def coming(self, context: Context) -> dict[str, Any]:
        """Not known: each part decides when it is reached."""
        return {}

    def asked(self, context: Context, site: PartSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Verdict:
        """The decision about a part, taken now if it was not before."""
        if site.key not in context.verdicts:
            assert self.ask is not None
            self.ask(context, site.key, site.part.path, entering_of(site.part, site.module, args, kwargs))
        return context.verdicts[site.key]

    def some_rows(
        self,
        context: Context,
        site: PartSite,
        verdict: Verdict,
        found: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute some rows of a part, predict the others, and give the host all of them."""
        rows, cached = verdict.full_rows, verdict.cached_rows
        predicted = self.forecast(context, site.name, rows=cached)
        if entrance_of(site.part) is None:  # else only these rows have come
            args, kwargs = self.host.module_rows(site.part.path, site.module, args, kwargs, rows)
        fresh, layout = take_apart(found(*args, **kwargs))
        if layout != context.state.layouts[site.name]:
            raise RunError(f"{site.part.path} returned another structure than before, while only some rows ran.")
        self.keep(context, site.name, fresh, rows=rows)
        return layout.fill(merge_rows([(rows, fresh), (cached, predicted)], len(verdict.cached)))

    def rested(self, context: Context) -> Rested:
        """The parts and what is inside of them, with the share of the rows for which each did not run."""
        shares = {}
        for site in self.sites:
            flags = context.verdicts[site.key].cached if site.key in context.verdicts else ()
            if any(flags):
                shares[site.part.path] = sum(flags) / len(flags)
        for rest in self.resting:
            share = min(shares.get(path, 0.0) for path in rest.inner.feeds)
            if share == 1 or (share and rest.inner.kind == "tokenwise"):
                shares[rest.inner.path] = share
        return tuple(shares.items())
