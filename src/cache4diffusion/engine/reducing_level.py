"""The reduced-level site: the drivers of a U-Net level and of reduced parts, one inside the other, and the output.

Each of the two is given the call with the one decision that is its own. What a call computes, whether with all tokens
or not, is recorded; so is its output, as long as anything of it was computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.denoiser import OutputMemory
from cache4diffusion.engine.driver import Driver, Inner, Rested
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.level import LevelDriver
from cache4diffusion.engine.reducing import ReductionDriver
from cache4diffusion.engine.state import Context
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import ReducedLevel
from cache4diffusion.trace import Reductions, letter_of_level
from cache4diffusion.wrap import CallWrapper, ForwardWrapper

OUTPUT, LEVEL, TOKENS = range(3)


class ReducedLevelDriver(Driver):
    """Reuses the output, or bypasses what is deeper than a level, and computes what runs on fewer tokens."""

    site: ReducedLevel

    def __init__(self, host: Host, site: ReducedLevel) -> None:
        super().__init__(host, site)
        self.level = LevelDriver(host, site.level)
        self.reducing = ReductionDriver(host, site.reduced)
        self.output = OutputMemory(Reuse(), store=host.store)

    def install(self, anatomy: Anatomy | None) -> None:
        """Wrap what lies behind the cut, and parts with their blocks."""
        self.level.install(anatomy)
        self.reducing.install(anatomy)

    def uninstall(self) -> None:
        """Unwrap everything."""
        self.reducing.uninstall()
        self.level.uninstall()

    @property
    def wrappers(self) -> list[CallWrapper | ForwardWrapper]:
        """Those of both."""
        return [*self.level.wrappers, *self.reducing.wrappers]

    @property
    def specs(self) -> dict[tuple[str, int, int], Any]:
        """Arguments of parts on fewer tokens."""
        return self.reducing.specs

    @property
    def keys(self) -> tuple[int, ...]:
        """Three decisions."""
        return (OUTPUT, LEVEL, TOKENS)

    def name_of(self, key: int) -> str:
        """What they are called."""
        return self.site.decisions[key]

    def is_ready(self, context: Context, key: int) -> bool:
        """Once the output was recorded; once the level's feature was; as the token rule is."""
        if key == OUTPUT:
            return self.output.is_ready(context)
        return (self.level if key == LEVEL else self.reducing).is_ready(context, key)

    def was_reached(self, context: Context) -> bool:
        """Whether blocks were entered, and the level was met."""
        sites = context.state.sites
        return self.reducing.was_reached(context) and any(path in sites for path in self.level.cut.sources)

    @staticmethod
    def _under(context: Context, key: int) -> Context:
        """The call as the driver sees it that follows one of the decisions."""
        return dataclasses.replace(context, verdicts={0: context.verdicts[key]})

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reuse the output, or run the host's code within both drivers."""
        if context.verdicts[OUTPUT].is_cached:
            return self.output.predicted(context)

        def in_level(*args: Any, **kwargs: Any) -> Any:
            return self.level.run(self._under(context, LEVEL), inner, args, kwargs)

        output = self.reducing.run(self._under(context, TOKENS), in_level, args, kwargs)
        self.output.record(context, output)
        return output

    def symbol(self, context: Context) -> str:
        """What ran: nothing, the level alone, or everything, on fewer tokens."""
        return letter_of_level(*(context.verdicts[key].is_cached for key in self.keys))

    def reductions(self, context: Context) -> Reductions | None:
        """What was computed on fewer tokens, unless nothing was computed."""
        if context.verdicts[OUTPUT].is_cached:
            return None
        return self.reducing.reductions(self._under(context, TOKENS))

    def bypassed(self) -> list[str]:
        """What rests where the level is cached."""
        return self.level.bypassed()

    def rested(self, context: Context) -> Rested:
        """Everything, what is deeper than the level, or nothing."""
        if context.verdicts[OUTPUT].is_cached:
            return (("", 1.0),)
        return tuple((path, 1.0) for path in self.bypassed()) if context.verdicts[LEVEL].is_cached else ()
