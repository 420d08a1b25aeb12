"""`selfcheck`: on *this* pipeline, does caching keep its promises? One finding per method and invariant.

Most checks drive the denoiser directly with the arguments of a real call, repeated unchanged from step to step: a
cached step must then return what a full one returns, whatever the method; the first site that does not is the culprit.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cache4diffusion.accelerate import _choose, accelerate, compose, denoisers_of
from cache4diffusion.anatomy import Anatomy
from cache4diffusion.anatomy.undisturbed import unwrapped
from cache4diffusion.calls import Call, check_call, first_step, quiet, sampler, subject
from cache4diffusion.compare import NOTHING_CACHED, parse_method
from cache4diffusion.engine.inputs import inputs_of
from cache4diffusion.engine.leaves import flatten, get_argument, parameter_names, with_arguments
from cache4diffusion.engine.level import LevelDriver
from cache4diffusion.engine.parts import PartsDriver
from cache4diffusion.engine.span import SpanDriver
from cache4diffusion.errors import AnatomyError, CompositionError, SettingError
from cache4diffusion.gates import Signal, Verification
from cache4diffusion.handle import Handle
from cache4diffusion.method import METHODS, Composition, Method, method
from cache4diffusion.predictors import Reuse
from cache4diffusion.sites import Denoiser, Parts, UNetLevel
from cache4diffusion.wrap import owner_of

Status = Literal["passed", "failed", "not applicable"]

INVARIANTS = {
    "off_is_off": "at its off settings the output is bit-equal to the plain denoiser's",
    "frozen_input": "for the same input at every step cached steps equal full ones, and what they bypass runs 0 times",
    "linear_feature": "features affine in the step are predicted exactly by order 1 and above",
    "remove_restores": "remove() restores what was found; copies are plain; an exception leaves no trace",
    "repeatable": "the same seed gives the same result, run after run",
    "kept_type": "type, dtype, device and shape of the output are kept",
    "nan_guard": "what is not finite is noticed and computed anew",
    "bad_settings_fail": "settings that are unknown or out of range are refused, with nothing attached",
    "ledger_equals_held": "the ledger's bytes are those really held, and none after the run",
}
_PROMPTS = {
    "prompt": ["a red circle on a gray background", "a blue star left of a green square on a white background"],
    "class_labels": [0, 1],
}


@dataclass(frozen=True)
class Finding:
    """What was found for one method and one invariant (a key of `INVARIANTS`); ``site``: where it fails, if known."""

    method: str
    invariant: str
    status: Status
    detail: str
    site: str | None = None

    @property
    def number(self) -> int:
        """Of the invariant, from 1."""
        return list(INVARIANTS).index(self.invariant) + 1


@dataclass
class SelfCheck:
    """All findings on one pipeline or denoiser; true if nothing failed."""

    denoiser: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "failed" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def failed(self) -> list[Finding]:
        """What failed."""
        return [finding for finding in self.findings if finding.status == "failed"]

    def of(self, method: str, invariant: str) -> Finding:
        """The finding for a method and an invariant."""
        return next(f for f in self.findings if (f.method, f.invariant) == (method, invariant))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = list(dict.fromkeys(finding.method for finding in self.findings))
        return {
            "denoiser": self.denoiser,
            "ok": self.ok,
            "invariants": INVARIANTS,
            "methods": {
                name: {
                    f.invariant: {"status": f.status, "detail": f.detail, "site": f.site}
                    for f in self.findings
                    if f.method == name
                }
                for name in names
            },
        }

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"selfcheck of {self.denoiser}"]
        for name in dict.fromkeys(finding.method for finding in self.findings):
            lines.append(name)
            mine = [finding for finding in self.findings if finding.method == name]
            if len({(f.status, f.detail) for f in mine}) == 1 and mine[0].status == "not applicable":
                lines.append(f"  not applicable  {mine[0].detail}")
                continue
            for f in mine:
                where = f" [{f.site}]" if f.site else ""
                lines.append(f"  {f.number} {f.invariant:<18} {f.status:<14}  {f.detail}{where}")
        count = len(self.failed)
        lines.append("nothing failed" if not count else f"{count} failed")
        return "\n".join(lines)


class _Failed(Exception):
    """An invariant does not hold."""

    def __init__(self, detail: str, site: str | None = None) -> None:
        super().__init__(detail)
        self.site = site


class _NotApplicable(Exception):
    """An invariant says nothing here."""


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
    thresholds raised, so that few steps show cached ones.

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
    with warnings.catch_warnings(), quiet(target) if not isinstance(target, nn.Module) else nullcontext():
        warnings.filterwarnings("ignore", message=NOTHING_CACHED)  # where that is wrong, it is a finding
        stage = _Stage(target, inputs, dict(call or {}), steps)
        found = SelfCheck(type(unwrapped(stage.denoiser)).__name__)
        if methods is None:
            methods = list(METHODS)
        elif isinstance(methods, (str, Method, Composition)):
            methods = [methods]
        chosen = [_resolve(stage, entry) for entry in methods]
        for name, case in _tracked(chosen, progress):
            found.findings += _check_method(stage, name, case)
    return found


def _tracked(cases: list[Any], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from cases
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(cases, "selfcheck", console=Console(stderr=True))


def _resolve(stage: _Stage, entry: Any) -> tuple[str, _Case]:
    name, settings = parse_method(entry) if isinstance(entry, str) else (entry, {})
    chosen, axes = _choose(stage.target, {"denoiser": stage.denoiser}, name, settings)
    compose(chosen, axes)
    label = chosen.info.name if isinstance(chosen, Method) else "composition"
    return label, _Case(chosen, axes)


@dataclass(frozen=True)
class _Case:
    """A method as the checks use it."""

    chosen: Method | Composition
    axes: dict[str, Any]

    def forced(self, steps: int) -> _Case:
        """Caches early and on every score; gains that change a constant are set to 1."""
        if not isinstance(self.chosen, Method):
            return self
        wanted = {
            "warmup": min(self.chosen.settings.get("warmup", 2), 2),
            "cooldown": 0,
            "threshold": 1e9,
            "min_run": steps,
            "low_gain": 1.0,
            "high_gain": 1.0,
        }
        known = {name: value for name, value in wanted.items() if name in self.chosen.settings}
        if self.chosen.is_off():
            known.pop("threshold", None)
        return dataclasses.replace(self, chosen=dataclasses.replace(self.chosen, **known))

    def off(self) -> _Case:
        """At the registry's off settings."""
        if not isinstance(self.chosen, Method):
            raise _NotApplicable("a composition of your own has no registered off settings")
        short = {"warmup": min(self.chosen.settings.get("warmup", 2), 2)} if "warmup" in self.chosen.settings else {}
        return dataclasses.replace(self, chosen=dataclasses.replace(self.chosen, **{**short, **self.chosen.info.off}))

    @property
    def composition(self) -> Composition:
        """What runs."""
        return compose(self.chosen, self.axes)


class _Stage:
    """Where checks run: the denoiser with the arguments of its calls in one step, and whole runs."""

    def __init__(self, target: Any, inputs: Any, call: dict[str, Any], steps: int) -> None:
        self.target, self.steps = target, steps
        self.is_pipeline = not isinstance(target, nn.Module)
        self.denoiser = next(iter(denoisers_of(target).values()))
        self.anatomy: Anatomy | None = None  # seen once
        if self.is_pipeline:
            check_call(target, call)
            name, embeddings = subject(target), call.get("prompt_embeds")
            prompts = call.pop(name, _PROMPTS[name] if embeddings is None else None)
            self.prompts = [prompts] if isinstance(prompts, (str, int)) else prompts
            self.rows = len(embeddings) if self.prompts is None else len(self.prompts)  # type: ignore[arg-type]
            call = {key: value for key, value in call.items() if key != "num_inference_steps"}
            self._sample = sampler(target, {**call, "output_type": "latent"})
            with torch.no_grad():
                self.calls = first_step(self.denoiser, getattr(target, "scheduler", None), self._run)
        else:
            if inputs is None:
                raise SettingError(
                    "selfcheck(denoiser) needs inputs=...: the arguments of one call, a tuple or a dict."
                )
            self.calls: list[Call] = [((), dict(inputs))] if isinstance(inputs, Mapping) else [(tuple(inputs), {})]
        with torch.no_grad():
            self.truth = [self.compute(call) for call in self.calls]

    def _run(self) -> Any:
        return self._sample(self.prompts, list(range(self.rows)), self.steps)

    def compute(self, call: Call) -> Any:
        """Call the denoiser; it may take entries out of the dictionaries it is given, so it gets its own."""
        args, kwargs = pytree.tree_map(lambda leaf: leaf, call)
        return self.denoiser(*args, **kwargs)

    def attach(self, case: _Case, *, bare: bool = False, **more: Any) -> Handle:
        """Accelerate the pipeline, or its denoiser alone, and attach at once.

        Raises:
            AnatomyError, CompositionError: it cannot serve this denoiser.
        """
        handle = accelerate(self.denoiser if bare else self.target, case.chosen, **case.axes, **more)
        try:
            handle._engines[0].prepare(*self.calls[0], anatomy=self.anatomy)
            self.anatomy = handle._engines[0].host.anatomy
        except BaseException:
            handle.remove()
            raise
        return handle

    def sample(self, handle: Handle | None = None) -> list[Tensor]:
        """A whole run: of the pipeline, or of a small loop around the denoiser."""
        with torch.no_grad():
            if self.is_pipeline:
                return _tensors(self._run())
            with handle.run(num_steps=self.steps) if handle is not None else nullcontext():
                return self._loop()

    def _loop(self) -> list[Tensor]:
        roles = inputs_of(self.denoiser)
        args, kwargs = self.calls[0]
        clock = get_argument(roles.module, args, kwargs, (roles.timestep,))
        latent, outputs = get_argument(roles.module, args, kwargs, (roles.latent,)), []
        half = latent.shape[0] // 2
        is_guided = half * 2 == latent.shape[0] and torch.equal(latent[:half], latent[half:])  # both branches at once
        for index in range(self.steps):
            time = clock * (self.steps - index) / self.steps
            if isinstance(clock, Tensor):
                time = time.to(clock.dtype)
            changed = {(roles.timestep,): time, (roles.latent,): latent}
            outputs += _tensors(self.compute(with_arguments(roles.module, args, kwargs, changed)))
            last = outputs[-1]
            latent = latent - 0.1 * last if last.shape == latent.shape else 0.97 * latent
            if is_guided:
                latent = torch.cat([latent[:half], latent[:half]])
        return outputs

    def frozen(self, handle: Handle, calls: list[Call] | None = None) -> Iterator[tuple[int, int, Any, str]]:
        """Call the denoiser with the same arguments at every step: step, call of the step, output, letter."""
        with torch.no_grad(), handle.run(num_steps=self.steps):
            for step in range(self.steps):
                for number, call in enumerate(calls or self.calls):
                    # No name for the output: nothing here may keep it alive.
                    yield step, number, self.compute(call), handle.trace.records[-1].symbol


def _tensors(value: Any) -> list[Tensor]:
    leaves = [torch.as_tensor(leaf) for leaf in flatten(value)[0] if not isinstance(leaf, (str, type(None)))]
    return [leaf.detach().clone() for leaf in leaves]


def _check_method(stage: _Stage, name: str, case: _Case) -> list[Finding]:
    try:
        stage.attach(case, bare=True).remove()
    except (AnatomyError, CompositionError) as error:
        return [Finding(name, invariant, "not applicable", str(error)) for invariant in INVARIANTS]
    findings = []
    for invariant in INVARIANTS:
        try:
            detail = _CHECKS[invariant](stage, case)
            findings.append(Finding(name, invariant, "passed", detail))
        except _NotApplicable as reason:
            findings.append(Finding(name, invariant, "not applicable", str(reason)))
        except _Failed as failure:
            findings.append(Finding(name, invariant, "failed", str(failure), failure.site))
        except Exception as error:  # whatever it is, it is a finding about this pipeline
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            findings.append(Finding(name, invariant, "failed", text))
        finally:
            owner = owner_of(stage.denoiser)
            if owner is not None:
                owner.remove()
    return findings


# --- the invariants ---------------------------------------------------------------------------------------------------


def _off_is_off(stage: _Stage, case: _Case) -> str:
    case = case.off()
    plain = stage.sample()
    with stage.attach(case) as handle:
        cached = stage.sample(handle)
        letters = {record.symbol for record in handle.trace.of()}
    if letters != {"F"}:
        raise _Failed(f"steps were cached at {_settings(case)}: {''.join(sorted(letters))}")
    for index, (a, b) in enumerate(zip(plain, cached, strict=True)):
        if not torch.equal(a, b):
            raise _Failed(f"output {index} differs by {_difference(a, b):.2e} at {_settings(case)}")
    return f"bit-equal over {stage.steps} steps at {_settings(case)}"


def _frozen_input(stage: _Stage, case: _Case) -> str:
    case = case.forced(stage.steps)
    composition = case.composition
    is_exact = _is_exact(composition)
    counts: dict[str, int] = {}
    with _counted(stage.denoiser, counts), stage.attach(case, bare=True) as handle:
        engine = handle._engines[0]
        resting = [] if composition.tokens is not None else _always_resting(engine)
        cached, worst, ran = 0, 0.0, []
        with _Probe(engine) as probe:
            runs = stage.frozen(handle)
            while True:
                counts.clear()
                probe.begin()
                try:
                    step, number, output, letter = next(runs)
                except StopIteration:
                    break
                except Exception as error:
                    site = probe.culprit(_tolerance(stage.truth[0]))
                    raise _Failed(f"a cached step failed: {type(error).__name__}: {error}", site) from error
                if letter == "F":
                    probe.keep(number)
                    continue
                cached += 1
                truth = stage.truth[number]
                worst = max(worst, _distance(truth, output))
                limit = 0.0 if is_exact else _tolerance(truth)
                if not worst <= limit:
                    site = probe.culprit(_tolerance(truth), number)
                    wanted = "be bit-equal" if is_exact else f"agree to {limit:.0e}"
                    raise _Failed(
                        f"step {step}, cached, differs from a full step by {worst:.2e}; it should {wanted}", site
                    )
                ran += [path for path in resting if counts.get(path)] if letter == "c" else []
    if not cached and composition.site is None:
        raise _NotApplicable("this call has no guidance, so there is no second branch to predict")
    if not cached:
        raise _Failed(f"nothing was cached in {stage.steps} steps of the same input, at {_settings(case)}")
    if ran:
        raise _Failed(f"{len(set(ran))} modules that should rest ran on cached steps", ran[0])
    said = "bit-equal" if worst == 0 else f"within {worst:.1e}"
    what = "1 bypassed module" if len(resting) == 1 else f"{len(resting)} bypassed modules"
    rests = f"{what} ran 0 times" if resting else "no module is bypassed as a whole"
    return f"{cached} cached calls {said}; {rests}"


def _linear_feature(stage: _Stage, case: _Case) -> str:
    raise _NotApplicable(
        "the parts of a real network are not affine in the step; shown by the library's tests on one that is"
    )


def _remove_restores(stage: _Stage, case: _Case) -> str:
    before, plain = _fingerprint(stage), stage.sample()
    case = case.forced(stage.steps)
    said = ["wrappers gone"]
    with stage.attach(case) as handle:
        expected = stage.sample(handle)
        _abort(stage, handle)
        again = stage.sample(handle)
        if not _all_equal(expected, again):
            raise _Failed("the run after one that was aborted by an exception differs")
        said.append("an aborted run leaves no trace")
        if sum(parameter.nbytes for parameter in stage.denoiser.parameters()) < 1 << 29:
            twin = copy.deepcopy(stage.denoiser)
            if owner_of(twin) is not None or any("forward" in module.__dict__ for module in twin.modules()):
                raise _Failed("a deep copy of the accelerated denoiser is not plain")
            said.append("a deep copy is plain")
    if handle.memory["held"]:
        raise _Failed(f"{handle.memory['held']} bytes are still held")
    after = _fingerprint(stage)
    changed = [key for key in before if after.get(key) != before[key]] + [key for key in after if key not in before]
    if changed:
        raise _Failed(f"{len(changed)} attributes are not what they were", changed[0])
    if not _all_equal(plain, stage.sample()):
        raise _Failed("the output after remove() differs from that before")
    return ", ".join([*said, "output bit-equal to that before"])


def _repeatable(stage: _Stage, case: _Case) -> str:
    case = case.forced(stage.steps)
    with stage.attach(case) as handle:
        first, second = stage.sample(handle), stage.sample(handle)
    with stage.attach(case) as handle:
        fresh = stage.sample(handle)
    if not _all_equal(first, second):
        raise _Failed("the second run differs from the first: something survived it")
    if not _all_equal(first, fresh):
        raise _Failed("a freshly attached handle gives another result")
    shares = isinstance(case.chosen, Method) and case.chosen.info.shares_branches
    return "two runs and a fresh handle are bit-equal" + ("; branches share by design" if shares else "")


def _kept_type(stage: _Stage, case: _Case) -> str:
    case, kinds = case.forced(stage.steps), []
    takes_dict = "return_dict" in parameter_names(type(unwrapped(stage.denoiser)))
    for flag in (True, False) if takes_dict else (None,):
        extra = {} if flag is None else {"return_dict": flag}
        calls = [(args, {**kwargs, **extra}) for args, kwargs in stage.calls]
        with torch.no_grad():
            truth = [stage.compute(call) for call in calls]
        with stage.attach(case, bare=True) as handle:
            for step, number, output, letter in stage.frozen(handle, calls):
                if (wanted := _kind(truth[number])) != (given := _kind(output)):
                    raise _Failed(f"step {step} ({letter}) returned {given}, the denoiser returns {wanted}")
        kinds.append(type(truth[0]).__name__)
    leaf = _tensors(stage.truth[0])[0]
    return f"{' and '.join(kinds)} of {str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"


def _nan_guard(stage: _Stage, case: _Case) -> str:
    case = case.forced(stage.steps)
    with stage.attach(case, bare=True, nan_guard="now") as handle:
        engine = handle._engines[0]
        poisoned, seen_cached = 0, False
        for step, number, output, letter in stage.frozen(handle):
            if poisoned:
                if any(not bool(torch.isfinite(leaf).all()) for leaf in _tensors(output)):
                    raise _Failed(f"step {step} returned NaN: the cache was poisoned and nobody noticed")
                if _distance(stage.truth[number], output) > _tolerance(stage.truth[number]):
                    raise _Failed(f"step {step}, after the cache was poisoned, is not what a full step returns")
            seen_cached |= letter != "F"
            if seen_cached and not poisoned and number == len(stage.calls) - 1:
                poisoned = _poison(engine)
        if not seen_cached:
            raise _NotApplicable("nothing is cached in this call, so there is nothing to poison")
        noted = [note for note in handle.trace.notes if "finite" in note]
    how = "noticed and computed anew" if noted else "a full step came first"
    return f"{poisoned} cached tensors filled with NaN: {how}"


def _bad_settings_fail(stage: _Stage, case: _Case) -> str:
    if not isinstance(case.chosen, Method):
        raise _NotApplicable("a composition of your own is checked when it is made")
    name, tried = case.chosen.info.name, 0
    bad: list[dict[str, Any]] = [{"no_such_setting": 1}]
    for entry in dataclasses.fields(case.chosen):
        limits = entry.metadata.get("range")
        if limits is None:
            continue
        bad.append({entry.name: object()})
        kind = float if isinstance(entry.default, float) else int
        for limit, step in ((limits.minimum, -1), (limits.maximum, 1), (limits.above, 0)):
            if limit is not None:
                bad.append({entry.name: kind(limit + step)})
    for settings in bad:
        tried += 1
        try:
            accelerate(stage.denoiser, name, **settings)
        except SettingError:
            if owner_of(stage.denoiser) is not None:
                raise _Failed(f"{settings} were refused with something left attached") from None
            continue
        raise _Failed(f"{settings} were accepted")
    method(name)
    return f"{tried} wrong settings refused, nothing attached"


def _ledger_equals_held(stage: _Stage, case: _Case) -> str:
    case = case.forced(stage.steps)
    with stage.attach(case, bare=True) as handle:
        list(stage.frozen(handle))  # whatever the denoiser memoises
        gc.collect()
        before = _alive()
        engine, most = handle._engines[0], 0
        for step, number, output, _ in stage.frozen(handle):
            del output
            if number < len(stage.calls) - 1 or step not in (1, stage.steps - 1):
                continue
            found = {key: size for key, size in _alive().items() if key not in before}
            held, most = engine.ledger.held, max(most, engine.ledger.held)
            small = sum(size for size in found.values() if size <= 64)  # scalars: decisions, finite checks
            if not 0 <= sum(found.values()) - held <= max(small, 64):
                raise _Failed(f"the ledger says {held} bytes at step {step}, {sum(found.values())} are held")
        if engine.ledger.held:
            raise _Failed(f"{engine.ledger.held} bytes are held after the run")
        left = {key: size for key, size in _alive().items() if key not in before and size > 64}
        if left:
            raise _Failed(f"{sum(left.values())} bytes outlive the run")
    return f"{most} bytes at the largest, 0 after the run"


_CHECKS: dict[str, Callable[[_Stage, _Case], str]] = {
    "off_is_off": _off_is_off,
    "frozen_input": _frozen_input,
    "linear_feature": _linear_feature,
    "remove_restores": _remove_restores,
    "repeatable": _repeatable,
    "kept_type": _kept_type,
    "nan_guard": _nan_guard,
    "bad_settings_fail": _bad_settings_fail,
    "ledger_equals_held": _ledger_equals_held,
}


# --- tools ------------------------------------------------------------------------------------------------------------


class _Probe:
    """Notes what leaves every site, call by call, and tells which is the first that differs on a cached step."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.driver = engine, engine.driver
        self._now: list[tuple[str, Any]] = []
        self._kept: dict[int, dict[str, Any]] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> _Probe:
        driver, engine = self.driver, self.engine
        if isinstance(driver, PartsDriver):
            for site in driver.sites:
                hook = site.module.register_forward_hook(lambda m, a, out, name=site.name: self._note(name, out))
                self._undo.append(hook.remove)
        if engine.attachment.blocks:
            inside = {p for s in getattr(driver, "stretches", []) for p in range(s.first, s.last)}
            original = engine.runner.on_block

            def on_block(position: int, *args: Any) -> Any:
                output = original(position, *args)
                if position not in inside:
                    self._note(engine.host.blocks[position].path, output)
                return output

            engine.runner.on_block = on_block
            self._undo.append(lambda: vars(engine.runner).pop("on_block", None))
        if isinstance(driver, LevelDriver):
            found = driver._on_module

            def on_module(path: str, *args: Any) -> Any:
                output = found(path, *args)
                context = driver._context
                if path in driver.cut.sources and context is not None:
                    leaves = flatten(output)[0]  # the others stand in for what nobody reads
                    self._note(path, [leaves[place] for place in context.state.extra["seen"][path].predicted])
                return output

            driver._on_module = on_module  # type: ignore[method-assign]
            self._undo.append(lambda: vars(driver).pop("_on_module", None))
        return self

    def __exit__(self, *error: object) -> None:
        for undo in self._undo:
            undo()

    def _note(self, name: str, output: Any) -> None:
        self._now.append((name, [leaf.clone() for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]))

    def begin(self) -> None:
        """A call begins."""
        self._now = []

    def keep(self, number: int) -> None:
        """The call was a full one: what cached ones are compared with."""
        self._kept[number] = dict(self._now)

    def culprit(self, tolerance: float, number: int = 0) -> str | None:
        """The first site whose output is not that of the full step."""
        if self.driver is None:
            return "cfg branch"
        if isinstance(self.engine.composition.site, Denoiser):
            return "output"
        known = self._kept.get(number, {})
        for name, leaves in self._now:
            if name in known and _distance(known[name], leaves) > tolerance:
                return self._words(name)
        return None

    def _words(self, name: str) -> str:
        if isinstance(self.driver, SpanDriver):
            paths = [view.path for view in self.engine.host.blocks]
            for stretch in self.driver.stretches:
                if name == paths[stretch.last]:
                    return f"{stretch.name} ({paths[stretch.first]} .. {name})"
        return name


def _always_resting(engine: Any) -> list[str]:
    """Modules that run on no cached step. A signal is read in the first block, a verification runs the last."""
    if engine.driver is None or (engine.attachment.bypassed == [""] and engine.host.blocks):
        return []
    if isinstance(engine.gate.watch, Signal):
        return [path for path in engine.attachment.bypassed if path != engine.host.blocks[0].path]
    checked = isinstance(engine.gate.watch, Verification) and engine.host.blocks
    last = engine.host.blocks[-1].path + "." if checked else None
    return [path for path in engine.attachment.bypassed if last is None or not path.startswith(last)]


def _is_exact(composition: Composition) -> bool:
    """Whether what is reused is the feature itself and nothing is added to it."""
    is_whole = isinstance(composition.site, (Denoiser, Parts, UNetLevel))
    is_reuse = isinstance(composition.predictor, Reuse)
    return is_whole and is_reuse and composition.tokens is None and composition.cfg is None


@contextmanager
def _counted(denoiser: nn.Module, counts: dict[str, int]) -> Iterator[None]:
    """Count how often each module's own forward runs, under every wrapper."""
    found: list[tuple[nn.Module, Any]] = []
    for path, module in denoiser.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        forward = module.forward

        def counting(*args: Any, path: str = path, forward: Any = forward, **kwargs: Any) -> Any:
            counts[path] = counts.get(path, 0) + 1
            return forward(*args, **kwargs)

        counting.__wrapped__ = forward  # type: ignore[attr-defined]
        found.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = counting
    try:
        yield
    finally:
        for module, before in found:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _abort(stage: _Stage, handle: Handle) -> None:
    """Run until the denoiser computes for the third time, and raise there."""
    seen = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise _Interrupted

    hook = stage.denoiser.register_forward_pre_hook(fail)
    try:
        stage.sample(handle)
    except _Interrupted:
        pass
    finally:
        hook.remove()


class _Interrupted(Exception):
    pass


def _poison(engine: Any) -> int:
    """Fill everything cached with NaN."""
    tensors = [tensor for state in engine._states.values() for tensor in engine.tensors_of(state)]
    if engine.branches is not None:
        tensors += list(engine.branches.tensors())
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    for tensor in floats:
        tensor.fill_(float("nan"))
    return len(floats)


def _alive() -> dict[int, int]:
    """Bytes of every storage some tensor of this process lies in."""
    storages = {}
    for thing in gc.get_objects():
        # A subclass keeps its data in plain tensors; a fake tensor, as torch.compile leaves about, has none.
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type != "meta":
            try:
                storage = thing.untyped_storage()
                address = storage.data_ptr()
            except (RuntimeError, NotImplementedError):  # sparse, functional, ...
                continue
            if address:
                storages[address] = storage.nbytes()
    return storages


def _fingerprint(stage: _Stage) -> dict[str, Any]:
    """Everything a wrapper could have changed: callables on instances, and hooks."""
    owners: dict[str, Any] = {f"denoiser.{path}": module for path, module in stage.denoiser.named_modules()}
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


def _all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ or something is not finite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    value = float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.numel() else 0.0
    return value if value == value else float("inf")


def _distance(truth: Any, output: Any) -> float:
    a, b = _tensors(truth), _tensors(output)
    return (
        max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0) if len(a) == len(b) else float("inf")
    )


def _tolerance(truth: Any) -> float:
    """1e-5, or what rounding leaves in a narrower type."""
    epsilons = [torch.finfo(leaf.dtype).eps for leaf in _tensors(truth) if leaf.is_floating_point()]
    return max(1e-5, 8 * max(epsilons, default=0.0))


def _kind(value: Any) -> str:
    leaves = [f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}" for leaf in _tensors(value)]
    return f"{type(value).__name__}({', '.join(leaves)})"


def _settings(case: _Case) -> str:
    if not isinstance(case.chosen, Method):
        return "its settings"
    off = case.chosen.info.off
    return ", ".join(f"{name}={case.chosen.settings[name]}" for name in off)
