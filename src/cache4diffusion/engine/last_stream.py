"""The parts-and-stream site: cached parts, and steps that go on with what last left the last block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.driver import Inner, Rested, go_on_with, take_in
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import own
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.engine.stretches import why_not_bypassed
from cache4diffusion.errors import AnatomyError
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import PartsAndStream
from cache4diffusion.strip import full_steps_of
from cache4diffusion.trace import CACHED


class LastStreamDriver(PartsDriver):
    """Predicts parts, and on a jump lets every block pass its input through but the last one, which hands out what it
    returned before.

    Kept are the streams of the last block that can still reach the output.
    """

    site: PartsAndStream
    name = "last stream"

    def __init__(self, host: Host, site: PartsAndStream) -> None:
        super().__init__(host, site)
        self._watches = self.needs_blocks = True
        self.memory = Reuse()
        self.kept: list[int] = []  # streams of the last block
        self._planned: dict[int, list[bool]] = {}  # full steps by length of the run

    def install(self, anatomy: Anatomy | None) -> None:
        """See that every block can be bypassed.

        Raises:
            AnatomyError: one cannot, or the denoiser reads what leaves another than the last one.
        """
        for view in self.host.blocks:
            why = why_not_bypassed(view.block)
            if why is None and "" in view.block.read_by and view is not self.host.blocks[-1]:
                why = f"{view.path} leaves what the denoiser reads beside the last block. Use 'toca': it never jumps."
            if why is not None:
                raise AnatomyError(why)
        last = self.host.blocks[-1]
        self.kept = [i for i, stream in enumerate(last.streams) if stream.output is not None and stream.feeds_output]
        super().install(anatomy)

    def is_ready(self, context: Context, key: int) -> bool:
        """Once the stream was recorded, too."""
        return self.name in context.state.sites and super().is_ready(context, key)

    def bring(self, state: BranchState, name: str, time: float) -> None:
        """The stream has a predictor of its own."""
        if name == self.name:
            self.memory.prefetch(state.sites[name], time)
        else:
            super().bring(state, name, time)

    def jumps(self, context: Context) -> bool:
        """Whether this call is a jump; False as long as it is not known to be cached."""
        if context.verdict is None or not context.verdict.is_cached:
            return False
        if "jumps" not in context.scratch:
            index = context.step.index
            if self.site.needs_num_steps:
                steps = context.step.num_steps
                assert steps is not None  # the engine refuses to begin without it
                if steps not in self._planned:
                    self._planned[steps] = full_steps_of(self.host.composition, steps)
                is_full = self._planned[steps]
            else:
                is_full = [step == context.state.extra["full_at"] for step in range(index)]
            context.scratch["jumps"] = self.site.jumps(is_full, index)
        return context.scratch["jumps"]

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note when a step was full."""
        output = super().run(context, inner, args, kwargs)
        if context.verdict is not None and context.verdict.is_full:
            context.state.extra["full_at"] = context.step.index
        return output

    def on_block(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run, or pass through; the last block hands out what is kept, or is kept."""
        is_last = position == len(self.host.blocks) - 1
        if not self.jumps(context):
            output = super().on_block(context, position, inner, args, kwargs)
            if is_last:
                left = self.host.stream_outputs(position, args, kwargs, output)
                take_in(self.memory, context, self.name, [left[i] for i in self.kept], store=self.host.store)
            return output
        streams: list[Tensor] = self.host.stream_inputs(position, args, kwargs)
        if is_last:
            context.scratch["jumped"] = True
            found = own(go_on_with(self.memory, context, self.name), context.state.sites[self.name])
            for i, stream in zip(self.kept, found, strict=True):
                streams[i] = stream
        return self.host.rebuild(position, streams, args, kwargs)

    def was_followed(self, context: Context) -> bool:
        """A jump ends at the last block, or not at all."""
        return not self.jumps(context) or "jumped" in context.scratch

    def symbol(self, context: Context) -> str:
        """No token is computed on a jump."""
        return CACHED if self.jumps(context) else super().symbol(context)

    def rested(self, context: Context) -> Rested | None:
        """All blocks on a jump."""
        if self.jumps(context):
            return tuple((path, 1.0) for path in dict.fromkeys(view.path for view in self.host.blocks))
        return super().rested(context)
