"""The front door: a pipeline or a denoiser, and a method, make a handle."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cache4diffusion import methods as _methods  # noqa: F401 - fills the registry
from cache4diffusion.anatomy import describe
from cache4diffusion.anatomy.arguments import TIMESTEP_NAMES
from cache4diffusion.anatomy.hints import is_said_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.budget import Budget
from cache4diffusion.composition import Composition
from cache4diffusion.engine import Engine
from cache4diffusion.engine.admission import Admission
from cache4diffusion.engine.compiling import WHOLE, forbids_compiled_blocks, hides_sites, is_compiled, is_compiled_whole
from cache4diffusion.engine.finite import NanGuard
from cache4diffusion.engine.group import Alone, shares_tokens
from cache4diffusion.engine.hooks import refuse_caches
from cache4diffusion.engine.host import no_stack
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.leaves import parameter_names
from cache4diffusion.engine.listener import Listener
from cache4diffusion.engine.trajectory import refuse
from cache4diffusion.errors import (
    AlreadyAcceleratedError,
    AnatomyError,
    Cache4DiffusionError,
    CompositionError,
    SettingError,
)
from cache4diffusion.few_steps import check_distilled
from cache4diffusion.gates import GATES
from cache4diffusion.guidance import BRANCH_RULES
from cache4diffusion.handle import Handle
from cache4diffusion.method import METHODS, Method, method
from cache4diffusion.options import Options, take_options
from cache4diffusion.predictors import PREDICTORS
from cache4diffusion.profile import load_profile
from cache4diffusion.run import RunTracker
from cache4diffusion.run.taps import schedulers_of
from cache4diffusion.settings import check_names, component
from cache4diffusion.sites import SITES, Trajectory
from cache4diffusion.storage import Store
from cache4diffusion.tokens import TOKEN_RULES
from cache4diffusion.trace import Trace
from cache4diffusion.wrap import owner_of

if TYPE_CHECKING:
    from cache4diffusion.engine.group import Processes

# Where pipelines keep what they call in their loop, in the order in which two-expert pipelines use them.
DENOISER_NAMES = ("transformer", "transformer_2", "unet", "prior", "denoiser", "dit", "model")
_BESIDE = ("ControlNet", "Adapter", "Autoencoder")  # they may take a timestep, and are no denoisers
_AXES = ("site", "gate", "predictor", "tokens", "cfg", "decide", "branches")


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline, by attribute name; a bare module is its own.

    Those with the usual names, and every other module that is called with a timestep (Ideogram's
    ``unconditional_transformer``): a denoiser that is overlooked would cost as much as before.

    Raises:
        AnatomyError: nothing that looks like a denoiser.
    """
    if isinstance(target, nn.Module):
        return {"denoiser": target}
    found: dict[str, nn.Module] = {}
    others = [name for name, value in getattr(target, "__dict__", {}).items() if _is_told_the_time(value)]
    for name in dict.fromkeys((*DENOISER_NAMES, *others)):
        candidate = getattr(target, name, None)
        if isinstance(candidate, nn.Module) and candidate not in found.values():
            found[name] = candidate
    if not found:
        raise AnatomyError(
            f"{type(target).__name__} has no denoiser: none of its attributes {', '.join(DENOISER_NAMES)} is a module, "
            "and no other one takes a timestep. Pass the denoiser itself: accelerate(denoiser, ...)."
        )
    return found


def _is_told_the_time(value: Any) -> bool:
    """Whether it is a module that takes a timestep, and not one beside a denoiser or a part of its pipeline."""
    if not isinstance(value, nn.Module):
        return False
    kind = type(unwrapped(value))
    names = parameter_names(kind)
    return is_said_of(value) or (
        not any(word in kind.__name__ for word in _BESIDE) and any(name in names for name in TIMESTEP_NAMES)
    )


def default_method(denoiser: nn.Module) -> Method:
    """A safe choice for a denoiser nobody tuned: adaptive for transformers, a short interval for the rest.

    Transformers with a stack of blocks get ``fbcache`` at its cautious threshold, U-Nets ``deepcache`` at interval 2.
    """
    plain = unwrapped(denoiser)
    is_unet = hasattr(plain, "down_blocks") and hasattr(plain, "up_blocks")
    return method("deepcache", interval=2) if is_unet else method("fbcache", threshold=0.06, warmup=4)


def accelerate(
    target: Any,
    method_or_profile: str | Method | Composition | Path | None = None,
    /,
    *,
    nan_guard: NanGuard | None = None,
    cache_dtype: str | torch.dtype | None = None,
    cache_device: str | torch.device | None = None,
    memory_budget: int | str | None = None,
    allow_downgrade: bool | None = None,
    strict: bool | None = None,
    inputs: tuple[Any, ...] | Mapping[str, Any] | list[Any] | None = None,
    call: Mapping[str, Any] | None = None,
    group: Processes | None = None,
    **settings: Any,
) -> Handle:
    """Cache features of a pipeline's denoisers (or of one denoiser) from now on, until ``handle.remove()``.

    Args:
        target: a diffusers pipeline, or a denoiser called in a loop of your own.
        method_or_profile: a method's name (``"taylorseer"``), a method (``methods.TaylorSeer(interval=5)``), a
            composition of your own, or a profile file (``"flux-fast.yaml"``). None picks a safe default and prints it.
        nan_guard: what to do about a predicted output with NaN or Inf: ``"now"`` (look at once and recompute; the
            default on the CPU), ``"next"`` (look at the next step, without a sync; the default elsewhere), ``"off"``.
        cache_dtype: what snapshots are kept in: ``"bf16"``, ``"fp16"``, ``"fp32"``, ``"fp8"`` (with a scale per row),
            ``"int8"`` (with one per row and channel) or torch's own. None: each in its feature's dtype.
        cache_device: where they lie: ``"cpu"``, or a device. For cached steps they are brought back ahead of their use.
            None: on their feature's device.
        memory_budget: bytes that the cache may take on the denoisers' device, or a text such as ``"2GiB"``. What would
            take more is refused, with a table of what fits: here, where ``inputs`` or ``call`` are given; else in the
            first run, before anything is stored.
        allow_downgrade: take the first that fits instead: a lower order, a smaller dtype, the host's memory, another
            method. The handle and its report then go by the new name.
        strict: refuse what is otherwise warned of: runs of fewer than 9 steps and few-step distilled models, which
            leave little to gain, and calibrations made with other weights.
        inputs: what the budget is checked against: arguments of a call of a bare denoiser, as in `cache_bytes`.
        call: likewise: arguments of the pipeline's call, as in `cache_bytes`. Its first step is computed.
        group: the processes that share every sample with this one: a group of ``torch.distributed``, or a device mesh
            with one dimension. All of them take the same decisions. None: as diffusers' ``enable_parallelism`` tells;
            without that, this process decides by itself.
        **settings: the method's settings by name; and, to combine methods by axis, ``site=``, ``gate=``,
            ``predictor=``, ``tokens=``, ``cfg=`` (each a name such as ``"newton(order=2)"`` or an object), ``decide=``
            and ``branches=``.

    Returns:
        The handle: ``report()``, ``trace``, ``stats``, ``memory``, ``run()``, ``remove()``; a context manager.

    Raises:
        UnknownNameError, SettingError: a name or value is not accepted; the nearest or the range is named.
        CompositionError: the axes do not go together; a model is distilled to a few steps (``strict``).
        MemoryBudgetError: the cache would be larger than ``memory_budget``; nothing is left attached.
        AlreadyAcceleratedError: a denoiser carries a handle already, or a cache of diffusers' own.
        CalibrationError: the method needs a calibration and has none, or it was made with another denoiser.
        AnatomyError: the denoiser lacks what the method needs (where that shows only in a call: at the first call,
            with nothing left attached).
    """
    if nan_guard not in (None, "now", "next", "off"):
        raise SettingError(f"nan_guard={nan_guard!r}: use 'now', 'next' or 'off'.")
    found = denoisers_of(target)
    _refuse_accelerated(found)
    given = {
        "cache_dtype": cache_dtype,
        "cache_device": cache_device,
        "memory_budget": memory_budget,
        "allow_downgrade": allow_downgrade,
        "strict": strict,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    choice = choose(target, found, method_or_profile, settings)
    handle = start(target, choice, nan_guard, inputs=inputs, call=call, group=group)
    if method_or_profile is None:
        print(f"cache4diffusion: using {handle.label} (name a method to choose another)")
    return handle


def start(
    target: Any,
    choice: Choice,
    nan_guard: NanGuard | None = None,
    *,
    inputs: Any = None,
    call: Any = None,
    group: Processes | None = None,
) -> Handle:
    """Put a choice to work, as `accelerate` does.

    Args:
        target: the pipeline, or the denoiser.
        choice: what runs.
        nan_guard, inputs, call, group: as in `accelerate`.

    Raises:
        Cache4DiffusionError: as `accelerate`.
    """
    found = denoisers_of(target)
    _refuse_accelerated(found)
    check_distilled(target, found, choice.composition, strict=choice.options.strict)
    budget = Budget(found, choice) if choice.options.memory_budget is not None else None
    if inputs is not None or call is not None:
        if budget is None:
            raise SettingError("inputs= and call= are what a memory_budget= is checked against: give one, or neither.")
        choice = budget.settle_at(target, inputs, call)
    return attach(target, found, choice.compositions(found), choice, nan_guard=nan_guard, budget=budget, group=group)


def _refuse_accelerated(found: Mapping[str, nn.Module]) -> None:
    for name, denoiser in found.items():
        owner = owner_of(denoiser)
        if owner is not None:
            raise AlreadyAcceleratedError(
                f"{name} ({type(denoiser).__name__}) is already accelerated by {owner.label}. Call remove() on that "
                "handle first; to combine methods, name both in one call, e.g. accelerate(pipe, 'dbcache', "
                "cfg='fastercache')."
            )


def attach(
    target: Any,
    found: dict[str, nn.Module],
    compositions: dict[str, Composition],
    choice: Choice | None = None,
    *,
    label: str = "",
    nan_guard: NanGuard | None = None,
    listeners: Mapping[str, Listener] | None = None,
    budget: Budget | None = None,
    store: Callable[[], Store] | None = None,
    group: Processes | Alone | None = None,
) -> Handle:
    """Put compositions to work in the denoisers of a pipeline (or in one denoiser).

    Args:
        target: the pipeline, or the denoiser.
        found: its denoisers by name.
        compositions: what runs in each of them.
        choice: what they come from.
        label: how that is called in reports, where there is no choice.
        nan_guard: as in `accelerate`.
        listeners: hear of what is recorded in a denoiser.
        budget: weighs what will be stored, before it is.
        store: makes what keeps the snapshots of one denoiser; None: as the choice says.
        group: as in `accelerate`; `ALONE` where nothing is to be decided with others.
    """
    trace = Trace()
    handle: Handle | None = None

    def on_begin(run: Any) -> None:
        if handle is not None:
            handle._on_begin(run)

    def on_end(run: Any, aborted: bool) -> None:
        if handle is not None:
            handle._on_end(run, aborted)

    def on_pipeline(pipe: Any) -> None:
        if handle is not None:
            handle._on_pipeline(pipe)

    tracker = RunTracker(on_begin, on_end, on_pipeline)
    handle = Handle(choice, label, tracker, trace, budget)
    try:
        for name, denoiser in found.items():
            composition = compositions[name]
            check_composition(name, denoiser, composition)
            composition.check_group(shares_tokens(denoiser, group))
            engine = Engine(
                denoiser,
                composition,
                tracker,
                trace,
                name=name,
                owner=handle,
                nan_guard=nan_guard,
                listener=listeners[name] if listeners is not None else None,
                store=store() if store is not None else Store(handle.options.storage),
                admission=Admission(partial(handle._weigh, name)) if budget is not None else None,
                is_guided=None if isinstance(target, nn.Module) else _guidance_of(target),
                on_check=handle._check_run,
                group=group,
            )
            handle._engines.append(engine)
            tracker.watch_denoiser(denoiser)
        if not isinstance(target, nn.Module):
            for composition in compositions.values():
                if isinstance(composition.site, Trajectory):
                    for scheduler in schedulers_of(target):
                        refuse(scheduler, composition.site)
            tracker.watch_pipeline(target)
    except BaseException:
        handle.remove()
        raise
    return handle


@dataclass(frozen=True)
class Choice:
    """What runs: a method or composition, parts of it that are replaced, and options."""

    chosen: Method | Composition
    axes: dict[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)

    @property
    def method(self) -> Method | None:
        """The method, if it is one."""
        return self.chosen if isinstance(self.chosen, Method) else None

    @property
    def name(self) -> str:
        """The method's slug."""
        return self.chosen.info.name if isinstance(self.chosen, Method) else "composition"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, replaced parts, and the options that are not at their default."""
        given = dict(self.chosen.settings) if isinstance(self.chosen, Method) else {}
        return given | self.axes | self.options.given

    @property
    def label(self) -> str:
        """Name and settings, as reports call it."""
        shown = {name: value for name, value in self.settings.items() if name not in ("memory_budget", "strict")}
        shown.pop("allow_downgrade", None)
        values = [
            f"{name}={value}" if name in self.axes and isinstance(value, str) else f"{name}={value!r}"
            for name, value in shown.items()
        ]
        return f"{self.name}({', '.join(values)})"

    @property
    def composition(self) -> Composition:
        """What the engine runs; of several denoisers, in any of them.

        Raises:
            UnknownNameError, SettingError, CompositionError: as `accelerate`.
        """
        return compose(self.chosen, self.axes)

    def compositions(self, found: Mapping[str, nn.Module]) -> dict[str, Composition]:
        """What runs in each denoiser: a calibrated method takes what was measured of it.

        Raises:
            CalibrationError: that was measured of one that is built otherwise.
        """
        made = self.chosen.loaded if isinstance(self.chosen, Method) else None
        if made is None:
            return dict.fromkeys(found, self.composition)
        assert isinstance(self.chosen, Method)
        compositions = {}
        for name, denoiser in found.items():
            made.check(denoiser, name, strict=self.options.strict)
            compositions[name] = compose(self.chosen.of(name), self.axes)
        return compositions


def choose(target: Any, found: dict[str, nn.Module], given: Any, settings: Mapping[str, Any]) -> Choice:
    """Read what `accelerate` was given.

    Args:
        target: the pipeline or denoiser.
        found: its denoisers by name.
        given: a name, method, composition, profile file or None.
        settings: of the method, of axes, and options.

    Raises:
        UnknownNameError, SettingError, FileFormatError: as `accelerate`.
    """
    settings = dict(settings)
    asked = take_options(settings)
    axes = {name: settings.pop(name) for name in _AXES if name in settings and not _is_setting(given, name)}
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml", ".json"))):
        profile = load_profile(Path(given))
        chosen = method(profile.method, **{**profile.settings, **settings})
        return Choice(chosen, {**profile.axes, **axes}, Options.of({**profile.options, **asked}))
    return Choice(_chosen(found, given, settings), axes, Options.of(asked))


def _chosen(found: dict[str, nn.Module], given: Any, settings: dict[str, Any]) -> Method | Composition:
    if given is None:
        if settings:
            raise SettingError(f"Settings ({', '.join(settings)}) need a method: accelerate(pipe, 'name', ...).")
        return default_method(next(iter(found.values())))
    if isinstance(given, (Method, Composition)):
        if settings:
            raise SettingError(
                f"{type(given).__name__} was given as an object, so settings belong into it, not into accelerate(): "
                f"{', '.join(settings)}."
            )
        return given
    if not isinstance(given, str):
        raise SettingError(
            f"accelerate(pipe, {given!r}): give a method's name, a method, a composition or a profile file."
        )
    return method(given, **settings)


def _is_setting(given: Any, name: str) -> bool:
    """Some methods have a setting of an axis' name (``decide`` of DBCache): then it is the method's."""
    if not isinstance(given, str) or given not in METHODS:
        return False
    return name in {entry.name for entry in dataclasses.fields(METHODS[given])}


def compose(chosen: Method | Composition, axes: dict[str, Any] | None = None) -> Composition:
    """The composition of a method with some of its axes replaced, by name or object.

    Raises:
        UnknownNameError, SettingError, CompositionError: as `accelerate`.
    """
    if isinstance(chosen, Method):
        made = chosen.loaded
        if made is not None and len(made.entries) > 1:  # experts differ in their numbers alone
            chosen = chosen.of(next(iter(made.entries)))
        composition = chosen.compose()
    else:
        composition = chosen
    check_names("A composition", axes or {}, _AXES)
    changed: dict[str, Any] = {}
    tables = {"site": SITES, "gate": GATES, "predictor": PREDICTORS, "tokens": TOKEN_RULES}
    for name, value in (axes or {}).items():
        if isinstance(value, str) and name in tables:
            value = component(value, tables[name], "token rule" if name == "tokens" else name)
        elif name == "cfg" and isinstance(value, str):
            value = component(value, BRANCH_RULES, "branch rule")
        elif name == "decide" and value not in ("batch", "any", "row"):
            raise SettingError(f"decide={value!r}: use 'batch', 'any' or 'row'.")
        elif name == "branches" and value not in ("independent", "tied"):
            raise SettingError(f"branches={value!r}: use 'independent' or 'tied'.")
        changed[name] = value
    try:
        return dataclasses.replace(composition, **changed)
    except CompositionError:
        raise
    except TypeError as error:
        raise SettingError(str(error)) from error


def check_composition(name: str, denoiser: nn.Module, composition: Composition) -> None:
    """Refuse what can be refused without seeing a call.

    Raises:
        AnatomyError, CompositionError: the denoiser lacks what the composition needs, or hides it.
        AlreadyAcceleratedError: something else caches it.
    """
    inputs_of(denoiser)
    refuse_caches(name, unwrapped(denoiser))
    if composition.needs_stack is not None and _is_convolutional_unet(denoiser):
        raise no_stack(f"{name} ({type(unwrapped(denoiser)).__name__})", composition)
    if hides_sites(composition) and is_compiled_whole(denoiser):
        raise CompositionError(f"{name} {WHOLE}")
    reason = forbids_compiled_blocks(composition)
    if reason is not None and any(is_compiled(module) for module in denoiser.modules()):
        raise CompositionError(f"{name}: {reason}")


def _is_convolutional_unet(denoiser: nn.Module) -> bool:
    """Whether a denoiser is made of lists of convolutional down and up blocks, by its modules alone."""
    plain = unwrapped(denoiser)
    if not describe(plain).is_unet_like:
        return False
    sides = [module for module in plain.children() if isinstance(module, nn.ModuleList) and len(module)]
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sum(any(isinstance(inside, convolutions) for inside in side.modules()) for side in sides) >= 2


def _guidance_of(pipe: Any) -> Any:
    reference = weakref.ref(pipe)

    def is_guided() -> bool | None:
        owner = reference()
        value = getattr(owner, "do_classifier_free_guidance", None)
        return value if isinstance(value, bool) else None

    return is_guided


__all__ = ["Cache4DiffusionError", "accelerate", "compose", "default_method", "denoisers_of"]
