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
from cache4diffusion.engine.half import Half
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.leaves import flatten, unflatten
from cache4diffusion.engine.maps import Grid, grid_of, said_of_grid
from cache4diffusion.errors import AnatomyError, CompositionError
from cache4diffusion.gates import Step
from cache4diffusion.guidance import BranchRule
from cache4diffusion.run import Call
from cache4diffusion.trace import CACHED, FULL, HALF, MIXED, Record

_COND, _UNCOND = ("cond", "pred_cond"), ("uncond", "pred_uncond")  # what diffusers calls its branches

_COND_FIRST = (  # denoisers to whose pipelines the first half of a batched call is the conditional one
    "AceStepTransformer1DModel",
    "DiTTransformer2DModel",
    "LuminaNextDiT2DModel",
    "OmniGenTransformer2DModel",
    "StableCascadeUNet",
    "WuerstchenDiffNeXt",
    "WuerstchenPrior",
    "ZImageTransformer2DModel",
)


@dataclass
class GuidanceState:
    """What is remembered of one run."""

    rule: Any
    layouts: dict[Any, bool] = field(default_factory=dict)  # by shape of the latent: are both branches in one call?
    source_step: int = -1
    source: list[Tensor] = field(default_factory=list)  # the source branch's output maps of this step (sequential)
    source_branch: str | None = None
    target_branch: str | None = None  # the one whose calls are answered from it
    template: Any = None  # how an output is made of tensors
    grid: Grid | None = None  # how its tokens lie in the image
    shape: Any = None  # of the latents the rule's state belongs to
    made: torch.Size | None = None  # shape of the last output
    pairs: int = 0  # steps at which both branches were seen, run or not
    skipped: int = 0  # steps at which one of them was not run
    last_step: int = 0  # that was called
    unread_finite: Tensor | None = None  # finite check of the last prediction, not read yet


@dataclass(frozen=True)
class GuidedCall:
    """One call of the denoiser, and what is remembered of its run."""

    state: GuidanceState
    step: Step
    call: Call
    latent: Tensor
    inner: Inner
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BranchDriver:
    """Runs a `BranchRule` around everything else.

    Whether a call holds both branches is asked once per run and shape of the latent, at the first step at which one of
    them would be skipped: both halves then denoise the same latents under different conditioning. (At the very first
    step so do two images of one seed; later their latents differ.) Until then calls are treated as both kinds.

    Args:
        host: the denoiser.
        rule: when and how.
        finite: checks what was predicted.
        run_branch: `Engine.run_branch`.

    Attributes:
        batch_order: which half of a batched call is which: as the rule says, else as diffusers calls the denoiser.
    """

    def __init__(self, host: Host, rule: BranchRule, finite: FiniteGuard, run_branch: Callable[..., Any]) -> None:
        self.host, self.rule, self.finite, self.run_branch = host, rule, finite, run_branch
        usual = "cond-uncond" if type(host.plain).__name__ in _COND_FIRST else "uncond-cond"
        self.batch_order = usual if rule.batch_order == "auto" else rule.batch_order
        self.is_guided: Callable[[], bool | None] = lambda: None  # the pipeline's own word, if it gives one
        self.shortfall = ""  # why nothing was skipped in the last run, if so
        self._states: dict[int, GuidanceState] = {}

    @property
    def is_off(self) -> bool:
        """Whether the rule never skips."""
        return getattr(self.rule, "interval", 0) == 1 or getattr(self.rule, "never_caches", False)

    def forget(self, run: int | None) -> None:
        """Drop what is remembered of a run (of all for None)."""
        for key in list(self._states):  # one by one: another thread's run may be adding to them
            if run is None or key == run:
                self._states.pop(key, None)

    def conclude(self, run: int) -> None:
        """At the end of a run: say so if nothing was skipped."""
        self.shortfall, state = "", self._states.get(run)
        if state is None or state.skipped or self.is_off:
            return
        if state.last_step < self.rule.begins:
            why = f"the run ended before step {self.rule.begins}, the first at which that may be"
        elif state.pairs:
            why = "every guided step was one that runs both branches"
        else:
            why = "no guidance was seen: no call with both branches as halves, no second call in a step"
        self.shortfall = f"{self.host.name}: no CFG branch was skipped, because {why}."
        self.host.trace.note(self.shortfall)

    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""
        for state in list(self._states.values()):
            yield from state.source
            yield from self.rule.tensors(state.rule)

    def run(self, call: Call, latent: Tensor, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of the denoiser, whole or in part."""
        state = self._states.setdefault(call.run.id, GuidanceState(self.rule.init(self.host.store)))
        if not self.finite.passed(state):
            self._start_anew(state)
        if call.is_edited:  # what is known of how the branches differ was seen under another conditioning
            state.rule = self.rule.init(self.host.store)
        now = GuidedCall(state, Step(call.step, call.run.num_steps), call, latent, inner, args, kwargs)
        state.last_step = now.step.index
        return self._batched(now) if self._may_be_batched(now) else self._sequential(now)

    def _may_be_batched(self, now: GuidedCall) -> bool:
        rows = now.latent.shape[0]
        if rows == 0 or rows % 2 or self.rule.layout == "sequential":
            return False
        if self.rule.layout == "batched":
            return True
        if now.call.ordinal > 0 or _kind(now.call.branch) is not None or self.is_guided() is False:
            return False
        return now.state.layouts.get(now.latent.shape, True)

    def _is_batched(self, now: GuidedCall) -> bool:
        """Whether a call that may hold both branches does."""
        if self.rule.layout == "batched":
            return True
        state, latent = now.state, now.latent
        if latent.shape not in state.layouts:
            conditioning = self.host.inputs.split(now.args, now.kwargs)[2]
            half, denoised = latent.shape[0] // 2, _denoised(latent, state.made)
            verdict = (denoised[:half] == denoised[half:]).all()
            if self.is_guided() is None:  # a pipeline that says yes may do so with equal prompts
                kinds = [c[:half] != c[half:] for c in conditioning if c.ndim and c.shape[0] == 2 * half]
                verdict = verdict & torch.stack([verdict & False, *[kind.any() for kind in kinds]]).any()
            self.host.trace.syncs += 1
            state.layouts[latent.shape] = bool(verdict)
        return state.layouts[latent.shape]

    def _fit(self, now: GuidedCall) -> None:
        if now.state.shape != now.latent.shape:
            now.state.rule, now.state.shape = self.rule.init(self.host.store), now.latent.shape

    def _run(self, now: GuidedCall, twin: str | None = None) -> Any:
        """The call as it is; its features are merged with those of another branch."""
        return self.run_branch(now.call, now.latent, now.inner, now.args, now.kwargs, twin=twin)

    # -- both branches in one call ---------------------------------------------------------------------------------

    def _batched(self, now: GuidedCall) -> Any:
        state, step, latent = now.state, now.step, now.latent
        batch, half = latent.shape[0], latent.shape[0] // 2
        self._fit(now)
        halves = (list(range(half)), list(range(half, batch)))
        is_source_last = (self.rule.source == "cond") == (self.batch_order == "uncond-cond")
        predicted_rows, source_rows = halves if is_source_last else halves[::-1]
        is_cached = self.rule.is_cached(state.rule, step)
        if is_cached and not self._is_batched(now):
            state.rule = self.rule.init(self.host.store)
            return self._sequential(now)
        if not is_cached:
            output = self._run(now)
            maps = self._maps(now, output)
            source, other = ([m[rows[0] : rows[-1] + 1] for m in maps] for rows in (source_rows, predicted_rows))
            self.rule.update(state.rule, step, source, other)
            if self.rule.layout == "batched" or state.layouts.get(latent.shape):
                state.pairs += 1
            else:  # a second call in this step would show that each branch has its own
                self._keep_source(now, maps)
            return output
        self.rule.prefetch(state.rule)  # while the source branch is computed
        sub_args, sub_kwargs = self.host.rows(now.args, now.kwargs, source_rows, batch)
        sub_latent = latent[source_rows[0] : source_rows[-1] + 1]
        shared = None
        if self.rule.shares_history:
            shared = Half(now.args, now.kwargs, source_rows, predicted_rows if self.rule.merges else None)
        output = self.run_branch(now.call, sub_latent, now.inner, sub_args, sub_kwargs, is_half=True, shared=shared)
        maps = self._maps(now, output)
        self.rule.commit(state.rule, step)
        others = self.rule.predict(state.rule, step, maps)
        state.pairs, state.source = state.pairs + 1, []
        if self._is_finite(state, others):
            state.skipped += 1
        else:
            other_args, other_kwargs = self.host.rows(now.args, now.kwargs, predicted_rows, batch)
            others = self._maps(now, now.inner(*other_args, **other_kwargs))
            self.rule.update(state.rule, step, maps, others)
            record = self.host.trace.records[-1]
            record.symbol = FULL if record.symbol == HALF else MIXED
            record.reason = "not finite, recomputed"
        pairs = [(p, s) if is_source_last else (s, p) for p, s in zip(others, maps, strict=True)]
        return self._output(state, [torch.cat(pair) for pair in pairs])

    # -- one call per branch ---------------------------------------------------------------------------------------

    def _keep_source(self, now: GuidedCall, maps: list[Tensor]) -> None:
        # Copies: the host may write into an output before it calls the other branch.
        state = now.state
        state.source, state.source_step = [m.clone() for m in maps], now.step.index
        state.source_branch = now.call.branch

    def _sequential(self, now: GuidedCall) -> Any:
        state, step, latent, kind = now.state, now.step, now.latent, _kind(now.call.branch)
        if now.call.ordinal == 0:
            if kind == "uncond" and not self.is_off and not self.rule.takes_either:
                raise self._wrong_order()
            twin = None
            if self.rule.is_cached(state.rule, step):
                self.rule.prefetch(state.rule)
                twin = state.target_branch if self.rule.merges else None
            output = self._run(now, twin)
            self._keep_source(now, self._maps(now, output))
            return output
        is_second = now.call.ordinal == 1 and (kind is None or self.rule.takes_either)
        is_target = is_second or (kind == "uncond" and not self.rule.takes_either)
        has_source = state.source_step == step.index and bool(state.source)
        if not is_target or not has_source or state.source[0].shape[0] != latent.shape[0]:
            return self._run(now)
        is_wrong = self.rule.batch_order == "uncond-cond" and kind is None and not self.rule.takes_either
        if is_wrong and not self.is_off:
            raise self._wrong_order()
        if latent.shape[0] % 2 == 0 and state.layouts.get(latent.shape) is None:
            state.layouts[latent.shape], state.rule = False, self.rule.init(self.host.store)
        self._fit(now)
        state.pairs += 1
        if self.rule.is_cached(state.rule, step):
            start = time.perf_counter()
            self.rule.commit(state.rule, step)
            maps = self.rule.predict(state.rule, step, state.source)
            if self._is_finite(state, maps):
                return self._skip(now, maps, start)
        output = self._run(now)
        self.rule.update(state.rule, step, state.source, self._maps(now, output))
        state.source, state.target_branch = [], now.call.branch
        return output

    def _skip(self, now: GuidedCall, maps: list[Tensor], start: float) -> Any:
        """Answer a call from the other branch's output of this step."""
        state, call = now.state, now.call
        output = self._output(state, maps)
        state.skipped, state.source = state.skipped + 1, []
        if _kind(call.branch) is None and self.rule.batch_order == "auto" and not self.rule.takes_either:
            self.host.note(
                f"the first of a step's calls was taken for the conditional branch ({state.source_branch}); say "
                "batch_order='cond-uncond' to confirm."
            )
        self.host.trace.add(
            Record(
                self.host.name,
                call.run.id,
                now.step.index,
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
        state.rule = self.rule.init(self.host.store)

    # -- layouts ---------------------------------------------------------------------------------------------------

    def _maps(self, now: GuidedCall, output: Any) -> list[Tensor]:
        """The output's tensors as maps; the state keeps the way back."""
        state = now.state
        leaves, spec = flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        state.made = tensors[0].shape
        state.template = ([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec)
        if tensors[0].ndim != 3 or not self.rule.needs_maps:
            state.grid = None
        elif state.grid is None or state.grid.count != tensors[0].shape[1]:
            denoiser = self.host.plain
            if any(tensor.shape[1] != tensors[0].shape[1] for tensor in tensors):
                raise AnatomyError(
                    f"{type(denoiser).__name__} makes more than image tokens (sound, beside a video), and FasterCache "
                    "cannot filter those by frequency. Use a method without cfg='fastercache'."
                )
            ids, shapes, sizes = said_of_grid(denoiser, now.args, now.kwargs)
            self.host.trace.syncs += isinstance(ids, Tensor)
            state.grid = grid_of(type(denoiser).__name__, tensors[0], ids, shapes, sizes=sizes)
        return tensors if state.grid is None else [state.grid.to_maps(tensor) for tensor in tensors]

    def _output(self, state: GuidanceState, maps: list[Tensor]) -> Any:
        """An output like the last one, around ``maps``."""
        grid = state.grid
        tensors = iter(maps if grid is None else [grid.to_tokens(m) for m in maps])
        constants, spec = state.template
        return unflatten([next(tensors) if slot is None else slot[0] for slot in constants], spec)


def _denoised(latent: Tensor, made: torch.Size | None) -> Tensor:
    """The latent's first channels, as many as are made of it: behind them may come an image that one branch lacks."""
    if made is None or len(made) != latent.ndim:
        return latent
    others = [axis for axis in range(1, latent.ndim) if made[axis] != latent.shape[axis]]
    if len(others) != 1 or made[others[0]] > latent.shape[others[0]]:
        return latent
    return latent.narrow(others[0], 0, made[others[0]])


def _kind(branch: str) -> str | None:
    """``"cond"`` or ``"uncond"`` where the host names its branches so."""
    name = branch.split("#")[0]
    return "cond" if name in _COND else "uncond" if name in _UNCOND else None
