"""What a corrector is: a predictor that also sees something of the step itself, and corrects or maps it.

A site hands it what it asks for (``sees``), at full steps beside the feature and at cached steps in its place::

    full      state = init_at(site, ...) once;  update_seeing(state, leaves, seen, time)
    cached    leaves = correct(material(state, time), seen)

The two halves of a prediction are apart because a compiled block can hold only one of them: `material` looks things up
before the block runs, `correct` is traced inside of it. Nothing of what is predicted is remembered.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.errors import CalibrationError
from cache4diffusion.storage import PLAIN, Store

Sight = Literal["input", "front"]


class Corrector(ABC):
    """A predictor that sees the step itself.

    ``sees`` says what: ``"input"``, the tensors that enter the site in this step, one for each leaf of its feature;
    ``"front"``, what the watched blocks in front of a span added, likewise.
    """

    sees: ClassVar[Sight]
    predicts: ClassVar[Literal["anything", "residual"]] = "anything"  # what a feature must be for it to make sense
    keeps_constants: ClassVar[bool] = True  # whether what never changes is predicted exactly

    @property
    def needs_num_steps(self) -> bool:
        """Where the run ends does not matter."""
        return False

    @abstractmethod
    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> Any:
        """Return the empty state of one site, as `Predictor.init`."""

    @abstractmethod
    def is_ready(self, state: Any) -> bool:
        """Whether anything can be predicted, as `Predictor.is_ready`."""

    @abstractmethod
    def update_seeing(
        self,
        state: Any,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor],
        time: float,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Take in the feature of a full step and what was seen with it (of the given rows)."""

    @abstractmethod
    def material(self, state: Any, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """What a prediction is made from, looked up and not computed with (of the given rows)."""

    @abstractmethod
    def correct(self, material: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """The predicted leaves, new tensors. Depends on nothing else: it is traced inside compiled blocks."""

    def prefetch(self, state: Any, time: float) -> None:  # noqa: B027 - optional step
        """Begin to bring what `material` will look up, where it lies on another device."""

    def flops(self, state: Any, leaves: Sequence[Tensor]) -> int:
        """What a correction of these leaves costs in matrix products (two per multiply-add)."""
        return 0

    def predict_seeing(
        self, state: Any, seen: Sequence[Tensor], time: float, rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The predicted leaves, given what is seen in the step. Writes nothing."""
        return self.correct(self.material(state, time, rows), seen)

    def update(self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Refuse to take in a feature blindly; the engine never asks for it."""
        raise TypeError(f"{type(self).__name__} must see the {self.sees} of a feature: use update_seeing.")

    def predict(self, state: Any, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Refuse to predict blindly; the engine never asks for it."""
        raise TypeError(f"{type(self).__name__} must see the {self.sees} of a feature: use predict_seeing.")

    def commit(  # noqa: B027 - optional step
        self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None
    ) -> None:
        """Nothing: what is predicted is not remembered."""


@runtime_checkable
class Sited(Protocol):
    """A predictor that brings numbers of its own for each site."""

    def serves(self, site: str) -> bool:
        """Whether it has numbers for this site. What it does not serve is computed on every step."""
        ...

    def init_at(self, site: str, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> Any:
        """As `Predictor.init`, of the site of this name; called instead of it."""
        ...


class Weights:
    """Fitted tensors of many sites, by name: ``SITE/LEAF/KIND``.

    The engine's states hold what they use; as long as one of them does, all branches share one copy on their device.

    Args:
        tensors: by name, wherever they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.sites = frozenset(name.split("/", 1)[0] for name in tensors)
        self._placed: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<weights of {len(self.sites)} sites>"

    @property
    def placed(self) -> list[Tensor]:
        """The copies that are in use, on whatever device."""
        return list(self._placed.values())

    def serves(self, site: str) -> bool:
        """Whether there are any for this site."""
        return site in self.sites

    def get(self, name: str, shape: Sequence[int | None], like: Tensor, longest: int = 0) -> Tensor:
        """A tensor of a site in the dtype and on the device of another one.

        Args:
            name: ``SITE/LEAF/KIND``.
            shape: what it must be; None is any length.
            like: a tensor of the feature.
            longest: the most that this length can be.

        Raises:
            CalibrationError: there is none, or it was fitted to another shape.
        """
        key = (name, like.dtype, like.device)
        placed = self._placed.get(key)
        if placed is None:
            placed = self._placed[key] = self._make(name, shape, like, longest)
        return placed

    def _make(self, name: str, shape: Sequence[int | None], like: Tensor, longest: int) -> Tensor:
        found = self.tensors.get(name)
        if found is None or found.ndim != len(shape) or any(b not in (None, a) for a, b in zip(found.shape, shape)):  # noqa: B905
            words = ", ".join("any" if size is None else str(size) for size in shape)
            what = "nothing" if found is None else f"a tensor {list(found.shape)}"
            raise CalibrationError(
                f"The calibration has {what} under {name}, and [{words}] is needed: it was made with another denoiser, "
                "or with other arguments of its call. Calibrate anew."
            )
        made = found.to(like.device, like.dtype)
        return made.clone() if made is found else made  # the ledger counts it, so it is the run's own


class Blank(Weights):
    """In place of weights that were not fitted yet: zeros, as large as they will be. For counting bytes.

    Args:
        free: the length of an axis that the fit decides on.
    """

    def __init__(self, free: int = 1) -> None:
        super().__init__({})
        self.free = free

    def serves(self, site: str) -> bool:
        """Every site."""
        return True

    def _make(self, name: str, shape: Sequence[int | None], like: Tensor, longest: int) -> Tensor:
        return like.new_zeros([min(self.free, longest) if size is None else size for size in shape])


def along_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``W x + b`` at every place: of the last axis of tokens ``[B, N, D]``, of axis 1 of maps ``[B, D, H, W]``."""
    if x.ndim <= 3:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def constant(x: Tensor, value: Tensor) -> Tensor:
    """A new tensor with ``value`` (one number per channel) at every place of ``x``."""
    if x.ndim <= 3:
        return value.expand(*x.shape[:-1], -1).clone()
    return value.expand(*places(x), -1).movedim(-1, 1).clone()


def channels(x: Tensor) -> int:
    """Number of channels, of tokens or of maps."""
    return x.shape[-1] if x.ndim <= 3 else x.shape[1]


def product_flops(x: Tensor, weight: Tensor) -> int:
    """FLOPs of ``W x`` at every place of ``x``."""
    return 2 * math.prod(places(x)) * weight.numel()


def places(x: Tensor) -> tuple[int, ...]:
    """Everything of a shape but the channels."""
    return tuple(x.shape[:-1]) if x.ndim <= 3 else (x.shape[0], *x.shape[2:])


def paired(leaves: Sequence[Tensor], inputs: Iterable[Tensor]) -> tuple[int, ...] | None:
    """For each leaf of a feature, the input it is made from: the first one with the same places, in the same order.

    Several leaves may share an input (an adapter's contribution beside the attention's own). None where a leaf has
    places that nothing brought.
    """
    entering, found = list(inputs), []
    for leaf in leaves:
        fits = [i for i, x in enumerate(entering) if x.ndim == leaf.ndim and places(x) == places(leaf)]
        free = [i for i in fits if i not in found]
        if not fits:
            return None
        found.append((free or fits)[0])
    return tuple(found)
