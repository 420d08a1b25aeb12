"""Denoisers of one kind are observed once."""

from unet_fixtures import seen_once  # noqa: F401
