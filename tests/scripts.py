"""Scripts of ``benchmarks/`` as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    """``benchmarks/<name>.py``, imported once."""
    known = f"benchmarks_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        sys.modules[known] = importlib.util.module_from_spec(spec)  # where dataclasses look their annotations up
        sys.path.insert(0, str(FOLDER))  # as where it is run: scripts share modules
        try:
            spec.loader.exec_module(sys.modules[known])
        finally:
            sys.path.remove(str(FOLDER))
    return sys.modules[known]
