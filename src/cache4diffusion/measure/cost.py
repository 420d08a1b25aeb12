"""What a run costs: FLOPs (see `cache4diffusion.flops`), time, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from typing import Any

import torch

from ..flops import FlopCounter, attention_flops, count_flops, missing_formulas
from .errors import MeasureError

__all__ = [
    "FlopCounter",
    "PeakMemory",
    "Timer",
    "attention_flops",
    "count_flops",
    "flux_block_flops",
    "missing_formulas",
    "synchronize",
]


def flux_block_flops(
    kind: str, *, image_tokens: int, text_tokens: int, width: int, mlp_ratio: float = 4.0, batch: int = 1
) -> int:
    """FLOPs of one FLUX block from its shapes, the yardstick `count_flops` is tested against.

    With ``N = image_tokens + text_tokens`` and ``D = width``, per sample, multiply-add = 2:
    attention ``4 N² D``; projections q, k, v, out ``8 N D²``; MLP ``4 r N D²``; modulation ``2 D · 12 D`` (double:
    6 D outputs for each of two streams) or ``2 D · 3 D`` (single). Double and single cost the same apart from it.

    Args:
        kind: ``"double"`` (separate weights for image and text) or ``"single"`` (one fused stream).
        mlp_ratio: hidden width of the MLP over ``width``; 4 in FLUX.
    """
    if kind not in ("double", "single"):
        raise MeasureError(f"flux_block_flops(kind={kind!r}): accepted are 'double' and 'single'.")
    tokens = image_tokens + text_tokens
    hidden = int(width * mlp_ratio)
    attention = 4 * tokens * tokens * width
    linears = 2 * tokens * width * (4 * width + 2 * hidden)
    modulation = 2 * width * (12 if kind == "double" else 3) * width
    return batch * (attention + linears + modulation)


# --- time -------------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has done all it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Timer:
    """Wall-clock seconds of a block, accelerator work included: ``with Timer() as timer: ...; timer.seconds``."""

    seconds: float = 0.0

    def __enter__(self) -> Timer:
        synchronize()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *exc: Any) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._begin


# --- memory -----------------------------------------------------------------------------------------------------------


class PeakMemory:
    """Highest memory use inside ``with PeakMemory() as peak:``, in bytes.

    After the block ``bytes`` holds the peak and ``source`` says what it is of:

    - ``"allocator"``: an accelerator. Highest number of bytes held by tensors on the current device, weights included.
    - ``"rss"``: CPU on Linux. Highest resident size of the *process* (weights, Python, libraries), as the kernel
      records it: exact, costs nothing. Freed memory is handed back to the system before the block begins.
    - ``"rss-sampled"``: as before where the kernel's mark cannot be reset: sampled every 5 ms; may miss short peaks.
    - ``"rss-process"``: elsewhere. Highest resident size since the process *started*: an upper bound.

    Compare only figures of one source, measured in one process. One block at a time per process.

    Args:
        device: where the work runs, such as ``"cpu"`` or ``"cuda:0"``; None: the accelerator if there is one.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.bytes, self.source = 0, ""
        self._on_cpu = device is not None and torch.device(device).type == "cpu"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if not self._on_cpu and torch.accelerator.is_available() and _reset_allocator_peak():
            self.source = "allocator"
            return self
        _return_freed_memory()
        if _reset_rss_peak():
            self.source = "rss"
        elif _status_bytes("VmRSS") is not None:
            self.source = "rss-sampled"
            self.bytes = _status_bytes("VmRSS") or 0
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        else:
            self.source = "rss-process"
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.source == "allocator":
            self.bytes = _allocator_peak()
        elif self.source == "rss":
            # The kernel folds its per-thread counters in lazily: the current size can be past the recorded mark.
            self.bytes = max(_status_bytes("VmHWM") or 0, _status_bytes("VmRSS") or 0)
        elif self.source == "rss-sampled":
            self._stop.set()
            self._thread.join()
        else:
            self.bytes = _process_peak()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, _status_bytes("VmRSS") or 0)


def _reset_allocator_peak() -> bool:
    synchronize()
    reset = getattr(torch.accelerator, "reset_peak_memory_stats", None)  # not in torch < 2.9
    if reset is None:
        reset = getattr(_accelerator(), "reset_peak_memory_stats", None)
    try:
        if reset is None:
            return False
        reset()
    except (RuntimeError, NotImplementedError):  # a device without a caching allocator (mps)
        return False
    return True


def _accelerator() -> Any:
    """The accelerator's own module, such as ``torch.cuda`` or ``torch.xpu``."""
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _allocator_peak() -> int:
    synchronize()
    read = getattr(torch.accelerator, "max_memory_allocated", None) or _accelerator().max_memory_allocated
    return int(read())


def _return_freed_memory() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _reset_rss_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # 5: set the high-water mark to the current size; see proc(5)
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def _status_bytes(field: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _process_peak() -> int:
    if os.name != "posix":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
