"""The engine: puts one composition to work in one denoiser.

For every call of the denoiser::

    which run, step and branch is this?          RunTracker.enter
    are both CFG branches to be run?             BranchDriver.run (if there is a rule for them)
    what is remembered of this branch?           Engine: states, dropped at the end of a run
    full or cached?                              SiteRunner.run: Decisions (guards, gate)
    run or predict, at the site                  Driver.run (and its block and part wrappers)
    is the result finite?                        FiniteGuard
    what was it, how long, how many bytes?       Trace, Timer, Ledger
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.composition import Composition
from cache4diffusion.engine.admission import Admission
from cache4diffusion.engine.attachment import Attachment
from cache4diffusion.engine.branches import BranchDriver
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.finite import FiniteGuard, NanGuard
from cache4diffusion.engine.group import ALONE, Alone, group_of
from cache4diffusion.engine.half import Half
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import specs_of
from cache4diffusion.engine.listener import Listener
from cache4diffusion.engine.runner import SiteRunner
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.engine.trajectory import TrajectoryDriver
from cache4diffusion.errors import Cache4DiffusionError, RunError, UnobservedError
from cache4diffusion.gates import Step
from cache4diffusion.run import Call, Run, RunTracker
from cache4diffusion.storage import Store
from cache4diffusion.trace import CACHED, FULL, HALF, Ledger, Record, Timer, Trace, bytes_by_place

if TYPE_CHECKING:
    from cache4diffusion.engine.group import Processes


class Engine:
    """One composition in one denoiser.

    Args:
        denoiser: the network called in the sampling loop.
        composition: what to run.
        tracker: tells run, step and branch; shared by the denoisers of one pipeline.
        trace: where records go; shared likewise.
        name: of the denoiser, for records and messages.
        owner: the handle, found again on the denoiser by a second `accelerate`.
        nan_guard: what to do about a predicted output with NaN or Inf, as in `FiniteGuard`. What is found at once is
            recomputed; what is found at the next step makes that one full.
        listener: hears of what is recorded.
        store: how snapshots are kept.
        admission: holds calls back until what they would store was weighed.
        is_guided: the pipeline's own word on whether guidance is on.
        on_check: told of every new run once its first call is known, before anything is cached; may refuse it.
        group: the processes that share every sample; None: as the denoiser tells.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        composition: Composition,
        tracker: RunTracker,
        trace: Trace,
        *,
        name: str = "denoiser",
        owner: Any = None,
        nan_guard: NanGuard | None = None,
        listener: Listener | None = None,
        store: Store | None = None,
        admission: Admission | None = None,
        is_guided: Callable[[], bool | None] | None = None,
        on_check: Callable[[Run], None] | None = None,
        group: Processes | Alone | None = None,
    ) -> None:
        self.denoiser, self.tracker, self.trace = denoiser, tracker, trace
        self.name, self.admission = name, admission
        self._listener = listener
        self._nan_guard: NanGuard | None = nan_guard
        self._is_guided, self._on_check, self._given = is_guided, on_check, group
        self._groups: dict[int, Alone] = {}  # by run: the processes that share its samples
        self.ledger, self.timer = Ledger(), Timer()
        self.call_specs: Any = None  # shapes of the newest run's first call, for cost estimates
        self.num_steps: int | None = None  # of the newest run
        self._states: dict[tuple[int, str], BranchState] = {}  # by run and branch
        self._checked_runs: set[int] = set()
        self._lock = threading.RLock()
        self._compose(composition, Store() if store is None else store)
        self.attachment = Attachment(self.host, self.runner, self._on_denoiser, owner)

    def _compose(self, composition: Composition, store: Store) -> None:
        """Make what puts a composition to work."""
        self.composition = composition
        self.gate, self.predictor = composition.gate, composition.predictor
        self.host = Host(self.denoiser, composition, self.trace, self.name, self._listener, store)
        finite = FiniteGuard(self._nan_guard, self.host)
        self.runner: SiteRunner | None = None
        self.branches: BranchDriver | None = None
        if composition.site is not None:
            self.runner = SiteRunner(self.host, composition.site, finite)
        if composition.cfg is not None:
            self.branches = BranchDriver(self.host, composition.cfg, finite, self.run_branch)
            if self._is_guided is not None:
                self.branches.is_guided = self._is_guided
        if isinstance(self.driver, TrajectoryDriver):
            self.tracker.steer(self)
        else:
            self.tracker.unsteer(self)

    @property
    def driver(self) -> Driver | None:
        """What puts the site to work, if there is one."""
        return self.runner.driver if self.runner is not None else None

    # -- attaching -------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy | None = None) -> None:
        """Attach now, from the arguments of a call, instead of at the first call; ``anatomy`` if it is known already.

        Raises:
            AnatomyError: the denoiser lacks what the site needs; nothing is left attached.
        """
        with self._lock:
            if not self.attachment.is_installed:
                if self.admission is not None:
                    self.admission.prepare(self._kind_of(args, kwargs), (args, kwargs))
                self.attachment.install(args, kwargs, anatomy)

    def _attach(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install at the first call; if that cannot be, leave nothing attached.

        A call that is wrong in itself fails in the host's own words, and nothing else changes. Observing runs no hooks;
        where one leaves something that the modules need (tomesd: the latent's size), it is there after a call of the
        host's own.
        """
        try:
            try:
                self.attachment.install(args, kwargs)
            except UnobservedError:
                with torch.random.fork_rng(devices=[]):
                    inner(*args, **{name: list(v) if isinstance(v, list) else v for name, v in kwargs.items()})
                self.attachment.install(args, kwargs)
        except Cache4DiffusionError:
            inner(*args, **kwargs)
            owner = self.attachment.owner
            (self if owner is None else owner).remove()
            raise

    def adopt(self, composition: Composition, store: Store) -> None:
        """Go on with another composition, or with snapshots kept in another way, from nothing."""
        with self._lock:
            self.attachment.uninstall()
            self._forget(None)
            self._checked_runs.clear()
            self._compose(composition, store)
            self.attachment.serve(self.host, self.runner)

    def remove(self) -> None:
        """Take every wrapper away and forget everything."""
        with self._lock:
            self.attachment.remove()
            self._forget(None)

    def put_back(self) -> None:
        """After `remove`: go on from nothing."""
        with self._lock:
            self.attachment.put_back()

    # -- around scheduler.step -------------------------------------------------------------------------------------

    def before_step(self, run: Run, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Act on what the scheduler is given."""
        assert isinstance(self.driver, TrajectoryDriver)
        with self._lock:
            self.driver.before_step(run, scheduler, arguments)

    def after_step(self, run: Run, scheduler: Any, arguments: dict[str, Any], result: Any) -> Any:
        """Act on what it makes of that, and take note of what is held now."""
        assert isinstance(self.driver, TrajectoryDriver)
        with self._lock:
            result = self.driver.after_step(run, scheduler, arguments, result)
            self.account()
        return result

    # -- memory ----------------------------------------------------------------------------------------------------

    def on_run_begin(self, run: Run) -> None:
        """Nothing survives from earlier runs of this thread; copies are counted from here."""
        for copies in self.host.store.engines:
            copies.start_over()

    def on_run_end(self, run: Run, aborted: bool) -> None:
        """Forget everything of this run. Another thread may be in the middle of a run of its own."""
        self._checked_runs.discard(run.id)
        group = self._groups.pop(run.id, ALONE)
        if aborted:
            group.fail(None)
        if self.branches is not None and not aborted:
            self.branches.conclude(run.id)
        if self.admission is not None:
            self.admission.forget(run.id)
        self._forget(run.id)

    def _forget(self, run: int | None) -> None:
        """Drop what is remembered of a run (of all for None)."""
        for key in list(self._states):  # one by one: another thread's run may be adding to them
            if run is None or key[0] == run:
                self._states.pop(key, None)
        if self.runner is not None:
            self.runner.decisions.forget(run)
        if self.branches is not None:
            self.branches.forget(run)
        self.account()

    def _state(self, run: int, branch: str, latent: Tensor, conditioning: list[Tensor]) -> BranchState:
        """What is remembered of a branch; born empty, also when the shapes change in a run."""
        shape = latent.shape if self.driver is None else self.driver.shape_of(latent)
        signature = (shape, latent.dtype, latent.device, [tensor.shape for tensor in conditioning])
        state = self._states.get((run, branch))
        if state is None or state.signature != signature:
            if state is not None:
                self.host.note("latent or conditioning changed their shape in a run; started anew.")
            state = self._states[run, branch] = BranchState(signature)
        return state

    def _forget_conditioning(self, call: Call) -> None:
        """What is cached for the call's branch was computed under another conditioning."""
        states = [self._states.get((call.run.id, name)) for name in (call.branch, _source_of(call.branch))]
        for state in states:
            if state is not None:
                state.forget_features()
        self.host.note("the conditioning of a branch was replaced in a run; its history was cleared.")

    def _start_anew(self, run: Run) -> None:
        """Modules were exchanged in mid-run, as an adapter does: what is cached was computed by others."""
        self.attachment.uninstall()
        for key, state in list(self._states.items()):
            if key[0] == run.id:
                state.forget_features()
        self.host.note("modules were exchanged in a run; its history was cleared.")

    def account(self) -> None:
        """Bring the ledger up to date."""
        self.ledger.set(bytes_by_place(self.tensors(), self.host.store.place_of))

    def tensors(self) -> list[Tensor]:
        """Every cached tensor."""
        tensors = [tensor for state in list(self._states.values()) for tensor in self.tensors_of(state)]
        if self.branches is not None:
            tensors += list(self.branches.tensors())
        return tensors

    def tensors_of(self, state: BranchState) -> list[Tensor]:
        """Every cached tensor of a branch."""
        tensors = list(state.tensors())
        rule = self.composition.tokens
        if rule is not None:
            for kept in list(state.tokens.values()):
                tensors += list(rule.tensors(kept))
        return tensors

    # -- calls -----------------------------------------------------------------------------------------------------

    def _on_denoiser(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            warnings.warn(
                "Gradients are enabled, so nothing is cached in this call. Sample under torch.no_grad().",
                stacklevel=3,
            )
            return inner(*args, **kwargs)
        with self._lock:
            try:
                self.attachment.check_visible()
                timestep, latent, conditioning = self.host.inputs.split(args, kwargs)
                call = self.tracker.enter(id(self), timestep=timestep, conditioning=conditioning, latent=latent)
                group = self._join(call)
                if self.admission is not None and self._is_held_back(call, args, kwargs):
                    return self._plainly(call, latent, inner, args, kwargs)
                is_new = call.run.id not in self._checked_runs
                if is_new:
                    self.attachment.check_host()
                if is_new and self.attachment.is_installed and self.attachment.is_outdated():
                    self.attachment.uninstall()
                elif self.attachment.is_exchanged():
                    self._start_anew(call.run)
                if not self.attachment.is_installed:
                    self._attach(inner, args, kwargs)
                if is_new:
                    self._check_run(call.run, args, kwargs)
                    self.attachment.make_room()
                if call.is_edited:
                    self._forget_conditioning(call)
                self.host.group = group
                with self.attachment.room:
                    if self.branches is not None:
                        output = self.branches.run(call, latent, inner, args, kwargs)
                        self.account()
                    else:
                        output = self.run_branch(call, latent, inner, args, kwargs)
                self.attachment.groups.settle()
                return output
            except BaseException as error:
                echo = self.host.group.fail(error)
                self.tracker.fail()
                if echo is not None:
                    raise echo from error
                raise

    def _join(self, call: Call) -> Alone:
        """The processes that share the samples of this call's run.

        Raises:
            CompositionError: what runs here needs whole samples.
        """
        run = call.run.id
        if run not in self._groups:
            group = self._groups[run] = group_of(self.denoiser, self._given)
            self.composition.check_group(group.is_sharded)
        self.host.group = self._groups[run]
        self.host.group.enter(call.step, call.ordinal)
        return self.host.group

    def _kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        """What decides how much a call stores."""
        _, latent, conditioning = self.host.inputs.split(args, kwargs)
        return latent.shape, latent.dtype, latent.device, tuple(tensor.shape for tensor in conditioning)

    def _is_held_back(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether nothing may be stored in this call.

        Raises:
            MemoryBudgetError: what the last step's calls would store is too much; nothing is left attached.
        """
        assert self.admission is not None
        try:
            return self.admission.holds(call, self._kind_of(args, kwargs), (args, kwargs))
        except Cache4DiffusionError:
            owner = self.attachment.owner
            self.remove() if owner is None else owner._remove(aborted=True)
            raise

    def _plainly(self, call: Call, latent: Tensor, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call as if nothing were attached."""
        start, event = time.perf_counter(), self.timer.events(latent.device)
        output = inner(*args, **kwargs)
        reason = "before the cache was weighed against memory_budget"
        self._note_call(Record(self.name, call.run.id, call.step, call.branch, FULL, reason), start, event, latent)
        return output

    def _note_call(self, record: Record, start: float, event: Any, latent: Tensor) -> None:
        if event is None:
            record.wall_ms = 1e3 * (time.perf_counter() - start)
        else:
            self.timer.add(record, event, self.timer.events(latent.device))
        self.trace.add(record)

    def _check_run(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call_specs, self.num_steps = specs_of(args, kwargs), run.num_steps
        if run.num_steps is None:
            if self.composition.needs_num_steps:
                raise RunError(
                    "This method must know the number of steps, and nothing tells it in a loop of your own. Write "
                    "`with handle.run(timesteps=timesteps):` around the loop (or num_steps=...)."
                )
        else:
            self.composition.check_run(run.num_steps, run.timesteps)
        if self._on_check is not None:
            self._on_check(run)
        self._checked_runs.add(run.id)

    def run_branch(
        self,
        call: Call,
        latent: Tensor,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_half: bool = False,
        shared: Half | None = None,
        twin: str | None = None,
    ) -> Any:
        """Run one call of one branch through the site.

        Args:
            call: which one.
            latent: the latent among the arguments.
            inner: the denoiser's call.
            args: its positional arguments.
            kwargs: its keyword arguments.
            is_half: whether these are the rows of one CFG branch only, of a call that had both. What is cached for
                them is kept apart from what is cached for both, unless it is shared.
            shared: the whole call, where rows of one branch go on with what was cached for both.
            twin: a branch that is not run any more; predictions are means of its features and those of this one.
        """
        step = Step(call.step, call.run.num_steps)
        start, event = time.perf_counter(), self.timer.events(latent.device)
        if self.runner is None:
            output = inner(*args, **kwargs)
            record = Record(self.name, call.run.id, step.index, call.branch, FULL, "no site", None)
        else:
            branch = _source_of(call.branch) if is_half and shared is None else call.branch
            timestep, _, conditioning = self.host.inputs.split(args, kwargs)
            if shared is None:
                state = self._state(call.run.id, branch, latent, conditioning)
                context = Context(call, step, state, latent.shape[0], kwargs=kwargs, latent=latent, timestep=timestep)
                other = None if twin is None else self._states.get((call.run.id, twin))
                context.twin = None if other is None else (other, None)
            else:
                _, whole, conditioning = self.host.inputs.split(shared.args, shared.kwargs)
                state = self._state(call.run.id, branch, whole, conditioning)
                context = Context(call, step, state, whole.shape[0], kwargs=kwargs, latent=latent, timestep=timestep)
                context.rows = shared.rows
                context.twin = None if shared.twins is None else (state, shared.twins)
            output = self.runner.run(context, inner, args, kwargs)
            record = self.runner.record(context)
        if is_half:
            record.reason += ", one branch only"
            record.symbol = HALF if record.symbol == FULL else record.symbol
        self._note_call(record, start, event, latent)
        if record.symbol != CACHED or (self.driver is not None and self.driver.keeps_when_cached):
            self.account()  # most cached steps take nothing in
        return output


def _source_of(branch: str) -> str:
    """The name under which is kept what belongs to the source half of a call that holds both CFG branches."""
    return f"{branch}/source"
