"""The mixed-score site: cached parts and the last full step's output, each with its weight."""

from __future__ import annotations

from typing import Any

from cache4diffusion.engine.denoiser import OutputMemory
from cache4diffusion.engine.driver import Inner, Rested
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import take_apart
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import MixedScore


class MixedScoreDriver(PartsDriver):
    """Predicts parts, and mixes what comes out with the output of the last full step."""

    site: MixedScore

    def __init__(self, host: Host, site: MixedScore) -> None:
        super().__init__(host, site)
        self.jump = OutputMemory(Reuse(), "jump", host.store)

    def is_ready(self, context: Context, key: int) -> bool:
        """Once the output and every part were recorded."""
        parts = [state for name, state in context.state.sites.items() if name != self.jump.name]
        return self.jump.is_ready(context) and bool(parts) and all(self.predictor.is_ready(state) for state in parts)

    def bring(self, state: BranchState, name: str, time: float) -> None:
        """The output has a predictor of its own."""
        if name == self.jump.name:
            self.jump.predictor.prefetch(state.sites[name], time)
        else:
            super().bring(state, name, time)

    def weight(self, context: Context) -> float:
        """Of the output made with cached parts."""
        assert context.step.num_steps is not None  # the engine refuses to begin without it
        return self.site.weight(context.step.index / context.step.num_steps)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute and record, or predict and mix."""
        verdict, weight = context.verdict, self.weight(context)
        if weight == 0 and verdict is not None and verdict.is_cached:
            return self.jump.predicted(context)
        output = super().run(context, inner, args, kwargs)
        if context.verdict is None:  # the watch point was not reached; the engine says so
            return output
        if context.verdict.is_full:
            self.jump.record(context, output)
            return output
        if weight == 1:
            return output
        reached, layout = take_apart(output)
        held = take_apart(self.jump.predicted(context))[0]
        return layout.fill([then.lerp(now, weight) for now, then in zip(reached, held, strict=True)])

    def rested(self, context: Context) -> Rested | None:
        """Everything early in the run, the parts later."""
        if context.verdicts[0].is_full:
            return None
        if self.tokens is not None and self.weight(context) > 0:
            return super().rested(context)
        flags = context.verdicts[0].cached
        paths = [""] if self.weight(context) == 0 else self.bypassed()
        return tuple((path, sum(flags) / len(flags)) for path in paths)
