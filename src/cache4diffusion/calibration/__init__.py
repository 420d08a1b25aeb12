"""Calibrations: what a method needs to know of a denoiser before sampling."""
