"""The U-Net level site: what is deeper than one up-layer is bypassed, and the feature that enters it is predicted."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.anatomy import Anatomy, LeafPath, UNet
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import flatten, get_output, own, unflatten
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import UNetLevel
from cache4diffusion.wrap import CallWrapper, ForwardWrapper


@dataclass(frozen=True)
class Cut:
    """Where a U-Net is cut.

    Args:
        sources: the modules (paths) whose outputs are predicted on cached steps, and which of their tensors: None for
            all of them, else all but the one at this place.
        resting: the modules that do not run on a cached step. A block that rests as a whole is named itself, not its
            layers.
    """

    sources: dict[str, LeafPath | None]
    resting: tuple[str, ...]


def cut(unet: UNet, site: UNetLevel) -> Cut:
    """Find the modules behind the up-layer ``site``, the first one that runs on a cached step.

    Raises:
        AnatomyError: there is no such level.
    """
    if site.block >= len(unet.up):
        raise AnatomyError(
            f"UNetLevel(block={site.block}): this U-Net has {len(unet.up)} up-blocks, so use 0 to {len(unet.up) - 1}."
        )
    index = len(unet.up) - 1 - site.block
    level = unet.up[index]
    if site.layer >= len(level.layers):
        raise AnatomyError(
            f"UNetLevel(block={site.block}, layer={site.layer}): {level.path} has {len(level.layers)} layers, so use 0 "
            f"to {len(level.layers) - 1}."
        )
    first = len(level.layers) - 1 - site.layer
    needed = max(
        [layer.skip for layer in level.layers[first:]]
        + [layer.skip for later in unet.up[index + 1 :] for layer in later.layers]
    )
    resting = [upper.path for upper in unet.up[:index]] + ([unet.mid] if unet.mid is not None else [])
    resting += [module for layer in level.layers[:first] for module in layer.modules]
    for down in unet.down:
        made = [layer.skip for layer in down.layers] + ([] if down.tail_skip is None else [down.tail_skip])
        if not any(skip <= needed for skip in made):
            resting.append(down.path)
            continue
        resting += [module for layer in down.layers if layer.skip > needed for module in layer.modules]
        if down.tail_skip is None or down.tail_skip > needed:
            resting += list(down.tail)
    sources: dict[str, LeafPath | None] = {}
    if first > 0:
        sources[level.layers[first - 1].modules[-1]] = None
        if index > 0:  # what the block in front hands on beside the main feature map
            sources[unet.up[index - 1].path] = unet.up[index - 1].output
    elif index > 0:
        sources[unet.up[index - 1].path] = None
    elif unet.mid is not None:
        sources[unet.mid] = None
    else:
        raise AnatomyError(
            f"UNetLevel(block={site.block}, layer={site.layer}): this U-Net has no middle block, so nothing lies "
            f"deeper than its first up-layer. Use a layer below {site.layer} or a block below {site.block}."
        )
    return Cut(sources, tuple(resting))


@dataclass
class _Seen:
    """What a resting module returned on the last full step, without its tensors' values."""

    leaves: list[Any]  # (shape, dtype, device) of a tensor, else the leaf itself
    is_tensor: list[bool]
    spec: Any
    predicted: list[int]  # leaves that are predicted; nobody needs the others
    same: dict[int, int]  # leaves that are the same tensor as one that is predicted
    written: set[int] = field(default_factory=set)  # leaves the host wrote into afterwards


class _Watched:
    """A tensor that a resting module returned: does the host write into it, as FreeU and T2I adapters do?

    The tensor is held until the next module that rests is called, since the host may drop it right after the write.
    """

    def __init__(self, tensor: Tensor, seen: _Seen, place: int) -> None:
        self.held: Tensor | None = tensor
        self.tensor, self.seen, self.place = weakref.ref(tensor), seen, place
        self.version = -1 if tensor.is_inference() else tensor._version  # inference tensors do not count writes

    def look(self) -> None:
        """Take note of a write."""
        tensor = self.tensor()
        if tensor is not None and (self.version < 0 or tensor._version != self.version):
            self.seen.written.add(self.place)
        self.held = None


class LevelDriver(Driver):
    """Wraps the calls of the modules that rest and of those whose output is predicted.

    On a cached step a resting module returns tensors of NaN in the shapes seen at the last full step, so that the
    host's own code (ControlNet residuals, concatenations) goes on. They are expanded from one element and cost nothing,
    but for those the host writes into: these are real.
    """

    site: UNetLevel

    def __init__(self, host: Host, site: UNetLevel) -> None:
        super().__init__(host, site)
        self.cut = Cut({}, ())
        self._wrappers: list[CallWrapper] = []
        self._context: Context | None = None
        self._watched: list[_Watched] = []

    def install(self, anatomy: Anatomy | None) -> None:
        """Cut the U-Net and wrap what lies behind the cut."""
        assert anatomy is not None
        if anatomy.unet is None:
            raise AnatomyError(
                f"{anatomy.denoiser} has no U-Net levels (down blocks whose outputs up blocks read again). Methods for "
                "transformers may work: 'taylorseer', 'dbcache', 'fora', 'cachequant' (calibrated with unit='span')."
            )
        self.cut = self.find_cut(anatomy.unet)
        for path in self.bypassed():
            module = self.host.denoiser.get_submodule(path)

            def handler(inner: Inner, args: Any, kwargs: Any, path: str = path) -> Any:
                return self._on_module(path, inner, args, kwargs)

            self._wrappers.append(CallWrapper(module, handler))

    def find_cut(self, unet: UNet) -> Cut:
        """Where the U-Net is cut."""
        return cut(unet, self.site)

    def uninstall(self) -> None:
        """Unwrap."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers, self._context = [], None

    @property
    def wrappers(self) -> list[CallWrapper | ForwardWrapper]:
        """Of the modules that rest, and of those whose output is predicted."""
        return [*self._wrappers]

    def is_ready(self, context: Context, key: int) -> bool:
        """Once the feature was recorded."""
        sites = context.state.sites
        main = [path for path, but in self.cut.sources.items() if but is None]
        known = [path for path in self.cut.sources if path in sites]
        return all(path in sites for path in main) and all(self.host.predictor.is_ready(sites[p]) for p in known)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the host's code."""
        self._context = context
        try:
            output = inner(*args, **kwargs)
            self._look()
            return output
        finally:
            self._context, self._watched = None, []

    def _look(self) -> None:
        for watched in self._watched:
            watched.look()

    def _on_module(self, path: str, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = self._context
        if context is None:
            return inner(*args, **kwargs)
        known: dict[str, _Seen] = context.state.extra.setdefault("seen", {})
        if context.verdicts[0].is_cached and path in known:
            return self._stand_in(context, path, known[path])
        self._look()  # before what was returned earlier is gone
        output = inner(*args, **kwargs)
        leaves, spec = flatten(output)
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        facts = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        predicted = self._predicted(path, output, leaves)
        rest = [place for place, flag in enumerate(is_tensor) if flag and place not in predicted]
        same = {place: other for place in rest for other in predicted if leaves[place] is leaves[other]}
        seen = known[path] = _Seen(facts, is_tensor, spec, predicted, same)
        others = [place for place in rest if place not in same]
        self._watched += [_Watched(leaves[place], seen, place) for place in others]
        features = [leaves[place] for place in seen.predicted]
        if features:
            self.keep(context, path, features)
        return output

    def _predicted(self, path: str, output: Any, leaves: list[Any]) -> list[int]:
        if path not in self.cut.sources:
            return []
        but = self.cut.sources[path]
        main = None if but is None else get_output(output, but)
        return [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf is not main]

    def _stand_in(self, context: Context, path: str, seen: _Seen) -> Any:
        features: dict[int, Tensor] = {}
        copies: int = context.scratch.get("copies", 1)
        if seen.predicted:
            predicted = own(self.forecast(context, path), context.state.sites[path])
            predicted = (
                predicted if copies == 1 else [leaf.repeat(copies, *[1] * (leaf.ndim - 1)) for leaf in predicted]
            )
            features = dict(zip(seen.predicted, predicted, strict=True))
            features |= {place: features[other] for place, other in seen.same.items()}
        blanks: dict[Any, Tensor] = context.scratch.setdefault("blanks", {})
        filled: list[Any] = []
        for place, (leaf, flag) in enumerate(zip(seen.leaves, seen.is_tensor, strict=True)):
            if not flag:
                filled.append(leaf)
            elif place in features:
                filled.append(features[place])
            else:
                shape, dtype, device = leaf
                if context.rows is not None:
                    shape = (shape[0] // context.batch * len(context.rows), *shape[1:])
                shape = (shape[0] * copies, *shape[1:])
                is_written = place in seen.written
                key = (shape if is_written else None, dtype, device)
                if key not in blanks:
                    size = shape if is_written else (1,)
                    blanks[key] = torch.full(size, float("nan"), dtype=dtype, device=device)
                filled.append(blanks[key] if is_written else blanks[key].expand(shape))
        return unflatten(filled, seen.spec)

    def bypassed(self) -> list[str]:
        """What rests, and the module whose output is predicted."""
        return list(dict.fromkeys([*self.cut.sources, *self.cut.resting]))
