"""Reference models ("scenes"): small trained pipelines, the worlds they draw, and their exact checkers.

>>> from cache4diffusion import reference
>>> pipe = reference.load("scenes-flux")  # doctest: +SKIP
>>> caption = "a red circle left of a blue star on a gray background"
>>> image = next(iter(reference.generate(pipe, [caption])))  # doctest: +SKIP
>>> reference.check(image, caption).ok  # doctest: +SKIP
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache4diffusion.reference.checker import Verdict, check
    from cache4diffusion.reference.evaluate import accuracy, generate
    from cache4diffusion.reference.folder import SAMPLING, available, folder_of, load
    from cache4diffusion.reference.models import MODELS, ReferenceModel, model_named, model_of
    from cache4diffusion.reference.motion import check_clip
    from cache4diffusion.reference.scenes import FAMILIES, Scene, draw_scene, held_out_captions, held_out_scenes, render

_HOMES = {
    "checker": ("Verdict", "check"),
    "evaluate": ("accuracy", "generate"),
    "folder": ("SAMPLING", "available", "folder_of", "load"),
    "models": ("MODELS", "ReferenceModel", "model_named", "model_of"),
    "motion": ("check_clip",),
    "scenes": ("FAMILIES", "Scene", "draw_scene", "held_out_captions", "held_out_scenes", "render"),
}

__all__ = [
    "FAMILIES",
    "MODELS",
    "SAMPLING",
    "ReferenceModel",
    "Scene",
    "Verdict",
    "accuracy",
    "available",
    "check",
    "check_clip",
    "draw_scene",
    "folder_of",
    "generate",
    "held_out_captions",
    "held_out_scenes",
    "load",
    "model_named",
    "model_of",
    "render",
]


def __getattr__(name: str) -> Any:
    # Looked up on first use: scenes and checker need neither torch nor diffusers.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
