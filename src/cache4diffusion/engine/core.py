"""The engine: puts one composition to work in one denoiser.

For every call of the denoiser::

    which run, step and branch is this?          RunTracker.enter
    full or cached?                              decide(): guards, gate
    run or predict, at the site                  Driver.run (and its block and part wrappers)
    is the result finite? what was it, how long? finite check, Trace, Ledger

Only this package changes modules, and only by wrappers on instances that `remove` takes away.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cache4diffusion.anatomy import Anatomy, Axes, LeafPath, observe
from cache4diffusion.anatomy.tree import argument_leaves
from cache4diffusion.engine.blocks import BlockView, views_of
from cache4diffusion.engine.branches import BranchDriver
from cache4diffusion.engine.compiling import (
    TOKENS,
    WHOLE,
    hides_sites,
    is_compiled,
    is_under_compile,
    leave_us_alone,
)
from cache4diffusion.engine.decide import decide, new_units
from cache4diffusion.engine.driver import Driver, Inner
from cache4diffusion.engine.drivers import driver_of
from cache4diffusion.engine.inputs import Inputs, inputs_of
from cache4diffusion.engine.leaves import flatten, merge_rows, parameter_names, specs_of, take_rows
from cache4diffusion.engine.state import BranchState, Context, Verdict, is_new_conditioning
from cache4diffusion.engine.watch import Watcher
from cache4diffusion.errors import AnatomyError, Cache4DiffusionError, CompositionError, RunError
from cache4diffusion.gates import Front, Step, Verification
from cache4diffusion.method import Composition
from cache4diffusion.run import Call, Run, RunTracker
from cache4diffusion.trace import CACHED, FULL, HALF, MIXED, PARTIAL, Ledger, Record, Timer, Trace, unique_bytes
from cache4diffusion.wrap import CallWrapper

NanGuard = Literal["now", "next", "off"]


class Engine:
    """One composition in one denoiser.

    Args:
        denoiser: the network called in the sampling loop.
        composition: what to run.
        tracker: tells run, step and branch; shared by the denoisers of one pipeline.
        trace: where records go; shared likewise.
        name: of the denoiser, for records and messages.
        owner: the handle, found again on the denoiser by a second `accelerate`.
        batch_order: which half of a batched guidance call is which, if known.
        nan_guard: ``"now"`` reads the finite check of a cached output at once and recomputes; ``"next"`` reads it at
            the next step (no sync) and makes that one full; ``"off"`` does not look. None: now on the CPU, else next.
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
        batch_order: str = "auto",
        nan_guard: NanGuard | None = None,
    ) -> None:
        self.denoiser, self.composition, self.tracker, self.trace = denoiser, composition, tracker, trace
        self.name = name
        self.nan_guard: NanGuard | None = nan_guard
        self.gate, self.predictor = composition.gate, composition.predictor
        self.anatomy: Anatomy | None = None
        self.blocks: list[BlockView] = []
        self.ledger, self.timer = Ledger(), Timer()
        self.call_specs: Any = None  # shapes of the newest run's first call, for cost estimates
        self.num_steps: int | None = None  # of the newest run
        self.bypassed: list[str] = []  # modules that rest on a cached step, likewise
        self._states: dict[tuple[int, str], BranchState] = {}
        self._leads: dict[tuple[int, int, int], Verdict] = {}
        self._lock = threading.RLock()
        self._active: Context | None = None
        self._inputs: Inputs = inputs_of(denoiser)
        self._seen: list[weakref.ref[nn.Module]] = []  # the denoiser's modules when the sites were attached
        self._block_wrappers: list[CallWrapper] = []
        self._installed = False
        self._checked_runs: set[int] = set()
        self._axes: dict[Any, dict[LeafPath, int]] = {}  # of the denoiser's arguments, by kind of call
        self.driver: Driver | None = driver_of(self, composition.site) if composition.site is not None else None
        self.branches = BranchDriver(self, composition.cfg, batch_order) if composition.cfg is not None else None
        self.watcher = Watcher(self)
        self._hides_sites = hides_sites(composition)
        leave_us_alone()
        self._root = CallWrapper(denoiser, self._on_denoiser, owner=owner, allow_compile=self._allow_compile)

    # -- attaching -------------------------------------------------------------------------------------------------

    @property
    def needs_anatomy(self) -> bool:
        """Whether the inside of the denoiser must be known."""
        splits_rows = self.composition.decide == "row" or self.branches is not None
        return splits_rows or (self.driver is not None and self.driver.needs_anatomy)

    @property
    def is_unet(self) -> bool:
        """Whether the denoiser has U-Net levels."""
        return self.anatomy is not None and self.anatomy.unet is not None

    @property
    def watched_blocks(self) -> int:
        """Blocks in front of the gate's watch point; they always run."""
        watch = self.gate.watch if self.gate is not None else None
        return watch.blocks if isinstance(watch, Front) else 0

    def _allow_compile(self) -> None:
        """``denoiser.compile()`` on the accelerated denoiser."""
        if self._hides_sites:
            raise CompositionError(f"{self.name} {WHOLE}".replace("was compiled", "would be compiled", 1))

    def _allow_block_compile(self) -> None:
        """``block.compile()`` on a wrapped block."""
        if self.composition.tokens is not None:
            raise CompositionError(f"{self.name}: {TOKENS}")

    def _attach(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Install at the first call; if that cannot be, leave nothing attached.

        A call that is wrong in itself fails in the host's own words, and nothing else changes.
        """
        try:
            self._install(args, kwargs)
        except Cache4DiffusionError:
            inner(*args, **kwargs)
            owner = self._root.owner
            (self if owner is None else owner).remove()
            raise

    def _is_rebuilt(self) -> bool:
        """Whether modules were exchanged since `_install`, as adapters do when they are loaded or unloaded."""
        now = [module for _, module in self.denoiser.named_modules()]
        return len(now) != len(self._seen) or any(a() is not b for a, b in zip(self._seen, now, strict=True))

    def _install(self, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy | None = None) -> None:
        """Find out how the denoiser is built and attach the sites; all or nothing."""
        try:
            if self.needs_anatomy:
                self.anatomy = anatomy or observe(self.denoiser, args, kwargs)
                self._axes = {}
                self.blocks = views_of(self.anatomy)
                for note in self.anatomy.notes:
                    self.trace.note(f"{self.name}: {note}")
                if self.composition.needs_stack is not None and not self.anatomy.main:
                    raise no_stack(self.anatomy.denoiser, self.composition)
            if self.driver is not None:
                self.watcher.install()
                self.driver.install(self.anatomy)
                if self.driver.needs_blocks or self.watcher.needs_blocks:
                    self._wrap_blocks()
                self.bypassed = self.driver.bypassed()
        except BaseException:
            self._uninstall()
            raise
        self._seen = [weakref.ref(module) for _, module in self.denoiser.named_modules()]
        self._installed = True

    def _wrap_blocks(self) -> None:
        modules = dict(self.denoiser.named_modules())
        for position, view in enumerate(self.blocks):

            def handler(inner: Inner, args: Any, kwargs: Any, position: int = position) -> Any:
                return self._on_block(position, inner, args, kwargs)

            self._block_wrappers.append(
                CallWrapper(modules[view.path], handler, allow_compile=self._allow_block_compile)
            )
        if any(is_compiled(wrapper.module) for wrapper in self._block_wrappers):
            self._allow_block_compile()

    def _uninstall(self) -> None:
        for wrapper in self._block_wrappers:
            wrapper.remove()
        self._block_wrappers = []
        if self.driver is not None:
            self.driver.uninstall()
        self._installed = False

    def remove(self) -> None:
        """Take every wrapper away and forget everything."""
        with self._lock:
            self._uninstall()
            self._root.remove()
            self.drop_states()

    # -- runs ------------------------------------------------------------------------------------------------------

    def on_run_begin(self, run: Run) -> None:
        """Nothing survives from earlier runs of this thread."""

    def on_run_end(self, run: Run, aborted: bool) -> None:
        """Forget everything of this run."""
        self._checked_runs.discard(run.id)
        self._states = {key: state for key, state in self._states.items() if key[0] != run.id}
        self._leads = {key: verdict for key, verdict in self._leads.items() if key[0] != run.id}
        if self.branches is not None:
            if not aborted:
                self.branches.conclude(run.id)
            self.branches.forget(run.id)
        self.account()

    def drop_states(self) -> None:
        """Forget everything of every run."""
        self._states.clear()
        self._leads.clear()
        if self.branches is not None:
            self.branches.forget(None)
        self.account()

    def account(self) -> None:
        """Bring the ledger up to date."""
        tensors = [tensor for state in self._states.values() for tensor in self.tensors_of(state)]
        if self.branches is not None:
            tensors += list(self.branches.tensors())
        self.ledger.set(unique_bytes(tensors))

    def tensors_of(self, state: BranchState) -> list[Tensor]:
        """Every cached tensor of a branch."""
        tensors = list(state.tensors())
        rule = self.composition.tokens
        if rule is not None:
            for kept in state.tokens.values():
                tensors += list(rule.tensors(kept))
        return tensors

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], anatomy: Anatomy | None = None) -> None:
        """Attach now, from the arguments of a call, instead of at the first call; ``anatomy`` if it is known already.

        Raises:
            AnatomyError: the denoiser lacks what the site needs; nothing is left attached.
        """
        with self._lock:
            if not self._installed:
                self._install(args, kwargs, anatomy)

    def _check_run(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if run.id in self._checked_runs:
            return
        self.call_specs, self.num_steps = specs_of(args, kwargs), run.num_steps
        if run.num_steps is None:
            if self.composition.needs_num_steps:
                raise RunError(
                    "This method must know the number of steps, and nothing tells it in a loop of your own. Write "
                    "`with handle.run(timesteps=timesteps):` around the loop (or num_steps=...)."
                )
        else:
            self.composition.check_run(run.num_steps)
        self._checked_runs.add(run.id)

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
                if self._hides_sites and is_under_compile():
                    raise RunError(f"{self.name} {WHOLE}")
                timestep, latent, conditioning = self._inputs.split(args, kwargs)
                call = self.tracker.enter(id(self), timestep=timestep, conditioning=conditioning, latent=latent)
                if self._installed and call.run.id not in self._checked_runs and self._is_rebuilt():
                    self._uninstall()
                if not self._installed:
                    self._attach(inner, args, kwargs)
                self._check_run(call.run, args, kwargs)
                if self.branches is not None:
                    output = self.branches.run(call, latent, inner, args, kwargs)
                    self.account()
                    return output
                return self.run_branch(call, latent, inner, args, kwargs)
            except BaseException:
                self.tracker.fail()
                raise
            finally:
                self._active = None

    def run_branch(
        self,
        call: Call,
        latent: Tensor,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_half: bool = False,
    ) -> Any:
        """Run one call of one branch through the site.

        Args:
            call: which one.
            latent: the latent among the arguments.
            inner: the denoiser's call.
            args: its positional arguments.
            kwargs: its keyword arguments.
            is_half: whether these are the rows of one CFG branch only, of a call that had both. What is cached for
                them is kept apart from what is cached for both.
        """
        step = Step(call.step, call.run.num_steps)
        start, event = time.perf_counter(), self.timer.events(latent.device)
        if self.driver is None:
            output = inner(*args, **kwargs)
            record = Record(self.name, call.run.id, step.index, call.branch, FULL, "no site", None)
        else:
            state_name = f"{call.branch}/source" if is_half else call.branch
            context = self._context(call, state_name, step, latent, args, kwargs)
            if not self.watcher.needs_blocks:
                self._decide_early(context)
            # Hosts use lists up (T2I adapters' residuals): a second attempt needs them whole.
            spare = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
            output = self._dispatch(context, inner, args, kwargs)
            self._check_reached(context)
            output = self._guarded(context, output, inner, args, spare)
            record = self._record(context, call.branch)
            context.state.last_step = step.index
        if is_half:
            record.reason += ", one branch only"
            record.symbol = HALF if record.symbol == FULL else record.symbol
        if event is None:
            record.wall_ms = 1e3 * (time.perf_counter() - start)
        else:
            self.timer.add(record, event, self.timer.events(latent.device))
        self.add_record(record)
        return output

    def add_record(self, record: Record) -> None:
        """Enter what a call was, and what is held after it."""
        self.trace.add(record)
        if record.symbol != CACHED:  # a cached step takes nothing in
            self.account()

    @property
    def inputs(self) -> Inputs:
        """Roles of the denoiser's arguments."""
        return self._inputs

    def _check_reached(self, context: Context) -> None:
        """A full step must have met the sites; something that runs around their wrappers hides them all."""
        assert self.driver is not None
        if not self.driver.keys:
            return  # nothing to decide: the blocks that always run are all there are
        is_reached = not self.watcher.needs_blocks or bool(context.verdicts)
        if context.rows is None and all(verdict.is_full for verdict in context.verdicts.values()):
            is_reached = is_reached and self.driver.was_reached(context)
        if not is_reached:
            raise RunError(
                f"In a full step of {self.name} no site was called: the wrappers on its modules were not run. If it "
                f"{WHOLE}"
            )

    def _context(
        self, call: Call, branch: str, step: Step, latent: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Context:
        lengths = [tensor.shape for tensor in self._inputs.split(args, kwargs)[2]]
        signature = (latent.shape, latent.dtype, latent.device, lengths)
        key = (call.run.id, branch)
        state = self._states.get(key)
        batch = latent.shape[0]
        if state is None or state.signature != signature:
            if state is not None:
                self.trace.note(f"{self.name}: latent or conditioning changed their shape in a run; started anew.")
            state = self._states[key] = BranchState(signature)
        assert self.driver is not None
        for decision in self.driver.keys:
            if decision not in state.units:
                state.units[decision] = new_units(self.composition, call.run.num_steps, batch)
        if state.unread_finite is not None:
            is_finite, state.unread_finite = bool(state.unread_finite), None
            self.trace.syncs += 1
            if not is_finite:
                self._mark_broken(state)
        return Context(call, step, state, batch, kwargs=kwargs)

    def _mark_broken(self, state: BranchState) -> None:
        self.trace.note(f"{self.name}: a predicted output was not finite; its history was cleared.")
        state.forget_features()

    def _decide_early(self, context: Context) -> None:
        assert self.driver is not None
        for key in self.driver.keys:
            self.take_decision(context, key, None)
        if isinstance(self.gate.watch if self.gate else None, Verification):
            units = context.state.units[0]
            flags = [self.gate.is_checked(unit.gate) for unit in units]  # type: ignore[union-attr]
            context.is_checked = any(flags)
            context.scratch["checked"] = flags

    def take_decision(self, context: Context, key: int, observe: Any) -> Verdict:
        """Ask guards and gate, once; tied branches follow the first of the step."""
        assert self.driver is not None
        lead = (context.call.run.id, context.step.index, key)
        follow = self._leads.get(lead) if self.composition.branches == "tied" else None
        is_overdue = self._is_overdue(context, key)
        is_ready = self.driver.is_ready(context, key) and not is_new_conditioning(context.call) and not is_overdue
        verdict = decide(self.composition, context, key, is_ready, observe, follow)
        if is_overdue:
            verdict = dataclasses.replace(verdict, reason="makes up for a full step this branch missed")
        if self.composition.branches == "tied" and follow is None:
            self._leads = {k: v for k, v in self._leads.items() if k[1] == context.step.index or k[0] != lead[0]}
            self._leads[lead] = verdict
        context.verdicts[key] = verdict
        return verdict

    def _is_overdue(self, context: Context, key: int) -> bool:
        """Whether a schedule's full step fell where this branch was not called: its CFG rule skipped it, or guidance
        paused. Gates that watch something see by themselves how far things have moved.
        """
        last, gate = context.state.last_step, self.gate
        if last is None or gate is None or gate.watch is not None:
            return False
        missed = [Step(index, context.step.num_steps) for index in range(last + 1, context.step.index)]
        return any(not gate.propose(unit.gate, step, None) for unit in context.state.units[key] for step in missed)

    def _dispatch(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.driver is not None
        verdict = context.verdicts.get(0)
        if verdict is None or verdict.is_full or verdict.is_cached or self.driver.splits_rows:
            self._active = context
            return self.driver.run(context, inner, args, kwargs)
        groups = []
        for rows, cached in ((verdict.full_rows, False), (verdict.cached_rows, True)):
            sub_args, sub_kwargs = self._denoiser_rows(args, kwargs, rows, context.batch)
            part = Context(context.call, context.step, context.state, context.batch, kwargs=kwargs, rows=rows)
            part.verdicts[0] = Verdict((cached,), verdict.reason, verdict.scores)
            part.is_checked = context.is_checked and cached
            part.scratch["checked"] = context.scratch.get("checked")
            self._active = part
            groups.append((rows, self.driver.run(part, inner, sub_args, sub_kwargs)))
        return merge_rows(groups, context.batch)

    def _denoiser_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int], batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return take_rows(self.denoiser, args, kwargs, self.denoiser_axes(args, kwargs, batch), rows)

    def denoiser_axes(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> dict[LeafPath, int]:
        """Batch axis of every argument of the denoiser that has one; found anew for every new kind of call.

        Raises:
            AnatomyError: they were not established.
        """
        names = parameter_names(type(getattr(self.denoiser, "_orig_mod", self.denoiser)))
        tensors = {path: leaf for path, leaf in argument_leaves(args, kwargs) if isinstance(leaf, Tensor)}
        kind = tuple((path, leaf.ndim) for path, leaf in tensors.items())
        if kind not in self._axes:
            assert self.anatomy is not None
            found = observe(self.denoiser, args, kwargs) if self._axes else self.anatomy
            axes: dict[LeafPath, int] = {}
            known = {_by_name(names, path): axis for path, axis in found.batch_axes.get("", Axes()).arguments.items()}
            for path, leaf in tensors.items():
                axis = known.get(_by_name(names, path), -1)
                if axis == -1 and batch in leaf.shape:
                    raise AnatomyError(
                        f"Whether argument {_words(_by_name(names, path))} of {found.denoiser} carries the batch could "
                        "not be established, so rows cannot be treated apart. Use a method without cfg='fastercache' "
                        "and decide='row'."
                    )
                if axis is not None and axis >= 0:
                    axes[path] = axis
            self._axes[kind] = axes
        return self._axes[kind]

    def batch_axes(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> dict[Any, int]:
        """Batch axis of every argument of a block that has one.

        Raises:
            AnatomyError: they were not established.
        """
        assert self.anatomy is not None
        axes = self.anatomy.batch_axes.get(path)
        if axes is None:
            raise AnatomyError(
                f"Which arguments of {path or self.anatomy.denoiser} carry the batch could not be established, so rows "
                "cannot be treated apart. Use decide='any' or decide='batch'."
            )
        return {leaf: axis for leaf, axis in axes.arguments.items() if axis is not None}

    def _on_block(self, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = self._active
        if context is None or self.driver is None:
            return inner(*args, **kwargs)
        self.watcher.before(context, position, inner, args, kwargs)
        output = self.driver.on_block(context, position, inner, args, kwargs)
        self.watcher.after(context, position, args, kwargs, output)
        if context.is_checked and position == len(self.blocks) - 1:
            self._verify(context, inner, args, kwargs, output)
        return output

    def _verify(
        self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        assert self.driver is not None
        context.scratch["last_output"] = output
        errors = self.driver.verify(context, inner, args, kwargs)
        units = context.state.units[0]
        concerned = context.rows if context.rows is not None else range(len(units))
        self.trace.syncs += 1
        for unit, value in zip(concerned, errors.tolist(), strict=True):
            if context.scratch["checked"][unit]:
                units[unit].feedback = value

    def pass_through(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's output as if it had done nothing."""
        return self.blocks[position].rebuild(self.stream_inputs(position, args, kwargs))

    def stream_inputs(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """What enters a block, one tensor per stream."""
        return self.blocks[position].inputs(self.module(position), args, kwargs)

    def module(self, position: int) -> nn.Module:
        """The module of a main block."""
        return self._block_wrappers[position].module

    def block_rows(
        self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Sequence[int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments for some rows."""
        path = self.blocks[position].path
        return take_rows(self.module(position), args, kwargs, self.batch_axes(path, args, kwargs, 0), rows)

    # -- afterwards ------------------------------------------------------------------------------------------------

    def nan_guard_on(self, device: torch.device) -> NanGuard:
        """What is done about NaN on this device."""
        if self.nan_guard is None:
            return "now" if device.type == "cpu" else "next"
        return self.nan_guard

    def _guarded(
        self, context: Context, output: Any, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Check a cached output for NaN and Inf."""
        if all(verdict.is_full for verdict in context.verdicts.values()):
            return output
        guard = self.nan_guard_on(next(leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)).device)
        if guard == "off":
            return output
        leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        is_finite = torch.stack([torch.isfinite(leaf).all() for leaf in leaves]).all()
        if guard == "next":
            context.state.unread_finite = is_finite
            return output
        if bool(is_finite):
            return output
        self._mark_broken(context.state)
        context.verdicts = {key: Verdict((False,), "not finite, recomputed") for key in context.verdicts}
        context.rows, context.is_checked, context.scratch = None, False, {}
        self._active = context
        assert self.driver is not None
        return self.driver.run(context, inner, args, kwargs)

    def _record(self, context: Context, branch: str) -> Record:
        verdicts = list(context.verdicts.values())
        first = verdicts[0] if verdicts else Verdict((False,), "nothing to decide")
        if all(verdict.is_full for verdict in verdicts):
            symbol = FULL
        elif all(verdict.is_cached for verdict in verdicts):
            symbol = PARTIAL if self.composition.tokens is not None else CACHED
        else:
            symbol = MIXED
        rows = first.cached if len(first.cached) > 1 else None
        return Record(
            self.name,
            context.call.run.id,
            context.step.index,
            branch,
            symbol,
            first.reason,
            rows,
            first.scores,
            is_verified=context.is_checked,
        )


def no_stack(denoiser: str, composition: Composition) -> AnatomyError:
    """The error where a composition needs a stack of blocks and there is none."""
    return AnatomyError(
        f"{denoiser} has no stack of blocks that carries the latent, and this method needs one: "
        f"{composition.needs_stack}. On U-Nets these work: 'deepcache' (levels), 'fora' and 'taylorseer' (the parts of "
        "the transformer blocks inside levels), 'taylorseer-lite' (the whole denoiser), 'fastercache' (CFG branches)."
    )


def _by_name(names: Sequence[str], path: LeafPath) -> LeafPath:
    """An argument's path with its name in front, however it was passed."""
    head = path[0]
    return (names[head], *path[1:]) if isinstance(head, int) and head < len(names) else path


def _words(path: LeafPath) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
