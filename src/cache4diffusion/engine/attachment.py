"""Wrappers on a denoiser, its main blocks and its sites: put on as a whole, taken away as a whole."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.runner import SiteRunner
from cache4diffusion.errors import CompositionError, RunError
from cache4diffusion.sites import Parts
from cache4diffusion.wrap import CallHandler, CallWrapper


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
        self._seen: list[weakref.ref[nn.Module]] = []  # the denoiser's modules at the last `install`
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
                if self.runner.needs_blocks:
                    self._wrap_blocks(self.runner)
                self.bypassed = self.runner.driver.bypassed()
        except BaseException:
            self.uninstall()
            raise
        self._seen = [weakref.ref(module) for _, module in self.host.denoiser.named_modules()]
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
        self.blocks = []
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

    def remove(self) -> None:
        """Take every wrapper away, until `put_back`."""
        self.uninstall()
        self._root.remove()

    def is_outdated(self) -> bool:
        """Whether modules were exchanged since `install`, as adapters do when they are loaded or unloaded."""
        now = [module for _, module in self.host.denoiser.named_modules()]
        return len(now) != len(self._seen) or any(a() is not b for a, b in zip(self._seen, now, strict=True))

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
