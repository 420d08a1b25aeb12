"""What a driver is: it puts one kind of site to use in one denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from cache4diffusion.anatomy import Anatomy
from cache4diffusion.engine.host import Host
from cache4diffusion.engine.state import BranchState, Context
from cache4diffusion.predictors import Corrector, History, Predictor, Sited
from cache4diffusion.storage import PLAIN, Store
from cache4diffusion.trace import CACHED, MIXED, PARTIAL, Reductions
from cache4diffusion.wrap import CallWrapper, ForwardWrapper

Inner = Callable[..., Any]
Rested = tuple[tuple[str, float], ...]  # modules that did not run in a call, and for which share of the rows


def take_in(
    predictor: Predictor | Corrector,
    context: Context,
    name: str,
    leaves: Sequence[Tensor],
    seen: Sequence[Tensor] = (),
    rows: Sequence[int] | None = None,
    store: Store = PLAIN,
) -> None:
    """Give a site's predictor the feature of a full step; a corrector also what it saw with it."""
    sites, rows = context.state.sites, context.rows if rows is None else rows
    if name not in sites:
        size = (context.batch, context.step.num_steps, store)
        sites[name] = predictor.init_at(name, *size) if isinstance(predictor, Sited) else predictor.init(*size)
    if isinstance(predictor, Corrector):
        predictor.update_seeing(sites[name], leaves, seen, context.time, rows)
    else:
        predictor.update(sites[name], leaves, context.time, rows)


def predicted(
    predictor: Predictor | Corrector,
    context: Context,
    name: str,
    seen: Sequence[Tensor] = (),
    rows: Sequence[int] | None = None,
) -> list[Tensor]:
    """The prediction of a site."""
    state, rows = context.state.sites[name], context.rows if rows is None else rows
    if isinstance(predictor, Corrector):
        return predictor.predict_seeing(state, seen, context.time, rows)
    return predictor.predict(state, context.time, rows)


def go_on_with(
    predictor: Predictor | Corrector, context: Context, name: str, seen: Sequence[Tensor] = ()
) -> list[Tensor]:
    """What a cached step goes on with at a site: the prediction, of which the predictor takes note."""
    leaves = predicted(predictor, context, name, seen)
    predictor.commit(context.state.sites[name], leaves, context.time, context.rows)
    return leaves


class Driver(ABC):
    """Records and replaces the features of one kind of site.

    The engine calls, in this order: `install` once the anatomy is known; per denoiser call `is_ready`, then `run`,
    within which block wrappers come back through `on_block`; `uninstall` at the end. A driver keeps what it remembers
    of a run in the `BranchState` it is given, never in itself.
    """

    needs_anatomy = True
    splits_rows = False  # whether it treats rows apart itself; else the engine calls it once per group of rows
    is_late = False  # whether what a call computed is recorded only after it, at the scheduler
    keeps_when_cached = False  # whether cached steps change what is held
    needs_blocks = False  # whether the engine must wrap the main blocks' calls for `on_block`

    def __init__(self, host: Host, site: Any) -> None:
        self.host, self.site = host, site
        self.corrections: dict[str, int] = {}  # FLOPs of correcting a whole batch, by path of the module that rests
        self.sees_input = host.sees == "input"  # it is given what enters a site

    def install(self, anatomy: Anatomy | None) -> None:  # noqa: B027 - optional step
        """Wrap what must be wrapped.

        Raises:
            AnatomyError: the denoiser lacks what this site needs.
        """

    def try_out(self, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: B027 - optional step
        """After `install`: see on the values of a call what cannot be seen without them.

        Raises:
            AnatomyError: the denoiser lacks what this site needs.
        """

    def shape_of(self, latent: Tensor) -> tuple[int, ...]:
        """What of the latent's shape must stay as it is in a run, for what is remembered to go on."""
        return latent.shape

    @property
    def forbids_compiled_blocks(self) -> str | None:
        """Why blocks must not be compiled while this is installed; None if they may be."""
        return None

    def uninstall(self) -> None:  # noqa: B027 - optional step
        """Take every wrapper away."""

    @property
    def wrappers(self) -> list[CallWrapper | ForwardWrapper]:
        """What was wrapped by `install`."""
        return []

    @property
    def keys(self) -> tuple[int, ...]:
        """Identifiers of the decisions taken in one call."""
        return (0,)

    def name_of(self, key: int) -> str:
        """The name of a decision, where there are several in a call; gates may go by it."""
        return ""

    def decision_of(self, site: str) -> str:
        """The name of the decision that a site follows, likewise."""
        return ""

    def path_of(self, site: str) -> str:
        """The path of the module whose output is predicted at a site."""
        return site

    @abstractmethod
    def is_ready(self, context: Context, key: int) -> bool:
        """Whether the features of decision ``key`` can be predicted in this call."""

    def was_reached(self, context: Context) -> bool:
        """After a full step: whether any site was."""
        return bool(context.state.sites)

    @abstractmethod
    def run(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the denoiser's call (``inner``) under the verdicts of ``context``."""

    def serves(self, site: str) -> bool:
        """Whether the predictor can serve a site of this name; if not, it is computed on every step."""
        predictor = self.host.predictor
        return not isinstance(predictor, Sited) or predictor.serves(site)

    def keep(
        self,
        context: Context,
        name: str,
        leaves: Sequence[Tensor],
        seen: Sequence[Tensor] = (),
        rows: Sequence[int] | None = None,
    ) -> None:
        """Take in what a full step computed at a site, for the rows of the call (or only the given ones of them)."""
        predictor = self.host.predictor
        kept = leaves
        if self.host.composition.splits_rows and not isinstance(predictor, Corrector):
            kept = self._by_sample(context, name, leaves, rows)
        take_in(predictor, context, name, kept, seen, rows, self.host.store)
        if isinstance(predictor, Corrector):
            flops = predictor.flops(context.state.sites[name], leaves)
            self.corrections[self.path_of(name)] = flops * context.batch // max(leaves[0].shape[0], 1)
        if self.host.listener is not None:
            self.host.listener.hear_feature(context, name, self.decision_of(name), leaves, seen)

    def forecast(
        self, context: Context, name: str, seen: Sequence[Tensor] = (), rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """What a cached step goes on with at a site, for the rows of the call (or only the given ones of them)."""
        leaves, rows = self.predicted(context, name, seen, rows), context.rows if rows is None else rows
        self.host.predictor.commit(context.state.sites[name], leaves, context.time, rows)
        self.bring_after(context, name)
        if context.twin is not None:
            leaves = self._with_twin(context, context.twin, name, leaves)
        return [leaf.flatten(0, 1) for leaf in leaves] if name in context.state.folded else leaves

    @staticmethod
    def _by_sample(
        context: Context, name: str, leaves: Sequence[Tensor], rows: Sequence[int] | None
    ) -> Sequence[Tensor]:
        """The leaves with an axis for the samples in front, where frames or places are folded into the rows."""
        rows = context.rows if rows is None else rows
        count = context.batch if rows is None else len(rows)
        is_folded = all(leaf.shape[0] > count and leaf.shape[0] % count == 0 for leaf in leaves)
        (context.state.folded.add if is_folded else context.state.folded.discard)(name)
        return [leaf.unflatten(0, (count, -1)) for leaf in leaves] if is_folded else leaves

    def _with_twin(
        self, context: Context, twin: tuple[BranchState, list[int] | None], name: str, leaves: list[Tensor]
    ) -> list[Tensor]:
        """The mean of both branches' features, if both were computed last at the same step."""
        state, rows = twin
        own, other = context.state.sites[name], state.sites.get(name)
        if not isinstance(own, History) or not isinstance(other, History) or other.is_empty:
            return leaves
        newest = [
            track.times[0] for history, its in ((own, context.rows), (other, rows)) for track in history.of(its or (0,))
        ]
        if len(set(newest)) != 1:
            return leaves
        theirs = self.host.predictor.predict(other, context.time, rows)
        return [(mine + theirs) / 2 for mine, theirs in zip(leaves, theirs, strict=True)]

    def predicted(
        self, context: Context, name: str, seen: Sequence[Tensor] = (), rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The prediction of a site, likewise, before anybody takes note of it."""
        return predicted(self.host.predictor, context, name, seen, rows)

    def bring(self, state: BranchState, name: str, time: float) -> None:
        """Begin to bring what a cached step at ``time`` reads at a site, where it lies on another device."""
        if name in state.sites:
            self.host.predictor.prefetch(state.sites[name], time)

    def bring_after(self, context: Context, name: str) -> None:
        """While a site's prediction is made, the next site's is on its way."""
        if not self.host.store.may_be_away:
            return
        if "next" not in context.scratch:
            context.scratch["next"] = dict(pairwise(context.state.sites))
        following = context.scratch["next"].get(name)
        if following is not None:
            self.bring(context.state, following, context.time)

    def bring_first(self, state: BranchState, time: float) -> None:
        """Between two steps, the first site's for the step at ``time`` is on its way."""
        if self.host.store.may_be_away and state.sites:
            self.bring(state, next(iter(state.sites)), time)

    def on_block(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A main block is called; by default it runs."""
        return inner(*args, **kwargs)

    def passing(self, context: Context, key: int) -> frozenset[int]:
        """Main blocks that only hand on what enters them once this decision is to cache: nobody looks at them."""
        return frozenset()

    def was_followed(self, context: Context) -> bool:
        """After a call with predictions: whether the host called what it did when they were recorded."""
        return True

    def symbol(self, context: Context) -> str:
        """The letter of a call that was not full, once it is over."""
        if not all(verdict.is_cached for verdict in context.verdicts.values()):
            return MIXED
        return PARTIAL if self.host.composition.tokens is not None else CACHED

    def reductions(self, context: Context) -> Reductions | None:
        """What a call computed on fewer tokens, once it is over."""
        return None

    def on_decided(self, context: Context, key: int) -> None:  # noqa: B027 - optional step
        """A verdict that was pending when the call began has been reached."""

    def bypassed(self) -> list[str]:
        """Paths of the modules that run on no cached step; ``""`` is the whole denoiser."""
        return []

    def rested(self, context: Context) -> Rested | None:
        """What did not run in this call, where cached steps differ in that; None: what `bypassed` says."""
        return None

    def verify(self, context: Context, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Compute the last block from its own input and return the prediction's error, per row or in one."""
        raise NotImplementedError(f"{type(self).__name__} cannot verify")  # compositions refuse this pair
