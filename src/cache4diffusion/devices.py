"""What devices have and lack, asked of the device itself: nothing in this library goes by a device's name."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_STREAMS = ("Stream", "Event", "stream", "current_stream")  # what copies beside the computation are made with


def streams_of(device: torch.device) -> Any:
    """The module of torch with the device's streams and events (``torch.cuda``, ``torch.xpu``, ``torch.npu``), or None.

    The CPU has streams in name only; Apple's devices have one and no more.
    """
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if all(hasattr(module, name) for name in _STREAMS) else None


def sent(made: Tensor, device: torch.device) -> Tensor:
    """What was made on the host, on a device.

    Where that has streams, from page-locked memory, which is kept until it has been read: nothing waits.
    """
    if streams_of(device) is None:
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)


@cache
def has_clock(device: torch.device) -> bool:
    """Whether a device's events tell the time between them."""
    if device.type == "cpu" or not torch.accelerator.is_available():
        return False
    try:
        first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
        first.record()
        last.record()
        last.synchronize()
        first.elapsed_time(last)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def in_double(x: Tensor) -> Tensor:
    """``x`` in float64: where it is, or on the host if its device has no such numbers."""
    return x.double() if has_double(x.device) else x.cpu().double()


@cache
def has_double(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's do not, nor do some of Intel's."""
    try:
        with _disable_current_modes():  # the device itself, also while something runs on tensors without data
            torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True
