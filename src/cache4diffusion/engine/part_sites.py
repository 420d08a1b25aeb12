"""What stands in a denoiser for the part sites: a wrapper on every part, and on what runs only to feed parts.

All wrappers of a denoiser read one shared `Switch`; inside a compiled block nothing else is read but attributes of the
site itself, so that every block of a class shares one graph per mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cache4diffusion.anatomy import Inner, Part
from cache4diffusion.engine.features import feature_of
from cache4diffusion.engine.leaves import Layout, Place
from cache4diffusion.engine.part_lookup import first_tensor
from cache4diffusion.engine.state import Context
from cache4diffusion.predictors import Corrector
from cache4diffusion.wrap import ForwardWrapper

if TYPE_CHECKING:
    from cache4diffusion.engine.parts import PartsDriver


class Switch:
    """What all wrappers of one denoiser read. Inside a compiled block: the two flags, and nothing else of it."""

    def __init__(self) -> None:
        self.is_on = False  # off: as if the wrappers were not there
        self.is_cached = False  # predict; else compute and keep
        self.is_watching = False  # what is computed is kept for a comparison, not as the feature of a full step
        self.context: Context | None = None  # the call in progress

    def turn(self, *, on: bool, cached: bool = False) -> None:
        """Say what the wrappers do from here on."""
        self.is_on, self.is_cached, self.is_watching = on, cached, False


class PartSite:
    """One part of one block: its wrapper, and where its feature comes from and goes to in the call in progress.

    In an eager block the feature is recorded and predicted while the block runs. A compiled block is one graph with no
    way out, so there it is left at ``fresh`` for the driver to collect after the call, and found at ``prepared``, made
    before the call. Whether a block is compiled shows in where its feature was left at the last full step.

    A module that runs several times in a call has a site for each, behind one wrapper (`Turns`).
    """

    def __init__(self, name: str, part: Part, position: int, module: nn.Module, driver: PartsDriver, key: int) -> None:
        self.name, self.part, self.position, self.module, self.key = name, part, position, module, key
        self.driver, self.switch = driver, driver.switch
        self.fresh: Any = None  # output computed in the call in progress
        self.prepared: Any = None  # output predicted for the call in progress
        self.is_traced = False
        self.must_run = False  # its decision is another than that of the parts that are predicted in this call
        self.feature = feature_of(part, module)
        self.corrector = driver.predictor if isinstance(driver.predictor, Corrector) else None
        self.layout: Layout | None = None  # of the output, for a corrector in a compiled block
        self.pairs: tuple[int, ...] = ()  # which of the inputs each of the output's tensors is made from
        self.fresh_seen: list[Tensor] = []  # what entered with ``fresh``
        self.entered: Any = None  # what entered in front of it in the call in progress, where a module there rests
        self.is_fed = False  # whether one does
        self._inputs = [Place.of(module, path) for path in part.inputs] if driver.sees_input else []
        self.wrapper = ForwardWrapper(module, self.around) if part.calls == 1 else None

    def around(self, found: Callable[..., Any]) -> Callable[..., Any]:
        """What runs in place of the module's ``forward``."""
        site, switch, tokens = self, self.switch, self.driver.tokens

        def forward(*args: Any, **kwargs: Any) -> Any:
            if switch.is_cached and not site.must_run:
                output = site.given(args, kwargs)
                if output is not None:
                    return output
            seen = site.seen(args, kwargs) if switch.is_on else []
            output = found(*args, **kwargs)
            if switch.is_on:
                site.take(site.feature.apart(output, args, kwargs), seen)
            return output

        if tokens is None:
            return forward
        is_captured = tokens.captures(self.part.kind)

        def forward_with_tokens(*args: Any, **kwargs: Any) -> Any:
            if switch.is_cached and site.is_known:
                return tokens.run(site, found, args, kwargs) if tokens.handles(site) else site.given(args, kwargs)
            if not switch.is_on or not is_captured:
                return forward(*args, **kwargs)
            output = tokens.capture(site.position, site.part.kind, found, args, kwargs)
            site.take(output, [])
            return output

        return forward_with_tokens

    def seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What a corrector sees of this call: all that enters the part, or what enters the module in front of it."""
        if self.is_fed:
            entered, self.entered = self.entered, None
            return [entered]
        values = [place.get(args, kwargs) for place in self._inputs]
        return [self.feature.seen(value) for value in values if isinstance(value, Tensor)]

    @property
    def is_known(self) -> bool:
        """Whether there is anything to predict from."""
        context = self.switch.context
        return context is not None and self.name in context.state.sites

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of this cached step; None if there is nothing to predict from, and the part must run."""
        feature = self._predicted(args, kwargs)
        return None if feature is None else self.feature.whole(feature, args, kwargs)

    def _predicted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or self.prepared is not None:
            if self.corrector is None or self.prepared is None:
                return self.prepared
            seen = self.seen(args, kwargs)
            assert self.layout is not None
            return self.layout.fill(self.corrector.correct(self.prepared, [seen[i] for i in self.pairs]))
        return self.driver.predict(self, self.seen(args, kwargs)) if self.is_known else None

    def take(self, feature: Any, seen: list[Tensor]) -> None:
        """Keep what was computed, and what entered."""
        if torch.compiler.is_compiling() or self.switch.is_watching:
            self.fresh = feature
            if seen:
                self.fresh_seen = seen
        else:
            self.driver.record(self, feature, seen)

    def distrust(self) -> None:
        """The host has written into what this part returned, which it was not seen to do when it was examined.

        So what was kept of it in this call is not its feature: nothing is. From here on it is copied at once, and the
        host gets copies.
        """
        self.part = dataclasses.replace(self.part, is_mutated=True)
        self.driver.forget(self)
        self.driver.host.note(f"{self.name}: its output is written into later on; what was kept of it was dropped.")

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The part's output around its tensors."""
        context = self.switch.context
        assert context is not None
        return context.state.layouts[self.name].fill(tensors)


class Turns:
    """A module that runs several times in a call of the denoiser: which of its sites is met goes by how often it ran.

    Args:
        sites: of its calls, or of some of them.
        switch: of the denoiser.
    """

    def __init__(self, sites: Sequence[PartSite], switch: Switch) -> None:
        self.sites, self.switch, self.next = sites, switch, 0
        self.wrapper = ForwardWrapper(sites[0].module, self._make)

    def _make(self, found: Callable[..., Any]) -> Callable[..., Any]:
        forwards = {site.part.turn: site.around(found) for site in self.sites}
        part = self.sites[0].part

        def forward(*args: Any, **kwargs: Any) -> Any:
            context, turn = self.switch.context, self.next
            if context is None:
                return found(*args, **kwargs)
            self.next += 1
            if turn >= part.calls:
                context.scratch["astray"] = part.path
            return forwards.get(turn, found)(*args, **kwargs)

        return forward

    def begin(self, turn: int = 0) -> None:
        """The call that comes next is this one."""
        self.next = turn


class RestingModule:
    """A module that runs only to feed parts: on cached steps it hands out a placeholder that costs nothing.

    Either a zero-width tensor, which vanishes in a concatenation along the width, or one token of NaN, which broadcasts
    through scale, shift and gate. Any leak is a shape error or a NaN that the guard catches.
    """

    def __init__(self, inner: Inner, module: nn.Module, driver: PartsDriver) -> None:
        self.inner, self.driver, self.switch = inner, driver, driver.switch
        self.fed = [site for site in driver.sites if site.part.path in inner.feeds]
        self.shapes: tuple[tuple[int, ...], ...] = ()  # of the output's tensors, at the last full step
        self.blank: Any = (
            None  # for compiled blocks: made before the call, as sizes kept in numbers would be compiled in
        )
        self.must_run = False  # a part that it feeds has nothing to predict from
        self.shows: PartSite | None = None  # the part whose input is what enters here
        self.wrapper = ForwardWrapper(module, self._make)

    def _make(self, found: Callable[..., Any]) -> Callable[..., Any]:
        rest, switch, tokens = self, self.switch, self.driver.tokens
        is_norm = self.inner.role == "nan_token"

        def forward(*args: Any, **kwargs: Any) -> Any:
            if switch.is_on and rest.shows is not None:
                rest.shows.entered = first_tensor(args, kwargs)
            if switch.is_cached and not rest.must_run:
                return rest.placeholder(args, kwargs)
            output = found(*args, **kwargs)
            if switch.is_on and not is_norm:
                rest.shapes = shapes_of(output)
            return output

        if tokens is None:
            return forward
        is_captured = tokens.captures(self.inner.kind)

        def forward_with_tokens(*args: Any, **kwargs: Any) -> Any:
            if switch.is_cached and not rest.must_run:
                return tokens.run_inner(rest, found, args, kwargs)
            if not switch.is_on or is_norm:
                return found(*args, **kwargs)
            position = tokens.position_of(rest) if is_captured else None
            if position is None:
                output = found(*args, **kwargs)
            else:
                output = tokens.capture(position, rest.inner.kind, found, args, kwargs)
            rest.shapes = shapes_of(output)
            tokens.took_inner(rest, output)
            return output

        return forward_with_tokens

    def placeholder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for the output."""
        x = first_tensor(args, kwargs)
        if self.inner.role == "nan_token":
            size = (x.shape[0], 1, x.shape[-1]) if x.ndim == 3 else (*x.shape[:2], *[1] * (x.ndim - 2))
            return x.new_full(size, float("nan"))
        if torch.compiler.is_compiling():
            return self.blank
        return self.blanks(x, x.shape[0])

    def blanks(self, like: Tensor, rows: int) -> Any:
        """Zero-width tensors, or tokens of NaN, in place of the output's."""
        if self.inner.role == "zero_width":
            found = [like.new_empty((rows, *shape[1:-1], 0)) for shape in self.shapes]
        else:
            found = [like.new_full((rows, 1, *shape[2:]), float("nan")) for shape in self.shapes]
        return found[0] if len(found) == 1 else tuple(found)


def shapes_of(output: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors of an output."""
    return (tuple(output.shape),) if isinstance(output, Tensor) else tuple(tuple(leaf.shape) for leaf in output)
