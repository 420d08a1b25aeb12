"""Compute one token per cluster and let it speak for its members: the token rule of ClusCa (arXiv:2509.10312)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.tokens.base import Segment, TokenPlace


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Labels ``[B, N]`` and centroids ``[B, K, D]`` of tokens ``[B, N, D]``, by L1 distances; float32, no host sync.

    A cluster without tokens keeps its centroid. Sums are matrix products, so that they have one order on every device.

    Args:
        x: the tokens.
        centroids: where to begin, ``[B, K, D]``.
        iterations: as many assignments; more than are needed change nothing.
    """
    x = x.float()
    labels = x.new_zeros(x.shape[:2], dtype=torch.long)
    for _ in range(iterations):
        labels = torch.cdist(x, centroids, p=1.0).argmin(-1)
        sums, counts = sums_by_label(x, labels, centroids.shape[1])
        centroids = torch.where(counts[..., None] > 0, sums / counts.clamp_min(1)[..., None], centroids)
    return labels, centroids


def sums_by_label(values: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of ``[B, N, D]``: sums per label ``[B, count, D]``, and how many there are ``[B, count]``, in float32."""
    one_hot = torch.nn.functional.one_hot(labels, count).to(torch.float32)
    return one_hot.transpose(1, 2) @ values.float(), one_hot.sum(1)


def representatives(labels: Tensor, noise: Tensor, count: int) -> Tensor:
    """``count`` distinct tokens ``[B, count]``, sorted: of every cluster the one with the highest noise, and for each
    cluster without tokens another token, again by the noise.

    Args:
        labels: ``[B, N]``, below ``count``.
        noise: ``[1, N]``, in [0, 1).
        count: of the clusters, at most N.
    """
    noise = noise.expand_as(labels)
    highest = noise.new_full((labels.shape[0], count), -1.0).scatter_reduce_(1, labels, noise, "amax")
    rank = noise + (noise == highest.gather(1, labels))
    return rank.topk(count, dim=1).indices.sort(dim=1).values


@dataclass
class ClusterState:
    """What is kept of a branch (labels and centroids, by kind of stream) or of a part (how it was moved)."""

    labels: dict[str, Tensor] = field(default_factory=dict)  # [B, N]
    centroids: dict[str, Tensor] = field(default_factory=dict)  # [B, K, D], float32
    moved: Tensor | None = None  # how far from the feature of the last full step; float32
    drift: list[Tensor] = field(default_factory=list)  # by which its differences of order 1, 2, ... are smaller
    since: int | None = None  # the last full step


@dataclass(frozen=True)
class ClusterTokens:
    """Of every cluster, one token drawn anew at each step and part; its output moves those of the other members.

    Tokens are clustered once per full step, by what leaves the last block that has an MLP of its own: image tokens
    and text tokens apart, by k-means on L1 distances that begins where the last one ended. On a cached step, in every
    MLP, with the prediction ``P`` and the computed outputs ``y``::

        out = P + gamma * (mean of y over the token's cluster - P)        all in float32
        out[computed] = y

    Text tokens that are not computed keep ``P``, unless ``spreads_text``. There are always ``clusters`` computed
    tokens (or all, if there are fewer), whatever the data.

    Args:
        clusters: ``K``, per stream. Released code: 16 (FLUX, DiT), 32 (HunyuanVideo).
        gamma: weight of the cluster's mean, 0 to 1. Released code: 0.005 (FLUX), 0.01 (HunyuanVideo), 0 (DiT).
        spreads_text: whether text tokens are moved, too. Released code: no (FLUX), yes (HunyuanVideo).
        iterations: of k-means. Released code: at most 10 (100 on DiT), or until centroids stand still.
        seed: of the draws, which are the same on every device and for every row.
        variant: ``"official"`` keeps the released arithmetic: what tokens were moved by stays with them until the next
            full step, which takes its differences from there; and these are added on top, also to tokens that were just
            computed.
        order, first_difference_step: of the Taylor predictor whose differences these are; for ``"official"``.

    Raises:
        SettingError: a value is out of range.

    Memory: per stream one label per token and ``K`` centroids; ``"official"`` ``order + 1`` copies of
    every MLP's output in float32.
    """

    clusters: int = 16
    gamma: float = 0.005
    spreads_text: bool = False
    iterations: int = 10
    seed: int = 0
    variant: Literal["ours", "official"] = "ours"
    order: int = 0
    first_difference_step: int = 0

    def __post_init__(self) -> None:
        if self.clusters < 0 or not 0 <= self.gamma <= 1 or self.iterations < 1:
            raise SettingError(
                f"ClusterTokens(clusters={self.clusters}, gamma={self.gamma}, iterations={self.iterations}): clusters "
                "must be 0 or more, gamma 0 to 1, iterations 1 or more."
            )
        if self.variant not in ("ours", "official"):
            raise SettingError(f"ClusterTokens(variant={self.variant!r}): variant must be 'ours' or 'official'.")

    @property
    def needs_num_steps(self) -> bool:
        """A fixed number of tokens."""
        return False

    @property
    def observes(self) -> frozenset[str]:
        """Nothing of attention."""
        return frozenset()

    @property
    def kinds(self) -> frozenset[str]:
        """MLPs. Other parts keep their prediction."""
        return frozenset({"ffn"}) if self.clusters > 0 else frozenset()

    def init(self) -> ClusterState:
        """Nothing is known."""
        return ClusterState()

    def survey(self, state: ClusterState, streams: Mapping[str, Tensor], twins: Tensor | None) -> None:
        """Cluster the tokens of a full step. Where rows are twins they share their clusters, by the mean of both."""
        for kind, x in streams.items():
            x = x.float()
            if twins is not None:
                x = torch.where(twins[:, None, None], (x + x.roll(len(x) // 2, 0)) / 2, x)
            count = min(self.clusters, x.shape[1])
            begin = state.centroids.get(kind)
            if begin is None:
                order = torch.randperm(x.shape[1], generator=_generator(f"{self.seed}/{kind}"))
                begin = x[:, sent(order[:count], x.device)]
            state.labels[kind], state.centroids[kind] = kmeans(x, begin, self.iterations)

    def observe(self, state: ClusterState, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """A full step: nothing is moved. Differences begin at where the last one's tokens had been moved to."""
        if self.variant == "official":
            made, before = [torch.zeros(())], []
            if state.since is not None and place.step.index >= self.first_difference_step:
                before = [torch.zeros(()) if state.moved is None else -state.moved, *state.drift]
            for old in before[: self.order]:
                made.append((made[-1] - old) / (place.step.index - state.since))  # type: ignore[operator]
            state.drift, state.since = made[1:], place.step.index
        state.moved = None

    def select(self, state: ClusterState, place: TokenPlace, device: torch.device) -> Tensor:
        """A random member of every cluster, sorted."""
        chosen = []
        for segment in place.segments:
            labels = self._labels(place, segment)
            if labels is not None:
                key = f"{self.seed}/{place.step.index}/{place.part}/{segment.start}"
                noise = sent(torch.rand(1, labels.shape[1], generator=_generator(key)), device)
                count = min(self.clusters, labels.shape[1])
                chosen.append(representatives(labels, noise, count) + segment.start)
        if not chosen:
            return torch.zeros(place.batch, 0, dtype=torch.long, device=device)
        return torch.cat(chosen, dim=1)

    @staticmethod
    def _labels(place: TokenPlace, segment: Segment) -> Tensor | None:
        labels = place.survey.labels.get(segment.kind) if isinstance(place.survey, ClusterState) else None
        return labels if labels is not None and labels.shape[1] == segment.stop - segment.start else None

    def spread(
        self,
        state: ClusterState,
        place: TokenPlace,
        predicted: Sequence[Tensor],
        last: Callable[[], Sequence[Tensor]],
        index: Tensor,
        fresh: Sequence[Tensor],
    ) -> list[Tensor]:
        """What the part's tensors become."""
        if self.variant == "ours":
            return [self._moved(place, p.float(), index, y).to(p.dtype) for p, y in zip(predicted, fresh, strict=True)]
        (p,), (then,), (y,) = predicted, last(), fresh  # an MLP returns one tensor
        then = then.float()
        state.moved = self._moved(place, then if state.moved is None else then + state.moved, index, y) - then
        assert state.since is not None
        out, distance = p.float() + state.moved, place.step.index - state.since
        for k, drift in enumerate(state.drift, 1):
            out -= drift * (distance**k / math.factorial(k))
        return [out.to(p.dtype)]

    def _moved(self, place: TokenPlace, values: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
        """``values`` [B, N, D] in float32, moved towards what was computed; computed tokens as they were computed."""
        begin, moved = 0, values.clone()
        for segment in place.segments:
            labels = self._labels(place, segment)
            if labels is None:
                continue
            count = min(self.clusters, labels.shape[1])
            own = slice(begin, begin + count)
            begin += count
            if self.gamma > 0 and (segment.kind != "text" or self.spreads_text):
                mine = labels.gather(1, index[:, own] - segment.start)
                sums, counts = sums_by_label(fresh[:, own], mine, self.clusters)
                means = sums / counts.clamp_min(1)[..., None]
                means = means.gather(1, labels[..., None].expand(-1, -1, means.shape[-1]))
                is_led = (counts > 0).gather(1, labels)[..., None]  # of a cluster that nothing was computed of, none
                span = moved[:, segment.start : segment.stop]
                span += torch.where(is_led, self.gamma * (means - span), 0.0)
        return moved.scatter_(1, index[..., None].expand(-1, -1, moved.shape[-1]), fresh.float())

    def tensors(self, state: ClusterState) -> Sequence[Tensor]:
        """Labels, centroids, and how far tokens were moved."""
        moved = [] if state.moved is None else [state.moved]
        return [*state.labels.values(), *state.centroids.values(), *moved, *state.drift]


def _generator(key: str) -> torch.Generator:
    """The same on every device and Python."""
    return torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
