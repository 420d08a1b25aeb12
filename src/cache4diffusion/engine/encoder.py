"""The encoder site: the encoder of a U-Net rests, and the decoder runs on what it handed over at the last full step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache4diffusion.anatomy import UNet
from cache4diffusion.devices import in_double
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import get_output, take_apart
from cache4diffusion.engine.level import Cut, LevelDriver
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import RunError
from cache4diffusion.gates import Step
from cache4diffusion.sites import UNetEncoder

_AHEAD = "ahead"


class EncoderDriver(LevelDriver):
    """Predicts every skip tensor and what leaves the middle.

    What a down block hands on to the next one is not predicted; where it is one of its skip tensors as well, it is
    handed out as that, so that what the host adds to one (T2I adapters) is in the other, as ever.
    """

    site: UNetEncoder  # type: ignore[assignment]

    def __init__(self, host: Host, site: UNetEncoder) -> None:
        super().__init__(host, site)  # type: ignore[arg-type]
        self.keeps_when_cached = site.parallel

    def find_cut(self, unet: UNet) -> Cut:
        """In front of the first up block."""
        head = [] if unet.head is None else [unet.head]
        sources: dict[str, Any] = dict.fromkeys(head)
        sources |= {level.path: level.output for level in unet.down}
        if unet.mid is not None:
            sources[unet.mid] = None
        else:
            sources[unet.down[-1].path] = None
        return Cut(sources, ())

    def is_ready(self, context: Context, key: int) -> bool:
        """Once all of it was recorded."""
        sites = context.state.sites
        return all(path in sites and self.host.predictor.is_ready(sites[path]) for path in self.cut.sources)

    def _predicted(self, path: str, output: Any, leaves: list[Any]) -> list[int]:
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        leaf = self.cut.sources[path]
        if leaf is None:
            return tensors
        main = get_output(output, leaf)
        first = next(place for place in tensors if leaves[place] is main)
        return [place for place in tensors if place != first]

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the host's code, or hand out what was decoded before."""
        ahead: dict[str, Tensor] = context.state.extra.get(_AHEAD, {})
        if not self.site.parallel or context.verdicts[0].is_full:
            context.state.extra.pop(_AHEAD, None)
            return super().run(context, inner, args, kwargs)
        step = context.step.index
        if f"{step}.0" not in ahead:
            ahead = context.state.extra[_AHEAD] = self._decode(context, inner, args, kwargs)
        leaves = [ahead.pop(key) for key in sorted(ahead, key=_place) if key.startswith(f"{step}.")]
        return context.state.extra["output"].fill(leaves)

    def _decode(
        self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The outputs of this step and the cached ones behind it, by step and place."""
        times, first = context.call.run.timesteps, context.step.index
        if times is None:
            raise RunError(
                "Decoding several steps at once needs the timesteps of the run: with handle.run(timesteps=timesteps). "
                "Or use parallel=False."
            )
        gate, unit = self.host.gate, context.state.units[0][0]
        assert gate is not None
        last = first
        while last + 1 < len(times) and gate.propose(unit.gate, Step(last + 1, len(times)), None):
            last += 1
        steps, rows = range(first, last + 1), context.rows or list(range(context.batch))
        count = len(rows)
        many_args, many_kwargs = self.host.rows(args, kwargs, list(range(count)) * len(steps), count)
        timestep, latent, _ = self.host.inputs.split(many_args, many_kwargs)
        moved = torch.cat([_moved(timestep, times[first], times[step], latent).expand(count) for step in steps])
        many_args, many_kwargs = self.host.inputs.at(many_args, many_kwargs, moved, latent)
        context.scratch["copies"] = len(steps)
        try:
            output = super().run(context, inner, many_args, many_kwargs)
        finally:
            context.scratch.pop("copies")
        tensors, layout = take_apart(output)
        context.state.extra["output"] = layout
        pieces = [tensor.split(count) for tensor in tensors]
        return {f"{step}.{place}": piece[i] for i, step in enumerate(steps) for place, piece in enumerate(pieces)}

    def bypassed(self) -> list[str]:
        """The encoder and the middle."""
        return list(self.cut.sources)


def _place(key: str) -> int:
    return int(key.split(".")[1])


def _moved(timestep: Any, now: float, then: float, like: Tensor) -> Tensor:
    """The clock at another step, one number: as the scheduler tells it, in proportion where the pipeline scales it."""
    clock = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep, device=like.device)
    first = in_double(clock).reshape(-1)[:1]
    moved = torch.full_like(first, then) + (first - now) * (then / now if now else 1.0)
    return (moved if clock.is_floating_point() else moved.round()).to(clock.dtype)
