"""What the feature of a part is, and the output that a host gets around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cache4diffusion.anatomy import Part
from cache4diffusion.engine.leaves import Place, map_tensors


class Feature:
    """Of a part that makes tokens: its output as it is."""

    def apart(self, output: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The feature in an output of the module, which was called with these arguments."""
        return output

    def whole(self, feature: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The output around a feature."""
        return feature

    def seen(self, entered: Tensor) -> Tensor:
        """What enters, in the feature's own form."""
        return entered


class MapFeature(Feature):
    """Of a part that makes maps ``[B, C, ...]``: the map as tokens ``[B, ..., C]``, a view.

    Predictors, and numbers per channel, then find the channels where tokens have theirs.

    Args:
        adds_to: the argument that the module adds it to by itself, which is taken off; None if there is none.
    """

    def __init__(self, adds_to: Place | None) -> None:
        self.adds_to = adds_to

    def apart(self, output: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Channels last, without what it was added to."""
        if self.adds_to is None:
            return map_tensors(_channels_last, output)
        x = self.adds_to.get(args, kwargs)
        return map_tensors(lambda y: _channels_last(y - x), output)

    def whole(self, feature: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Channels first, added to today's."""
        if self.adds_to is None:
            return map_tensors(_channels_first, feature)
        x = self.adds_to.get(args, kwargs)
        return map_tensors(lambda y: x + _channels_first(y), feature)

    def seen(self, entered: Tensor) -> Tensor:
        """Channels last, too."""
        return _channels_last(entered)


def feature_of(part: Part, module: nn.Module) -> Feature:
    """The form of a part's feature."""
    if not part.is_of_maps:
        return Feature()
    return MapFeature(None if part.adds_to is None else Place.of(module, part.adds_to))


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)
