"""The CFG-branch site, outside every other: one branch is not run and its output is made from the other's.

Batched guidance: both branches are halves of one call; on a cached step the call runs with the source half only.
Sequential guidance: the predicted branch's call does not run. The source must have run first in the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.finite import FiniteGuard
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import flatten, get_argument, unflatten
from cache4diffusion.engine.maps import Grid, grid_of
from cache4diffusion.engine.state import is_new_conditioning
from cache4diffusion.errors import CompositionError
from cache4diffusion.gates import Step
from cache4diffusion.guidance import BranchRule
from cache4diffusion.run import Call
from cache4diffusion.trace import CACHED, Record

_COND, _UNCOND = ("cond", "pred_cond"), ("uncond", "pred_uncond")  # what diffusers calls its branches


@dataclass
class GuidanceState:
    """What is remembered of one run."""

    rule: Any
    layouts: dict[Any, bool] = field(default_factory=dict)  # by shape of the latent: are both branches in one call?
    source_step: int = -1
    source: list[Tensor] = field(default_factory=list)  # the source branch's output maps of this step (sequential)
    source_branch: str | None = None
    is_source_new: bool = False  # its conditioning was replaced at this step
    template: Any = None
    grid: Grid | None = None
    shape: Any = None  # of the latents the rule's state belongs to
    pairs: int = 0  # steps at which both branches were seen, run or not
    skipped: int = 0  # steps at which one of them was not run
    unread_finite: Tensor | None = None  # finite check of the last prediction, not read yet


class BranchDriver:
    """Runs a `BranchRule` around everything else.

    Whether a call holds both branches is asked once per run and shape of the latent, at the first step at which one of
    them would be skipped: both halves then denoise the same latents under different conditioning. (At the very first
    step so do two images of one seed; later their latents differ.) Until then calls are treated as both kinds.

    Args:
        host: the denoiser.
        rule: when and how.
        batch_order: which half of a batched call is which, if known from the pipeline (the rule's own setting wins).
        finite: checks what was predicted.
        run_branch: `Engine.run_branch`.
    """

    def __init__(
        self, host: Host, rule: BranchRule, batch_order: str, finite: FiniteGuard, run_branch: Callable[..., Any]
    ) -> None:
        self.host, self.rule, self.finite, self.run_branch = host, rule, finite, run_branch
        own = rule.batch_order
        self.batch_order = own if own != "auto" else (batch_order if batch_order != "auto" else "uncond-cond")
        self.is_guided: Callable[[], bool | None] = lambda: None  # the pipeline's own word, if it gives one
        self.shortfall = ""  # why nothing was skipped in the last run, if so
        self._states: dict[int, GuidanceState] = {}

    @property
    def is_off(self) -> bool:
        """Whether the rule never skips."""
        return getattr(self.rule, "interval", 0) == 1

    def forget(self, run: int | None) -> None:
        """Drop what is remembered of a run (of all for None)."""
        self._states = {} if run is None else {key: state for key, state in self._states.items() if key != run}

    def conclude(self, run: int) -> None:
        """At the end of a run: say so if nothing was skipped."""
        self.shortfall, state = "", self._states.get(run)
        if state is None or state.skipped or self.is_off:
            return
        why = (
            "every guided step was one that runs both branches"
            if state.pairs
            else "no guidance was seen: no call with both branches as halves, no second call in a step"
        )
        self.shortfall = f"{self.host.name}: no CFG branch was skipped, because {why}."
        self.host.trace.note(self.shortfall)

    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""
        for state in self._states.values():
            yield from state.source
            yield from self.rule.tensors(state.rule)

    def run(self, call: Call, latent: Tensor, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the denoiser, whole or in part."""
        state = self._states.setdefault(call.run.id, GuidanceState(self.rule.init()))
        step = Step(call.step, call.run.num_steps)
        if not self.finite.passed(state):
            self._start_anew(state)
        if self._may_be_batched(state, call, latent):
            return self._batched(state, step, call, latent, inner, args, kwargs)
        return self._sequential(state, step, call, latent, inner, args, kwargs)

    def _may_be_batched(self, state: GuidanceState, call: Call, latent: Tensor) -> bool:
        rows = latent.shape[0]
        if rows == 0 or rows % 2 or self.rule.layout == "sequential":
            return False
        if self.rule.layout == "batched":
            return True
        if call.ordinal > 0 or _kind(call.branch) is not None or self.is_guided() is False:
            return False
        return state.layouts.get(latent.shape, True)

    def _is_batched(self, state: GuidanceState, latent: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call that may hold both branches does."""
        if self.rule.layout == "batched":
            return True
        if latent.shape not in state.layouts:
            conditioning = self.host.inputs.split(args, kwargs)[2]
            half = latent.shape[0] // 2
            verdict = (latent[:half] == latent[half:]).all()
            if self.is_guided() is None:  # a pipeline that says yes may do so with equal prompts
                kinds = [c[:half] != c[half:] for c in conditioning if c.ndim and c.shape[0] == 2 * half]
                verdict = verdict & torch.stack([verdict & False, *[kind.any() for kind in kinds]]).any()
            self.host.trace.syncs += 1
            state.layouts[latent.shape] = bool(verdict)
        return state.layouts[latent.shape]

    def _fit(self, state: GuidanceState, latent: Tensor) -> None:
        if state.shape != latent.shape:
            state.rule, state.shape = self.rule.init(), latent.shape

    # -- both branches in one call ---------------------------------------------------------------------------------

    def _batched(
        self,
        state: GuidanceState,
        step: Step,
        call: Call,
        latent: Tensor,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        batch, half = latent.shape[0], latent.shape[0] // 2
        self._fit(state, latent)
        halves = (list(range(half)), list(range(half, batch)))
        predicted_rows, source_rows = halves if self.batch_order == "uncond-cond" else halves[::-1]
        is_cached = self.rule.is_cached(state.rule, step) and not is_new_conditioning(call)
        if is_cached and not self._is_batched(state, latent, args, kwargs):
            state.rule = self.rule.init()
            return self._sequential(state, step, call, latent, inner, args, kwargs)
        if not is_cached:
            output = self.run_branch(call, latent, inner, args, kwargs)
            maps, _ = self._maps(state, output, args, kwargs)
            source, other = ([m[rows[0] : rows[-1] + 1] for m in maps] for rows in (source_rows, predicted_rows))
            self.rule.update(state.rule, step, source, other)
            if self.rule.layout == "batched" or state.layouts.get(latent.shape):
                state.pairs += 1
            else:  # a second call in this step would show that each branch has its own
                self._keep_source(state, step, call, maps)
            return output
        sub_args, sub_kwargs = self.host.rows(args, kwargs, source_rows, batch)
        sub_latent = latent[source_rows[0] : source_rows[-1] + 1]
        output = self.run_branch(call, sub_latent, inner, sub_args, sub_kwargs, is_half=True)
        maps, restore = self._maps(state, output, args, kwargs)
        self.rule.commit(state.rule, step)
        others = self.rule.predict(state.rule, step, maps)
        state.pairs, state.source = state.pairs + 1, []
        if self._is_finite(state, others):
            state.skipped += 1
        else:
            other_args, other_kwargs = self.host.rows(args, kwargs, predicted_rows, batch)
            others, _ = self._maps(state, inner(*other_args, **other_kwargs), args, kwargs)
            self.rule.update(state.rule, step, maps, others)
        pairs = [(u, c) if self.batch_order == "uncond-cond" else (c, u) for u, c in zip(others, maps, strict=True)]
        return restore([torch.cat(pair) for pair in pairs])

    # -- one call per branch ---------------------------------------------------------------------------------------

    def _keep_source(self, state: GuidanceState, step: Step, call: Call, maps: list[Tensor]) -> None:
        # Copies: the host may write into an output before it calls the other branch.
        state.source, state.source_step, state.source_branch = [m.clone() for m in maps], step.index, call.branch

    def _sequential(
        self,
        state: GuidanceState,
        step: Step,
        call: Call,
        latent: Tensor,
        inner: Inner,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        kind = _kind(call.branch)
        if call.ordinal == 0:
            if kind == "uncond" and not self.is_off:
                raise self._wrong_order()
            output = self.run_branch(call, latent, inner, args, kwargs)
            self._keep_source(state, step, call, self._maps(state, output, args, kwargs)[0])
            state.is_source_new = is_new_conditioning(call)
            return output
        is_target = kind == "uncond" or (call.ordinal == 1 and kind is None)
        has_source = state.source_step == step.index and bool(state.source)
        if not is_target or not has_source or state.source[0].shape[0] != latent.shape[0]:
            return self.run_branch(call, latent, inner, args, kwargs)
        if self.rule.batch_order == "uncond-cond" and kind is None and not self.is_off:
            raise self._wrong_order()
        if latent.shape[0] % 2 == 0 and state.layouts.get(latent.shape) is None:
            state.layouts[latent.shape], state.rule = False, self.rule.init()
        self._fit(state, latent)
        state.pairs += 1
        is_new = state.is_source_new or is_new_conditioning(call)
        if self.rule.is_cached(state.rule, step) and not is_new:
            start = time.perf_counter()
            self.rule.commit(state.rule, step)
            maps = self.rule.predict(state.rule, step, state.source)
            if self._is_finite(state, maps):
                return self._skip(state, step, call, maps, start)
        output = self.run_branch(call, latent, inner, args, kwargs)
        maps, _ = self._maps(state, output, args, kwargs)
        self.rule.update(state.rule, step, state.source, maps)
        state.source = []
        return output

    def _skip(self, state: GuidanceState, step: Step, call: Call, maps: list[Tensor], start: float) -> Any:
        """Answer a call from the other branch's output of this step."""
        output = self._restore(state, maps)
        state.skipped, state.source = state.skipped + 1, []
        if _kind(call.branch) is None and self.rule.batch_order == "auto":
            self.host.note(
                f"the first of a step's calls was taken for the conditional branch "
                f"({state.source_branch}); say batch_order='cond-uncond' to confirm."
            )
        self.host.trace.add(
            Record(
                self.host.name,
                call.run.id,
                step.index,
                call.branch,
                CACHED,
                f"predicted from {state.source_branch}",
                wall_ms=1e3 * (time.perf_counter() - start),
            ),
        )
        return output

    def _wrong_order(self) -> CompositionError:
        return CompositionError(
            "FasterCache makes the unconditional output from the conditional one of the same step, and this loop calls "
            "the unconditional branch first. Call the conditional branch first, or use a method without "
            "cfg='fastercache'."
        )

    # -- finite check ----------------------------------------------------------------------------------------------

    def _is_finite(self, state: GuidanceState, maps: list[Tensor]) -> bool:
        """Check a predicted branch as the engine checks its own predictions: now, or at the next step."""
        is_finite = self.finite.passes(state, maps)
        if not is_finite:
            self._start_anew(state)
        return is_finite

    def _start_anew(self, state: GuidanceState) -> None:
        self.host.note("a predicted branch was not finite; its history was cleared.")
        state.rule = self.rule.init()

    # -- layouts ---------------------------------------------------------------------------------------------------

    def _maps(
        self, state: GuidanceState, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
        """The output's tensors as maps, and the way back."""
        leaves, spec = flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        state.template = ([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec)
        if tensors[0].ndim != 3:
            state.grid = None
        elif state.grid is None or state.grid.height * state.grid.width != tensors[0].shape[1]:
            denoiser = getattr(self.host.denoiser, "_orig_mod", self.host.denoiser)
            ids, shapes = (get_argument(denoiser, args, kwargs, (name,)) for name in ("img_ids", "img_shapes"))
            self.host.trace.syncs += isinstance(ids, Tensor)
            state.grid = grid_of(type(denoiser).__name__, tensors[0], ids, shapes)
        grid = state.grid
        maps = tensors if grid is None else [grid.to_maps(tensor) for tensor in tensors]
        return maps, lambda maps: self._restore(state, maps)

    def _restore(self, state: GuidanceState, maps: list[Tensor]) -> Any:
        grid = state.grid
        tensors = iter(maps if grid is None else [grid.to_tokens(m) for m in maps])
        constants, spec = state.template
        return unflatten([next(tensors) if slot is None else slot[0] for slot in constants], spec)


def _kind(branch: str) -> str | None:
    """``"cond"`` or ``"uncond"`` where the host names its branches so."""
    name = branch.split("#")[0]
    return "cond" if name in _COND else "uncond" if name in _UNCOND else None
