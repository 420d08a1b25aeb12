"""Step masks: which steps must be computed, fixed before sampling (SCM of cache-dit)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Literal

from cache4diffusion.data import table
from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step

LENGTH = 28  # steps of the published presets; other lengths are made from these

Resize = Literal["scale", "bins"]


def _alternating(compute: list[int], cache: list[int]) -> tuple[bool, ...]:
    """``compute[0]`` full steps, ``cache[0]`` cached ones, ``compute[1]`` full ones, and so on."""
    mask: list[bool] = []
    for full, cached in zip_longest(compute, cache, fillvalue=0):
        mask += [True] * full + [False] * cached
    return tuple(mask)


def _scaled(bins: dict[str, dict[str, list[int]]], num_steps: int) -> tuple[bool, ...]:
    """The 28-step mask, its borders moved in proportion."""
    whole = _alternating(**bins[str(LENGTH)])
    borders = [round(i * num_steps / LENGTH) for i in range(1, LENGTH) if whole[i] != whole[i - 1]]
    return tuple(sum(border <= step for border in borders) % 2 == 0 for step in range(num_steps))


def _grown_and_cut(bins: dict[str, dict[str, list[int]]], num_steps: int) -> tuple[bool, ...]:
    """As in the released code: bins of the next larger preset, or of 28 steps and grown, then cut at their end."""
    made_for = min((int(steps) for steps in bins if int(steps) >= num_steps), default=LENGTH)
    compute, cache = (list(bins[str(made_for)][name]) for name in ("compute", "cache"))
    growth = [[max(int(count * (num_steps / LENGTH * 0.5)), 1) for count in counts] for counts in (compute, cache)]
    while sum(compute) + sum(cache) < num_steps:
        for i in range(len(cache)):
            for counts, more in zip((compute, cache), growth, strict=True):
                if sum(compute) + sum(cache) < num_steps:
                    counts[i] += more[i]
        if sum(compute) + sum(cache) < num_steps:
            compute[-1] += 1
    while sum(compute) + sum(cache) > num_steps:
        for counts in (cache, compute):
            if counts and sum(compute) + sum(cache) > num_steps:
                counts[-1] -= 1
                if not counts[-1]:
                    counts.pop()
    return _alternating(compute, cache)


@lru_cache(maxsize=64)
def step_mask(mask: str | tuple[bool, ...], num_steps: int, resize: Resize = "scale") -> tuple[bool, ...]:
    """One flag per step: whether it must be computed. The first and the last one always are.

    A preset has published bins for 28, 15, 9, 8, 6 and 4 steps. For another length either the 28-step mask is scaled:
    the border between two bins that lies behind step ``b`` of 28 lies behind step ``round(b * num_steps / 28)``. Or, as
    the released code does, the bins grow in passes and are cut at their end.

    Args:
        mask: ``"off"``, the name of a preset, ``"110100..."`` or flags.
        num_steps: length of the run.
        resize: ``"scale"``, or ``"bins"`` as the released code.

    Raises:
        SettingError: no such preset, the run is too short for one, or the mask given has another length.
    """
    if mask == "off":
        return (True,) * num_steps
    if isinstance(mask, tuple) or (mask and set(mask) <= {"0", "1"}):
        flags = tuple(flag in (True, "1") for flag in mask)
        if len(flags) != num_steps:
            raise SettingError(f"This step mask was made for {len(flags)} steps; the run has {num_steps}.")
        return flags
    presets = table("scm")["presets"]
    if mask not in presets:
        raise SettingError(
            f"There is no step mask {mask!r}. Use 'off', a preset ({', '.join(presets)}), a text such as '1110100' "
            "with one digit per step (1: computed), or flags."
        )
    bins = presets[mask]
    if num_steps < min(int(steps) for steps in bins):
        raise SettingError(f"Step masks begin at {min(int(steps) for steps in bins)} steps; the run has {num_steps}.")
    if str(num_steps) in bins:
        flags = list(_alternating(**bins[str(num_steps)]))
    else:
        flags = list((_scaled if resize == "scale" else _grown_and_cut)(bins, num_steps))
    flags[0] = flags[-1] = True
    return tuple(flags)


@dataclass(frozen=True)
class StepMask(StaticGate):
    """Cached wherever the mask does not ask for a computation.

    ``StepMask("fast")`` over 28 steps is ``FFFFFFcFcccFccccFcccccFccccF``. Needs the length of the run.

    Args:
        mask: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``; ``"off"``; a text such as ``"1101"`` with one digit
            per step (1: computed); or flags. The first step is always computed.
        resize: how a preset is brought to another length; see `step_mask`.

    Raises:
        SettingError: no such preset, or (at the start of a run) a mask of another length.
    """

    mask: str | tuple[bool, ...] = "medium"
    resize: Resize = "scale"

    def __post_init__(self) -> None:
        if self.resize not in ("scale", "bins"):
            raise SettingError(f"StepMask(resize={self.resize!r}): use 'scale' or 'bins'.")
        is_preset = isinstance(self.mask, str) and not set(self.mask) <= {"0", "1"}
        if not is_preset and (not self.mask or self.mask[0] in (False, "0")):
            raise SettingError(f"StepMask(mask={self.mask!r}): the first step cannot be cached.")
        step_mask(self.mask, LENGTH if is_preset else len(self.mask))

    @property
    def never_caches(self) -> bool:
        """Whether every step is computed."""
        return self.mask == "off"

    @property
    def needs_num_steps(self) -> bool:
        """The mask is made for one length."""
        return True

    def begin(self, num_steps: int | None) -> tuple[bool, ...]:
        """One flag per step."""
        assert num_steps is not None
        return step_mask(self.mask, num_steps, self.resize)

    def propose(self, state: tuple[bool, ...], step: Step, score: float | None) -> bool:
        """As the mask says; what lies beyond its end is computed."""
        return step.index < len(state) and not state[step.index]
