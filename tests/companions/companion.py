"""What a companion is: something else that people put on a pipeline or its denoiser, and what must be so beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

import cache4diffusion as c4d
import toys
from pipelines.case import denoisers
from pipelines.unets import sd_call, sd_like

ORDERS = ("before", "after")


@dataclass(frozen=True, eq=False)
class Subject:
    """A tiny stock pipeline, how it is sampled from, and the methods tried on it, by kind of site.

    Args:
        make: builds it, with the same random weights each time.
        sample: one run.
        methods: name and settings that cache whatever the weights are, and the settings that are off.
    """

    make: Callable[[], Any]
    sample: Callable[[Any], torch.Tensor]
    methods: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]]


def flux() -> Any:
    return toys.flux_pipeline(toys.flux().requires_grad_(False))


def unet() -> Any:
    found = sd_like()
    found.set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
def flux_sample(pipe: Any) -> torch.Tensor:
    return toys.generate(pipe, 9)


@torch.no_grad()
def unet_sample(pipe: Any) -> torch.Tensor:
    words = {"num_inference_steps": 9, "generator": toys.generator(0), "output_type": "latent"}
    return pipe(**sd_call(), **words).images


WHOLE = ("taylorseer-lite", {"interval": 3, "warmup": 1}, {"interval": 1, "warmup": 1})
PART = ("taylorseer", {"interval": 3, "warmup": 1}, {"interval": 1, "warmup": 1})
# Blocks run in front of the span and behind it, as the published setting has it.
SPAN = (
    "dbcache",
    {"front": 1, "back": 2, "warmup": 1, "threshold": 1e9},
    {"front": 1, "back": 2, "warmup": 1, "threshold": 0.0},
)
LEVEL = ("deepcache", {"interval": 3}, {"interval": 1})

FLUX = Subject(flux, flux_sample, {"whole": WHOLE, "span": SPAN, "part": PART})
UNET = Subject(unet, unet_sample, {"whole": WHOLE, "level": LEVEL, "part": PART})


@dataclass(frozen=True)
class Companion:
    """One companion, and how it is put on a pipeline.

    Args:
        name: as the table calls it.
        how: what a user writes.
        apply: does that, to a pipeline that may be accelerated.
        undo: takes it away again, where that can be.
        restores: how far from the bit-equal plain pipeline `undo` may leave it, relative: weights that something was
            added to and taken from again are rounded.
        needs: the package that must be installed.
        refused: words of the error, by kind of site, or by order and kind; ``""`` stands for all.
        subject: what it is tried on.
        also: what else must be so of the pipeline when it was applied: that it does something there.
    """

    name: str
    how: str
    apply: Callable[[Any], None]
    undo: Callable[[Any], None] | None = None
    restores: float = 0.0
    needs: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    subject: Subject = FLUX
    also: Callable[[Any], bool] | None = None

    def refusal(self, order: str, site: str) -> str | None:
        """The words with which it is refused in this order and on this kind of site; None if it is not."""
        for key in (f"{order} {site}", order, site, ""):
            if key in self.refused:
                return self.refused[key]
        return None

    @property
    def absence(self) -> str | None:
        """Why it cannot be had here; None if it can."""
        if self.needs is None or version_of(self.needs) is not None:
            return None
        return f"{self.needs} is not installed"


def version_of(package: str) -> str | None:
    """Of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def denoiser_of(pipe: Any) -> nn.Module:
    (found,) = denoisers(pipe).values()
    return found


def accelerate(pipe: Any, companion: Companion, site: str, *, is_off: bool = False) -> c4d.Handle:
    method, settings, off = companion.subject.methods[site]
    return c4d.accelerate(pipe, method, **(off if is_off else settings))
