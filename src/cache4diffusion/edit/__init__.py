"""Editing pictures from what was kept of the run that made them."""

from cache4diffusion.edit.recording import Recording, record

__all__ = ["Recording", "record"]
