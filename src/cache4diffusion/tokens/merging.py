"""Merge similar tokens: bipartite soft matching, of ToMe for Stable Diffusion (arXiv:2303.17604) and what followed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.tokens.base import TokenPlace
from cache4diffusion.tokens.reduction import Form, Plan, Signal


def destinations(
    grid: tuple[int, int, int], window: int | tuple[int, int, int], generator: torch.Generator | None
) -> Tensor:
    """One token of each window, sorted; the first of each without a generator.

    Frames, rows and columns that fill no window hold none.

    Args:
        grid: frames, rows and columns.
        window: likewise; a number: so many rows and columns of a frame.
        generator: draws them.
    """
    deep, high, wide = (1, window, window) if isinstance(window, int) else window
    _, height, width = grid
    depth, rows, columns = (side // piece for side, piece in zip(grid, (deep, high, wide), strict=True))
    if generator is None:
        drawn = torch.zeros(depth, rows, columns, dtype=torch.long)
    else:
        drawn = torch.randint(deep * high * wide, (depth, rows, columns), generator=generator)
    z = torch.arange(depth)[:, None, None] * deep + drawn // (high * wide)
    y = torch.arange(rows)[:, None] * high + drawn // wide % high
    x = torch.arange(columns) * wide + drawn % wide
    return (z * height * width + y * width + x).flatten().sort().values


def others(chosen: Tensor, length: int) -> Tensor:
    """All tokens but these (``[B, n]``, unique per row) of ``length``, sorted: ``[B, length - n]``."""
    is_chosen = chosen.new_zeros(len(chosen), length, dtype=torch.uint8).scatter_(1, chosen, 1)
    return is_chosen.sort(dim=1, stable=True).indices[:, : length - chosen.shape[1]]


def match(metric: Tensor, dst: Tensor, src: Tensor, twins: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every source the largest cosine to a destination, and to which one; both ``[B, sources]``.

    Args:
        metric: tokens ``[B, N, D]``.
        dst, src: their indices, ``[B, destinations]`` and ``[B, sources]``.
        twins: rows that are matched together, by the mean of their cosines.
    """
    unit = normalize(metric.float(), dim=-1)
    sources, targets = (unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1])) for index in (src, dst))
    cosines = sources @ targets.transpose(1, 2)
    if twins is not None:
        cosines = torch.where(twins[:, None, None], (cosines + cosines.roll(len(cosines) // 2, 0)) / 2, cosines)
    best = cosines.max(dim=-1)
    return best.values, best.indices


def merge_plan(dst: Tensor, src: Tensor, target: Tensor, merged: Tensor, form: Form, **made: int) -> Plan:
    """The plan by which some sources are merged into destinations; what is left is the other sources, then these.

    Args:
        dst, src: indices of the tokens, ``[B, destinations]`` and ``[B, sources]``.
        target: of every source the destination, ``[B, sources]``.
        merged: which sources are merged, ``[B, r]``, unique.
        form: of the plan.
        **made: what it took to make the plan.
    """
    (batch, count), r = src.shape, merged.shape[1]
    is_merged = torch.zeros(batch, count, dtype=torch.bool, device=src.device).scatter_(1, merged, True)
    left = is_merged.to(torch.uint8).sort(dim=1, stable=True).indices[:, : count - r]
    kept = torch.cat([src.gather(1, left), dst], dim=1)
    slots = torch.arange(kept.shape[1], device=src.device).expand(batch, -1)
    own = torch.zeros_like(target).scatter_(1, left, slots[:, : count - r])
    own = torch.where(is_merged, target + count - r, own)
    owner = torch.empty(batch, count + dst.shape[1], dtype=torch.long, device=src.device)
    owner.scatter_(1, src, own).scatter_(1, dst, slots[:, count - r :])
    return Plan(kept, owner, form, **made)


@dataclass
class MergeState:
    """Of one block: the plan that serves until it is renewed."""

    plan: Plan | None = None


@dataclass(frozen=True)
class MergeTokens:
    """Bipartite soft matching: one token of each window is a *destination*, the others are *sources*, and of these the
    ``r`` that are most like a destination (by cosine) are merged into it.

    ``r = int(ratio * N)``, at most all sources; or, with a ``threshold``, the number of sources whose cosine reaches
    it: of all rows the smallest number, so that nothing below the threshold is merged (``"official"``: the largest, as
    in the released code). With a threshold the number of tokens depends on the data, and every new plan costs a host
    sync; it is rounded down to a multiple of ``bucket``, so that there are few shapes.

    Destinations are drawn on the host, the same on every device and for every row. Halves of batched guidance are
    matched together. A plan is made anew at the steps in ``renew_at``, or if there are none at every ``renew``-th.

    Args:
        ratio: share of the tokens that is merged, 0 to 1. Released code: 0.5.
        threshold: smallest cosine that is merged, in place of the ratio; 1 or more merges nothing. Code: 0.7 (CA-ToMe).
        window: side of a neighbourhood. Released code: 2.
        is_random: whether destinations are drawn; else the first token of each window is one.
        form: of the plans; ``"mlerp"`` and ``"pick"`` are ToFu's.
        pick_depth: share of the blocks, from the first, that pick, whatever ``form`` says.
        renew, renew_at: when a plan is made.
        pool: how many tokens are *important*, as a multiple of those that are left; 0 for none. The most important by
            `TokenPlace.signal`; of equal ones, some are drawn. Destinations are drawn from them instead of one per
            window, as many. All tokens that matter less than these are merged before any of them, and none of these
            is with 1 or less. Where nothing is known (without a signal, in rows that are no halves of guidance),
            destinations are those of the windows. Released code: 1.4, and 1 (PixArt).
        bucket: see above.
        seed: of the draws.
        variant: see above.

    Raises:
        SettingError: a value is out of range.

    Memory: two indices per token and block, where a plan serves several steps.
    """

    ratio: float = 0.5
    threshold: float | None = None
    window: int = 2
    is_random: bool = True
    form: Form = "mean"
    pick_depth: float = 0.0
    renew: int = 1
    renew_at: tuple[int, ...] = ()
    bucket: int = 1
    pool: float = 0.0
    seed: int = 0
    variant: Literal["ours", "official"] = "ours"

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.ratio, self.pick_depth)):
            raise SettingError(
                f"MergeTokens(ratio={self.ratio}, pick_depth={self.pick_depth}): all must be shares, 0 to 1."
            )
        if not self.pool >= 0 or (self.pool > 0 and self.threshold is not None):
            raise SettingError(
                f"MergeTokens(pool={self.pool}, threshold={self.threshold}): pool must be 0 (no token is important) or "
                "more, and goes with a ratio: how many tokens are left must be known."
            )
        if min(self.window, self.renew, self.bucket) < 1 or min(self.renew_at, default=0) < 0:
            raise SettingError(
                f"MergeTokens(window={self.window}, renew={self.renew}, bucket={self.bucket}, "
                f"renew_at={self.renew_at}): steps to renew at must be 0 or more, the others 1 or more."
            )
        if self.form not in ("pick", "mean", "mlerp") or self.variant not in ("ours", "official"):
            raise SettingError(
                f"MergeTokens(form={self.form!r}, variant={self.variant!r}): forms are 'pick', 'mean' and 'mlerp', "
                "variants 'ours' and 'official'."
            )

    @property
    def needs_num_steps(self) -> bool:
        """Nothing follows the progress of the run."""
        return False

    def init(self) -> MergeState:
        """No plan yet."""
        return MergeState()

    def is_due(self, index: int) -> bool:
        """Whether plans are made anew at a step."""
        return index in self.renew_at if self.renew_at else index % self.renew == 0

    def plan(self, state: MergeState, place: TokenPlace, entering: Tensor) -> Plan | None:
        """A new plan, or the one that still serves."""
        if self._merges_nothing:
            return None
        served = state.plan
        if served is not None and not self.is_due(place.step.index) and served.kept.device == entering.device:
            return served
        made = self._made(place, entering)
        keeps = bool(self.renew_at) or self.renew > 1
        state.plan = made if keeps else None
        return made

    @property
    def _merges_nothing(self) -> bool:
        return self.ratio == 0 if self.threshold is None else self.threshold >= 1

    @property
    def signal(self) -> Signal | None:
        """What the driver is to find out of the tokens."""
        return "guidance" if self.pool > 0 else None

    def _made(self, place: TokenPlace, entering: Tensor) -> Plan:
        (batch, length, dim), (segment,) = entering.shape, place.segments
        assert segment.grid is not None
        generator = None
        if self.is_random:
            key = f"{self.seed}/{place.step.index}/{place.part}"
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
        dst = destinations(segment.grid, self.window, generator)
        dst = sent(dst, entering.device).expand(batch, -1)
        is_least = None
        if self.pool > 0 and place.signal is not None:
            is_known = torch.ones_like(dst[:, :1], dtype=torch.bool) if place.twins is None else place.twins[:, None]
            drawn, is_least = self._important(place, place.signal, dst.shape[1])
            dst, is_least = torch.where(is_known, drawn, dst), is_least & is_known
        src = others(dst, length)
        cosine, target = match(entering, dst, src, place.twins)
        count = self._count(cosine, length)
        if is_least is not None:
            cosine = cosine + 4.0 * is_least.gather(1, src)  # before all others: these differ by 2 at most
        merged = cosine.topk(count, dim=1).indices
        form: Form = "pick" if place.layer < self.pick_depth * place.num_layers else self.form
        flops = 2 * batch * src.shape[1] * dst.shape[1] * dim
        return merge_plan(dst, src, target, merged, form, flops=flops, syncs=int(self.threshold is not None))

    def _important(self, place: TokenPlace, signal: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """So many destinations among the important tokens, ``[B, count]``; and which tokens matter less than all these,
        ``[B, N]``: none where all matter as much.
        """
        length = signal.shape[1]
        left = length - min(int(self.ratio * length + 1e-9), length - count)
        size = min(max(int(self.pool * left + 1e-9), count), length)
        key = f"{self.seed}/{place.step.index}/{place.part}/pool"
        ties, draws = torch.rand(2, length, generator=torch.Generator("cpu").manual_seed(zlib.crc32(key.encode())))
        order = sent(ties.argsort(), signal.device).expand_as(signal)
        ranked = signal.gather(1, order).sort(dim=1, descending=True, stable=True)
        pool = order.gather(1, ranked.indices[:, :size])
        chosen = sent(draws, signal.device).expand_as(signal).gather(1, pool).topk(count, dim=1).indices
        return pool.gather(1, chosen).sort(dim=1).values, signal < ranked.values[:, size - 1 : size]

    def _count(self, cosine: Tensor, length: int) -> int:
        """``r``."""
        if self.threshold is None:
            return min(int(self.ratio * length + 1e-9), cosine.shape[1])
        counts = (cosine >= self.threshold).sum(1)
        r = int((counts.max() if self.variant == "official" else counts.min()).item())
        return r // self.bucket * self.bucket

    def tensors(self, state: MergeState) -> Sequence[Tensor]:
        """The plan that is kept."""
        return [] if state.plan is None else state.plan.tensors()


@dataclass(frozen=True)
class KeyStride:
    """Every query is kept, and keys and values are those of every ``factor``-th row and column: ToDo's.

    The token picked for row ``i`` of the small grid is ``floor(i * h / (h // factor))``, as nearest interpolation does.

    Args:
        factor: 1 or more; 1 reduces nothing. Released code: 2 at 1024 pixels, 3 at 1536, 4 at 2048.

    Raises:
        SettingError: the factor is below 1.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise SettingError(f"KeyStride(factor={self.factor}): factor must be 1 (nothing is reduced) or more.")

    @property
    def needs_num_steps(self) -> bool:
        """The grid says it all."""
        return False

    @property
    def signal(self) -> Signal | None:
        """Nothing."""
        return None

    def init(self) -> MergeState:
        """No plan yet."""
        return MergeState()

    def plan(self, state: MergeState, place: TokenPlace, entering: Tensor) -> Plan | None:
        """The same at every step."""
        (segment,) = place.segments
        assert segment.grid is not None
        frames, height, width = segment.grid
        if self.factor == 1 or min(height, width) < self.factor:
            return None
        if state.plan is None or state.plan.kept.device != entering.device:
            rows, columns = (
                torch.arange(side // self.factor) * side // (side // self.factor) for side in (height, width)
            )
            index = torch.arange(frames)[:, None, None] * height * width + rows[:, None] * width + columns
            state.plan = Plan(sent(index.flatten(), entering.device).expand(place.batch, -1), None)
        return state.plan

    def tensors(self, state: MergeState) -> Sequence[Tensor]:
        """The plan."""
        return [] if state.plan is None else state.plan.tensors()
