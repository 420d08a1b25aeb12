"""One call of one CFG branch through the site: decide, run or predict, look whether the result is finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cache4diffusion.engine.compiling import WHOLE
from cache4diffusion.engine.decide import new_units
from cache4diffusion.engine.decisions import Decisions
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.drivers import driver_of
from cache4diffusion.engine.finite import FiniteGuard
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import flatten, merge_rows, select_rows, take_apart
from cache4diffusion.engine.observers import observer_of
from cache4diffusion.engine.state import Context, Verdict
from cache4diffusion.errors import RunError
from cache4diffusion.gates import Place, Remarking
from cache4diffusion.sites import Site
from cache4diffusion.trace import FULL, Record

NOT_FINITE = "not finite"


class SiteRunner:
    """Runs calls of a denoiser through one site. What is remembered between calls is in the context's state.

    Args:
        host: the denoiser.
        site: where features are recorded and replaced.
        finite: checks what was predicted.
    """

    def __init__(self, host: Host, site: Site, finite: FiniteGuard) -> None:
        self.host, self.finite = host, finite
        self.driver = driver_of(host, site)
        self.decisions = Decisions(host.composition, self.driver)
        self.observer = observer_of(host, self.driver, self.decisions)
        self._active: Context | None = None  # the call in progress
        self._remarking = host.gate if isinstance(host.gate, Remarking) else None

    @property
    def needs_blocks(self) -> bool:
        """Whether `on_block` must be called for every main block."""
        return self.driver.needs_blocks or self.observer.needs_blocks

    def install(self) -> None:
        """Find the watch point and wrap the sites, once the host was examined.

        Raises:
            AnatomyError: the denoiser lacks what they need.
        """
        self.observer.install()
        self.driver.install(self.host.anatomy)

    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the denoiser's call (``inner``), in full or from what is cached."""
        state = context.state
        for key in self.driver.keys:
            if key not in state.units:
                state.units[key] = new_units(self.host.composition, self._place(context, key), context.batch)
        if not self.finite.passed(state):
            self._forget(context)
        # Hosts use lists up (T2I adapters' residuals): a second attempt needs them whole.
        spare = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        try:
            if not self.observer.decides_inside:
                self.decisions.take_all(context, self.observer.look(context))
            output = self._dispatch(context, inner, args, kwargs)
            self._check_reached(context)
            reason = self._flaw(context, output)
            if reason is not None:
                output = self._recompute(context, inner, args, spare, reason)
            self.observer.finish(context, output)
            self._check_turns(context)
        finally:
            self._active = None
        if self.host.listener is not None and not self.driver.is_late:
            self.host.listener.hear_call(context, take_apart(output)[0])
        context.end()
        if not self.driver.is_late:
            self.driver.bring_first(state, context.time + 1)
        return output

    def _place(self, context: Context, key: int) -> Place:
        call = context.call
        return Place(context.step.num_steps, call.run.timesteps, call.branch, self.driver.name_of(key))

    def _forget(self, context: Context, flaw: str = NOT_FINITE) -> None:
        self.host.note(f"a predicted output was {flaw}; its history was cleared.")
        context.state.forget_features()

    def _check_turns(self, context: Context) -> None:
        """Keep nothing of a call in which a module ran more often than when the denoiser was examined."""
        if "astray" in context.scratch:
            self.host.note(
                f"{context.scratch['astray']} ran more often than when the denoiser was examined; such steps are "
                "computed."
            )
            context.state.forget_features()

    def _flaw(self, context: Context, output: Any) -> str | None:
        """What is wrong with what was predicted, if anything."""
        if all(verdict.is_full for verdict in context.verdicts.values()):
            return None
        if "astray" in context.scratch or not self.driver.was_followed(context):
            return "made for other blocks than the host called"
        leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]
        return None if self.finite.passes(context.state, leaves) else NOT_FINITE

    def _recompute(
        self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], flaw: str
    ) -> Any:
        self._forget(context, flaw)
        self.decisions.revoke(context, f"{flaw}, recomputed")
        context.is_checked, context.scratch, context.is_recomputed = False, {}, True
        context.passing, context.passed = frozenset(), 0
        self._active = context
        return self.driver.run(context, inner, args, kwargs)

    def _dispatch(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call as a whole, or its full and its cached rows apart."""
        verdict = context.verdicts.get(0)
        if verdict is None or verdict.is_full or verdict.is_cached or self.driver.splits_rows:
            self._active = context
            return self.driver.run(context, inner, args, kwargs)
        groups = []
        for rows, cached in ((verdict.full_rows, False), (verdict.cached_rows, True)):
            sub_args, sub_kwargs = self.host.rows(args, kwargs, rows, context.batch)
            part = Context(context.call, context.step, context.state, context.batch, kwargs=kwargs, rows=rows)
            part.latent = None if context.latent is None else select_rows(context.latent, rows)
            part.verdicts[0] = Verdict((cached,), verdict.reason, verdict.scores)
            part.is_checked = context.is_checked and cached
            part.scratch["checked"] = context.scratch.get("checked")
            self._active = part
            groups.append((rows, self.driver.run(part, inner, sub_args, sub_kwargs)))
        return merge_rows(groups, context.batch)

    def _check_reached(self, context: Context) -> None:
        """A full step must have met the sites; something that runs around their wrappers hides them all."""
        if not self.driver.keys:
            return  # nothing to decide: the blocks that always run are all there are
        is_reached = not self.observer.decides_inside or bool(context.verdicts)
        if context.rows is None and all(verdict.is_full for verdict in context.verdicts.values()):
            is_reached = is_reached and self.driver.was_reached(context)
        if not is_reached:
            raise RunError(
                f"In a full step of {self.host.name} no site was called: the wrappers on its modules were not run. If "
                f"it {WHOLE}"
            )

    # -- blocks ----------------------------------------------------------------------------------------------------

    def turn(self, positions: Sequence[int]) -> int | None:
        """A module that is several main blocks is called: which of them this is; None if it is none of them."""
        if self._active is None:
            return None
        scratch = self._active.scratch
        count = scratch[("turn", positions[0])] = scratch.get(("turn", positions[0]), 0) + 1
        if count <= len(positions):
            return positions[count - 1]
        scratch["astray"] = self.host.blocks[positions[0]].path
        return None

    def on_block(self, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A main block is called."""
        context = self._active
        if context is None:
            return inner(*args, **kwargs)
        if position in context.passing:
            context.passed += 1
            return self.host.pass_through(position, args, kwargs)
        self.observer.before(context, position, inner, args, kwargs)
        output = self.driver.on_block(context, position, inner, args, kwargs)
        self.observer.after(context, position, args, kwargs, output)
        if context.is_checked and position == len(self.host.blocks) - 1:
            self._verify(context, inner, args, kwargs, output)
        return output

    def _verify(
        self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        context.scratch["last_output"] = output
        errors = self.driver.verify(context, inner, args, kwargs)
        units = context.state.units[0]
        concerned = context.rows if context.rows is not None else range(len(units))
        self.host.trace.syncs += 1
        for unit, value in zip(concerned, errors.tolist(), strict=True):
            if context.scratch["checked"][unit]:
                units[unit].feedback = value

    # -- afterwards ------------------------------------------------------------------------------------------------

    def record(self, context: Context) -> Record:
        """What the call was."""
        verdicts = list(context.verdicts.values())
        if self._remarking is not None:
            for score in [score for verdict in verdicts for score in verdict.scores if score is not None]:
                remark = self._remarking.remark(score)
                if remark is not None:
                    self.host.trace.count(f"{self.host.name}: {remark}")
        flags = [flag for verdict in verdicts for flag in verdict.cached]
        first = verdicts[0] if verdicts else Verdict((False,), "nothing to decide")
        symbol = FULL if all(verdict.is_full for verdict in verdicts) else self.driver.symbol(context)
        return Record(
            self.host.name,
            context.call.run.id,
            context.step.index,
            context.call.branch,
            symbol,
            first.reason,
            first.cached if len(first.cached) > 1 else None,
            first.scores,
            cached=sum(flags) / len(flags) if flags else 0.0,
            rested=self.driver.rested(context) if any(flags) else None,
            is_verified=context.is_checked,
            reduced=self.driver.reductions(context),
        )
