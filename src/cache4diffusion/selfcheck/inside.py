"""Looking inside while a denoiser is accelerated: its sites, its modules, what is cached, and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cache4diffusion.engine import Engine
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.leaves import flatten
from cache4diffusion.engine.level import LevelDriver
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.runner import SiteRunner
from cache4diffusion.engine.span import SpanDriver
from cache4diffusion.gates import Signal, Spectral, Verification
from cache4diffusion.selfcheck.values import distance
from cache4diffusion.sites import Denoiser


class Probe:
    """Notes what leaves every site, call by call, and tells which is the first that differs on a cached step."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.driver = engine, engine.driver
        self._now: list[tuple[str, Any]] = []
        self._kept: dict[int, dict[str, Any]] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Probe:
        driver, engine = self.driver, self.engine
        if isinstance(driver, PartsDriver):
            for site in driver.sites:
                hook = site.module.register_forward_hook(lambda m, a, out, name=site.name: self._note(name, out))
                self._undo.append(hook.remove)
        if engine.runner is not None and engine.attachment.blocks:
            self._watch_blocks(engine.runner)
        if isinstance(driver, LevelDriver):
            found = driver._on_module

            def on_module(path: str, *args: Any) -> Any:
                output = found(path, *args)
                context = driver._context
                if path in driver.cut.sources and context is not None:
                    leaves = flatten(output)[0]  # the others stand in for what nobody reads
                    self._note(path, [leaves[place] for place in context.state.extra["seen"][path].predicted])
                return output

            driver._on_module = on_module  # type: ignore[method-assign]
            self._undo.append(lambda: vars(driver).pop("_on_module", None))
        return self

    def __exit__(self, *error: object) -> None:
        for undo in self._undo:
            undo()

    def _watch_blocks(self, runner: SiteRunner) -> None:
        inside = {p for s in getattr(self.driver, "stretches", []) for p in range(s.first, s.last)}
        original = runner.on_block

        def on_block(position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = original(position, inner, args, kwargs)
            if position not in inside:
                self._note(runner.host.blocks[position].path, output)
            return output

        runner.on_block = on_block
        self._undo.append(lambda: vars(runner).pop("on_block", None))

    def _note(self, name: str, output: Any) -> None:
        self._now.append((name, [leaf.clone() for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]))

    def begin(self) -> None:
        """A call begins."""
        self._now = []

    def keep(self, number: int) -> None:
        """The call was a full one: what cached ones are compared with."""
        self._kept[number] = dict(self._now)

    def culprit(self, tolerance: float, number: int = 0) -> str | None:
        """The first site whose output is not that of the full step."""
        if self.driver is None:
            return "cfg branch"
        if isinstance(self.engine.composition.site, Denoiser):
            return "output"
        known = self._kept.get(number, {})
        for name, leaves in self._now:
            if name in known and distance(known[name], leaves) > tolerance:
                return self._words(name)
        return None

    def _words(self, name: str) -> str:
        if isinstance(self.driver, SpanDriver):
            paths = [view.path for view in self.engine.host.blocks]
            for stretch in self.driver.stretches:
                if name == paths[stretch.last]:
                    return f"{stretch.name} ({paths[stretch.first]} .. {name})"
        return name


def always_resting(engine: Engine) -> list[str]:
    """Modules that run on no cached step. A signal is read in the first block, a verification runs the last."""
    if engine.driver is None or engine.gate is None or (engine.attachment.bypassed == [""] and engine.host.blocks):
        return []
    if isinstance(engine.gate.watch, (Signal, Spectral)):
        return [path for path in engine.attachment.bypassed if path != engine.host.blocks[0].path]
    checked = isinstance(engine.gate.watch, Verification) and engine.host.blocks
    last = engine.host.blocks[-1].path + "." if checked else None
    return [path for path in engine.attachment.bypassed if last is None or not path.startswith(last)]


@contextmanager
def counted(denoiser: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Count how often each module's own forward runs, under every wrapper."""
    found: list[tuple[nn.Module, Any]] = []
    for path, module in denoiser.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        forward = module.forward

        def counting(*args: Any, path: str = path, forward: Any = forward, **kwargs: Any) -> Any:
            counts[path] = counts.get(path, 0) + 1
            return forward(*args, **kwargs)

        counting.__wrapped__ = forward  # type: ignore[attr-defined]
        found.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = counting
    try:
        yield
    finally:
        for module, before in found:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def poison(engine: Engine) -> int:
    """Fill everything cached with NaN."""
    floats = [tensor for tensor in engine.tensors() if tensor.is_floating_point()]
    for tensor in floats:
        tensor.fill_(float("nan"))
    return len(floats)


@contextmanager
def newcomers() -> Iterator[Callable[[], dict[int, int]]]:
    """Within: a function that returns, by address, the bytes of storages that came up since.

    Objects from before are set aside, or every look would go through all of a process's millions.
    """
    gc.collect()
    before, is_ours = _storages(), gc.get_freeze_count() == 0
    if is_ours:
        gc.freeze()
    try:
        yield lambda: {address: size for address, size in _storages().items() if address not in before}
    finally:
        if is_ours:
            gc.unfreeze()


def _storages() -> dict[int, int]:
    """Bytes of every storage some tensor of this process lies in, by address."""
    storages = {}
    for thing in gc.get_objects():
        # A subclass keeps its data in plain tensors; a fake tensor, as torch.compile leaves about, has none.
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type != "meta":
            try:
                storage = thing.untyped_storage()
                address = storage.data_ptr()
            except (RuntimeError, NotImplementedError):  # sparse, functional, ...
                continue
            if address:
                storages[address] = storage.nbytes()
    return storages
