"""What a calibrated method declares: what a calibration of it consists of, whether that is measured or trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import Quality
from cache4diffusion.settings import check, describe
from cache4diffusion.sites import Site

Sums = dict[str, Tensor]
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Fit:
    """What a calibration is for.

    Args:
        tensors: the numbers the method takes, by name.
        quality: how well they explain what was measured, or do what they were trained for.
    """

    tensors: Mapping[str, Tensor]
    quality: Quality


@dataclass(frozen=True)
class Calibrator(ABC):
    """Base of a `Statistic`, which is measured, and of a `Training`: frozen settings, declared with `setting`."""

    def __post_init__(self) -> None:
        check(self)

    @property
    @abstractmethod
    def site(self) -> Site:
        """Where features are recorded: the method's own site."""

    @abstractmethod
    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """Names and shapes of the tensors that a fit has; None is any length. ``"*"`` in a name: any, or none."""

    def figure(self, sums: Sums, fit: Fit) -> Figure | None:
        """A picture of the fit, if there is something to see."""
        return None

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """Name, default, range and meaning of every setting."""
        return describe(cls)
