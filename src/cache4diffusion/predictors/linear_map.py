"""A fitted linear map of what enters stands for a block. Source: FastCache, arXiv:2505.20353."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from cache4diffusion.predictors.corrector import (
    Corrector,
    Sight,
    Weights,
    along_channels,
    channels,
    constant,
    product_flops,
)
from cache4diffusion.storage import PLAIN, Store


class MapState:
    """The map of one site. It holds no feature."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.maps: list[tuple[Tensor, Tensor]] = []  # W and b, for each leaf; none where nothing was fitted
        self.blanks: list[Tensor] = []  # then: zeros, one per channel of each leaf
        self.is_known = False  # whether the site was recorded, so that the kind of its feature is known

    @property
    def buffers(self) -> list[Tensor]:
        """Nothing of past steps."""
        return []

    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""
        for pair in self.maps:
            yield from pair
        yield from self.blanks


@dataclass(frozen=True)
class LinearMap(Corrector):
    """Predict ``W x + b`` from what enters in the step itself; past features play no part.

    The feature is what is *added* to x, so that W = 0, b = 0 (where nothing was fitted) passes x through: the block is
    skipped. Exact for blocks that are affine. The same at every step: what depends on the timestep beyond x is lost.

    Args:
        weights: ``SITE/LEAF/weight`` ``[D, D]`` and ``SITE/LEAF/bias`` ``[D]``; None for none.

    Memory: the maps, which branches share; no feature. Cost: ``D^2`` multiply-adds per token.
    """

    keeps_constants: ClassVar[bool] = False  # it is a fit

    sees: ClassVar[Sight] = "input"
    predicts: ClassVar[Literal["anything", "residual"]] = "residual"

    weights: Weights | None = None

    def serves(self, site: str) -> bool:
        """Sites with a map; all, where there are none at all."""
        return self.weights is None or self.weights.serves(site)

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> MapState:
        """Of a site that has no name."""
        return self.init_at("", rows, num_steps, store)

    def init_at(self, site: str, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> MapState:
        """The map is fetched when the feature's width is known."""
        return MapState(site)

    def is_ready(self, state: MapState) -> bool:
        """After one full step."""
        return state.is_known

    def update_seeing(
        self,
        state: MapState,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor],
        time: float,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Learn what kind of feature it is."""
        if self.weights is None:
            state.blanks = state.blanks or [y.new_zeros(channels(y)) for y in leaves]
        elif not state.is_known:
            for i, (y, x) in enumerate(zip(leaves, seen, strict=True)):
                weight = self.weights.get(f"{state.site}/{i}/weight", (channels(y), channels(x)), y)
                state.maps.append((weight, self.weights.get(f"{state.site}/{i}/bias", (channels(y),), y)))
        state.is_known = True

    def flops(self, state: MapState, leaves: Sequence[Tensor]) -> int:
        """``2 D^2`` at every place."""
        return sum(product_flops(y, weight) for y, (weight, _) in zip(leaves, state.maps, strict=False))

    def material(self, state: MapState, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """W and b of each leaf."""
        return [*(tensor for pair in state.maps for tensor in pair), *state.blanks]

    def correct(self, material: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """``W x + b``."""
        if len(material) == len(seen):
            return [constant(x, blank) for x, blank in zip(seen, material, strict=True)]
        return [
            along_channels(x.to(material[2 * i].dtype), material[2 * i], material[2 * i + 1])
            for i, x in enumerate(seen)
        ]
