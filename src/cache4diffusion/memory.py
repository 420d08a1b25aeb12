"""How many bytes a method keeps, found without computing anything.

The engine itself runs, on a copy of the denoiser whose tensors have shapes and no data: what the ledger says then is
what it would say in a real run.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cache4diffusion.accelerate import Choice, attach, choose, compose, denoisers_of
from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.hints import say_as_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.calls import Call, Sampling, default_steps, quiet
from cache4diffusion.compare import parse_method
from cache4diffusion.composition import Composition
from cache4diffusion.copies import CopyEngine
from cache4diffusion.engine.group import ALONE
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.errors import AnatomyError, SettingError
from cache4diffusion.gates import Step
from cache4diffusion.method import Method
from cache4diffusion.run.taps import schedulers_of
from cache4diffusion.sites import ReducedLevel, SwitchingSpan, Trajectory, UNetEncoder
from cache4diffusion.storage import Storage, Store
from cache4diffusion.strip import planned_strip
from cache4diffusion.trace import FULL, REDUCED, Places
from cache4diffusion.wrap import owner_of


def cache_bytes(
    target: Any,
    method: str | Method | Composition,
    /,
    *,
    inputs: tuple[Any, ...] | Mapping[str, Any] | list[Any] | None = None,
    call: Mapping[str, Any] | None = None,
    steps: int | None = None,
    cache_dtype: str | torch.dtype | None = None,
    cache_device: str | torch.device | None = None,
    **settings: Any,
) -> int:
    """Bytes that a method holds at most in one sampling run, as the ledger counts them. Nothing is cached for this.

    The denoiser's structure is copied, not its weights. A pipeline computes its first step, to see what it gives to its
    denoisers. Of a bare denoiser nothing is computed; it may have been built under ``FakeTensorMode``, without weights.
    The cost is that of a few forwards without arithmetic, a second or so each for the largest denoisers.

    Args:
        target: a diffusers pipeline, or a denoiser (then ``inputs`` are needed).
        method: by name (with settings), or as an object.
        inputs: arguments of one call of the denoiser, a tuple or a mapping; a list of those for CFG branches that are
            called one by one, told apart by their conditioning.
        call: arguments of the pipeline's call, such as ``{"height": 1024, "width": 1024}``.
        steps: of the run, 2 or more; the pipeline's own, or 50.
        cache_dtype: as in `accelerate`.
        cache_device: as in `accelerate`; what lies there is counted like the rest.
        **settings: as in `accelerate`.

    Returns:
        The most that is held at a time, all branches, denoisers and devices together.

    Raises:
        UnknownNameError, SettingError, CompositionError: as `accelerate`; inputs are missing; a denoiser is
            accelerated, and its handle knows.
        AnatomyError: the denoiser cannot be served, or reads its data while it runs.
    """
    found = denoisers_of(target)
    for name, denoiser in found.items():
        if owner_of(denoiser) is not None:
            raise SettingError(
                f"{name} is accelerated: handle.memory says what its cache holds. Or call remove() first."
            )
    name, given = parse_method(method) if isinstance(method, str) else (method, {})
    options = {"cache_dtype": cache_dtype, "cache_device": cache_device}
    given |= settings | {option: value for option, value in options.items() if value is not None}
    choice = choose(target, found, name, given)
    return footprint(target, choice, inputs=inputs, call=call, steps=steps).total


@dataclass(frozen=True)
class Footprint:
    """What a cache holds at its largest.

    Args:
        places: bytes by device and dtype.
        away: the device that is not the denoiser's, if snapshots lie on one.
    """

    places: Places
    away: str | None = None

    @property
    def total(self) -> int:
        """Bytes on all devices."""
        return sum(self.places.values())

    @property
    def here(self) -> int:
        """Bytes on the denoiser's device."""
        return sum(count for (device, _), count in self.places.items() if device != self.away)

    def __add__(self, other: Footprint) -> Footprint:
        places = dict(self.places)
        for place, count in other.places.items():
            places[place] = places.get(place, 0) + count
        return Footprint(places, self.away or other.away)


def footprint(
    target: Any,
    choice: Choice,
    *,
    inputs: Any = None,
    call: Mapping[str, Any] | None = None,
    steps: int | None = None,
    pretends: bool = False,
) -> Footprint:
    """What a choice would hold, by device and dtype.

    Args:
        target: as in `cache_bytes`.
        choice: what runs.
        inputs: as in `cache_bytes`.
        call: as in `cache_bytes`.
        steps: as in `cache_bytes`.
        pretends: count as if the denoiser were on an accelerator, wherever it is.

    Raises:
        SettingError, AnatomyError: as `cache_bytes`.
    """
    found = denoisers_of(target)
    made = choice.method
    is_missing = made is not None and made.info.needs_calibration and made.loaded is None
    composition = compose(made.outline(), choice.axes) if made is not None and is_missing else choice.composition
    calls, steps = calls_of(target, found, inputs, call, steps)
    if steps < 2:
        raise SettingError(f"cache_bytes(steps={steps}): use 2 or more; a run of one step has nothing to reuse.")
    composition.check_run(steps)
    storage = choice.options.storage
    parts = [
        Rehearsal(found[name], own).held(composition, storage, steps, pretends=pretends)
        for name, own in calls.items()
        if own
    ]
    return sum(parts, Footprint({}))


def calls_of(
    target: Any,
    found: Mapping[str, nn.Module],
    inputs: Any = None,
    call: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> tuple[dict[str, list[Call]], int]:
    """Arguments of the denoisers' calls in one step, and the number of steps.

    Args:
        target: a pipeline, whose first step is computed, or a denoiser.
        found: its denoisers by name.
        inputs: of a denoiser, as in `cache_bytes`.
        call: of a pipeline, as in `cache_bytes`.
        steps: of the run; None: the pipeline's own, or 50.

    Raises:
        SettingError: inputs are missing.
    """
    if isinstance(target, nn.Module):
        if inputs is None:
            raise SettingError("cache_bytes(denoiser) needs inputs=...: the arguments of one call, a tuple or a dict.")
        made = inputs if isinstance(inputs, list) else [inputs]
        calls = {"denoiser": [((), dict(one)) if isinstance(one, Mapping) else (tuple(one), {}) for one in made]}
        return calls, 50 if steps is None else steps
    call = dict(call or {})
    asked = call.get("num_inference_steps", default_steps(target)) if steps is None else steps
    with quiet(target):
        return Sampling(target, call, asked).first_steps(found, schedulers_of(target)), asked


@dataclass(frozen=True)
class _Given:
    """A guard that settles every step, so that nobody looks at what is sampled."""

    letters: str

    @property
    def needs_num_steps(self) -> bool:
        return False

    def begin(self) -> None:
        return None

    def overrule(self, state: None, step: Step) -> bool:
        return self.letters[step.index] != FULL

    def commit(self, state: None, step: Step, cached: bool, score: float | None) -> None:
        pass


_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class _Answers(TorchDispatchMode):
    """Whoever reads a value of a tensor without data gets a 1: a predictor that fits something to its snapshots keeps
    as much whatever it finds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class Rehearsal:
    """Runs on tensors without data.

    Args:
        denoiser: the network.
        calls: of one step.

    Raises:
        AnatomyError: the denoiser reads its data while it runs.
    """

    def __init__(self, denoiser: nn.Module, calls: Sequence[Call]) -> None:
        name = type(unwrapped(denoiser)).__name__
        self.calls = calls
        self._anatomy: Anatomy | None = None  # found in the first run that needs it
        with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
            self.twin = _twin_of(unwrapped(denoiser))
        say_as_of(self.twin, denoiser)
        try:
            with torch.no_grad():
                for call in self.calls:
                    self._call(call)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AnatomyError(
                f"{name} reads its data while it runs ({error}), so what is cached cannot be counted without "
                "running it. Sample once and see handle.memory."
            ) from error

    @property
    def device(self) -> torch.device:
        """Of what is sampled."""
        return self._latent().device

    def held(self, composition: Composition, storage: Storage, steps: int, *, pretends: bool = False) -> Footprint:
        """The most that is held.

        Args:
            composition: what caches.
            storage: how snapshots are kept.
            steps: of the run.
            pretends: count as if the denoiser were on an accelerator.

        Raises:
            AnatomyError, CompositionError: it cannot serve this denoiser.
        """
        # Where the gate looks at what is sampled, the most is kept if every second step is computed.
        letters = planned_strip(composition, steps) or (FULL + "c") * steps
        letters = FULL + letters[1:steps]
        store = Store(storage, CopyEngine, pretends=pretends)
        site, ahead = composition.site, 0
        if isinstance(site, UNetEncoder) and site.parallel:  # the outputs of a run of cached steps lie together
            ahead = max(map(len, letters.split(FULL)))
            composition = dataclasses.replace(composition, site=UNetEncoder())
        with _Answers():
            places = self._run(composition, letters, _steps_that_fill(composition, letters), store)
        if ahead > 1:
            with torch.no_grad():
                output = self._call(self.calls[0])
            place = store.place_of(output)
            places[place] = places.get(place, 0) + ahead * output.numel() * output.itemsize
        return Footprint(places, str(storage.device) if store.is_away(self.device) else None)

    def _run(self, composition: Composition, letters: str, count: int, store: Store) -> Places:
        has_several = isinstance(composition.site, ReducedLevel)  # decisions, and a gate that looks at nothing
        guards = (_Given(letters),) if composition.gate is not None and not has_several else ()
        composition, found = dataclasses.replace(composition, guards=guards), {"denoiser": self.twin}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the real run will say it again
            handle = attach(
                self.twin, found, {"denoiser": composition}, nan_guard="off", store=lambda: store, group=ALONE
            )
            with handle:
                (engine,) = handle._engines
                engine.prepare(*self.calls[0], anatomy=self._anatomy)
                self._anatomy = engine.host.anatomy or self._anatomy
                scheduler = _scheduler(len(letters)) if isinstance(composition.site, Trajectory) else None
                if scheduler is not None:
                    handle.watch_scheduler(scheduler)
                with handle.run(num_steps=len(letters)):
                    for index in range(count):
                        outputs = [self._call(call) for call in self.calls]
                        if scheduler is not None:
                            scheduler.step(outputs[0], scheduler.timesteps[index], self._latent())
                return engine.ledger.places

    def _call(self, call: Call) -> Any:
        # A denoiser may take entries out of the dictionaries it is given.
        args, kwargs = pytree.tree_map(lambda leaf: leaf, call)
        output = self.twin(*args, **kwargs)
        return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

    def _latent(self) -> Tensor:
        return inputs_of(self.twin).split(*self.calls[0])[1]


def _twin_of(denoiser: nn.Module) -> nn.Module:
    """A copy that computes by itself.

    diffusers' hooks hold functions, which are not copied: those that split samples over processes are put on anew. What
    they exchange is as imaginary as the tensors.
    """
    config = getattr(denoiser, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    twin = copy.deepcopy(denoiser, {id(shared): shared for shared in (config, context) if shared is not None})
    if context is None:
        return twin
    from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook

    for module in twin.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        hooks = dict(registry.hooks)
        if all(isinstance(hook, (ContextParallelGatherHook, ContextParallelSplitHook)) for hook in hooks.values()):
            for name in reversed(hooks):
                registry.remove_hook(name, recurse=False)
            for name, hook in hooks.items():
                registry.register_hook(hook, name)
    return twin


def _steps_that_fill(composition: Composition, letters: str) -> int:
    """Number of steps after which no more is held: a predictor that keeps n snapshots has had them, and one more step
    of each kind was run."""
    if isinstance(composition.site, SwitchingSpan):  # it keeps something else from some step on
        return len(letters)
    needed, seen, kinds = getattr(composition.predictor, "capacity", 3), 0, set(letters)
    for index, letter in enumerate(letters):
        seen += letter in (FULL, REDUCED)
        kinds.discard(letter)
        if seen > needed and not kinds:
            return index + 1
    return len(letters)


def _scheduler(steps: int) -> Any:
    """What acts on the trajectory keeps latents and velocities, whoever steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler
