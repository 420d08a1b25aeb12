"""Pipelines of the installed diffusers that no case can be made of here, with the reason."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType

import diffusers
from diffusers.utils import is_torchvision_available


def absent() -> dict[str, list[str]]:
    """Names of pipeline classes by the reason."""
    found: dict[str, list[str]] = {}
    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline") or name == "DiffusionPipeline":
            continue
        reason = _reason(getattr(diffusers, name))
        if reason:
            found.setdefault(reason, []).append(name)
    return found


def _reason(kind: type) -> str:
    backends = getattr(kind, "_backends", None)
    if backends is not None:
        missing = [backend for backend in backends if backend not in ("torch", "transformers")]
        return f"diffusers offers it only beside {', '.join(missing)}"
    if not is_torchvision_available() and _asks_for_torchvision(sys.modules[kind.__module__]):
        return "its file asks for torchvision"
    return ""


def _asks_for_torchvision(module: ModuleType) -> bool:
    """By an import or a question, wherever it stands; example code in docstrings does not count."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if any("torchvision" in name for name in (*names, source)):
            return True
    return False
