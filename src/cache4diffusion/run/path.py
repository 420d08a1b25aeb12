"""A sampling run as its loop walks along it: number of steps, timesteps, and the step of each call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cache4diffusion.run.branches import Branches, Evidence, How, Sample

Source = Literal["pipeline", "scheduler", "explicit", "timesteps"]


@dataclass(eq=False)
class Run:
    """One sampling trajectory. Compared and hashed by identity.

    Args:
        id: unique per tracker, rising.
        num_steps: steps promised by the host (calls of ``scheduler.step``), or None. A promise: `step` may exceed it.
        timesteps: the scheduler's timestep of each step, in float64; ``num_steps`` of them, or None when not known.
        source: what announced the run: "pipeline" (``progress_bar``), "scheduler" (``set_timesteps``), "explicit"
            (`RunTracker.run`), or "timesteps" (nothing did: inferred from the calls).
        step: index of the step in progress, -1 before the first call.
    """

    id: int
    num_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    source: Source = "timesteps"
    step: int = -1


@dataclass(frozen=True)
class Call:
    """One call of one denoiser.

    Args:
        run: the run it belongs to.
        step: index of the step.
        branch: name of the CFG branch. Within a step, a denoiser is called at most once per branch.
        ordinal: number of calls of this denoiser earlier in the step.
        is_first_of_step: no denoiser of this run was called before in this step.
        how: how the branch was told. "ordinal": only by its place within the step, the conditioning was never seen
            before (edited mid-run, or a new branch in an old one's place). "new": first call of this branch.
        is_edited: the branch's conditioning is another than at its last call: what is cached belongs to another.
    """

    run: Run
    step: int
    branch: str
    ordinal: int
    is_first_of_step: bool
    how: How
    is_edited: bool = False


class Path:
    """The private side of a `Run`, dropped at its end: where its loop stands and what tells its steps."""

    def __init__(self, run: Run, bar: object | None) -> None:
        self.run, self.bar = run, bar
        self.has_begun = False
        self.is_counted = False  # num_steps is more than the length of the scheduler's list
        self.is_hosted = False  # a scheduler or progress bar was heard: it is no loop of the user's own over timesteps
        self.is_driven = False  # scheduler.step has fired: steps are told by nothing else from then on
        self.is_step_over = False  # scheduler.step has fired since the last call
        self.scheduler: Any = None  # the one whose set_timesteps announced the run, until the first call
        self.schedule: Any = None  # its timesteps; read at the first call only, it may be a host sync
        self.limit: int | None = None  # length of the scheduler's list
        self.first = self.last = 0.0  # values of the timestep
        self.direction = 0.0  # sign: whether the timestep rises or falls
        self.denoisers: dict[Hashable, Branches] = {}

    # ---- announcements

    def follow(self, scheduler: Any) -> None:
        """Take number and timesteps of the steps from the scheduler's list, as far as they are not given."""
        if self.has_begun:
            return
        self.is_hosted = True
        self.scheduler, self.schedule = scheduler, getattr(scheduler, "timesteps", None)
        self.limit = length(self.schedule)
        if self.run.source != "explicit":
            self.is_counted = False
        if not self.is_counted and self.limit is not None:
            self.run.num_steps = self.limit

    def expect(self, iterable: Any, total: Any, main: Any) -> None:
        """Take the number of steps from a progress bar of a pipeline with scheduler ``main``, if it is not given."""
        self.is_hosted = True
        if self.has_begun or (self.run.source == "explicit" and self.is_counted):
            return
        count = length(iterable)
        if count is None and isinstance(total, int):
            count = _calls(total, self.scheduler, main)
        if count:
            self.run.num_steps, self.is_counted = count, True
        if isinstance(iterable, Tensor):
            self.scheduler, self.schedule = None, iterable

    def settle(self, value: float) -> None:
        """Fix number and timesteps of the steps, at the first call: the loop may use only a part of the list."""
        run, times = self.run, floats(self.schedule) if self.run.timesteps is None else None
        if times is not None:
            start = getattr(self.scheduler, "begin_index", None)
            if not isinstance(start, int):
                start = _start(times, run.num_steps if self.is_counted else None, value)
            if not self.is_counted and start < len(times):
                run.num_steps = len(times) - start
            times = times[start:][: run.num_steps]
            run.timesteps = times if len(times) == run.num_steps else None
        self.scheduler = self.schedule = None

    # ---- calls

    @property
    def is_bounded(self) -> bool:
        """Whether the host says where the run ends: what timesteps do then begins no other."""
        return self.bar is not None or self.run.source == "explicit"

    @property
    def must_look(self) -> bool:
        """Whether the value of the timestep is needed: the scheduler tells no steps, or all it promised are over."""
        is_used_up = self.is_step_over and self.limit is not None and self.run.step + 1 >= self.limit
        return not self.is_driven or (is_used_up and not self.is_bounded)

    def is_restart(self, key: Hashable, value: float, latent: Tensor) -> bool:
        """Whether this call of a loop without bounds belongs to another trajectory."""
        if not self.has_begun or self.is_bounded:
            return False
        if self.is_driven:
            return value == self.first
        branches = self.denoisers.get(key)
        if not self.is_hosted and branches is not None and branches.is_other_shape(latent.shape):
            return True
        return (value - self.last) * self.direction < 0

    def place(
        self, key: Hashable, name: str | None, value: float | None, conditioning: Sequence[Tensor], latent: Tensor
    ) -> Call:
        """Find step and branch of a call, and remember it."""
        run = self.run
        branches = self.denoisers.setdefault(key, Branches())
        if branches.step != run.step:
            branches.open(run.step)
        evidence = branches.inspect(name, conditioning)
        is_new_step, seen = self.is_step_over, None
        if not self.is_driven and value is not None:
            seen = Sample([latent])
            is_new_step = self._is_new_step(branches, evidence, value, seen)
        if is_new_step:
            run.step += 1
            branches.open(run.step)
        self.is_step_over = False
        ordinal = len(branches.called)
        if ordinal == 0:
            branches.shape, branches.latent = latent.shape, seen
        branch, how, is_edited = branches.take(evidence)
        return Call(run, run.step, branch.name, ordinal, is_new_step, how, is_edited)

    def _is_new_step(self, branches: Branches, evidence: Evidence, value: float, latent: Sample) -> bool:
        """Tell a new step from the call alone, while no scheduler has fired."""
        if self.run.step < 0:
            self.first = self.last = value
            return True
        if value != self.last:
            self.direction = value - self.last
            self.last = value
            return True
        if not branches.is_repeat(evidence):
            return False
        # A known branch again at an equal timestep. Another latent: the next step, its timestep was rounded. The same
        # latent: another branch of this step (equal prompts; a host that calls one twice), unless a bare loop repeats
        # the very same input.
        if branches.latent is None or not latent.is_same(branches.latent):
            return True
        return not self.is_hosted and evidence.how != "values"


def highest(timestep: Tensor | float) -> float:
    """Return the largest value: some models take one timestep per token."""
    return float(timestep.detach().max().item()) if isinstance(timestep, Tensor) else float(timestep)


def floats(times: Any) -> tuple[float, ...] | None:
    """Return a non-empty list of numbers as floats, or None if it is none."""
    values = times.tolist() if hasattr(times, "tolist") else times
    if not isinstance(values, (list, tuple, range)) or not values:
        return None
    if not all(isinstance(value, (int, float, Tensor)) for value in values):
        return None
    return tuple(float(value) for value in values)


def length(sized: Any) -> int | None:
    """Return the length, or None of what has none."""
    try:
        return len(sized)
    except TypeError:
        return None


def _calls(total: int, scheduler: Any, main: Any) -> int:
    """Return how often a loop calls ``scheduler.step`` whose progress bar counts to ``total``.

    Second-order schedulers list most steps twice (Heun: ``2 n - 1`` entries for ``n``), PNDM lists one twice
    (``n + 1``), and bars count ``n``. Image-to-image uses the list's last entries and a smaller total, so what is
    listed beyond ``n * order`` stays the same.
    """
    order = getattr(scheduler if scheduler is not None else main, "order", 1)
    order = order if isinstance(order, int) and order > 0 else 1
    listed, asked = length(getattr(scheduler, "timesteps", None)), getattr(scheduler, "num_inference_steps", None)
    if listed is None or not isinstance(asked, int):
        return total * order - (order - 1)
    return min(max(total * order + listed - asked * order, 1), listed)


def _start(times: Sequence[float], count: int | None, value: float) -> int:
    """Return where in the scheduler's list the loop starts, judged by its first timestep.

    Args:
        times: the scheduler's list.
        count: number of entries the loop uses, if known: then its first ones (a base model before a refiner) or its
            last ones (image-to-image).
        value: first timestep the denoiser got, in the scheduler's unit or divided by 1000.
    """

    def distance(start: int) -> float:
        return min(abs(times[start] - value), abs(times[start] - 1000 * value))

    if count is not None:
        return min((max(len(times) - count, 0), 0), key=distance)
    if distance(0) <= 0.01 * abs(times[0]) or times.count(value) != 1:
        return 0
    return times.index(value)
