"""A budget for the cache: what will be stored is weighed before it is, and what would fit is named."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.calls import Call
from cache4diffusion.engine.admission import USUAL_STEPS
from cache4diffusion.errors import Cache4DiffusionError, MemoryBudgetError
from cache4diffusion.method import METHODS
from cache4diffusion.settings import component
from cache4diffusion.storage import FP8, Storage
from cache4diffusion.units import size_text

if TYPE_CHECKING:
    from cache4diffusion.accelerate import Choice
    from cache4diffusion.memory import Footprint, Rehearsal

_DEPTHS = ("order", "history", "window")  # settings that say how many snapshots there are, all with a least value of 0
_EACH = 8  # a number of snapshots up to which every lower one is tried; longer histories are halved
_DTYPES = tuple(
    dtype for dtype in (torch.bfloat16, torch.int8, FP8) if dtype is not None
)  # what costs the least, first
_OTHERS = ("fora", "deepcache", "fbcache", "taylorseer-lite", "easycache")  # what keeps little, the most first


class Budget:
    """Holds what a handle's cache would take against a limit.

    Args:
        found: the denoisers by name.
        choice: what was asked for, with its ``memory_budget``.
    """

    def __init__(self, found: Mapping[str, nn.Module], choice: Choice) -> None:
        assert choice.options.memory_budget is not None
        self.found, self.choice, self.limit = dict(found), choice, choice.options.memory_budget
        self.notes: list[str] = []  # what became of what was asked for
        self._kept: dict[str, Footprint] = {}  # by denoiser: what was let through

    def settle_at(self, target: Any, inputs: Any, call: Any) -> Choice:
        """As `settle`, where the shapes are known beforehand.

        Args:
            target: the pipeline, or the denoiser.
            inputs, call: as in `cache_bytes`.

        Raises:
            MemoryBudgetError: nothing that may be taken fits.
        """
        from cache4diffusion.memory import calls_of

        return self.settle(*calls_of(target, self.found, inputs, call))

    def settle(self, calls: Mapping[str, Sequence[Call]], steps: int | None = None, *, is_more: bool = False) -> Choice:
        """What runs from here on: what was asked for if it fits, else the first that does where that is allowed.

        Args:
            calls: of one step, by denoiser.
            steps: of the run; None: 50.
            is_more: whether these calls come on top of what was let through before, in the same run.

        Raises:
            MemoryBudgetError: nothing that may be taken fits.
        """
        from cache4diffusion.memory import Footprint, Rehearsal

        steps = max(steps or USUAL_STEPS, 2)
        weighed = {name: Rehearsal(self.found[name], own) for name, own in calls.items() if own}
        asked = self._weigh(self.choice, weighed, steps)
        others = {name: kept for name, kept in self._kept.items() if is_more or name not in weighed}
        others |= self._twins(asked, others)
        rest = sum(others.values(), Footprint({}))
        total = sum(asked.values(), rest)
        if total.here <= self.limit:
            self._keep(asked, is_more)
            return self.choice
        smaller = self._smaller(weighed, steps, total, rest)
        fitting = [(choice, parts) for choice, parts, here in smaller if here <= self.limit]
        if fitting and self.choice.options.allow_downgrade:
            choice, parts = fitting[0]
            here = sum(parts.values(), rest).here
            self.notes.append(
                f"memory_budget={size_text(self.limit)}: {self.choice.label} would keep {size_text(total.here)}, so "
                f"{choice.label} runs, which keeps {size_text(here)}."
            )
            self.choice = choice
            self._keep(parts, is_more)
            return choice
        raise MemoryBudgetError(self._refusal(weighed, total, smaller))

    def _keep(self, parts: Mapping[str, Footprint], is_more: bool) -> None:
        for name, part in parts.items():
            self._kept[name] = self._kept[name] + part if is_more and name in self._kept else part

    def _twins(self, asked: Mapping[str, Footprint], known: Mapping[str, Footprint]) -> dict[str, Footprint]:
        """Denoisers that are built like a weighed one and come later in the run: they will keep as much."""
        found = {}
        for name, denoiser in self.found.items():
            if name in asked or name in known:
                continue
            like = next((other for other in asked if _is_alike(self.found[other], denoiser)), None)
            if like is not None:
                found[name] = asked[like]
        return found

    def _weigh(self, choice: Choice, rehearsals: Mapping[str, Rehearsal], steps: int) -> dict[str, Footprint]:
        found = {name: self.found[name] for name in rehearsals}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is to be said is said when it is attached
            compositions = choice.compositions(found)
        for composition in compositions.values():
            composition.check_run(steps)
        return {
            name: rehearsal.held(compositions[name], choice.options.storage, steps)
            for name, rehearsal in rehearsals.items()
        }

    def _smaller(
        self, rehearsals: Mapping[str, Rehearsal], steps: int, total: Footprint, rest: Footprint
    ) -> list[tuple[Choice, dict[str, Footprint], int]]:
        """What would take less, in the order in which it is preferred; up to the first that fits, if it is taken."""
        from cache4diffusion.accelerate import check_composition

        found = []
        for choice in alternatives(self.choice, next(iter(rehearsals.values())).device):
            try:
                for name, composition in choice.compositions(self.found).items():
                    check_composition(name, self.found[name], composition)
                parts = self._weigh(choice, rehearsals, steps)
            except Cache4DiffusionError:  # it does not go with this denoiser or run
                continue
            here = sum(parts.values(), rest).here
            if here < total.here:
                found.append((choice, parts, here))
            if here <= self.limit and self.choice.options.allow_downgrade:
                break
        return found

    def _refusal(
        self, rehearsals: Mapping[str, Rehearsal], total: Footprint, smaller: list[tuple[Choice, Any, int]]
    ) -> str:
        device = next(iter(rehearsals.values())).device
        fitting = [(choice, here) for choice, _, here in smaller if here <= self.limit]
        asked = f"memory_budget={size_text(self.limit)}: {self.choice.label}"
        head = f"{asked} would keep {size_text(total.here)} on {device}."
        if not fitting:
            if not smaller:
                return f"{head} Nothing that takes less is known for this denoiser; use a larger budget."
            choice, _, here = min(smaller, key=lambda row: row[2])
            words = differs(choice, self.choice)
            return f"{head} Nothing known fits; the least is {size_text(here)}, with {words}. Use a larger budget."
        width = max(len(differs(choice, self.choice)) for choice, _ in fitting)
        rows = [f"  {differs(choice, self.choice):<{width}}  {size_text(here)}" for choice, here in fitting]
        return "\n".join([f"{head} These fit:", *rows, "allow_downgrade=True takes the first of them."])


def alternatives(choice: Choice, device: torch.device) -> Iterator[Choice]:
    """What may keep less than a choice, in the order in which it is preferred.

    The method at lower orders, the method in smaller dtypes, the method in the host's memory, and then other methods at
    their defaults, those that keep the most first.

    Args:
        choice: what was asked for.
        device: of the denoiser.
    """
    yield from lighter(choice)
    options, storage = choice.options, choice.options.storage
    for dtype in _DTYPES:
        if storage.dtype is None or dtype.itemsize < storage.dtype.itemsize:
            smaller = Storage(dtype, storage.device)
            yield dataclasses.replace(choice, options=dataclasses.replace(options, storage=smaller))
    if storage.device is None and device.type != "cpu":
        away = Storage(storage.dtype, torch.device("cpu"))
        yield dataclasses.replace(choice, options=dataclasses.replace(options, storage=away))
    for name in _OTHERS:
        if name != choice.name:
            yield dataclasses.replace(choice, chosen=METHODS[name](), axes={})


def lighter(choice: Choice) -> Iterator[Choice]:
    """The same with fewer snapshots: lower orders, shorter histories; of the predictor, if that was replaced."""
    from cache4diffusion.predictors import PREDICTORS

    predictor = choice.axes.get("predictor")
    if isinstance(predictor, str):
        predictor = component(predictor, PREDICTORS, "predictor")
    if predictor is None and choice.method is None:
        predictor = choice.composition.predictor
    owner: Any = choice.method if predictor is None else predictor
    for name in _DEPTHS:
        value = getattr(owner, name, None)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        for lower in range(value - 1, -1, -1) if value <= _EACH else _halves(value):
            try:
                made = dataclasses.replace(owner, **{name: lower})
            except Cache4DiffusionError:  # below what it takes
                break
            if predictor is None:
                yield dataclasses.replace(choice, chosen=made)
            else:
                yield dataclasses.replace(choice, axes={**choice.axes, "predictor": made})


def _halves(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value


def differs(choice: Choice, asked: Choice) -> str:
    """In what a choice differs from the one asked for: ``taylorseer(order=1)``."""
    if choice.name != asked.name:
        return choice.name
    before = asked.settings
    changed = {name: value for name, value in choice.settings.items() if before.get(name) != value}
    return f"{choice.name}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def _is_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two denoisers are built alike, so that they keep as much."""
    a, b = unwrapped(a), unwrapped(b)
    if type(a) is not type(b):
        return False
    return [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]
