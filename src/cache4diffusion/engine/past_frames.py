"""The past-frames site: in a video that is made chunk by chunk, keys and values of earlier frames are kept.

A call brings a window: clean frames in front, and behind them the chunk that is denoised. The denoiser runs on frames
that are not held yet, and its attention over time goes back to those that are::

    window of a call      [ held: keys and values | new clean frames | chunk ]
    runs, with keys kept                           ^^^^^^^^^^^^^^^^
    runs                                                              ^^^^^

Where nothing is held, the call runs as it came, and what its clean frames leave behind is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.hints import hint_of
from cache4diffusion.engine.attending import OTHERS, Attending, KeysAndValues, Pass
from cache4diffusion.engine.driver import Driver, Inner, Rested
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_argument, parameter_names, take_apart, with_arguments
from cache4diffusion.engine.part_lookup import blocks_of
from cache4diffusion.engine.state import BranchState, Context, Verdict
from cache4diffusion.errors import AnatomyError, RunError, SettingError, closest
from cache4diffusion.sites import PastFrames
from cache4diffusion.storage import Kept
from cache4diffusion.trace import PARTIAL
from cache4diffusion.wrap import ForwardWrapper

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_CAUSAL = 1e-5  # of their norm: how far what early frames leave behind may depend on later ones
_ALIKE = {torch.float64: 1e-3, torch.float32: 1e-3}  # likewise, of frames that run behind held ones
_ALIKE_IN_HALF = 3e-2


@dataclass
class _Window:
    """The frames of one call.

    Args:
        args, kwargs: of the call.
        axes: the axis of frames of each argument that has one, by name.
        frames: how many.
        first: the place of the first one in the video.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: dict[str, int]
    frames: int
    first: int


@dataclass
class _Held:
    """What is held of the frames ``first .. first + count - 1``: arguments, outputs, keys and values, by name."""

    first: int
    count: int
    names: tuple[str, ...]  # of attentions

    @property
    def end(self) -> int:
        """The place behind the last of them."""
        return self.first + self.count


class PastFramesDriver(Driver):
    """Wraps attention over time, and runs the denoiser on the frames that are not held."""

    site: PastFrames
    keeps_when_cached = True
    needs_blocks = True  # so that compiled ones are seen

    def __init__(self, host: Host, site: PastFrames) -> None:
        super().__init__(host, site)
        self._wrappers: list[ForwardWrapper] = []
        self._running: Pass | None = None
        self._axes: dict[str, int] = {}
        self._first_frame: str | None = None

    # -- attaching -------------------------------------------------------------------------------------------------

    def install(self, anatomy: Anatomy | None) -> None:
        """Wrap the attentions that reach other frames.

        Raises:
            AnatomyError: the axes of frames are not declared, or no attention reaches other frames.
        """
        assert anatomy is not None
        hint, inputs = hint_of(self.host.denoiser), self.host.inputs
        wanted = [name for name in (inputs.latent, inputs.timestep) if name not in hint.frames]
        if wanted or inputs.timestep is None:
            raise AnatomyError(
                f"{anatomy.denoiser}: this method is for denoisers that were trained to make videos chunk by chunk, "
                "with attention that is causal in time and a timestep for each frame, 0 for those that are done. If "
                f"it is one, say where frames are: c4d.declare(denoiser, frames={{{inputs.latent!r}: 2, "
                f"{inputs.timestep or 'timestep'!r}: 1}}, first_frame='...'). {OTHERS}"
            )
        self._axes, self._first_frame = dict(hint.frames), hint.first_frame
        names = parameter_names(type(self.host.plain))
        if self._first_frame is not None and self._first_frame not in names:
            raise AnatomyError(
                f"{anatomy.denoiser}.forward({', '.join(names)}) has no argument {self._first_frame!r}, which is "
                f"declared to say where the first frame is{closest(self._first_frame, names) or '.'}"
            )
        modules = dict(self.host.plain.named_modules())
        parts = [part for _, block in blocks_of(self.host) for part in block.parts]
        paths = dict.fromkeys(part.path for part in parts if part.kind == "attn" and part.over != "space")
        if not paths:
            raise AnatomyError(
                f"{anatomy.denoiser} has no attention that reaches other frames, so there are no keys of earlier ones "
                f"to keep. {OTHERS}"
            )
        self._wrappers = [ForwardWrapper(modules[path], self._attending(path)) for path in paths]

    def try_out(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See on the values of a call that early frames do not know of later ones, and that later ones behind held keys
        are what they are in one piece. Three forwards.

        Raises:
            AnatomyError: one of the two does not hold.
        """
        window = self._window(args, kwargs)
        if window.frames == 1:
            window = self._with(window, {n: torch.cat([t, t], self._axes[n]) for n, t in self._framed(window).items()})
        front = window.frames // 2
        tensors, inputs = self._framed(window), self.host.inputs
        assert inputs.timestep is not None
        clock, latent = tensors[inputs.timestep].clone(), tensors[inputs.latent].clone()
        clock.narrow(self._axes[inputs.timestep], 0, front).fill_(self.site.clean)
        window = self._with(window, {inputs.timestep: clock})
        latent.narrow(self._axes[inputs.latent], front, window.frames - front).neg_().add_(1)
        other = {inputs.latent: latent, inputs.timestep: torch.full_like(clock, self.site.clean)}
        plain, found = self._pass(inner, window, keeps=front)
        changed, found_then = self._pass(inner, self._with(window, other), keeps=front)
        self._check_reached(found)
        axis = self._axes[inputs.latent]
        early = [(plain.narrow(axis, 0, front), changed.narrow(axis, 0, front))]
        early += [pair for name in found for pair in zip(found[name], found_then[name], strict=True)]
        name = type(self.host.plain).__name__
        if not _are_alike(early, _CAUSAL):
            raise AnatomyError(
                f"{name}: what its attention makes of early frames changes with later frames or their timesteps, by "
                f"{_worst(early):.1%}, so it cannot be kept: the denoiser is not causal in time. {OTHERS}"
            )
        behind, _ = self._pass(inner, self._cut(window, front, window.frames), past=found)
        late = [(plain.narrow(axis, front, window.frames - front), behind)]
        if not _are_alike(late, _ALIKE.get(plain.dtype, _ALIKE_IN_HALF)):
            raise AnatomyError(
                f"{name}: later frames that run behind the kept keys of earlier ones come out differently, by "
                f"{_worst(late):.1%}. Declare every argument that has an axis of frames, and the one that says where "
                "the first frame is in the video: c4d.declare(denoiser, frames={...}, first_frame='...'). Denoisers "
                "that place frames by counting them, or that mix them in other modules than attention, cannot be "
                f"served. {OTHERS}"
            )

    def _attending(self, path: str) -> Callable[..., Any]:
        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._running is None:
                    return found(*args, **kwargs)
                with Attending(self._running, path):
                    return found(*args, **kwargs)

            return forward

        return make

    def _check_reached(self, found: dict[str, KeysAndValues]) -> None:
        paths = {path for path, module in self.host.plain.named_modules() for w in self._wrappers if w.module is module}
        missing = paths - {name.split("#")[0] for name in found}
        if missing:
            raise AnatomyError(
                f"{min(missing)} does not attend by torch's scaled_dot_product_attention, so its keys are not seen. "
                "Choose that for the denoiser's attention backend ('native' in diffusers)."
            )

    @property
    def forbids_compiled_blocks(self) -> str | None:
        """Keys are put in front of others while the blocks run."""
        return (
            "keys and values of earlier frames are put in while the blocks run, so the blocks must not be compiled. "
            "Leave them as they are, or use another method."
        )

    @property
    def wrappers(self) -> list[Any]:
        """Those of attentions."""
        return list(self._wrappers)

    def uninstall(self) -> None:
        """Unwrap the attentions."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers, self._running = [], None

    # -- running ---------------------------------------------------------------------------------------------------

    def shape_of(self, latent: Tensor) -> tuple[int, ...]:
        """Windows grow while there are few frames."""
        axis = self._axes[self.host.inputs.latent] % latent.ndim
        return (*latent.shape[:axis], -1, *latent.shape[axis + 1 :])

    def is_ready(self, context: Context, key: int) -> bool:
        """Something is held."""
        return "held" in context.state.extra

    def was_reached(self, context: Context) -> bool:
        """Whether attentions ran."""
        return "reached" in context.scratch

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The frames that are not held, or all of them."""
        window, state = self._window(args, kwargs), context.state
        self.host.trace.syncs += isinstance(self._first_place(args, kwargs), Tensor)
        clean, known = self._look(context, window)
        if clean > self.site.capacity and not self.host.composition.is_off:
            raise SettingError(
                f"PastFrames(capacity={self.site.capacity}): a call brings {clean} clean frames in front of those that "
                f"are denoised. Give capacity={clean} or more, or let the loop go back fewer frames."
            )
        state.extra["window"] = (window.first, window.frames, clean)
        verdict = context.verdict
        is_cached = verdict is not None and verdict.is_cached
        if not known or known == window.frames or not is_cached:
            if is_cached:
                reason = "other clean frames than those that are held" if clean else "no clean frames"
                context.verdicts[0] = Verdict((False,), reason)
            return self._run_all(context, inner, window, clean)
        held = self._shortened(context, window.first + clean)
        if clean > known:
            leaf, found = self._pass(
                inner, self._cut(window, known, clean), keeps=clean - known, past=self._past(state, held)
            )
            held = self._take_in(state, held, self._cut(window, known, clean), leaf, found)
        held = self._shortened(context, held.end, window.first)
        early = state.extra["output"].read()
        context.scratch["held"], context.scratch["reached"] = known / window.frames, True
        if clean == window.frames:
            return self._layout.fill([early])
        leaf, _ = self._pass(inner, self._cut(window, clean, window.frames), past=self._past(state, held))
        return self._layout.fill([torch.cat([early, leaf], dim=self._axes[self.host.inputs.latent])])

    def _run_all(self, context: Context, inner: Inner, window: _Window, clean: int) -> Any:
        """The call as it came; what its clean frames leave behind is held from now on."""
        context.scratch["reached"] = True
        self._drop(context.state)
        if not clean:
            return inner(*window.args, **window.kwargs)
        leaf, found = self._pass(inner, window, keeps=clean)
        early = leaf.narrow(self._axes[self.host.inputs.latent], 0, clean)
        self._take_in(
            context.state,
            _Held(window.first, 0, tuple(found)),
            self._cut(window, 0, clean, is_call=False),
            early,
            found,
        )
        return self._layout.fill([leaf])

    def _pass(
        self, inner: Inner, window: _Window, *, keeps: int = 0, past: dict[str, KeysAndValues] | None = None
    ) -> tuple[Tensor, dict[str, KeysAndValues]]:
        """Run the denoiser on a window; its output, and the keys and values to keep.

        Raises:
            AnatomyError: the output is not one tensor with these frames.
        """
        self._running = running = Pass(window.frames, keeps, past or {})
        try:
            output = inner(*window.args, **window.kwargs)
        finally:
            self._running = None
        leaves, self._layout = take_apart(output)
        axis = self._axes[self.host.inputs.latent]
        if len(leaves) != 1 or leaves[0].ndim <= axis or leaves[0].shape[axis] != window.frames:
            raise AnatomyError(
                f"{type(self.host.plain).__name__} does not return one tensor with {window.frames} frames along axis "
                f"{axis}, as its latent has, so outputs of held frames cannot be put in front. {OTHERS}"
            )
        return leaves[0], running.found

    # -- windows ---------------------------------------------------------------------------------------------------

    def _window(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Window:
        """The frames of a call.

        Raises:
            AnatomyError: arguments disagree on how many there are, or rows on where they begin.
        """
        inputs, counts = self.host.inputs, dict[str, int]()
        for name, axis in self._axes.items():
            value = get_argument(inputs.module, args, kwargs, (name,))
            if isinstance(value, Tensor):
                counts[name] = value.shape[axis] if value.ndim > axis else 0
        frames = counts.get(inputs.latent, 0)
        axes = {name: self._axes[name] for name, count in counts.items() if count == frames}
        is_broadcast = {count for name, count in counts.items() if name not in axes} <= {1}
        if not frames or inputs.timestep not in axes or not is_broadcast:
            raise AnatomyError(
                f"{type(self.host.plain).__name__}: its arguments should have as many frames as {inputs.latent!r}, and "
                f"have, along the declared axes: {counts}. This method needs a timestep for every frame, "
                f"{inputs.timestep}=[batch, frames]. {OTHERS}"
            )
        return _Window(args, kwargs, axes, frames, self._place(args, kwargs))

    def _first_place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What says where the window is in the video, if anything does."""
        if self._first_frame is None:
            return None
        return get_argument(self.host.inputs.module, args, kwargs, (self._first_frame,))

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        value = self._first_place(args, kwargs)
        if value is None:
            return 0
        places = set(value.flatten().tolist()) if isinstance(value, Tensor) else {value}
        if len(places) != 1:
            raise AnatomyError(
                f"{self._first_frame}={value}: the rows of a batch must begin at the same frame for this method."
            )
        return int(places.pop())

    def _framed(self, window: _Window) -> dict[str, Tensor]:
        """The arguments that have frames, by name."""
        module = self.host.inputs.module
        return {name: get_argument(module, window.args, window.kwargs, (name,)) for name in window.axes}

    def _with(self, window: _Window, tensors: dict[str, Tensor]) -> _Window:
        """A window with other tensors."""
        given = with_arguments(
            self.host.inputs.module, window.args, window.kwargs, {(name,): t for name, t in tensors.items()}
        )
        name = self.host.inputs.latent
        frames = tensors[name].shape[self._axes[name]] if name in tensors else window.frames
        return _Window(*given, window.axes, frames, window.first)

    def _cut(self, window: _Window, start: int, stop: int, is_call: bool = True) -> _Window:
        """Some frames of a window; as a call of its own, with the place where they begin."""
        cut = self._with(
            window, {n: t.narrow(self._axes[n], start, stop - start) for n, t in self._framed(window).items()}
        )
        cut.first += start
        if not is_call or self._first_frame is None or not start:
            return cut
        module, name = self.host.inputs.module, self._first_frame
        value = get_argument(module, cut.args, cut.kwargs, (name,))
        if value is None:
            cut.kwargs = {**cut.kwargs, name: start}
        else:
            cut.args, cut.kwargs = with_arguments(module, cut.args, cut.kwargs, {(name,): value + start})
        return cut

    def _look(self, context: Context, window: _Window) -> tuple[int, int]:
        """How many frames in front are clean, and how many of them are held as they are. One transfer to the host."""
        state, inputs, tensors = context.state, self.host.inputs, self._framed(window)
        assert inputs.timestep is not None
        held: _Held | None = state.extra.get("held")
        flags = _over_frames(tensors[inputs.timestep] == self.site.clean, self._axes[inputs.timestep])
        both = 0
        if held is not None and held.first <= window.first < held.end:
            both = min(held.end - window.first, window.frames)
            same = torch.ones_like(flags[:both])
            for name, tensor in tensors.items():
                if name != inputs.timestep:
                    axis = self._axes[name]
                    now = tensor.narrow(axis, 0, both)
                    then = state.extra[f"argument {name}"].narrow(axis, window.first - held.first, both)
                    same = same & _over_frames(now == then, axis)
            flags = torch.cat([flags, same])
        values = flags.tolist()
        self.host.trace.syncs += 1
        clean = _leading(values[: window.frames])
        before = state.extra.get("window")
        if clean == window.frames and before is not None and before[:2] == (window.first, window.frames):
            clean = before[2]  # the last step of a chunk may have the timestep of a clean frame
        same = min(_leading(values[window.frames :]), clean)
        return clean, same if same == min(both, clean) else 0

    # -- what is held ----------------------------------------------------------------------------------------------

    def _past(self, state: BranchState, held: _Held) -> dict[str, KeysAndValues]:
        return {n: (state.extra[f"key {n}"].read(), state.extra[f"value {n}"].read()) for n in held.names}

    def _take_in(
        self, state: BranchState, held: _Held, window: _Window, output: Tensor, found: dict[str, KeysAndValues]
    ) -> _Held:
        """Put frames behind those that are held.

        Raises:
            RunError: other attentions ran than before.
        """
        if set(found) != set(held.names):
            raise RunError(
                f"{self.host.name}: attention ran in other modules than for the frames before, so what is kept of "
                "both does not fit together. Let a run call the denoiser in one way."
            )
        extra, store, axis = state.extra, self.host.store, self._axes[self.host.inputs.latent]
        for name, tensor in self._framed(window).items():
            if name != self.host.inputs.timestep:  # what is compared is kept as it is
                extra[f"argument {name}"] = _joined(extra.get(f"argument {name}"), tensor, self._axes[name])
        added = {"output": (output, axis)}
        for name, (key, value) in found.items():
            added |= {f"key {name}": (key, -2), f"value {name}": (value, -2)}
        for name, (tensor, along) in added.items():
            before = extra[name].read() if held.count else None
            extra[name] = store.keep(_joined(before, tensor, along))
        extra["held"] = held = _Held(held.first, held.count + window.frames, held.names)
        return held

    def _shortened(self, context: Context, end: int, first: int | None = None) -> _Held:
        """Let go of frames behind ``end``, and in front of ``first``: the queue moves on."""
        extra = context.state.extra
        held: _Held = extra["held"]
        first = held.first if first is None else first
        count = min(end, held.end) - first
        if (first, count) != (held.first, held.count):
            skipped = first - held.first
            for name, tensor in list(extra.items()):
                if isinstance(tensor, Kept):
                    along = self._axes[self.host.inputs.latent] if name == "output" else -2
                    extra[name] = self.host.store.keep(_share(tensor.read(), along, held.count, skipped, count))
                elif isinstance(tensor, Tensor) and name.startswith("argument "):
                    along = self._axes[name.removeprefix("argument ")]
                    extra[name] = _share(tensor, along, held.count, skipped, count).clone()
            extra["held"] = _Held(first, count, held.names)
        return extra["held"]

    def _drop(self, state: BranchState) -> None:
        for name in [name for name in state.extra if name != "window"]:
            del state.extra[name]

    # -- what a call was -------------------------------------------------------------------------------------------

    def symbol(self, context: Context) -> str:
        """The frames that are not held are computed."""
        return PARTIAL

    def rested(self, context: Context) -> Rested | None:
        """The denoiser, for the frames that were held."""
        return (("", context.scratch["held"]),)

    def bypassed(self) -> list[str]:
        """Every module runs, on fewer frames."""
        return []


def _over_frames(flags: Tensor, axis: int) -> Tensor:
    """Whether everything of each frame is True."""
    return flags.movedim(axis, 0).flatten(1).all(1)


def _leading(flags: Sequence[bool]) -> int:
    """How many are True before the first that is not."""
    return next((i for i, flag in enumerate(flags) if not flag), len(flags))


def _joined(before: Tensor | None, tensor: Tensor, axis: int) -> Tensor:
    return tensor.clone() if before is None else torch.cat([before, tensor], dim=axis)


def _share(tensor: Tensor, axis: int, frames: int, skipped: int, count: int) -> Tensor:
    """Some frames of a tensor that has as many places for each."""
    rows = tensor.shape[axis] // frames
    return tensor.narrow(axis, skipped * rows, count * rows)


def _are_alike(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> bool:
    """Whether all pairs differ by less than so much of their norm. One transfer to the host."""
    flags = [(a.float() - b.float()).norm() <= tolerance * a.float().norm() for a, b in pairs]
    return bool(torch.stack(flags).all())


def _worst(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    return max(float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-12)) for a, b in pairs)
