"""What a statistic is: what a calibrated method measures on uncached runs, and what it makes of that.

The contract, drawn once::

    sums = statistic.init()                                   # once per calibration
    for each run (one prompt):
        for each call of the denoiser, nothing ever cached:
            statistic.observe(sums, memory, seen)             # memory: this run's and branch's own, empty at first
    sums = statistic.merge([sums of one machine, ...])        # shards; equals one pass over all prompts
    fit  = statistic.fit(sums)                                # numbers for the method, and how good they are

The object is frozen settings. ``sums`` is all there is to a calibration in progress: float64 tensors on the CPU that
are stored with the fit, so that shards can be merged and fits made anew without sampling again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Calibrator, Fit, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import judged, mean_of, r2_of_means
from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates import Watch
from cache4diffusion.tokens import Reduction


@dataclass(frozen=True)
class Seen:
    """What one full call showed.

    Args:
        step: its index.
        num_steps: of the run.
        branch: the CFG branch. On the trajectory, the branch called first.
        score: what the watch compares, exactly as a gate is given it; None where there is nothing to compare with yet.
        features: what the site recorded, by the site's name; what the method would be given at a full step.
        decisions: for each of them, the name of the decision it follows (of a part, its kind).
        outputs: tensors of the denoiser's output; none on the trajectory.
        entered: for statistics that ask for it (``sees``), what entered each site: a tensor per leaf of its feature.
        levels: the scheduler's timestep of every step, where it is known.
    """

    step: int
    num_steps: int
    branch: str
    score: float | None
    features: Mapping[str, Sequence[Tensor]]
    decisions: Mapping[str, str]
    outputs: Sequence[Tensor] = ()
    entered: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    levels: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Statistic(Calibrator):
    """Base of every statistic: frozen settings, declared with `setting`.

    A subclass says where to look (`site`, and `watch` if the method's gate watches something), what to add up
    (`observe`) and what to make of it (`fit`).
    """

    is_by_step: ClassVar[bool] = True  # whether the fit belongs to steps, and so to their noise levels
    listed: ClassVar[tuple[str, ...]] = ()  # names of sums whose rows are listed one after another, not added up
    sees: ClassVar[Literal["input"] | None] = None  # what is wanted beside the features, as of a corrector

    @property
    def watch(self) -> Watch | None:
        """What its gate watches, if the scores are measured as well."""
        return None

    @property
    def tokens(self) -> Reduction | None:
        """The rule its site needs, if it needs one; nothing is reduced while observing."""
        return None

    def init(self) -> Sums:
        """Nothing was seen."""
        return {}

    @abstractmethod
    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Take in one call.

        Args:
            sums: of the calibration; added to.
            memory: of this branch in this run, for what later steps are compared with; empty at its first call.
            seen: the call. Its tensors are the host's own: clone what is kept.
        """

    def merge(self, shards: Sequence[Sums]) -> Sums:
        """The sums as if one pass had seen all of it."""
        merged = {name: value.clone() for name, value in shards[0].items()}
        for shard in shards[1:]:
            for name, value in shard.items():
                if name not in merged:
                    merged[name] = value.clone()
                elif name in self.listed:
                    merged[name] = torch.cat([merged[name], value])
                elif merged[name].shape != value.shape:
                    raise CalibrationError(
                        f"Shards do not go together: {name} has the shape {tuple(merged[name].shape)} in one and "
                        f"{tuple(value.shape)} in another."
                    )
                else:
                    merged[name] = merged[name] + value
        return merged

    @abstractmethod
    def fit(self, sums: Sums) -> Fit:
        """What the method takes from it."""


@dataclass(frozen=True)
class WeightStatistic(Statistic):
    """A statistic whose fit is made from the denoiser's own weights as well, which no sum holds.

    So its shards can only be merged where the denoiser is at hand.
    """

    def fit(self, sums: Sums) -> Fit:
        """Refuse: there are no weights here."""
        raise CalibrationError(
            f"The fit of {type(self).__name__} is made from the denoiser's weights. Merge its shards where the "
            "denoiser is: cache4diffusion.calibration.merge_calibrations(shards, pipe)."
        )

    @abstractmethod
    def fit_to(self, sums: Sums, weights: Callable[[str], Tensor]) -> Fit:
        """What the method takes from it.

        Args:
            sums: of the calibration.
            weights: the weight of the module at a site.
        """


@dataclass(frozen=True)
class StepMeans(Statistic):
    """A statistic that averages numbers by step: a subclass only measures them.

    Per name there is a tensor ``[3, num_steps, ...]`` of counts, sums and squares over all runs and branches. The fit
    is their means, the quality how much of their variance the step explains: what is left varies with the prompt, which
    no schedule can follow.
    """

    effect: ClassVar[str] = "what was measured"
    rule: ClassVar[str] = "a schedule for all prompts"
    nothing: ClassVar[float] = 0.0  # what is measured where nothing happens

    @abstractmethod
    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, Tensor | float]]:
        """What this call reveals: by name, the step it belongs to and its value (a tensor of a fixed shape)."""

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Add what was measured to its step."""
        for name, (step, value) in self.measure(memory, seen).items():
            number = torch.as_tensor(value).detach().to("cpu", torch.float64)
            if name not in sums:
                sums[name] = torch.zeros((3, seen.num_steps, *number.shape), dtype=torch.float64)
            known = number.isfinite()
            number = torch.where(known, number, torch.zeros_like(number))
            sums[name][:, step] += torch.stack([known.double(), number, number.square()])

    def fit(self, sums: Sums) -> Fit:
        """Means by step."""
        if not sums:
            raise CalibrationError(f"{type(self).__name__} measured nothing: runs need two steps or more.")
        whole = torch.cat([value.flatten(1) for value in sums.values()], dim=1)
        r2, residual = r2_of_means(whole, self.nothing)
        quality = judged(r2, residual, int(whole[0].sum()), "the mean of a step", self.effect, self.rule)
        return Fit({name: mean_of(value) for name, value in sums.items()}, quality)

    def figure(self, sums: Sums, fit: Fit) -> Figure | None:
        """The means by step."""
        lines = {}
        for name, mean in fit.tensors.items():
            flat = mean.reshape(mean.shape[0], -1)
            for column in range(min(flat.shape[1], 4)):
                label = name if flat.shape[1] == 1 else f"{name}, {column + 1}"
                counts = sums[name][0].reshape(mean.shape[0], -1)[:, column]
                points = [(float(i), float(flat[i, column])) for i in range(len(flat)) if counts[i] > 0]
                if points:
                    lines[label] = points
        return Figure("step", self.effect, lines=lines) if lines else None
