"""Noticing NaN and Inf in what was predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from cache4diffusion.engine.host import Host

NanGuard = Literal["now", "next", "off"]


class Unread(Protocol):
    """A state that keeps the finite check of what was predicted last, until somebody reads it."""

    unread_finite: Tensor | None


class FiniteGuard:
    """Checks predicted tensors, at once or without waiting for the device.

    Args:
        mode: ``"now"`` reads the check at once; ``"next"`` at the next step (no sync); ``"off"`` does not look. None:
            now on the CPU, else next.
        host: whose trace counts the transfers that a late reading costs. Where processes share its samples, what is not
            finite for one of them is not finite for any.
    """

    def __init__(self, mode: NanGuard | None, host: Host) -> None:
        self.mode, self.host = mode, host

    def passes(self, state: Unread, predicted: Sequence[Tensor]) -> bool:
        """Whether ``predicted`` may be handed on: it is finite, or that is left to `passed`."""
        floating = [x for x in predicted if x.is_floating_point()]
        mode = self.mode or ("now" if not floating or floating[0].device.type == "cpu" else "next")
        if mode == "off" or not floating:
            return True
        if mode == "now" and all(math.isfinite(x.sum(dtype=torch.float32)) for x in floating):
            return self.host.group.all(True)  # a finite sum holds nothing else; one that overflowed is looked at again
        is_finite = torch.stack([torch.isfinite(x).all() for x in floating]).all()
        if mode == "next":
            state.unread_finite = is_finite
            return True
        return self.host.group.all(bool(is_finite))

    def passed(self, state: Unread) -> bool:
        """Whether what was handed on before was finite, as far as that is not known yet."""
        if state.unread_finite is None:
            return True
        is_finite, state.unread_finite = bool(state.unread_finite), None
        self.host.trace.syncs += 1
        return self.host.group.all(is_finite)
