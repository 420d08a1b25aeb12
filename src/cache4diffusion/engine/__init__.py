"""Putting a composition to work in a denoiser. Only this package changes modules, by wrappers on instances."""

from cache4diffusion.engine.core import Engine

__all__ = ["Engine"]
