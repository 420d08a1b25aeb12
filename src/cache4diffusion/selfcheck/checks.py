"""The invariants, one function each: on whole runs of the target, or on each of its denoisers.

A check returns in words what it saw, or raises `Failed` or `NotApplicable`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cache4diffusion.accelerate import accelerate
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.composition import Composition
from cache4diffusion.engine import Engine
from cache4diffusion.engine.leaves import parameter_names
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.errors import SettingError
from cache4diffusion.handle import Handle
from cache4diffusion.method import Method, method
from cache4diffusion.predictors import Reuse
from cache4diffusion.selfcheck.inside import Probe, always_resting, counted, newcomers, poison
from cache4diffusion.selfcheck.stage import Case, Failed, NotApplicable, Stage, Subject
from cache4diffusion.selfcheck.values import all_equal, difference, distance, kind, tensors
from cache4diffusion.sites import Denoiser, Parts, Reduced, ReducedLevel, SingleContext, UNetLevel
from cache4diffusion.wrap import owner_of

# --- on whole runs ----------------------------------------------------------------------------------------------------


def _off_is_off(stage: Stage, case: Case) -> str:
    case = case.off()
    plain = stage.sample()
    with stage.attach(case) as handle:
        cached = stage.sample(handle)
        letters = {record.symbol for record in handle.trace.of()}
    if letters != {"F"}:
        raise Failed(f"steps were cached at {case.settings}: {''.join(sorted(letters))}")
    for index, (a, b) in enumerate(zip(plain, cached, strict=True)):
        if not torch.equal(a, b):
            raise Failed(f"output {index} differs by {difference(a, b):.2e} at {case.settings}")
    return f"bit-equal over {stage.steps} steps at {case.settings}"


def _linear_feature(stage: Stage, case: Case) -> str:
    raise NotApplicable(
        "nothing in a real network changes so evenly; shown by the library's tests on one in which it does"
    )


def _remove_restores(stage: Stage, case: Case) -> str:
    before, plain = _fingerprint(stage), stage.sample()
    case = case.forced(stage.steps)
    said = ["wrappers gone"]
    with stage.attach(case) as handle:
        expected = stage.sample(handle)
        _abort(stage, handle)
        again = stage.sample(handle)
        if not all_equal(expected, again):
            raise Failed("the run after one that was aborted by an exception differs")
        said.append("an aborted run leaves no trace")
        denoisers = [subject.denoiser for subject in stage.subjects]
        if sum(parameter.nbytes for denoiser in denoisers for parameter in denoiser.parameters()) < 1 << 29:
            for twin in map(copy.deepcopy, denoisers):
                if owner_of(twin) is not None or any("forward" in module.__dict__ for module in twin.modules()):
                    raise Failed("a deep copy of the accelerated denoiser is not plain")
            said.append("a deep copy is plain")
    if handle.memory["held"]:
        raise Failed(f"{handle.memory['held']} bytes are still held")
    after = _fingerprint(stage)
    changed = [key for key in before if after.get(key) != before[key]] + [key for key in after if key not in before]
    if changed:
        raise Failed(f"{len(changed)} attributes are not what they were", changed[0])
    if not all_equal(plain, stage.sample()):
        raise Failed("the output after remove() differs from that before")
    return ", ".join([*said, "output bit-equal to that before"])


def _repeatable(stage: Stage, case: Case) -> str:
    case = case.forced(stage.steps)
    with stage.attach(case) as handle:
        first, second = stage.sample(handle), stage.sample(handle)
    with stage.attach(case) as handle:
        fresh = stage.sample(handle)
    if not all_equal(first, second):
        raise Failed("the second run differs from the first: something survived it")
    if not all_equal(first, fresh):
        raise Failed("a freshly attached handle gives another result")
    shares = isinstance(case.chosen, Method) and case.chosen.info.shares_branches
    return "two runs and a fresh handle are bit-equal" + ("; branches share by design" if shares else "")


def _bad_settings_fail(stage: Stage, case: Case) -> str:
    if not isinstance(case.chosen, Method):
        raise NotApplicable("a composition of your own is checked when it is made")
    name, tried = case.chosen.info.name, 0
    bad: list[dict[str, Any]] = [{"no_such_setting": 1}]
    for entry in dataclasses.fields(case.chosen):
        limits = entry.metadata.get("range")
        if limits is None:
            continue
        bad.append({entry.name: object()})
        number = float if isinstance(entry.default, float) else int
        for limit, step in ((limits.minimum, -1), (limits.maximum, 1), (limits.above, 0)):
            if limit is not None:
                bad.append({entry.name: number(limit + step)})
    for settings in bad:
        tried += 1
        try:
            accelerate(stage.target, name, **settings)
        except SettingError:
            if any(owner_of(subject.denoiser) is not None for subject in stage.subjects):
                raise Failed(f"{settings} were refused with something left attached") from None
            continue
        raise Failed(f"{settings} were accepted")
    method(name)
    return f"{tried} wrong settings refused, nothing attached"


def _abort(stage: Stage, handle: Handle) -> None:
    """Run until the denoisers compute for the third time, and raise there."""
    seen = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise _Interrupted

    hooks = [subject.denoiser.register_forward_pre_hook(fail) for subject in stage.subjects]
    try:
        stage.sample(handle)
    except _Interrupted:
        pass
    finally:
        for hook in hooks:
            hook.remove()


class _Interrupted(Exception):
    pass


def _fingerprint(stage: Stage) -> dict[str, Any]:
    """Everything a wrapper could have changed: callables on instances, and hooks."""
    owners: dict[str, Any] = {
        f"{subject.name}.{path}": module
        for subject in stage.subjects
        for path, module in subject.denoiser.named_modules()
    }
    if stage.is_pipeline:
        owners |= {"pipeline": stage.target, "scheduler": getattr(stage.target, "scheduler", None)}
    found: dict[str, Any] = {}
    for name, owner in owners.items():
        for key, value in vars(owner).items() if owner is not None else ():
            if key.endswith("_hooks"):
                found[f"{name}:{key}"] = len(value)
            elif callable(value) and not isinstance(value, nn.Module):
                found[f"{name}:{key}"] = id(value)
    return found


OF_RUNS: dict[str, Callable[[Stage, Case], str]] = {
    "off_is_off": _off_is_off,
    "linear_feature": _linear_feature,
    "remove_restores": _remove_restores,
    "repeatable": _repeatable,
    "bad_settings_fail": _bad_settings_fail,
}


# --- on each denoiser -------------------------------------------------------------------------------------------------


def _frozen_input(subject: Subject, case: Case) -> str:
    case = case.forced(subject.steps)
    composition = case.composition
    if isinstance(composition.site, (Reduced, ReducedLevel)):
        raise NotApplicable("on fewer tokens even what never changes comes out another way")
    is_exact, is_close = _is_exact(composition) and not case.rounds, _keeps_constants(composition)
    counts: dict[str, int] = {}
    with counted(subject.denoiser, counts), subject.attach(case) as handle:
        engine = handle._engines[0]
        is_exact = is_exact and not _takes_apart(engine)
        resting = [] if composition.tokens is not None else always_resting(engine)
        cached, worst, ran = 0, 0.0, []
        with Probe(engine) as probe:
            runs = subject.frozen(handle)
            while True:
                counts.clear()
                probe.begin()
                try:
                    step, number, output, letter = next(runs)
                except StopIteration:
                    break
                except Exception as error:
                    site = probe.culprit(case.tolerance(subject.truth[0]))
                    raise Failed(f"a cached step failed: {type(error).__name__}: {error}", site) from error
                if letter == "F":
                    probe.keep(number)
                    continue
                cached += 1
                truth = subject.truth[number]
                worst = max(worst, distance(truth, output))
                limit = 0.0 if is_exact else case.tolerance(truth)
                if is_close and not worst <= limit:
                    site = probe.culprit(case.tolerance(truth), number)
                    wanted = "be bit-equal" if is_exact else f"agree to {limit:.0e}"
                    raise Failed(
                        f"step {step}, cached, differs from a full step by {worst:.2e}; it should {wanted}", site
                    )
                ran += [path for path in resting if counts.get(path)] if letter == "c" else []
    if not cached and composition.is_off:
        raise NotApplicable("with these settings the method is off: it caches nothing")
    if not cached and composition.site is None:
        raise NotApplicable("this call has no guidance, so there is no second branch to predict")
    if not cached:
        raise Failed(f"nothing was cached in {subject.steps} steps of the same input, at {case.settings}")
    if ran:
        raise Failed(f"{len(set(ran))} modules that should rest ran on cached steps", ran[0])
    said = "bit-equal" if worst == 0 else f"within {worst:.1e}"
    what = "1 bypassed module" if len(resting) == 1 else f"{len(resting)} bypassed modules"
    rests = f"{what} ran 0 times" if resting else "no module is bypassed as a whole"
    found = f"{cached} cached calls {said}; {rests}"
    if not is_close and worst > case.tolerance(subject.truth[0]):
        raise NotApplicable(f"its predictor does not keep what never changes ({found})")
    return found


def _kept_type(subject: Subject, case: Case) -> str:
    case, kinds = case.forced(subject.steps), []
    takes_dict = "return_dict" in parameter_names(type(unwrapped(subject.denoiser)))
    for flag in (True, False) if takes_dict else (None,):
        extra = {} if flag is None else {"return_dict": flag}
        calls = [(args, {**kwargs, **extra}) for args, kwargs in subject.calls]
        with torch.no_grad():
            truth = [subject.compute(call) for call in calls]
        with subject.attach(case) as handle:
            for step, number, output, letter in subject.frozen(handle, calls):
                if (wanted := kind(truth[number])) != (given := kind(output)):
                    raise Failed(f"step {step} ({letter}) returned {given}, the denoiser returns {wanted}")
        kinds.append(type(truth[0]).__name__)
    leaf = tensors(subject.truth[0])[0]
    return f"{' and '.join(kinds)} of {str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def _nan_guard(subject: Subject, case: Case) -> str:
    case = case.forced(subject.steps)
    with subject.attach(case, nan_guard="now") as handle:
        engine = handle._engines[0]
        poisoned, seen_cached = 0, False
        for step, number, output, letter in subject.frozen(handle):
            if poisoned:
                if any(not bool(torch.isfinite(leaf).all()) for leaf in tensors(output)):
                    raise Failed(f"step {step} returned NaN: the cache was poisoned and nobody noticed")
                is_due = letter == "F" or _keeps_constants(case.composition)
                if is_due and distance(subject.truth[number], output) > case.tolerance(subject.truth[number]):
                    raise Failed(f"step {step}, after the cache was poisoned, is not what a full step returns")
            seen_cached |= letter != "F"
            if seen_cached and not poisoned and number == len(subject.calls) - 1:
                poisoned = poison(engine)
        if not seen_cached:
            raise NotApplicable("nothing is cached in this call, so there is nothing to poison")
        noted = [note for note in handle.trace.notes if "finite" in note]
    how = "noticed and computed anew" if noted else "a full step came first"
    return f"{poisoned} cached tensors filled with NaN: {how}"


def _ledger_equals_held(subject: Subject, case: Case) -> str:
    case = case.forced(subject.steps)
    with subject.attach(case) as handle:
        list(subject.frozen(handle))  # whatever the denoiser memoises
        engine, most = handle._engines[0], 0
        # Decisions, finite checks, and on accelerators the 32 values by which conditioning is recognised.
        scalar = 64 if tensors(subject.truth[0])[0].device.type == "cpu" else 256
        with newcomers() as found_since:
            for step, number, output, _ in subject.frozen(handle):
                del output
                if number < len(subject.calls) - 1 or step not in (1, subject.steps - 1):
                    continue
                found = list(found_since().values())
                held, most = engine.ledger.held, max(most, engine.ledger.held)
                small = sum(size for size in found if size <= scalar)
                if not 0 <= sum(found) - held <= max(small, 64):
                    raise Failed(f"the ledger says {held} bytes at step {step}, {sum(found)} are held")
            if engine.ledger.held:
                raise Failed(f"{engine.ledger.held} bytes are held after the run")
            left = [size for size in found_since().values() if size > 64]
            if left:
                raise Failed(f"{sum(left)} bytes outlive the run")
    return f"{most} bytes at the largest, 0 after the run"


def _is_exact(composition: Composition) -> bool:
    """Whether what is reused is the feature itself and nothing is added to it."""
    is_whole = isinstance(composition.site, (Denoiser, Parts, UNetLevel))
    is_whole = is_whole and getattr(composition.site, "form", "output") == "output"
    is_reuse = isinstance(composition.predictor, Reuse) and not isinstance(composition.site, SingleContext)
    return is_whole and is_reuse and composition.tokens is None and composition.cfg is None


def _takes_apart(engine: Engine) -> bool:
    """Whether a part is what its module adds to its input: taken off and put back on another time, it is rounded."""
    return isinstance(engine.driver, PartsDriver) and any(site.part.adds_to is not None for site in engine.driver.sites)


def _keeps_constants(composition: Composition) -> bool:
    """Whether an output that never changes is predicted as it is; some fits and regressions do not, nor what ends
    guidance, nor what computes fewer tokens."""
    is_whole = not isinstance(composition.site, (Reduced, ReducedLevel))
    return (
        is_whole
        and getattr(composition.cfg, "keeps_guidance", True)
        and getattr(composition.predictor, "keeps_constants", True)
    )


OF_DENOISERS: dict[str, Callable[[Subject, Case], str]] = {
    "frozen_input": _frozen_input,
    "kept_type": _kept_type,
    "nan_guard": _nan_guard,
    "ledger_equals_held": _ledger_equals_held,
}
