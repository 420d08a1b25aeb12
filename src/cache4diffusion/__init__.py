"""cache4diffusion: feature caching for diffusion models behind one interface."""

from cache4diffusion import edit, methods
from cache4diffusion.accelerate import accelerate
from cache4diffusion.calibration import Calibration
from cache4diffusion.calibration.run import calibrate
from cache4diffusion.compare import compare
from cache4diffusion.composition import Composition
from cache4diffusion.declare import declare
from cache4diffusion.errors import Cache4DiffusionError
from cache4diffusion.handle import Handle
from cache4diffusion.memory import cache_bytes
from cache4diffusion.method import METHODS, Method, method
from cache4diffusion.quantising import quantised
from cache4diffusion.selfcheck import selfcheck

__version__ = "0.1.0.dev0"

__all__ = [
    "METHODS",
    "Cache4DiffusionError",
    "Calibration",
    "Composition",
    "Handle",
    "Method",
    "__version__",
    "accelerate",
    "cache_bytes",
    "calibrate",
    "compare",
    "declare",
    "edit",
    "method",
    "methods",
    "quantised",
    "selfcheck",
]
