"""What a training is: few numbers of a method, learned on a frozen denoiser from its own uncached outputs.

The contract, drawn once::

    <one uncached run, in which the sites are found>
    numbers = training.start(spots, num_steps, generator, measured)   # few, by step and by site
    for each of ``runs`` sampling runs, one prompt each:
        weights = training.weigh(numbers, run, rehearse)              # of the steps' losses; 1 where not named
        for each call of the denoiser:
            target = <the denoiser, uncached, without gradients>
            where training.is_taught(step) and something is cached:
                student = <the denoiser, where every site it reaches hands out training.answer(numbers, reached)>
                loss    = weight * mean|target - student|^2 + <what was charged at the sites>
                <one update of this step's numbers, which are clamped to +-limit>
            elsewhere the sites' outputs are cached
    tensors = training.tensors(numbers)                               # for the method

The object is frozen settings; ``numbers`` are what trains. The denoiser's weights never change. The engine takes no
part: it passes calls with gradients through. The sites are the engine's own, so what is learned is what will be cached.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Calibrator, Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import GOOD, POOR, Quality
from cache4diffusion.calibration.statistic import Statistic
from cache4diffusion.settings import setting

SMALL = 0.02  # of the features: where less is cached, it is not worth it

Leaves = list[Tensor]
Numbers = dict[int, dict[str, list[Tensor]]]  # by step and site: what trains


@dataclass(frozen=True)
class Spot:
    """One site of a denoiser.

    Args:
        name: a part's path, or a block's ``block.3``.
        kind: of the part; ``"block"``.
        entering: widths of what enters a part: of its modulated inputs, one per stream.
        leaving: widths of its outputs.
        is_tokenwise: whether the part maps every token by itself.
        lengths: of its outputs, in tokens.
    """

    name: str
    kind: str
    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    is_tokenwise: bool = False
    lengths: tuple[int, ...] = ()


@dataclass
class Reached:
    """A site that the student has reached.

    Args:
        spot: which.
        step: index of the step.
        num_steps: of the run.
        entering: the part's modulated inputs, one per stream; of a block none.
        cached: what was kept at the site last; detached.
        compute: runs the site and returns its output.
        charges: what is added to the loss.
        kept: what replaces ``cached``, if anything does.
    """

    spot: Spot
    step: int
    num_steps: int
    entering: Leaves
    cached: Leaves
    compute: Callable[[], Leaves]
    charges: list[Tensor] = field(default_factory=list)
    kept: Leaves | None = None

    def charge(self, cost: Tensor) -> None:
        """Add something to the loss."""
        self.charges.append(cost)

    def keep(self, leaves: Leaves) -> None:
        """From here on, these are cached."""
        self.kept = [leaf.detach() for leaf in leaves]


Answer = Callable[[Numbers, Reached], Leaves]


@dataclass(frozen=True)
class Training(Calibrator):
    """Base of every training: frozen settings, declared with `setting`.

    Cost: per taught call a forward without and one with gradients, and the backward; in the last tenth of the runs two
    forwards more, for the verdict. Memory: the sites' outputs once per CFG branch, and the activations of one call.
    """

    is_students: ClassVar[bool] = False  # whether the trajectory is the student's; else the uncached denoiser's
    limit: ClassVar[float] = float("inf")  # the numbers are clamped to +- this after every update

    runs: int = setting(100, "sampling runs to train on; each updates the numbers of every taught step", ge=1)
    rate: float = setting(0.01, "learning rate of AdamW, without weight decay", gt=0)

    @property
    def first(self) -> Statistic | None:
        """What must be measured, over uncached runs, before the training begins."""
        return None

    @abstractmethod
    def start(
        self, spots: Sequence[Spot], num_steps: int, generator: torch.Generator, measured: Mapping[str, Tensor]
    ) -> Numbers:
        """The numbers before the first update, in float32, for the steps and sites that have any.

        Args:
            spots: in the order in which they run.
            num_steps: of the runs.
            generator: for random numbers, on the CPU.
            measured: the fit of `first`; empty if there is none.
        """

    @abstractmethod
    def is_taught(self, numbers: Numbers, step: int) -> bool:
        """Whether the student learns at this step. At others, and where nothing is cached, outputs are cached."""

    def weigh(self, numbers: Numbers, run: int, rehearse: Callable[[Answer], Tensor]) -> Mapping[int, float] | None:
        """Weights of the steps' losses from this run on; None leaves them as they are.

        Args:
            numbers: so far.
            run: its index.
            rehearse: samples this run with these answers, without learning, and returns all numbers of its result.
        """
        return None

    @abstractmethod
    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """What the student goes on with at a site."""

    @abstractmethod
    def sampled(self, numbers: Numbers, reached: Reached) -> tuple[Leaves, float]:
        """What sampling will go on with there, and the share of it that is cached; for the verdict."""

    def plain(self, numbers: Numbers, reached: Reached) -> Leaves:
        """What the error is compared with: everything that may be cached is, as it is."""
        return reached.cached

    @abstractmethod
    def tensors(self, numbers: Numbers, num_steps: int) -> dict[str, Tensor]:
        """What the method takes, beside what was measured before."""

    def judge(self, sums: Sums) -> Quality:
        """How good it is, in words.

        Args:
            sums: ``losses`` and ``errors``, ``[runs]`` means; ``plain``, ``sampled`` and ``cached``, ``[1]`` means over
                the last tenth of the runs: two mean squared errors, and the share that is cached at the taught steps.
        """
        share, words = self.outcome(*(float(sums[name]) for name in ("cached", "sampled", "plain")))
        verdict = f"after {len(sums['losses'])} runs of training, {words}. {_trend(sums['losses'])}"
        return Quality(share, float(sums["sampled"]) ** 0.5, len(sums["losses"]), verdict)

    def outcome(self, cached: float, sampled: float, plain: float) -> tuple[float | None, str]:
        """The share of the plain error that is avoided (None if there is none), and what that means."""
        if cached < SMALL:
            return None, "hardly anything will be cached: use a higher price, or more runs"
        if plain == 0:
            return None, f"{cached:.0%} of the features are cached at the trained steps; caching all makes no error"
        avoided = 1 - sampled / plain
        words = (
            f"{cached:.0%} of the features are cached at the trained steps, with {1 - avoided:.0%} of the error of all"
        )
        if avoided >= GOOD:
            return avoided, f"{words}: a sound basis"
        if avoided >= POOR:
            return avoided, f"{words}: compare before use"
        return avoided, f"{words}: little better than caching everything"

    @property
    def nothing_words(self) -> str:
        """What to do where no step is taught."""
        return "Use more steps."

    def figure(self, sums: Sums, fit: Fit) -> Figure | None:
        """Loss and error by run."""
        lines = {
            name: [(float(i + 1), float(value)) for i, value in enumerate(sums[key])]
            for name, key in (("loss", "losses"), ("error", "errors"))
        }
        return Figure("run", "mean over the trained steps", lines=lines)


@dataclass(frozen=True)
class VectorTraining(Training):
    """Base of trainings whose numbers are one vector of channels per site, at the taught steps only."""

    def is_taught(self, numbers: Numbers, step: int) -> bool:
        """Where there are vectors."""
        return step in numbers

    def tensors(self, numbers: Numbers, num_steps: int) -> dict[str, Tensor]:
        """The vectors by step, for every site; 0 where there is none."""
        found: dict[str, Tensor] = {}
        for step, sites in numbers.items():
            for name, (vector,) in sites.items():
                found.setdefault(name, torch.zeros(num_steps, len(vector)))
                found[name][step] = vector.detach().cpu()
        return found

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A row of channels per step."""
        return {"*": (num_steps, None)}


def _trend(losses: Tensor) -> str:
    """Whether the loss was still falling at the end: the last tenth of the runs against the one before."""
    count = len(losses) // 10
    if count < 1:
        return "So few runs tell nothing of the loss"
    last, before, first = (float(losses[a:b].mean()) for a, b in ((-count, None), (-2 * count, -count), (0, count)))
    change = f"The loss went from {first:.3g} to {last:.3g}"
    return f"{change} and was still falling: more runs may help" if last < 0.95 * before else change


def mixed(share: Tensor, fresh: Leaves, cached: Leaves) -> Leaves:
    """``share * fresh + (1 - share) * cached``; the share is one number, or one per row, or one per row and token."""
    found = []
    for f, c in zip(fresh, cached, strict=True):
        weight = share.to(f.dtype)
        weight = weight.reshape(*weight.shape, *[1] * (f.ndim - weight.ndim)) if weight.ndim else weight
        found.append(weight * f + (1 - weight) * c)
    return found
