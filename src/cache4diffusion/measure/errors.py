"""Errors of the measuring part."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import Cache4DiffusionError, MissingExtraError

__all__ = ["MeasureError", "MissingExtraError", "require"]


class MeasureError(Cache4DiffusionError, ValueError):
    """Input that cannot be measured, or a results file that cannot be used."""


def require(module: str) -> ModuleType:
    """Import ``module``, or raise `MissingExtraError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(module.split(".")[0], "measure") from error
