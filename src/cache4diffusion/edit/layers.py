"""The layers of a U-Net: recorded in one run, computed at the changed places alone in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cache4diffusion.anatomy.facts import call_name
from cache4diffusion.edit import sparse
from cache4diffusion.edit.masks import resized
from cache4diffusion.edit.sparse import Moments, Places
from cache4diffusion.engine.leaves import get_argument
from cache4diffusion.storage import Kept, Store
from cache4diffusion.wrap import ForwardWrapper


@dataclass
class Call:
    """What one call of the denoiser left behind.

    Args:
        latent: what it was given.
        timestep: likewise.
        outputs: of layers, by name.
        moments: of group normalisations, by name.
    """

    latent: Tensor
    timestep: float
    outputs: dict[str, Kept] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held."""
        yield self.latent
        for kept in self.outputs.values():
            yield from kept.tensors()
        for one in self.moments.values():
            yield from (one.scale, one.shift)


class Layers:
    """Wrappers around the convolutions, linear layers, group normalisations and attentions of a U-Net.

    Args:
        denoiser: the U-Net.
        store: how outputs are kept.
        least: share of the latent's places from which on a layer is recorded; coarser ones always run densely.
        least_attention: likewise, for the queries of attention.
    """

    def __init__(self, denoiser: nn.Module, store: Store, least: float, least_attention: float) -> None:
        self.store, self.least, self.least_attention = store, least, least_attention
        self._call: Call | None = None  # in progress
        self._mask: Tensor | None = None  # None: the call is recorded
        self._places: dict[tuple[int, int], Places] = {}
        self._grids: dict[int, tuple[int, int]] = {}  # of maps, by the number of their places
        self._turns: Counter[str] = Counter()
        self._of_text: tuple[nn.Module, ...] = ()  # layers of the attention in progress that see the prompt
        self._area = 0
        self._wrappers: list[ForwardWrapper] = []
        for path, module in denoiser.named_modules():
            make = self._maker(path, module)
            if make is not None:
                self._wrappers.append(ForwardWrapper(module, make))

    def remove(self) -> None:
        """Take every wrapper away."""
        for wrapper in reversed(self._wrappers):
            wrapper.remove()
        self._wrappers = []

    @contextmanager
    def recording(self, call: Call) -> Iterator[None]:
        """Within: a call of the denoiser leaves its outputs in ``call``."""
        with self._within(call, None):
            yield

    @contextmanager
    def sparse(self, call: Call, mask: Tensor) -> Iterator[None]:
        """Within: a call of the denoiser computes what the mask says, and takes the rest from ``call``."""
        with self._within(call, mask):
            yield

    @contextmanager
    def _within(self, call: Call, mask: Tensor | None) -> Iterator[None]:
        height, width = call.latent.shape[-2:]
        self._call, self._area, self._turns = call, height * width, Counter()
        if mask is not self._mask:
            self._mask, self._places = mask, {}
        try:
            yield
        finally:
            self._call, self._of_text = None, ()

    # -- wrappers --------------------------------------------------------------------------------------------------

    def _maker(self, path: str, module: nn.Module) -> Callable[[Any], Any] | None:
        if isinstance(module, nn.Conv2d) and sparse.fits(module):
            return lambda found: self._around(path, found, self._conv(module))
        if isinstance(module, nn.Linear):
            return lambda found: self._around(path, found, self._linear(module, found))
        if isinstance(module, nn.GroupNorm):
            return lambda found: self._norm(path, module, found)
        if all(isinstance(getattr(module, name, None), nn.Module) for name in ("to_q", "to_k", "to_v")):
            return lambda found: self._attention(module, found)
        return None

    def _around(self, path: str, found: Any, compute: Callable[..., Tensor | None]) -> Any:
        """Around a layer: record its output, or let ``compute`` make it from what was recorded."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is None:
                return found(x, *args, **kwargs)
            name = call_name(path, self._turns[path])
            self._turns[path] += 1
            if self._mask is None:
                made = found(x, *args, **kwargs)
                if compute(x, made, None) is not None:
                    call.outputs[name] = self.store.keep(made)
                return made
            old = call.outputs.get(name)
            made = None if old is None else compute(x, old.read(), self._mask)
            return found(x, *args, **kwargs) if made is None else made

        return forward

    def _conv(self, conv: nn.Conv2d) -> Callable[..., Tensor | None]:
        def compute(x: Tensor, old: Tensor, mask: Tensor | None) -> Tensor | None:
            height, width = old.shape[-2:]
            if old.ndim != 4 or height * width < self.least * self._area:
                return None
            if mask is None:
                self._grids[height * width] = (height, width)
                return old
            places = self._of(height, width)
            return None if places.are_all else sparse.conv2d(conv, x, old, places)

        return compute

    def _linear(self, layer: nn.Linear, found: Any) -> Callable[..., Tensor | None]:
        def compute(x: Tensor, old: Tensor, mask: Tensor | None) -> Tensor | None:
            grid = self._grids.get(x.shape[1]) if x.ndim == 3 else None
            if grid is None or layer in self._of_text or x.shape[1] < self.least * self._area:
                return None
            if mask is None:
                return old
            places = self._of(*grid)
            return None if places.are_all else sparse.linear(found, x, old, places)

        return compute

    def _norm(self, path: str, norm: nn.GroupNorm, found: Any) -> Any:
        """Statistics of the recorded run, where the layers around it are sparse."""

        def forward(x: Tensor) -> Tensor:
            call = self._call
            if call is None or x.ndim != 4 or x.shape[2] * x.shape[3] < self.least * self._area:
                return found(x)
            name = call_name(path, self._turns[path])
            self._turns[path] += 1
            if self._mask is None:
                call.moments[name] = Moments.of(norm, x)
                return found(x)
            is_whole = name not in call.moments or self._of(*x.shape[-2:]).are_all
            return found(x) if is_whole else call.moments[name].apply(x)

        return forward

    def _attention(self, module: nn.Module, found: Any) -> Any:
        """Queries of the mask alone, keys and values of all tokens; those of the prompt are computed as ever."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._call is None:
                return found(*args, **kwargs)
            x = args[0] if args else kwargs["hidden_states"]
            has_text = get_argument(module, args, kwargs, ("encoder_hidden_states",)) is not None
            self._of_text = (module.to_k, module.to_v) if has_text else ()  # type: ignore[assignment]
            try:
                grid = self._grids.get(x.shape[1]) if x.ndim == 3 else None
                if self._mask is None or grid is None or x.shape[1] < self.least_attention * self._area:
                    return found(*args, **kwargs)
                places = self._of(*grid)
                if places.are_all:
                    return found(*args, **kwargs)
                with _SomeQueries(places):
                    return found(*args, **kwargs)
            finally:
                self._of_text = ()

        return forward

    def _of(self, height: int, width: int) -> Places:
        assert self._mask is not None
        if (height, width) not in self._places:
            self._places[height, width] = Places.of(resized(self._mask, height, width))
        return self._places[height, width]


class _SomeQueries(TorchFunctionMode):
    """Within: scaled-dot-product attention is asked for some queries only."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, mask = given.pop("query"), given.pop("attn_mask", None)
        if query.shape[-2] != self.places.mask.numel():
            return func(query, attn_mask=mask, **given)
        if self.places.are_none:
            return query.new_zeros(*query.shape[:-1], given["value"].shape[-1])
        if mask is not None and mask.shape[-2] != 1:
            mask = mask[..., self.places.tokens, :]
        return sparse.queries(lambda some: func(some, attn_mask=mask, **given), query, self.places)


def bytes_of(calls: list[Call]) -> int:
    """What calls hold."""
    return sum(tensor.numel() * tensor.itemsize for call in calls for tensor in call.tensors())
