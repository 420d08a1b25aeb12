"""What Block Caching measures and trains: how much each block's output changes from step to step, and how to mend it.

Source: arXiv:2312.03209.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.relative import relative_l1
from cache4diffusion.calibration.statistic import Seen, Statistic, StepMeans
from cache4diffusion.calibration.training import Leaves, Numbers, Reached, Spot, Training
from cache4diffusion.gates import accumulated_steps
from cache4diffusion.predictors import scaled_and_shifted
from cache4diffusion.settings import setting
from cache4diffusion.sites import Blocks, Parts

Unit = Literal["block", "part", "transformer"]


def site_of(unit: Unit) -> Blocks | Parts:
    """What is cached as one: whole blocks of a stack, or their parts; in U-Nets parts, or what holds them."""
    if unit == "block":
        return Blocks()
    return Parts(decisions="part") if unit == "part" else Parts(("transformer",), decisions="part")


@dataclass(frozen=True)
class StepChanges(StepMeans):
    """``r[i] = |C_i - C_(i-1)|_1 / |C_i|_1`` of every block's (or part's) output, a mean over prompts; ``r[0] = 0``.

    In float32, over tokens, channels and the whole batch, divided by the *later* output. Memory: one copy of each.
    """

    effect: ClassVar[str] = "how much features change from step to step"

    unit: Unit = setting("block", "what is measured: blocks, parts or a U-Net's transformers")

    @property
    def site(self) -> Blocks | Parts:
        """Every block, part or transformer."""
        return site_of(self.unit)

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, float]]:
        """The change since the step before."""
        found = {}
        for name, leaves in seen.features.items():
            now = [leaf.detach().clone() for leaf in leaves]
            before, memory[name] = memory.get(name), now
            if before is not None:
                found[f"change {name}"] = (seen.step, relative_l1(before, now))
        return found

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A curve for each."""
        return {"change *": (num_steps,)}


@dataclass(frozen=True)
class ScaleShift(Training):
    """Per cached step and channel, ``a`` and ``d`` in ``a * C + d``, for the schedule that follows from the changes.

    The changes are measured first, once per prompt; they and ``threshold`` make the schedule, which then stays. ``a``
    begins as 1 and ``d`` as 0. At every step that has something to cache, the student, which caches along the schedule,
    sees the uncached denoiser's latent, and the loss is ``mean|target - student|^2``. At the steps between, its caches
    are filled with its own outputs.

    ``runs`` and ``rate`` are ours; the paper's are not known.
    """

    runs: int = setting(
        60, "sampling runs to train on; each updates the numbers of every step with something cached", ge=1
    )
    rate: float = setting(0.005, "learning rate of AdamW", gt=0)
    threshold: float = setting(0.1, "of the schedule: largest sum of changes since a block last ran", gt=0)
    unit: Unit = setting(
        "block", "what is cached as one. U-Nets: 'transformer', as in the paper, or 'part', of their transformer blocks"
    )

    @property
    def site(self) -> Blocks | Parts:
        """Every block, part or transformer."""
        return site_of(self.unit)

    @property
    def first(self) -> Statistic:
        """How much each output changes."""
        return StepChanges(self.unit)

    def start(
        self, spots: Sequence[Spot], num_steps: int, generator: torch.Generator, measured: Mapping[str, Tensor]
    ) -> Numbers:
        """1 and 0, wherever the schedule caches."""
        numbers: Numbers = {}
        for spot in spots:
            changes = measured.get(f"change {spot.name}")
            full = range(num_steps) if changes is None else accumulated_steps(changes.tolist(), self.threshold)
            for step in set(range(num_steps)) - set(full):
                pairs = [value for width in spot.leaving for value in (torch.ones(width), torch.zeros(width))]
                numbers.setdefault(step, {})[spot.name] = pairs
        return numbers

    def is_taught(self, numbers: Numbers, step: int) -> bool:
        """Where something is cached."""
        return step in numbers

    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """``a * C + d`` where the schedule caches; else what is computed, which is cached from then on."""
        pairs = numbers[reached.step].get(reached.spot.name)
        if pairs is None:
            return self._computed(reached)
        return [
            scaled_and_shifted(leaf, a, d) for leaf, a, d in zip(reached.cached, pairs[::2], pairs[1::2], strict=True)
        ]

    @staticmethod
    def _computed(reached: Reached) -> Leaves:
        leaves = reached.compute()
        reached.keep(leaves)
        return leaves

    def sampled(self, numbers: Numbers, reached: Reached) -> tuple[Leaves, float]:
        """The same."""
        return self.answer(numbers, reached), float(reached.spot.name in numbers[reached.step])

    def plain(self, numbers: Numbers, reached: Reached) -> Leaves:
        """The schedule without scale and shift."""
        return reached.cached if reached.spot.name in numbers[reached.step] else self._computed(reached)

    def tensors(self, numbers: Numbers, num_steps: int) -> dict[str, Tensor]:
        """``scale NAME LEAF`` and ``shift NAME LEAF``, 1 and 0 at steps that are not cached."""
        found: dict[str, Tensor] = {}
        for step, sites in numbers.items():
            for name, pairs in sites.items():
                for place, value in enumerate(pairs):
                    word, neutral = ("shift", 0.0) if place % 2 else ("scale", 1.0)
                    key = f"{word} {name} {place // 2}"
                    found.setdefault(key, torch.full((num_steps, len(value)), neutral))
                    found[key][step] = value.detach().cpu()
        return found

    def outcome(self, cached: float, sampled: float, plain: float) -> tuple[float | None, str]:
        """How much of the error of plain reuse is gone."""
        share = f"at the steps with something cached, {cached:.0%} of the {self.unit}s are"
        if plain == 0:
            return None, f"{share}, without an error"
        avoided = 1 - sampled / plain
        if avoided <= 0:
            return avoided, f"{share}; scale and shift take nothing from the error: use scale_shift=False, or more runs"
        return avoided, f"{share}; scale and shift take {avoided:.0%} from the error of plain reuse"

    @property
    def nothing_words(self) -> str:
        """What to do where nothing is cached."""
        return f"With threshold={self.threshold} every {self.unit} is computed at every step: use a larger one."

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A curve for each; a row of channels per step."""
        return {"change *": (num_steps,), "scale *": (num_steps, None), "shift *": (num_steps, None)}

    def figure(self, sums: Sums, fit: Fit) -> Figure | None:
        """The changes of the first and the last unit, of one in the middle and their mean."""
        curves = {name.removeprefix("change "): t for name, t in fit.tensors.items() if name.startswith("change ")}
        names = list(curves)
        chosen = dict.fromkeys([names[0], names[len(names) // 2], names[-1]])
        lines = {name: list(enumerate(curves[name].tolist())) for name in chosen}
        lines["mean"] = list(enumerate(torch.stack(list(curves.values())).mean(0).tolist()))
        return Figure("step", "change since the step before", lines=lines)
