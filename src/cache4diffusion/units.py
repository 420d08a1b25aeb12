"""Sizes in words and back, and settings in few words."""

from __future__ import annotations

import re
from typing import Any

from cache4diffusion.errors import SettingError

_BINARY: tuple[str, ...] = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL: tuple[str, ...] = ("B", "KB", "MB", "GB", "TB")


def size_text(count: int) -> str:
    """Bytes in binary units: ``12.5 MiB``, ``17 B``."""
    exponent = min(len(_BINARY) - 1, max(int(count).bit_length() - 1, 0) // 10)
    return f"{count / 1024**exponent:.{0 if exponent == 0 else 1}f} {_BINARY[exponent]}"


def size_of(value: Any, name: str) -> int:
    """Bytes of a number or of a text such as ``"2GiB"`` (binary) or ``"2 GB"`` (decimal).

    Args:
        value: what was given.
        name: of the setting, for the error.

    Raises:
        SettingError: it is neither, or not above 0.
    """
    count: float | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", value, re.IGNORECASE)
        if match:
            unit = (match[2] or "B").upper()
            base, names = (1024, [u.upper() for u in _BINARY]) if "I" in unit else (1000, [*_DECIMAL])
            count = float(match[1]) * base ** names.index(unit)
    if count is None or count < 1:
        raise SettingError(
            f"{name}={value!r}: give bytes as a whole number above 0, or a text such as '2GiB' or '800MB'."
        )
    return int(count)


def value_text(value: Any) -> str:
    """A long list of whole numbers by its runs, ``[0..16, 24, 32]``; anything else as it is."""
    if not isinstance(value, (list, tuple)) or len(value) < 6 or not all(type(x) is int for x in value):
        return str(value)
    runs: list[list[int]] = []
    for number in value:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"[{', '.join(words)}]"
