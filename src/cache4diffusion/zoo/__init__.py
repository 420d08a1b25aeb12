"""Every denoiser class of diffusers, small enough to run in milliseconds, with the arguments of a real call.

What diffusers exports is found by looking at it, so that a class of a later release is found too; if no configuration
is written down for it yet, that is what is said of it.
"""

from __future__ import annotations

import inspect
import warnings

from torch import nn

from cache4diffusion.anatomy.arguments import timestep_name
from cache4diffusion.anatomy.hints import HINTS, NOTHING
from cache4diffusion.errors import UnknownNameError, closest
from cache4diffusion.zoo.images import IMAGES
from cache4diffusion.zoo.others import OTHERS
from cache4diffusion.zoo.tiny import Case, Tiny
from cache4diffusion.zoo.unets import UNETS
from cache4diffusion.zoo.videos import VIDEOS
from cache4diffusion.zoo.wan import WAN

TINY: dict[str, Tiny] = {tiny.kind: tiny for tiny in (*IMAGES, *VIDEOS, *WAN, *OTHERS, *UNETS)}
"""By class name."""

_NO_DENOISERS = ("controlnet", "adapter", "autoencoder", "vae")


def denoiser_classes() -> dict[str, type[nn.Module]]:
    """The denoisers among the classes that the installed diffusers exports, by name.

    Those are its modules whose ``forward`` takes a clock, out of what makes no ControlNet, adapter or VAE.
    """
    import diffusers

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that will move
        for name in sorted(dir(diffusers)):
            try:
                value = getattr(diffusers, name)
            except (ImportError, RuntimeError):  # what it is made with is not installed
                continue
            if isinstance(value, type) and issubclass(value, nn.Module) and _is_denoiser(value):
                found[name] = value
    return found


def _is_denoiser(cls: type[nn.Module]) -> bool:
    home = cls.__module__.lower()
    if any(word in home for word in _NO_DENOISERS):
        return False
    names = list(inspect.signature(cls.forward).parameters)
    return timestep_name(names) is not None or not HINTS.get(cls.__name__, NOTHING).has_clock


def tiny(name: str) -> Tiny:
    """The configuration of a class.

    Raises:
        UnknownNameError: none is known; the nearest is named.
    """
    if name not in TINY:
        raise UnknownNameError(f"No tiny configuration is known of {name!r}{closest(name, TINY) or '.'}")
    return TINY[name]


__all__ = ["TINY", "Case", "Tiny", "denoiser_classes", "tiny"]
