"""Copies between a denoiser's device and the one its cache lies on, beside the computation where that is possible."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.devices import streams_of


@dataclass(frozen=True)
class Coming:
    """A tensor on its way to the denoiser's device: not to be read before `CopyEngine.fetch` hands it out."""

    tensor: Tensor
    ticket: Any = None  # what tells that it has arrived


class CopyEngine:
    """Does every copy at once. Copies are made in the order in which they were asked for.

    The three steps of a snapshot::

        offload(source, target)     a full step: from the device into its place in the cache
        prefetch(source) -> coming  a step before it is needed: from the cache, into memory of its own
        fetch(coming) -> tensor     when it is needed: waits if it must

    Args:
        device: where fetched tensors are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0  # copied so far, both ways
        self._ms = 0.0

    @property
    def ms(self) -> float:
        """Time that the copies took so far. May wait for them."""
        return self._ms

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of the cache, not filled."""
        return torch.empty(shape, dtype=dtype, device=device)

    def offload(self, source: Tensor, target: Tensor) -> None:
        """Copy ``source``, which nobody will write into any more, to its place in the cache."""
        begun = time.perf_counter()
        target.copy_(source)
        self._count(target, begun)

    def prefetch(self, source: Tensor) -> Coming:
        """Begin to bring a snapshot."""
        begun = time.perf_counter()
        tensor = torch.empty_like(source, device=self.device)
        tensor.copy_(source)
        self._count(source, begun)
        return Coming(tensor)

    def fetch(self, coming: Coming) -> Tensor:
        """The tensor, now that it is needed. It belongs to the caller."""
        return coming.tensor

    def finish(self) -> None:
        """Wait until the host may read and write the cache."""

    def start_over(self) -> None:
        """Count from 0."""
        self.bytes, self._ms = 0, 0.0

    def _count(self, copied: Tensor, begun: float) -> None:
        self.bytes += copied.numel() * copied.element_size()
        self._ms += 1e3 * (time.perf_counter() - begun)


class StreamCopyEngine(CopyEngine):
    """Copies in a stream of its own, from and to page-locked host memory: computation goes on meanwhile.

    One stream for both directions keeps a copy out behind the one that filled its source. An offload waits for what the
    computation has been given so far, since that makes its source; a prefetch for nothing but earlier copies; a fetch
    makes the computation wait for this one copy, and the host for none.

    Args:
        device: of the denoiser.
        streams: the module with its streams and events, as of `streams_of`.
    """

    def __init__(self, device: torch.device, streams: Any) -> None:
        super().__init__(device)
        self._streams = streams
        self.stream = streams.Stream(device)
        self._clocked: deque[tuple[Any, Any]] = deque()  # begin and end of copies whose time is not read yet

    @property
    def ms(self) -> float:
        """Waits for the last copy."""
        while self._clocked:
            self._clocked[0][1].synchronize()
            self._read()
        return self._ms

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Page-locked on the host."""
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=device.type == "cpu")

    def offload(self, source: Tensor, target: Tensor) -> None:
        """Once everything given to the device so far is done."""
        self.stream.wait_stream(self._streams.current_stream(self.device))
        with self._copying(target):
            target.copy_(source, non_blocking=True)
        self.hold(source, self.stream)

    def prefetch(self, source: Tensor) -> Coming:
        """Behind the copies asked for before. The memory is the stream's own, so it is free to be written."""
        with self._copying(source):
            tensor = torch.empty_like(source, device=self.device)
            tensor.copy_(source, non_blocking=True)
        return Coming(tensor, self.stream.record_event())

    def fetch(self, coming: Coming) -> Tensor:
        """What is computed from here on waits for the copy."""
        current = self._streams.current_stream(self.device)
        current.wait_event(coming.ticket)
        self.hold(coming.tensor, current)
        return coming.tensor

    def finish(self) -> None:
        """The host waits for the stream."""
        self.stream.synchronize()

    def start_over(self) -> None:
        """Count from 0; nothing is waited for."""
        super().start_over()
        self._clocked.clear()

    def hold(self, tensor: Tensor, stream: Any) -> None:
        """Keep the tensor's memory from being given away before ``stream`` is done with it."""
        tensor.record_stream(stream)

    @contextmanager
    def _copying(self, copied: Tensor) -> Iterator[None]:
        begin, end = (self._streams.Event(enable_timing=True) for _ in range(2))
        with self._streams.stream(self.stream):
            begin.record(self.stream)
            yield
            end.record(self.stream)
        self.bytes += copied.numel() * copied.element_size()
        self._clocked.append((begin, end))
        while self._clocked[0][1].query() and len(self._clocked) > 1:  # or they would pile up
            self._read()

    def _read(self) -> None:
        begin, end = self._clocked.popleft()
        self._ms += begin.elapsed_time(end)


def copy_engine(device: torch.device) -> CopyEngine:
    """The best there is for a device."""
    streams = streams_of(device)
    return CopyEngine(device) if streams is None else StreamCopyEngine(device, streams)
