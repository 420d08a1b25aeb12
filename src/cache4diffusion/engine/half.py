"""What is said of a call that runs one CFG branch of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Half:
    """The rows of one CFG branch, of a call that has both.

    Args:
        args, kwargs: of the whole call.
        rows: which rows run.
        twins: those of the other branch, whose features go half into predictions; None if they do not.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: list[int]
    twins: list[int] | None
