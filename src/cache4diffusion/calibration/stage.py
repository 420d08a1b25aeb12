"""The sites of a denoiser in training, and one forward as they see it.

Wrappers sit on instances, as the engine's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cache4diffusion.anatomy import Block, Part
from cache4diffusion.calibration.training import Leaves, Reached, Spot
from cache4diffusion.engine.blocks import BlockView
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.features import feature_of
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import Layout, take_apart
from cache4diffusion.engine.part_lookup import blocks_of, entering_of, entrance_of, parts_of, units_of
from cache4diffusion.engine.span import BlocksDriver
from cache4diffusion.errors import AnatomyError
from cache4diffusion.sites import Blocks, Parts
from cache4diffusion.wrap import CallWrapper, ForwardWrapper


@dataclass
class Forward:
    """One forward of the denoiser, as the sites see it.

    Args:
        answer: what they hand out; None: what they compute, of which copies are kept in ``cache``.
        step: index of the step.
        num_steps: of the run.
        cache: what was kept at every site, by name.
    """

    answer: Callable[[Reached], Leaves] | None
    step: int
    num_steps: int
    cache: dict[str, Leaves]
    charges: list[Tensor] = field(default_factory=list)
    kept: dict[str, Leaves] = field(default_factory=dict)
    entering: dict[str, Leaves] = field(default_factory=dict)  # of parts whose input is seen before they are called


class Stage:
    """The sites of one denoiser, each handing out what the forward in progress says."""

    def __init__(self, host: Host, site: Parts | Blocks) -> None:
        self.host = host
        self.forward: Forward | None = None
        self.spots: dict[str, Spot] = {}  # known after the first full forward
        self._layouts: dict[str, Layout] = {}
        self._wrappers: list[ForwardWrapper | CallWrapper] = []
        try:
            self._wrap_blocks(site) if isinstance(site, Blocks) else self._wrap_parts(site)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Unwrap everything."""
        for wrapper in reversed(self._wrappers):
            wrapper.remove()
        self._wrappers = []

    @contextmanager
    def playing(self, forward: Forward) -> Iterator[Forward]:
        """The denoiser's next call is this forward."""
        self.forward = forward
        try:
            yield forward
        finally:
            self.forward = None

    def _wrap_parts(self, site: Parts) -> None:
        units = units_of(self.host, site)
        every = [part for _, block in blocks_of(self.host) for part in parts_of(block, site, units)] + units
        found = [part for part in every if part.calls == 1]
        if not found:
            _refuse_shared(every, self.host)
        if not found:
            assert self.host.anatomy is not None
            raise AnatomyError(
                f"{self.host.anatomy.denoiser} has no parts of the kinds {', '.join(site.kinds)} that can be told "
                "apart, so nothing can be trained there."
            )
        modules = dict(self.host.plain.named_modules())
        for part in found:
            entrance = entrance_of(part)
            if entrance is not None:
                self._wrappers.append(ForwardWrapper(modules[entrance.path], self._noting(part, modules)))
            self._wrappers.append(ForwardWrapper(modules[part.path], self._answering(part, modules[part.path])))

    def _noting(self, part: Any, modules: Mapping[str, nn.Module]) -> Callable[[Inner], Inner]:
        """In front of a fused part: keep its modulated input."""

        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.forward is not None:
                    self.forward.entering[part.path] = entering_of(part, modules[part.path], args, kwargs)
                return found(*args, **kwargs)

            return forward

        return make

    def _answering(self, part: Any, module: nn.Module) -> Callable[[Inner], Inner]:
        feature = feature_of(part, module)

        def make(found: Inner) -> Inner:
            def forward(*args: Any, **kwargs: Any) -> Any:
                playing = self.forward
                if playing is None:
                    return found(*args, **kwargs)
                entering = playing.entering.get(part.path) or entering_of(part, module, args, kwargs)
                entering = [feature.seen(tensor) for tensor in entering]

                def compute() -> Leaves:
                    computed = feature.apart(found(*args, **kwargs), args, kwargs)
                    leaves, self._layouts[part.path] = take_apart(computed)
                    return leaves

                leaves = self._meet(part.path, part.kind, entering, compute, part.is_tokenwise)
                leaves = [leaf.clone() for leaf in leaves] if part.is_mutated else leaves
                return feature.whole(self._layouts[part.path].fill(leaves), args, kwargs)

            return forward

        return make

    def _wrap_blocks(self, site: Blocks) -> None:
        driver = BlocksDriver(self.host, site)  # type: ignore[arg-type] - as in the table of drivers
        driver.install(self.host.anatomy)  # only looks: every block's output must be one that can be rebuilt
        _refuse_shared([self.host.blocks[stretch.first].block for stretch in driver.stretches], self.host)
        for stretch in driver.stretches:
            module, kept = self.host.modules[stretch.first], driver.kept(stretch.last)
            handler = self._adding(stretch.name, stretch.first, self.host.blocks[stretch.first], kept)
            self._wrappers.append(CallWrapper(module, handler))

    def _adding(self, name: str, position: int, block: BlockView, kept: Sequence[int]) -> Any:
        """Around a block, whose site is what it adds to the streams that are read afterwards."""

        def handler(inner: Inner, args: Any, kwargs: Any) -> Any:
            if self.forward is None:
                return inner(*args, **kwargs)
            streams = [stream.clone() for stream in self.host.stream_inputs(position, args, kwargs)]
            left = list(streams)

            def compute() -> Leaves:
                left[:] = self.host.stream_outputs(position, args, kwargs, inner(*args, **kwargs))
                return [left[i] - streams[i] for i in kept]

            leaves = self._meet(name, "block", [], compute)
            for i, leaf in zip(kept, leaves, strict=True):
                left[i] = streams[i] + leaf
            return block.rebuild(left, self.host.modules[position], args, kwargs)

        return handler

    def _meet(
        self, name: str, kind: str, entering: Leaves, compute: Callable[[], Leaves], is_tokenwise: bool = False
    ) -> Leaves:
        """A site is reached."""
        playing = self.forward
        assert playing is not None
        if playing.answer is None or name not in playing.cache:
            leaves = compute()
            if name not in self.spots:
                before, after = (tuple(leaf.shape[-1] for leaf in several) for several in (entering, leaves))
                lengths = tuple(leaf.shape[-2] for leaf in leaves)
                self.spots[name] = Spot(name, kind, before, after, is_tokenwise, lengths)
            playing.kept[name] = [leaf.detach().clone() for leaf in leaves]
            return leaves
        reached = Reached(
            self.spots[name], playing.step, playing.num_steps, entering, playing.cache[name], compute, playing.charges
        )
        leaves = playing.answer(reached)
        if reached.kept is not None:
            playing.kept[name] = reached.kept
        return leaves


def _refuse_shared(sites: Sequence[Part | Block], host: Host) -> None:
    shared = next((site.path for site in sites if site.calls > 1), None)
    if shared is not None:
        assert host.anatomy is not None
        raise AnatomyError(
            f"{shared} runs several times in a call of {host.anatomy.denoiser}, and a training has one set of numbers "
            "for each module. Use a method without a training, such as 'fora' or 'fbcache'."
        )
