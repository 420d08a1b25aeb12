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
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cache4diffusion.accelerate import _choose, accelerate, compose, denoisers_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.calls import Call, Sampling, default_steps, quiet
from cache4diffusion.compare import parse_method
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.leaves import get_argument
from cache4diffusion.errors import AnatomyError, SettingError
from cache4diffusion.gates import Step
from cache4diffusion.method import Composition, Method
from cache4diffusion.run.taps import schedulers_of
from cache4diffusion.sites import SwitchingSpan, Trajectory
from cache4diffusion.strip import planned_strip
from cache4diffusion.trace import FULL
from cache4diffusion.wrap import owner_of


def cache_bytes(
    target: Any,
    method: str | Method | Composition,
    /,
    *,
    inputs: tuple[Any, ...] | Mapping[str, Any] | list[Any] | None = None,
    call: Mapping[str, Any] | None = None,
    steps: int | None = None,
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
        **settings: as in `accelerate`.

    Returns:
        The most that is held at a time, all branches and denoisers together.

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
    if isinstance(method, str):
        name, given = parse_method(method)
        chosen, axes = _choose(target, found, name, {**given, **settings})
    else:
        chosen, axes = _choose(target, found, method, settings)
    is_missing = isinstance(chosen, Method) and chosen.info.needs_calibration and chosen.loaded is None
    composition = compose(chosen.outline() if is_missing else chosen, axes)  # type: ignore[union-attr]
    if isinstance(target, nn.Module):
        if inputs is None:
            raise SettingError("cache_bytes(denoiser) needs inputs=...: the arguments of one call, a tuple or a dict.")
        made = inputs if isinstance(inputs, list) else [inputs]
        calls = {"denoiser": [((), dict(one)) if isinstance(one, Mapping) else (tuple(one), {}) for one in made]}
    else:
        call = dict(call or {})
        asked = call.get("num_inference_steps", default_steps(target)) if steps is None else steps
        with quiet(target):
            calls = Sampling(target, call, asked).first_steps(found, schedulers_of(target))
        steps = asked
    steps = 50 if steps is None else steps
    if steps < 2:
        raise SettingError(f"cache_bytes(steps={steps}): use 2 or more; a run of one step has nothing to reuse.")
    composition.check_run(steps)
    return sum(_Rehearsal(found[name], composition, own, steps).held() for name, own in calls.items() if own)


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


class _Rehearsal:
    """Runs on tensors without data.

    Args:
        denoiser: the network.
        composition: what caches.
        calls: of one step.
        steps: of the run that is rehearsed.
    """

    def __init__(self, denoiser: nn.Module, composition: Composition, calls: Sequence[Call], steps: int) -> None:
        self.name = type(unwrapped(denoiser)).__name__
        self.calls, self.composition = calls, composition
        # Where the gate looks at what is sampled, the most is kept if every second step is computed.
        letters = planned_strip(composition, steps) or (FULL + "c") * steps
        self.letters = FULL + letters[1:steps]
        with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
            self.twin = copy.deepcopy(unwrapped(denoiser))

    def held(self) -> int:
        """The most that is held."""
        try:
            with torch.no_grad():
                for call in self.calls:
                    self._call(call)
        except DataDependentOutputException as error:
            raise AnatomyError(
                f"{self.name} reads its data while it runs ({error}), so what is cached cannot be counted without "
                "running it. Sample once and see handle.memory."
            ) from error
        with _Answers():
            return self._run(self.letters[: self._steps_that_fill()])

    def _steps_that_fill(self) -> int:
        """Number of steps after which no more is held: a predictor that keeps n snapshots has had them, and one more
        step of each kind was run."""
        if isinstance(self.composition.site, SwitchingSpan):  # it keeps something else from some step on
            return len(self.letters)
        needed, seen, kinds = getattr(self.composition.predictor, "capacity", 3), 0, set(self.letters)
        for index, letter in enumerate(self.letters):
            seen += letter == FULL
            kinds.discard(letter)
            if seen > needed and not kinds:
                return index + 1
        return len(self.letters)

    def _run(self, letters: str) -> int:
        guards = (_Given(letters),) if self.composition.gate is not None else ()
        composition = dataclasses.replace(self.composition, guards=guards)
        with warnings.catch_warnings(), torch.no_grad(), accelerate(self.twin, composition, nan_guard="off") as handle:
            warnings.simplefilter("ignore")  # the real run will say it again
            scheduler = _scheduler(len(self.letters)) if isinstance(composition.site, Trajectory) else None
            if scheduler is not None:
                handle.watch_scheduler(scheduler)
            with handle.run(num_steps=len(self.letters)):
                for index in range(len(letters)):
                    outputs = [self._call(call) for call in self.calls]
                    if scheduler is not None:
                        scheduler.step(outputs[0], scheduler.timesteps[index], self._latent())
            return handle.memory["peak"]

    def _call(self, call: Call) -> Any:
        # A denoiser may take entries out of the dictionaries it is given.
        args, kwargs = pytree.tree_map(lambda leaf: leaf, call)
        output = self.twin(*args, **kwargs)
        return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

    def _latent(self) -> Tensor:
        roles = inputs_of(self.twin)
        return get_argument(roles.module, *self.calls[0], (roles.latent,))


def _scheduler(steps: int) -> Any:
    """What acts on the trajectory keeps latents and velocities, whoever steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler
