"""Running the checks, method by method, and putting what they find together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from cache4diffusion.accelerate import choose, compose, denoisers_of
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
    steps: int = 8,
    progress: bool = False,
) -> SelfCheck:
    """Prove on this pipeline (or denoiser) what this library promises of any, for each method that can serve it.

    Nothing is left attached. Runs are short: ``steps`` steps, two images, no decoding. Warm-ups are shortened and
    thresholds raised, so that few steps show cached ones. Of a pipeline with several denoisers (two experts that share
    the steps) each is checked, and what is found names it.

    Args:
        target: a diffusers pipeline, or a denoiser (then ``inputs`` are needed).
        methods: one or several, by name or as objects; None: all, those that cannot serve it as "not applicable".
        inputs: arguments of one call of a bare denoiser, a tuple or a mapping.
        call: arguments of the pipeline's call, such as ``{"height": 256, "width": 256}``.
        steps: of each run, 4 or more.
        progress: a progress bar on stderr.

    Raises:
        UnknownNameError, SettingError: a method, setting or argument is not known, or inputs are missing.
    """
    if steps < 4:
        raise SettingError(f"selfcheck(steps={steps}): use 4 or more, so that there are full and cached ones.")
    for name, denoiser in denoisers_of(target).items():
        if owner_of(denoiser) is not None:
            raise SettingError(f"{name} is accelerated: call remove() on its handle first, selfcheck attaches its own.")
    with unconcerned(), quiet(target) if not isinstance(target, nn.Module) else nullcontext():
        stage = Stage(target, inputs, dict(call or {}), steps)
        names = dict.fromkeys(type(unwrapped(subject.denoiser)).__name__ for subject in stage.subjects)
        found = SelfCheck(", ".join(names))
        if isinstance(methods, (str, Method, Composition)):
            methods = [methods]
        for entry in methods or ():
            choice = choose(target, denoisers_of(target), *_named(entry))
            compose(choice.chosen, choice.axes)  # fails before anything runs
        chosen = [_resolve(target, entry) for entry in (list(METHODS) if methods is None else methods)]
        for name, case in _tracked(chosen, progress):
            found.findings += _findings(stage, name, case)
    return found


def _tracked(cases: list[Any], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from cases
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(cases, "selfcheck", console=Console(stderr=True))


def _named(entry: Any) -> tuple[Any, dict[str, Any]]:
    return parse_method(entry) if isinstance(entry, str) else (entry, {})


def _resolve(target: Any, entry: Any) -> tuple[str, Case]:
    choice = choose(target, denoisers_of(target), *_named(entry))
    return choice.name, Case(choice.chosen, choice.axes, choice.options.storage.given)


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
