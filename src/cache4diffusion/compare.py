"""Methods side by side on a pipeline: `compare`, and the adapter that lets `measure.bench` run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache4diffusion.accelerate import Choice, choose, compose, denoisers_of, start
from cache4diffusion.anatomy import Anatomy
from cache4diffusion.calls import Call, check_call, default_steps, first_step, quiet, sampler
from cache4diffusion.composition import Composition
from cache4diffusion.cost import Summary, summarise
from cache4diffusion.errors import SettingError
from cache4diffusion.few_steps import unconcerned
from cache4diffusion.files import check_writable
from cache4diffusion.handle import Handle
from cache4diffusion.ladder import ladder
from cache4diffusion.method import Method
from cache4diffusion.options import Options
from cache4diffusion.settings import plain, read_call

if TYPE_CHECKING:
    from PIL.Image import Image

    from cache4diffusion.measure import Bench


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of ``"taylorseer(interval=5, order=1)"`` or ``"taylorseer"``, as `read_call`.

    Raises:
        SettingError: it cannot be read.
    """
    return read_call(text, "method")


def split_methods(text: str) -> list[str]:
    """The entries of ``"a,b(x=1,y=2),c"``: commas inside brackets separate settings, not methods."""
    entries, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        elif letter == "," and depth == 0:
            entries.append(text[start:position].strip())
            start = position + 1
    entries.append(text[start:].strip())
    return [entry for entry in entries if entry]


@dataclass
class MethodVariant:
    """A method for `measure.bench`: attached around every run, and described by what its handle saw.

    Args:
        pipe: what it accelerates.
        chosen: the method or composition.
        axes: parts of its composition that are replaced.
        label: tells two of one name apart; found from the settings if empty.
        calls: of the denoisers, by name: attached before the clock starts, as for a user who samples more than once.
    """

    pipe: Any
    chosen: Method | Composition
    axes: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    calls: dict[str, Call] = field(default_factory=dict)
    anatomies: dict[str, Anatomy | None] = field(default_factory=dict)  # of the denoisers, once seen
    options: Options = field(default_factory=Options)
    is_weighed: bool = False  # whether it was held against the memory budget, and became what fits
    notes: list[str] = field(default_factory=list)  # of that

    @property
    def name(self) -> str:
        """The method's slug: of what ran last, if a memory budget asked for another."""
        return self._choice.name

    @property
    def settings(self) -> dict[str, Any]:
        """All settings and the options that are not at their default, JSON-ready; likewise of what ran last."""
        return plain(self._choice.settings)

    @property
    def _choice(self) -> Choice:
        return Choice(self.chosen, self.axes, self.options)

    @property
    def fidelity(self) -> str:
        """How close to its source."""
        return self.chosen.info.fidelity if isinstance(self.chosen, Method) and not self.axes else "ours"

    @contextmanager
    def attach(self) -> Iterator[Seen]:
        """Accelerate for the time of one run."""
        with unconcerned():  # it becomes a note of the row
            choice = Choice(self.chosen, self.axes, self.options.unlimited if self.is_weighed else self.options)
            with start(self.pipe, choice) as handle:
                for engine in handle._engines:
                    if engine.name in self.calls:
                        engine.prepare(*self.calls[engine.name], anatomy=self.anatomies.get(engine.name))
                        self.anatomies[engine.name] = engine.host.anatomy
                yield Seen(handle, self.notes)
                budget = handle._budget
                if budget is not None and handle.trace.records:  # a whole run was seen, so it need not be weighed again
                    settled, self.is_weighed, self.notes = budget.choice, True, list(budget.notes)
                    self.chosen, self.axes, self.options = settled.chosen, settled.axes, settled.options


class Seen:
    """What a handle saw of the last run, under the names `measure.bench` reads. Counted when it is asked for."""

    def __init__(self, handle: Handle, notes: Sequence[str] = ()) -> None:
        self._handle, self._notes = handle, list(notes)

    @cached_property
    def _summary(self) -> Summary:
        return summarise(self._handle)

    @property
    def full_steps(self) -> float:
        """Full steps; a mean where branches or rows differ."""
        return self._summary.full_steps

    @property
    def total_steps(self) -> int:
        """Steps."""
        return self._summary.total_steps

    @property
    def strip(self) -> str:
        """One letter per step."""
        return self._summary.strip

    @property
    def cache_bytes(self) -> int:
        """At their largest."""
        return self._handle.memory["peak"]

    @property
    def predicted_flops_speedup(self) -> float | None:
        """From the strip."""
        return self._summary.predicted

    @property
    def syncs(self) -> int:
        """Scalars that decisions waited for."""
        return self._handle.trace.syncs

    @property
    def _counts(self) -> list[str]:
        return [f"{count} x {text}" for text, count in self._handle.trace.counts.items()]

    @property
    def notes(self) -> list[str]:
        """What was unusual."""
        return list(dict.fromkeys([*self._notes, *self._handle.trace.notes, *self._counts, *self._summary.problems]))


def check_methods(methods: Sequence[Any]) -> None:
    """Refuse what can be refused without a pipeline: names, settings and axes that do not exist or do not fit.

    Raises:
        UnknownNameError, SettingError, CompositionError, FileFormatError: as `accelerate`.
    """
    for entry in methods:
        if hasattr(entry, "attach"):
            continue
        name, settings = parse_method(entry) if isinstance(entry, str) else (entry, {})
        choice = choose(None, {}, name, settings)
        compose(choice.chosen, choice.axes)


def variants_of(pipe: Any, methods: Sequence[Any]) -> list[Any]:
    """Make a variant of each entry: a name, ``"name(setting=value)"``, a method, a composition, or a variant already.

    Raises:
        UnknownNameError, SettingError, CompositionError: as `accelerate`; before anything runs.
    """
    found = denoisers_of(pipe)
    variants: list[Any] = []
    for entry in methods:
        if hasattr(entry, "attach"):
            variants.append(entry)
            continue
        name, settings = parse_method(entry) if isinstance(entry, str) else (entry, {})
        choice = choose(pipe, found, name, settings)
        compose(choice.chosen, choice.axes)
        variants.append(MethodVariant(pipe, choice.chosen, choice.axes, options=choice.options))
    return variants


def compare(
    pipe: Any,
    prompts: Sequence[Any],
    methods: Sequence[Any] | Literal["all"],
    *,
    calibrations: str | Path | None = None,
    seeds: int | Sequence[int] = 0,
    steps: int | None = None,
    batch: int = 4,
    judge: Callable[[str, Image], bool] | None = None,
    family: Callable[[str], str] | None = None,
    report: str | Path | None = None,
    results: str | Path | None = None,
    name: str | None = None,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Bench:
    """Measure methods on your pipeline: quality against the uncached images of the same seeds, and what each costs.

        bench = c4d.compare(pipe, prompts, ["taylorseer(interval=5)", c4d.methods.DBCache(threshold=0.12)],
                            report="report.html", call={"guidance_scale": 3.5})
        print(bench.results.row("dbcache").psnr)

    Args:
        pipe: a diffusers pipeline that makes images. Nothing is left attached to it.
        prompts: one image each (class labels for class-to-image pipelines).
        methods: names, names with settings, profile files, methods, compositions, or what has an ``attach()``
            (`measure.Variant`). ``"all"``: every method at the settings of its ladder; those that cannot run here are
            named in ``results.conditions.left_out``, with the reason.
        calibrations: for ``"all"``: a folder with a ``METHOD.safetensors`` for each method that takes one, or the
            reference model whose shipped ones are used.
        seeds: one per prompt, or the first of consecutive ones.
        steps: sampling steps, 1 or more; None: the pipeline's default.
        batch: prompts per call of the pipeline, 1 or more.
        judge: whether an image meets its prompt; adds accuracies.
        family: of a prompt; adds accuracies per family.
        report: write the HTML report there.
        results: write the JSON results there.
        name: of the pipeline in tables; None: its class.
        call: further arguments of the pipeline's call, such as ``height``.
        progress: a progress bar on stderr.
        **options: of `measure.bench`: ``fewer_steps``, ``flops_captions``, ``warmup``, ``show``, ``level``,
            ``conditions`` and ``keep_going`` (True for ``"all"``).

    Returns:
        `measure.Bench`: ``results``, and images for the report.

    Raises:
        UnknownNameError, SettingError, CompositionError, AnatomyError: a method is not known or cannot serve this
            pipeline; found before anything is measured.
        FileFormatError: ``report`` or ``results`` cannot be written; found before anything is measured.
        MissingExtraError: the extra ``measure`` is not installed.
        MeasureError: a run failed.
    """
    from cache4diffusion.measure import MeasureError, bench, write_report
    from cache4diffusion.measure.errors import require
    from cache4diffusion.measure.report import REPORT_LIBRARIES

    left_out: dict[str, str] = {}
    is_all = isinstance(methods, str) and methods == "all"
    if is_all:
        methods, left_out = ladder(calibrations)
    elif calibrations is not None:
        raise SettingError("compare(calibrations=...) is for methods='all'; others take calibration= each.")
    for given, words in ((prompts, "prompts"), (methods, "methods")):
        if isinstance(given, str):
            raise SettingError(f"compare({words}={given!r}): give a list, even of one.")
    options.setdefault("keep_going", is_all)
    prompts, call = list(prompts), dict(call or {})
    seeds = list(range(seeds, seeds + len(prompts))) if isinstance(seeds, int) else list(seeds)
    if not prompts or not methods:
        raise SettingError(f"compare() needs prompts and methods: {len(prompts)} and {len(methods)} were given.")
    if len(seeds) != len(prompts):
        raise SettingError(f"compare() needs one seed per prompt: {len(seeds)} for {len(prompts)} were given.")
    if (steps is not None and steps < 1) or batch < 1:
        raise SettingError(f"compare(steps={steps}, batch={batch}): use 1 or more.")
    for path in (report, results):
        if path is not None:
            check_writable(path)
    for library in REPORT_LIBRARIES if report is not None else ():
        require(library)  # before minutes are spent
    check_call(pipe, call)
    steps = steps or default_steps(pipe)
    found = denoisers_of(pipe)
    variants = variants_of(pipe, methods)
    sample = sampler(pipe, call)
    with quiet(pipe):
        first = prompts[:batch], seeds[:batch], steps
        try:
            seen = {name: first_step(each, (), lambda: sample(*first)) for name, each in found.items()}
        except Exception as error:  # the host's own code may raise anything
            raise MeasureError(
                f"{type(pipe).__name__} fails without any method, on {prompts[0]!r}: {type(error).__name__}: {error}"
            ) from error
        calls = {name: calls[0] for name, calls in seen.items() if calls}
        for variant in variants:
            if isinstance(variant, MethodVariant):
                variant.calls = calls
                if not options["keep_going"]:  # there the first run shows what cannot serve this pipeline
                    with variant.attach():
                        pass
        measured = bench(
            variants,
            sample,
            prompts,
            seeds,
            steps=steps,
            batch=batch,
            judge=judge,
            family=family,
            denoiser=list(found.values()),
            conditions=_conditions(pipe, name, call, {"left_out": left_out, **options.pop("conditions", {})}),
            progress=progress,
            **options,
        )
    if results is not None:
        measured.results.save(results)
    if report is not None:
        write_report(measured.results, measured.images, [str(caption) for caption in measured.captions], report)
    return measured


def _conditions(pipe: Any, name: str | None, call: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    scheduler = getattr(pipe, "scheduler", None)
    guidance = next(
        (call[key] for key in ("true_cfg_scale", "guidance_scale") if isinstance(call.get(key), (int, float))), None
    )
    found = {
        "denoiser": name or type(pipe).__name__,
        "scheduler": type(scheduler).__name__ if scheduler is not None else None,
        "guidance": float(guidance) if guidance is not None else None,
        "extra": {"call": plain(call)},
    }
    return found | dict(given)


__all__ = ["MethodVariant", "check_methods", "compare", "parse_method", "split_methods", "variants_of"]
