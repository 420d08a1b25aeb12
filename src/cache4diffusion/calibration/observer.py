"""One observer for every calibration: the uncached denoiser, seen where the method would cache.

The denoiser carries the method's own site and watch in a composition that never caches; the engine tells what is
recorded there. So a statistic is given exactly what gate and predictor would be given while sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from cache4diffusion.accelerate import attach, denoisers_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.calibration.calibrator import Sums
from cache4diffusion.calibration.fingerprint import fingerprint_of
from cache4diffusion.calibration.statistic import Fit, Seen, Statistic, WeightStatistic
from cache4diffusion.calibration.store import Entry
from cache4diffusion.composition import Composition
from cache4diffusion.engine.group import shares_tokens
from cache4diffusion.engine.state import Context
from cache4diffusion.errors import AlreadyAcceleratedError, CalibrationError, CompositionError
from cache4diffusion.gates import StaticGate, Step, Watch
from cache4diffusion.predictors import Predictor, Reuse
from cache4diffusion.predictors.corrector import Corrector, Sight
from cache4diffusion.sites import Trajectory
from cache4diffusion.storage import PLAIN, Store
from cache4diffusion.wrap import owner_of


@dataclass(frozen=True)
class Listening(StaticGate):
    """Never caches, and is given the scores of what it watches all the same. Its strip is ``FFFF``."""

    of: Watch | None = None

    @property
    def watch(self) -> Watch | None:
        """What the engine observes."""
        return self.of

    @property
    def never_caches(self) -> bool:
        """Whether every step is full."""
        return True

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Full."""
        return False


class _Nothing:
    """The state of a predictor that keeps nothing."""

    def tensors(self) -> Iterator[Tensor]:
        return iter(())


@dataclass(frozen=True)
class Forgetting:
    """Keeps nothing, so that observing costs no memory; nothing is ever predicted."""

    @property
    def needs_num_steps(self) -> bool:
        """It takes no part."""
        return False

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> _Nothing:
        """Nothing."""
        return _Nothing()

    def update(self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Forget it."""

    def is_ready(self, state: Any) -> bool:
        """Yes, so that scores are computed."""
        return True

    def predict(self, state: Any, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Never asked for, as no step is cached."""
        raise AssertionError("a step was cached while observing")

    def prefetch(self, state: Any, time: float) -> None:
        """Nothing is kept."""

    def commit(self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Nothing was cached."""


class ForgettingInputs(Forgetting, Corrector):
    """The same, for a statistic that asks what enters a site: so it is handed on."""

    sees: ClassVar[Sight] = "input"

    def update_seeing(
        self,
        state: Any,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor],
        time: float,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Forget it."""

    def material(self, state: Any, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Never asked for, as no step is cached."""
        raise AssertionError("a step was cached while observing")

    def correct(self, material: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """Never asked for, as no step is cached."""
        raise AssertionError("a step was cached while observing")


@dataclass
class Collected:
    """What was seen of one denoiser: it listens to the engine and hands every call to the statistic."""

    statistic: Statistic
    sums: Sums
    levels: tuple[float, ...] | None = None
    num_steps: int | None = None
    calls: int = 0
    _memory: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)  # of the run in progress, by branch
    _features: dict[str, Sequence[Tensor]] = field(default_factory=dict)  # of the call in progress
    _entered: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    _decisions: dict[str, str] = field(default_factory=dict)

    def hear_feature(
        self, context: Context, site: str, decision: str, leaves: Sequence[Tensor], seen: Sequence[Tensor]
    ) -> None:
        """Note what a site recorded."""
        self._features[site], self._decisions[site] = leaves, decision
        if self.statistic.sees is not None:
            self._entered[site] = seen

    def hear_call(self, context: Context, outputs: Sequence[Tensor]) -> None:
        """Hand the call to the statistic."""
        features, decisions, entered = self._features, self._decisions, self._entered
        self._features, self._decisions, self._entered = {}, {}, {}
        run, step = context.call.run, context.step
        if step.num_steps is None:
            raise CalibrationError(
                "A calibration must know the number of steps, and nothing tells it in a loop of your own. Write "
                "`with observer.run(timesteps=timesteps):` around the loop."
            )
        if self.num_steps is None:
            self.num_steps, self.levels = step.num_steps, run.timesteps
        elif (step.num_steps, run.timesteps) != (self.num_steps, self.levels):
            raise CalibrationError(
                f"Runs of one calibration must have the same steps and noise levels: the first had {self.num_steps} "
                f"({_ends(self.levels)}), this one has {step.num_steps} ({_ends(run.timesteps)})."
            )
        if step.index >= step.num_steps:
            return  # the host promised fewer
        scores = [score for verdict in context.verdicts.values() for score in verdict.scores]
        for key in [key for key in self._memory if key[0] != run.id]:
            del self._memory[key]  # of a run that is over
        memory = self._memory.setdefault((run.id, context.call.branch), {})
        seen = Seen(
            step.index,
            step.num_steps,
            context.call.branch,
            scores[0] if len(scores) == 1 else None,
            features,
            decisions,
            outputs,
            entered,
            run.timesteps,
        )
        self.statistic.observe(self.sums, memory, seen)
        self.calls += 1

    def forget(self) -> None:
        """The run is over."""
        self._memory.clear()


def uncached(target: Any, purpose: str) -> dict[str, nn.Module]:
    """The denoisers of a pipeline (or a denoiser itself), by name, if they can be seen uncached and whole.

    Args:
        target: the pipeline, or a denoiser.
        purpose: what must see them, in a word.

    Raises:
        AlreadyAcceleratedError: one carries a handle, so it would not be the uncached denoiser that is seen.
        CompositionError: this process sees no more than a share of every sample's tokens.
    """
    found = denoisers_of(target)
    for name, denoiser in found.items():
        owner = owner_of(denoiser)
        if owner is not None:
            raise AlreadyAcceleratedError(
                f"{name} is accelerated by {owner.label}, and a {purpose} must see it uncached. Call remove() on that "
                "handle first."
            )
        if shares_tokens(denoiser):
            raise CompositionError(
                f"{name} shares the tokens of its samples out over several processes, and a {purpose} must see all of "
                "them. Make it in one process, without enable_parallelism; the file serves any number of processes."
            )
    return found


class Observer:
    """Attached to a pipeline (or a denoiser) while it samples, uncached; a context manager.

        with Observer(pipe, statistic) as observer:
            for prompt in prompts:
                pipe(prompt)
        entries = observer.entries()

    Args:
        target: the pipeline, or a denoiser called in a loop of your own.
        statistic: what is measured.

    Raises:
        AlreadyAcceleratedError, CompositionError: as of `uncached`.
    """

    def __init__(self, target: Any, statistic: Statistic) -> None:
        self.target, self.statistic = target, statistic
        self.denoisers = uncached(target, "calibration")
        self.collected = {name: Collected(statistic, statistic.init()) for name in self.denoisers}

    def __enter__(self) -> Observer:
        composition = Composition(
            site=self.statistic.site,
            gate=Listening(self.statistic.watch),
            predictor=self._predictor(),
            tokens=self.statistic.tokens,
            branches="tied" if isinstance(self.statistic.site, Trajectory) else "independent",
        )
        label = f"observer({type(self.statistic).__name__})"
        compositions = dict.fromkeys(self.denoisers, composition)
        self._handle = attach(
            self.target, self.denoisers, compositions, label=label, nan_guard="off", listeners=self.collected
        )
        return self

    def _predictor(self) -> Predictor:
        """One that keeps nothing; where tokens are reduced, nothing is recorded."""
        if self.statistic.tokens is not None:
            return Reuse()
        return Forgetting() if self.statistic.sees is None else ForgettingInputs()

    def __exit__(self, *error: object) -> None:
        for collected in self.collected.values():
            collected.forget()
        self._handle.remove()

    @contextmanager
    def run(self, timesteps: Sequence[float] | None = None, num_steps: int | None = None) -> Iterator[None]:
        """Say where one sampling run begins and ends, in a loop of your own; see `Handle.run`."""
        with self._handle.run(timesteps, num_steps):
            yield

    def watch_scheduler(self, scheduler: Any) -> None:
        """Listen to the scheduler of a loop of your own; see `Handle.watch_scheduler`."""
        self._handle.watch_scheduler(scheduler)

    def entries(self) -> dict[str, Entry]:
        """The fits, by denoiser.

        Raises:
            CalibrationError: nothing was seen.
        """
        found = {}
        for name, collected in self.collected.items():
            if not collected.calls:
                continue  # an expert whose steps were not reached
            fit = fitted(self.statistic, collected.sums, self.denoisers[name])
            found[name] = Entry(
                fingerprint_of(self.denoisers[name]), collected.levels, fit.tensors, fit.quality, collected.sums
            )
        if not found:
            raise CalibrationError("Nothing was seen: the denoiser was not called. Sample under torch.no_grad().")
        return found


def fitted(statistic: Statistic, sums: Sums, denoiser: nn.Module | None) -> Fit:
    """The fit, with the denoiser's weights where it takes them.

    Raises:
        CalibrationError: it does, and there is no denoiser, or a layer has no weight that can be read.
    """
    if not isinstance(statistic, WeightStatistic) or denoiser is None:
        return statistic.fit(sums)
    plain = unwrapped(denoiser)

    def weight_of(site: str) -> Tensor:
        module = plain.get_submodule(site)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise CalibrationError(
                f"The weight of {site} ({type(module).__name__}) cannot be read as a matrix; a quantised denoiser must "
                "be calibrated before it is quantised."
            )
        return weight.detach()

    return statistic.fit_to(sums, weight_of)


def _ends(levels: Sequence[float] | None) -> str:
    return "noise levels not known" if levels is None else f"{levels[0]:g} to {levels[-1]:g}"
