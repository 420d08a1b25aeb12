"""Running the checks, method by method, and putting what they find together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from cache4diffusion.accelerate import Choice, choose, compose, denoisers_of
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.calls import quiet
from cache4diffusion.compare import parse_method
from cache4diffusion.composition import Composition
from cache4diffusion.errors import AnatomyError, CalibrationError, CompositionError, SettingError
from cache4diffusion.few_steps import unconcerned
from cache4diffusion.method import METHODS, Method
from cache4diffusion.selfcheck.checks import OF_DENOISERS, OF_RUNS
from cache4diffusion.selfcheck.findings import INVARIANTS, Finding, SelfCheck, Status
from cache4diffusion.selfcheck.stage import Case, Failed, NotApplicable, Stage, Subject
from cache4diffusion.sites import Trajectory
from cache4diffusion.wrap import owner_of


def selfcheck(
    target: Any,
    methods: str | Method | Composition | Sequence[Any] | None = None,
    /,
    *,
    inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    steps: int | None = None,
    progress: bool = False,
) -> SelfCheck:
    """Prove on this pipeline (or denoiser) what this library promises of any, for the method that accelerates it.

        c4d.accelerate(pipe, "dbcache", threshold=0.1)
        print(c4d.selfcheck(pipe))  # in words; true if nothing failed

    What accelerates it now is paused meanwhile, and goes on afterwards; of a pipeline that is not accelerated every
    method is checked. Runs are short: ``steps`` steps, two images, no decoding. Warm-ups are shortened and thresholds
    raised, so that few steps show cached ones. Of a pipeline with several denoisers (two experts that share the steps)
    each is checked, and what is found names it.

    Cost: about 17 runs for each method, at the size that the pipeline has by itself: seconds on tiny components,
    minutes where a step takes a second. ``call`` makes images smaller; what is proven holds for all sizes.

    Args:
        target: a diffusers pipeline, or a denoiser (then ``inputs`` are needed).
        methods: others, one or several, by name or as objects. None: what accelerates the target; where nothing does,
            all, those that cannot serve it as "not applicable".
        inputs: arguments of one call of a bare denoiser, a tuple or a mapping.
        call: arguments of the pipeline's call, such as ``{"height": 256, "width": 256}``.
        steps: of each run, 4 or more. None: 6; for what accelerates the target more, if it caches nothing in so few.
        progress: a progress bar on stderr.

    Raises:
        UnknownNameError, SettingError: a method, setting or argument is not known, inputs are missing, or several
            handles accelerate the target.
    """
    if steps is not None and steps < 4:
        raise SettingError(f"selfcheck(steps={steps}): use 4 or more, so that there are full and cached ones.")
    owners = list(dict.fromkeys(filter(None, map(owner_of, denoisers_of(target).values()))))
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(owner.paused())
        stack.enter_context(unconcerned())
        if not isinstance(target, nn.Module):
            stack.enter_context(quiet(target))
        if isinstance(methods, (str, Method, Composition)):
            methods = [methods]
        for entry in methods or ():
            choice = choose(target, denoisers_of(target), *_named(entry))
            compose(choice.chosen, choice.axes)  # fails before anything runs
        if methods is None and owners:
            choices = [_attached(owners)]
        else:
            choices = [_choice(target, entry) for entry in (list(METHODS) if methods is None else methods)]
        cases = [(choice.name, Case(choice.chosen, choice.axes, choice.options.storage.given)) for choice in choices]
        given = (target, inputs, dict(call or {}))
        if steps is None and methods is None and owners:
            stage = _long_enough(given, cases[0][1])
        else:
            stage = Stage(*given, _STEPS[0] if steps is None else steps)
        names = dict.fromkeys(type(unwrapped(subject.denoiser)).__name__ for subject in stage.subjects)
        labels = {choice.name: choice.label for choice in choices}
        found = SelfCheck(", ".join(names), steps=stage.steps, labels=labels)
        for name, case in _tracked(cases, progress):
            found.findings += _findings(stage, name, case)
    return found


def _attached(owners: list[Any]) -> Choice:
    """What a handle put to work.

    Raises:
        SettingError: there are several, or it is an observer's.
    """
    if len(owners) > 1:
        labels = ", ".join(owner.label for owner in owners)
        raise SettingError(f"selfcheck: {len(owners)} handles accelerate this pipeline ({labels}): name the methods.")
    if owners[0].choice is None:
        raise SettingError(f"selfcheck: what is attached is no method ({owners[0].label}). Name the methods.")
    return owners[0].choice


def _long_enough(given: tuple[Any, Any, dict[str, Any]], case: Case) -> Stage:
    """Runs in which a method caches something, where shorter ones show nothing of it."""
    for steps in _STEPS:
        stage = Stage(*given, steps)
        try:
            if any(subject.caches(case) for subject in stage.subjects):
                break
        except SettingError:  # the run is too short for its settings
            continue
        except Exception:  # a finding, which the checks tell better
            break
    return stage


def _tracked(cases: list[Any], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from cases
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(cases, "selfcheck", console=Console(stderr=True))


def _named(entry: Any) -> tuple[Any, dict[str, Any]]:
    return parse_method(entry) if isinstance(entry, str) else (entry, {})


def _choice(target: Any, entry: Any) -> Choice:
    return choose(target, denoisers_of(target), *_named(entry))


_STEPS = (6, 12, 25, 50)
_IN_THE_SCHEDULER = "it acts in scheduler.step, which this check never calls; whole runs of a pipeline show the rest"


@dataclass(frozen=True)
class _Outcome:
    """What one check came to, on the whole or on one denoiser."""

    status: Status
    detail: str
    site: str | None = None


def _findings(stage: Stage, name: str, case: Case) -> list[Finding]:
    try:
        handle = stage.attach(case)
        site = handle._engines[0].composition.site
        handle.remove()
    except (AnatomyError, CalibrationError, CompositionError) as error:
        return [Finding(name, invariant, "not applicable", str(error)) for invariant in INVARIANTS]
    findings = []
    for invariant in INVARIANTS:
        if isinstance(site, Trajectory) and not (stage.is_pipeline and invariant in OF_RUNS):
            outcome = _Outcome("not applicable", _IN_THE_SCHEDULER)
        elif invariant in OF_RUNS:
            outcome = _outcome(OF_RUNS[invariant], stage, case)
        else:
            outcome = _merged({s.name: _outcome_on(s, OF_DENOISERS[invariant], case) for s in stage.subjects})
        findings.append(Finding(name, invariant, outcome.status, outcome.detail, outcome.site))
    return findings


def _outcome_on(subject: Subject, check: Callable[[Subject, Case], str], case: Case) -> _Outcome:
    if not subject.calls:
        return _Outcome("not applicable", f"not called in a run of {subject.steps} steps")
    return _outcome(check, subject, case)


def _outcome(check: Callable[[Any, Case], str], place: Stage | Subject, case: Case) -> _Outcome:
    try:
        return _Outcome("passed", check(place, case))
    except NotApplicable as reason:
        return _Outcome("not applicable", str(reason))
    except Failed as failure:
        return _Outcome("failed", str(failure), failure.site)
    except Exception as error:  # whatever it is, it is a finding about this pipeline
        return _Outcome("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        place.release()


def _merged(outcomes: Mapping[str, _Outcome]) -> _Outcome:
    """Of several denoisers: failed if one failed, passed if one passed; each is named."""
    if len(outcomes) == 1:
        return next(iter(outcomes.values()))
    worst: Status = next(
        status
        for status in ("failed", "passed", "not applicable")
        if any(outcome.status == status for outcome in outcomes.values())
    )
    if worst == "failed":
        outcomes = {name: outcome for name, outcome in outcomes.items() if outcome.status == "failed"}
    detail = "; ".join(f"{name}: {outcome.detail}" for name, outcome in outcomes.items())
    site = next((f"{name}.{outcome.site}" for name, outcome in outcomes.items() if outcome.site), None)
    return _Outcome(worst, detail, site)
