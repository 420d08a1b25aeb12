"""Where checks run: each denoiser with the arguments of its calls in one step, and whole runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cache4diffusion.accelerate import accelerate, compose, denoisers_of
from cache4diffusion.anatomy import Anatomy
from cache4diffusion.calls import Call, Sampling
from cache4diffusion.composition import Composition
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.leaves import get_argument, with_arguments
from cache4diffusion.errors import SettingError
from cache4diffusion.handle import Handle
from cache4diffusion.method import Method
from cache4diffusion.run.taps import schedulers_of
from cache4diffusion.selfcheck.values import epsilon, tensors, tolerance
from cache4diffusion.sites import Trajectory
from cache4diffusion.storage import Storage
from cache4diffusion.wrap import owner_of


class Failed(Exception):
    """An invariant does not hold."""

    def __init__(self, detail: str, site: str | None = None) -> None:
        super().__init__(detail)
        self.site = site


class NotApplicable(Exception):
    """An invariant says nothing here."""


@dataclass(frozen=True)
class Case:
    """A method as the checks use it."""

    chosen: Method | Composition
    axes: dict[str, Any]
    storage: dict[str, Any] = dataclasses.field(default_factory=dict)  # how snapshots are kept

    def forced(self, steps: int) -> Case:
        """Caches early and on every score; gains that change a constant are set to 1."""
        if not isinstance(self.chosen, Method):
            return self
        wanted = {
            "warmup": min(self.chosen.settings.get("warmup", 2), 2),
            "cooldown": 0,
            "threshold": 1e9,
            "min_run": steps,
            "attention_warmup": 2,
            "gate_step": min(self.chosen.settings.get("gate_step", 2), 2),
            "low_gain": 1.0,
            "high_gain": 1.0,
        }
        known = {name: value for name, value in wanted.items() if name in self.chosen.settings}
        for entry in dataclasses.fields(self.chosen):
            most = entry.metadata["range"].maximum
            if entry.name in known and most is not None:
                known[entry.name] = min(known[entry.name], most)
        if self.chosen.is_off():
            known.pop("threshold", None)
        try:
            forced = dataclasses.replace(self.chosen, **known)
        except SettingError:  # its calibration was trained for one threshold, and is no use at another
            forced = dataclasses.replace(self.chosen, **{k: v for k, v in known.items() if k != "threshold"})
        return dataclasses.replace(self, chosen=forced)

    def off(self) -> Case:
        """At the registry's off settings, which know nothing of a gate or CFG rule in the place of the method's own."""
        if not isinstance(self.chosen, Method):
            raise NotApplicable("a composition of your own has no registered off settings")
        short = {"warmup": min(self.chosen.settings.get("warmup", 2), 2)} if "warmup" in self.chosen.settings else {}
        return dataclasses.replace(
            self,
            chosen=dataclasses.replace(self.chosen, **{**short, **self.chosen.info.off}),
            axes={name: axis for name, axis in self.axes.items() if name not in ("gate", "cfg")},
        )

    def tolerance(self, truth: Any) -> float:
        """How far a cached step may be from a full one, for rounding; snapshots may be kept in a narrower type."""
        return tolerance(truth, self._kept_in)

    @property
    def rounds(self) -> bool:
        """Whether snapshots, or some of them, may be kept in another type than that of their features."""
        return self._kept_in is not None

    @property
    def _kept_in(self) -> torch.dtype | None:
        asked = Storage.of(dtype=self.storage.get("cache_dtype")).dtype
        own = getattr(self.composition.predictor, "narrowest", None)
        return max((dtype for dtype in (asked, own) if dtype is not None), key=epsilon, default=None)

    @property
    def composition(self) -> Composition:
        """What runs."""
        return compose(self.chosen, self.axes)

    @property
    def settings(self) -> str:
        """Those that turn the method off, in words."""
        if not isinstance(self.chosen, Method):
            return "its settings"
        return ", ".join(f"{name}={self.chosen.settings[name]}" for name in self.chosen.info.off)


class Subject:
    """One denoiser under test.

    Args:
        name: attribute of the pipeline.
        denoiser: the network.
        calls: arguments of its calls in the first step that has any; none where a run does not call it.
        steps: of each run.
    """

    def __init__(self, name: str, denoiser: nn.Module, calls: list[Call], steps: int) -> None:
        self.name, self.denoiser, self.calls, self.steps = name, denoiser, calls, steps
        self.anatomy: Anatomy | None = None  # seen once
        with torch.no_grad():
            self.truth = [self.compute(call) for call in calls]

    def compute(self, call: Call) -> Any:
        """Call the denoiser; it may take entries out of the dictionaries it is given, so it gets its own."""
        args, kwargs = pytree.tree_map(lambda leaf: leaf, call)
        return self.denoiser(*args, **kwargs)

    def attach(self, case: Case, **more: Any) -> Handle:
        """Accelerate this denoiser alone, and attach at once.

        Raises:
            AnatomyError, CompositionError: the method cannot serve it.
        """
        return _attached(accelerate(self.denoiser, case.chosen, **case.axes, **case.storage, **more), [self])

    def release(self) -> None:
        """Remove whatever handle is still on it."""
        owner = owner_of(self.denoiser)
        if owner is not None:
            owner.remove()

    def caches(self, case: Case) -> bool:
        """Whether a run shows anything cached; true where that shows only in whole runs, or with guidance."""
        case = case.forced(self.steps)
        composition = case.composition
        if composition.is_off or composition.site is None or isinstance(composition.site, Trajectory):
            return True
        if not self.calls:
            return False
        with self.attach(case) as handle:
            return any(letter != "F" for _, _, _, letter in self.frozen(handle))

    def frozen(self, handle: Handle, calls: list[Call] | None = None) -> Iterator[tuple[int, int, Any, str]]:
        """Call the denoiser with the same arguments at every step: step, call of the step, output, letter."""
        with torch.no_grad(), handle.run(num_steps=self.steps):
            for step in range(self.steps):
                for number, call in enumerate(calls or self.calls):
                    # No name for the output: nothing here may keep it alive.
                    yield step, number, self.compute(call), handle.trace.records[-1].symbol


class Stage:
    """A pipeline with all its denoisers, or a denoiser in a small loop.

    Args:
        target: the pipeline or denoiser.
        inputs: arguments of one call of a bare denoiser.
        call: arguments of the pipeline's call.
        steps: of each run.

    Raises:
        SettingError: a bare denoiser came without inputs, an argument is not known, or a run calls no denoiser.
    """

    def __init__(self, target: Any, inputs: Any, call: dict[str, Any], steps: int) -> None:
        self.target, self.steps = target, steps
        self.is_pipeline = not isinstance(target, nn.Module)
        found = denoisers_of(target)
        if self.is_pipeline:
            self._sample = Sampling(target, call, steps)
            calls = self._sample.first_steps(found, schedulers_of(target))
        elif inputs is None:
            raise SettingError("selfcheck(denoiser) needs inputs=...: the arguments of one call, a tuple or a dict.")
        else:
            (name,) = found
            calls = {name: [((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})]}
        self.subjects = [Subject(name, module, calls[name], steps) for name, module in found.items()]

    def attach(self, case: Case) -> Handle:
        """Accelerate the target, and attach at once to all its denoisers that a run calls.

        Raises:
            AnatomyError, CompositionError: the method cannot serve one of them.
        """
        return _attached(accelerate(self.target, case.chosen, **case.axes, **case.storage), self.subjects)

    def release(self) -> None:
        """Remove whatever handle is still on its denoisers."""
        for each in self.subjects:
            each.release()

    def sample(self, handle: Handle | None = None) -> list[Tensor]:
        """A whole run: of the pipeline, or of a small loop around the denoiser."""
        with torch.no_grad():
            if self.is_pipeline:
                return tensors(self._sample())
            with handle.run(num_steps=self.steps) if handle is not None else nullcontext():
                return self._loop(*self.subjects)

    def _loop(self, subject: Subject) -> list[Tensor]:
        roles = inputs_of(subject.denoiser)
        args, kwargs = subject.calls[0]
        clock = None if roles.timestep is None else get_argument(roles.module, args, kwargs, (roles.timestep,))
        latent, outputs = get_argument(roles.module, args, kwargs, (roles.latent,)), []
        is_whole = isinstance(latent, Tensor) and latent.is_floating_point()
        half = latent.shape[0] // 2 if is_whole else 0
        is_even = half > 0 and half * 2 == latent.shape[0]
        is_guided = is_even and torch.equal(latent[:half], latent[half:])  # both branches at once
        for index in range(self.steps):
            changed: dict[Any, Any] = {(roles.latent,): latent}
            if clock is not None:
                time = clock * (self.steps - index) / self.steps
                changed[(roles.timestep,)] = time.to(clock.dtype) if isinstance(clock, Tensor) else time
            outputs += tensors(subject.compute(with_arguments(roles.module, args, kwargs, changed)))
            if not is_whole:  # a list of samples, or indices of a codebook: what changes is the clock
                continue
            last = outputs[-1]
            latent = latent - 0.1 * last if last.shape == latent.shape else 0.97 * latent
            if is_guided:
                latent = torch.cat([latent[:half], latent[:half]])
        return outputs


def _attached(handle: Handle, subjects: list[Subject]) -> Handle:
    """The handle, attached to each subject by the arguments of its own calls."""
    try:
        for engine, subject in zip(handle._engines, subjects, strict=True):
            if subject.calls:
                engine.prepare(*subject.calls[0], anatomy=subject.anatomy)
                subject.anatomy = engine.host.anatomy
    except BaseException:
        handle.remove()
        raise
    return handle
