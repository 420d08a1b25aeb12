"""Errors of the measuring part."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import Cache4DiffusionError


class MeasureError(Cache4DiffusionError, ValueError):
    """Input that cannot be measured, or a results file that cannot be used."""


class MissingExtraError(Cache4DiffusionError, ImportError):
    """A library of the extra ``measure`` is not installed."""


def require(module: str) -> ModuleType:
    """Import ``module``, or raise `MissingExtraError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'This needs {module.split(".")[0]!r}, which is not installed: pip install "cache4diffusion[measure]"'
        ) from error
