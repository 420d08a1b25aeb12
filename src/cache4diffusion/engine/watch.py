"""Observing what a gate watches inside the denoiser: the first block's modulated input, the first blocks' residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cache4diffusion.engine.decide import relative_change
from cache4diffusion.engine.decisions import Decisions
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_argument, get_output, version
from cache4diffusion.engine.state import Context, Verdict
from cache4diffusion.errors import AnatomyError
from cache4diffusion.gates import Front, Signal
from cache4diffusion.sites import Span


class _Reached(BaseException):
    """The part whose input is the signal is about to run: no need to go on."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_seen, self.kwargs_seen = args, kwargs


class Watcher:
    """Observes, asks for the decision at the right place, and keeps the reference up to date.

    Args:
        host: the denoiser that is watched.
        driver: told when a decision was taken inside its call.
        decisions: takes them.
    """

    def __init__(self, host: Host, driver: Driver, decisions: Decisions) -> None:
        self.host, self.driver, self.decisions = host, driver, decisions
        self.watch = host.gate.watch if host.gate is not None else None
        self._starts: dict[int, int] = {}  # first position of each watched list -> decision key
        self._copies = False  # whether streams are written into, so that copies must be compared

    @property
    def needs_blocks(self) -> bool:
        """Whether the decision is taken inside the call, at a block."""
        return isinstance(self.watch, (Signal, Front))

    def install(self) -> None:
        """Find the watch points.

        Raises:
            AnatomyError: the denoiser has no stack of blocks, or too few blocks.
        """
        if not self.needs_blocks:
            return
        anatomy = self.host.anatomy
        assert anatomy is not None
        words = type(self.host.gate).__name__
        if not anatomy.main:
            raise AnatomyError(
                f"{words} watches the first blocks of a stack, and {anatomy.denoiser} has none that carries the "
                "latent. Methods whose gate watches nothing may work: 'taylorseer-lite', 'deepcache' for U-Nets."
            )
        if isinstance(self.watch, Signal) and anatomy.signal is None:
            raise AnatomyError(
                f"{words} watches the modulated input of the first block's first part, and none was found in "
                f"{anatomy.denoiser}. 'fbcache' or 'dbcache' watch the first blocks' residual instead."
            )
        site = self.host.composition.site
        per_list = isinstance(site, Span) and site.per_list
        start = 0
        for key, stack in enumerate(anatomy.main):
            if key == 0 or per_list:
                self._starts[start] = key
            start += len(stack.blocks)
        watched = [block for stack in anatomy.main for block in stack.blocks]
        self._copies = any(block.mutates for block in watched)
        if isinstance(self.watch, Front) and self.watch.blocks > len(self.host.blocks):
            raise AnatomyError(
                f"{words} watches the first {self.watch.blocks} blocks, and {anatomy.denoiser} has "
                f"{len(self.host.blocks)}: use fewer."
            )

    def before(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A block is about to run."""
        if not self.needs_blocks:
            return
        if isinstance(self.watch, Signal):
            if position == 0:
                self._meet(context, 0, lambda: self._signal(args, kwargs))
            return
        if position in self._starts:
            key = self._starts[position]
            context.scratch["front", key] = [self._kept(self._image(position, args, kwargs)), None]
            context.scratch["front_key"] = (key, position)
        elif "front_key" in context.scratch:
            key, start = context.scratch["front_key"]
            if position - start < self.watch.blocks:  # type: ignore[union-attr]
                entered = self._image(position, args, kwargs)
                left, known, stamp = context.scratch["front_left"]
                self._copies |= entered is left and version(entered) != stamp  # of the next step on
                if entered is not left or known is not left:  # the host added something; it is not the blocks' own
                    kept = context.scratch["front", key]
                    kept[1] = entered - known if kept[1] is None else kept[1] + (entered - known)

    def after(
        self, context: Context, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A block has run."""
        if not isinstance(self.watch, Front) or "front_key" not in context.scratch:
            return
        key, start = context.scratch["front_key"]
        if position - start >= self.watch.blocks:
            return
        stream = self.host.blocks[position].streams[0]
        left = get_output(output, stream.output) if stream.output is not None else self._image(position, args, kwargs)
        context.scratch["front_left"] = (left, self._kept(left), version(left))
        if position - start == self.watch.blocks - 1 and key in self.driver.keys:
            entered, glue = context.scratch["front", key]
            self._meet(context, key, lambda: left - entered if glue is None else left - entered - glue)

    def _kept(self, stream: Tensor) -> Tensor:
        """The stream as it is now, whatever is written into it later. Nobody counts writes in inference mode."""
        return stream.clone() if self._copies or version(stream) is None else stream

    def _image(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.host.stream_inputs(position, args, kwargs)[0]

    def _signal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the first block up to its first part, and no further."""
        anatomy = self.host.anatomy
        assert anatomy is not None and anatomy.signal is not None
        part = self.host.denoiser.get_submodule(anatomy.signal.path)

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args, kwargs)

        hook = part.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.host.modules[0].forward(*args, **kwargs)
        except _Reached as reached:
            return get_argument(part, reached.args_seen, reached.kwargs_seen, anatomy.signal.argument)
        finally:
            hook.remove()
        raise AnatomyError(f"{anatomy.signal.path} was not called by its block this time, so there is no signal.")

    def _meet(self, context: Context, key: int, observe: Callable[[], Tensor]) -> None:
        """The watch point is reached."""
        if key not in context.verdicts:
            self._judge(context, key, observe())
        elif key not in context.state.references:  # recomputed in full: later steps are compared with this one
            context.state.references[key] = observe()

    def _judge(self, context: Context, key: int, observed: Tensor) -> Verdict:
        host, references = self.host, context.state.references
        before = references.get(key)
        if before is not None and (before.shape != observed.shape or before.dtype != observed.dtype):
            before = None

        def observe() -> list[float | None]:
            if before is None:
                return [None] * len(context.state.units[key])
            host.trace.syncs += 1
            return list(relative_change(observed, before, host.composition.decide != "batch").tolist())

        verdict = self.decisions.take(context, key, observe)
        assert self.watch is not None
        if isinstance(self.watch, Signal) or verdict.is_full or before is None:
            references[key] = observed
        elif not verdict.is_cached:
            updated = before.clone()
            updated[verdict.full_rows] = observed[verdict.full_rows]
            references[key] = updated
        self.driver.on_decided(context, key)
        return verdict
