"""Errors of this library. Each also inherits the builtin a caller would catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Cache4DiffusionError(Exception):
    """Base class of every error this library raises on purpose."""


class SettingError(Cache4DiffusionError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class MemoryBudgetError(SettingError):
    """The cache would be larger than ``memory_budget``."""


class UnknownNameError(Cache4DiffusionError, ValueError):
    """A method, predictor, gate, site or model of that name does not exist."""


class CompositionError(Cache4DiffusionError, ValueError):
    """Two axes of a method cannot work together, or not on this denoiser."""


class AnatomyError(Cache4DiffusionError, ValueError):
    """The denoiser has no such part, or it could not be established."""


class UnobservedError(AnatomyError):
    """A call of the denoiser could not be watched."""


class AlreadyAcceleratedError(Cache4DiffusionError, RuntimeError):
    """The denoiser already carries a handle, or another library's cache."""


class RunError(Cache4DiffusionError, RuntimeError):
    """The sampling run cannot be followed, or lacks something a method needs."""


class FileFormatError(Cache4DiffusionError, ValueError):
    """A profile, calibration, weights folder or results file cannot be used, or a file cannot be written."""


class CalibrationError(Cache4DiffusionError, ValueError):
    """A calibration is missing, or was made for another method, denoiser or run."""


class MissingExtraError(Cache4DiffusionError, ImportError):
    """A library of one of the extras is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f'This needs {library!r}, which is not installed: pip install "cache4diffusion[{extra}]"', name=library
        )


def closest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``choices``, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
