"""Wrappers on a denoiser, its main blocks and its sites: put on as a whole, taken away as a whole."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.hints import is_said_of
from cache4diffusion.engine.compiling import (
    WHOLE,
    drop_graphs,
    forbids_compiled_blocks,
    graphs_per_graph,
    hides_sites,
    is_compiled,
    is_under_compile,
    leave_us_alone,
    room_for,
)
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.hooks import GroupLoading, keep_alone, refuse_caches
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.runner import SiteRunner
from cache4diffusion.errors import CompositionError, RunError
from cache4diffusion.sites import Parts
from cache4diffusion.wrap import CallHandler, CallWrapper, ForwardWrapper


class Attachment:
    """What one engine has put on one denoiser.

    The denoiser's own call is wrapped from the beginning until `remove`; blocks and sites from `install` to
    `uninstall`.

    Args:
        host: the denoiser.
        runner: of its sites; None where there are none.
        on_denoiser: runs a call of the denoiser.
        owner: found again on the denoiser by `owner_of`.
    """

    def __init__(self, host: Host, runner: SiteRunner | None, on_denoiser: CallHandler, owner: Any = None) -> None:
        self.owner = owner
        self.serve(host, runner)
        self.is_installed = False
        self.blocks: list[CallWrapper] = []
        self.bypassed: list[str] = []  # modules that rest on a cached step, as of the last `install`
        self._seen: list[tuple[weakref.ref[nn.Module], type]] = []  # the denoiser's modules at the last `install`
        self._places: list[tuple[dict[str, Any], str, nn.Module]] = []  # where the wrapped modules hang
        self.groups = GroupLoading(host.plain)
        self.room: AbstractContextManager[Any] = nullcontext()  # for calls: what compiled blocks need
        leave_us_alone()
        self._on_denoiser = on_denoiser
        self.put_back()

    def serve(self, host: Host, runner: SiteRunner | None) -> None:
        """What is to be installed next; nothing is installed now."""
        self.host, self.runner = host, runner
        self._hides_sites = hides_sites(host.composition)

    @property
    def needs_anatomy(self) -> bool:
        """Whether the inside of the denoiser must be known."""
        splits_rows = self.host.composition.decide == "row" or self.host.composition.cfg is not None
        return (
            splits_rows
            or is_said_of(self.host.denoiser)
            or (self.runner is not None and self.runner.driver.needs_anatomy)
        )

    def install(self, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy | None = None) -> None:
        """Find out how the denoiser is built and wrap what must be; all or nothing.

        Args:
            args, kwargs: of a call.
            anatomy: of the denoiser, if it is known already.

        Raises:
            AnatomyError: the denoiser lacks what the composition needs.
            CompositionError: it is compiled in a way that hides what the composition needs.
        """
        try:
            if self.needs_anatomy:
                self.host.examine(args, kwargs, anatomy)
            if self.runner is not None:
                self.runner.install()
                with torch.no_grad():
                    self.runner.driver.try_out(self._root.inner, args, kwargs)
                if self.runner.needs_blocks:
                    self._wrap_blocks(self.runner)
                self.bypassed = self.runner.driver.bypassed()
        except BaseException:
            self.uninstall()
            raise
        self._seen = [(weakref.ref(module), type(module)) for _, module in self.host.denoiser.named_modules()]
        wrapped = {wrapper.module for wrapper in self._wrappers()}
        self._places = [
            (parent._modules, name, child)
            for parent in self.host.plain.modules()
            for name, child in parent._modules.items()
            if child in wrapped and child is not None
        ]
        self.is_installed = True

    def _wrap_blocks(self, runner: SiteRunner) -> None:
        positions: dict[nn.Module, list[int]] = {}
        for position, module in enumerate(self.host.modules):
            positions.setdefault(module, []).append(position)
        for module, several in positions.items():

            def handler(inner: Inner, args: Any, kwargs: Any, several: list[int] = several) -> Any:
                position = several[0] if len(several) == 1 else runner.turn(several)
                return inner(*args, **kwargs) if position is None else runner.on_block(position, inner, args, kwargs)

            self.blocks.append(CallWrapper(module, handler, allow_compile=self._allow_block_compile))
        if any(is_compiled(wrapper.module) for wrapper in self.blocks):
            self._allow_block_compile()

    def uninstall(self) -> None:
        """Unwrap blocks and sites."""
        for wrapper in self.blocks:
            wrapper.remove()
        self.blocks, self._places = [], []
        if self.runner is not None:
            self.runner.driver.uninstall()
        if self.is_installed and isinstance(self.host.composition.site, Parts):
            drop_graphs(self.host.denoiser)
        self.is_installed = False

    def put_back(self) -> None:
        """Wrap the denoiser's own call; the rest follows with `install`."""
        self._root = CallWrapper(
            self.host.denoiser, self._on_denoiser, owner=self.owner, allow_compile=self._allow_compile
        )
        self._alone = keep_alone(self.host.name, self.host.plain)

    def remove(self) -> None:
        """Take every wrapper away, until `put_back`."""
        self.uninstall()
        self.groups.remove()
        self._root.remove()
        if self._alone is not None:
            self._alone.remove()

    def is_outdated(self) -> bool:
        """Whether something was put in the place of modules, of their classes or of wrappers, since `install`.

        Adapters exchange modules when they are loaded or unloaded, token merging patches their classes, and a hook that
        was there first takes what was put in front of it with it when it goes.
        """
        now = [module for _, module in self.host.denoiser.named_modules()]
        if len(now) != len(self._seen):
            return True
        seen = zip(self._seen, now, strict=True)
        if any(was() is not module or kind is not type(module) for (was, kind), module in seen):
            return True
        return not all(wrapper.is_in_place for wrapper in self._wrappers())

    def is_exchanged(self) -> bool:
        """Whether a wrapped module has lost its place to another since `install`: quick enough for every call."""
        return any(modules.get(name) is not module for modules, name, module in self._places)

    def _wrappers(self) -> list[CallWrapper | ForwardWrapper]:
        return [*self.blocks, *(self.runner.driver.wrappers if self.runner is not None else ())]

    def check_host(self) -> None:
        """See what the host has put on the denoiser, before a run.

        Raises:
            AlreadyAcceleratedError: another cache.
        """
        refuse_caches(self.host.name, self.host.plain)
        if self._hides_sites:
            self.groups.refresh()

    # -- compiling -------------------------------------------------------------------------------------------------

    def check_visible(self) -> None:
        """Refuse a call from inside a ``torch.compile`` that hides the sites.

        Raises:
            RunError: says what to compile instead.
        """
        if self._hides_sites and is_under_compile():
            raise RunError(f"{self.host.name} {WHOLE}")

    def make_room(self) -> None:
        """See whether anything is compiled, before a run."""
        graphs = graphs_per_graph(self.host.composition)
        needs_room = graphs > 1 and any(is_compiled(module) for module in self.host.denoiser.modules())
        self.room = room_for(graphs) if needs_room else nullcontext()

    def _allow_compile(self) -> None:
        """``denoiser.compile()`` on the accelerated denoiser."""
        if self._hides_sites:
            raise CompositionError(f"{self.host.name} {WHOLE}".replace("was compiled", "would be compiled", 1))

    def _allow_block_compile(self) -> None:
        """``block.compile()`` on a wrapped block."""
        driver = None if self.runner is None else self.runner.driver
        reason = forbids_compiled_blocks(self.host.composition) or (driver and driver.forbids_compiled_blocks)
        if reason:
            raise CompositionError(f"{self.host.name}: {reason}")
