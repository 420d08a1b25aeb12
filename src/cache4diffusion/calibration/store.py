"""Calibrations as files: what a method was told about a denoiser, where it comes from, and how good it is.

One safetensors file. Its tensors are ``DENOISER/fit/NAME`` (what the method takes) and ``DENOISER/sums/NAME`` (what the
fit was made from, so that shards can be merged); everything else is JSON in its metadata, checked field by field.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cache4diffusion.calibration.calibrator import Calibrator, Fit, Sums
from cache4diffusion.calibration.fingerprint import Fingerprint, fingerprint_of
from cache4diffusion.calibration.quality import Quality
from cache4diffusion.calibration.statistic import Statistic
from cache4diffusion.calibration.training import Training
from cache4diffusion.calibration.trial import Trial
from cache4diffusion.data import shipped_calibrations
from cache4diffusion.errors import CalibrationError, FileFormatError
from cache4diffusion.files import write_whole
from cache4diffusion.settings import check_names

FORMAT = 1
UNTRIED = "It was not tried in sampling: compare before use."
_KEY = "cache4diffusion.calibration"


@dataclass(frozen=True)
class Provenance:
    """Where a calibration comes from. Shards that differ in any of this but the samples do not go together.

    Args:
        pipeline: class of the pipeline, or of the denoiser.
        scheduler: class of its scheduler; None in a loop of one's own.
        steps: sampling steps.
        call: arguments of the pipeline's call (guidance, size ...), as text where they are no plain values.
        dtype: of the denoiser's weights.
        package: version of this library.
        samples: a digest of every prompt and seed.
    """

    pipeline: str
    scheduler: str | None
    steps: int
    call: dict[str, Any]
    dtype: str
    package: str
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """What was measured on one denoiser.

    Args:
        fingerprint: of the denoiser; None where the numbers were written by hand and claim nothing.
        levels: the scheduler's timestep of every step, the noise level; None where it was not known.
        fit: the numbers the method takes.
        quality: of the fit.
        sums: what the fit was made from; empty where the numbers were written by hand.
    """

    fingerprint: Fingerprint | None
    levels: tuple[float, ...] | None
    fit: Mapping[str, Tensor]
    quality: Quality
    sums: Sums = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A method's calibration: one entry per denoiser of the pipeline that it was made with.

    Args:
        method: slug of the method.
        options: settings of its statistic.
        provenance: where it comes from.
        entries: by the denoiser's name in the pipeline.
        trial: what came of sampling with it; None where it was not tried.
    """

    method: str
    options: dict[str, Any]
    provenance: Provenance
    entries: Mapping[str, Entry]
    trial: Trial | None = None

    @classmethod
    def by_hand(
        cls, method: str, steps: int, fit: Mapping[str, Tensor], levels: Sequence[float] | None = None, **options: Any
    ) -> Calibration:
        """A calibration from numbers of your own; it claims no denoiser, so none is refused.

        Args:
            method: slug of the method.
            steps: of the runs they are for.
            fit: the numbers, by name.
            levels: the scheduler's timestep of every step, if the numbers belong to noise levels.
            **options: settings of the method's statistic.

        Raises:
            CalibrationError: a number is missing or has the wrong shape.
        """
        statistic = statistic_of(method, options)
        numbers = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in fit.items()}
        problem = misshapen(statistic, numbers, steps)
        if problem:
            raise CalibrationError(f"Calibration.by_hand({method!r}): {problem}")
        origin = Provenance("none", None, steps, {}, "none", "by hand", ())
        quality = Quality(None, 0.0, 0, "written by hand: nothing was measured.")
        entry = Entry(None, tuple(levels) if levels is not None else None, numbers, quality)
        return cls(method, dict(options), origin, {"denoiser": entry})

    def __repr__(self) -> str:
        return f"<calibration of {self.method}, {len(self.provenance.samples)} samples, {self.provenance.steps} steps>"

    @property
    def statistic(self) -> Calibrator:
        """What measured or trained it."""
        return statistic_of(self.method, self.options)

    @property
    def entry(self) -> Entry:
        """The entry, where there is only one.

        Raises:
            CalibrationError: there are several.
        """
        if len(self.entries) != 1:
            raise CalibrationError(
                f"This calibration has entries for {', '.join(self.entries)}: take one with only(name)."
            )
        return next(iter(self.entries.values()))

    def only(self, name: str) -> Calibration:
        """This calibration for one denoiser; a single entry serves whatever the denoiser is called.

        Raises:
            CalibrationError: there are several entries, and none of that name.
        """
        if len(self.entries) == 1:
            return self
        if name not in self.entries:
            raise CalibrationError(
                f"This calibration of {self.method} has no entry for the denoiser {name!r}; it has "
                f"{', '.join(self.entries)}."
            )
        return replace(self, entries={name: self.entries[name]})

    def check(self, denoiser: nn.Module, name: str, *, strict: bool = False) -> None:
        """Refuse a denoiser that is built otherwise than the one it was made with.

        Other weights are only warned of, unless ``strict``: a fine-tuned denoiser often behaves like its parent.

        Raises:
            CalibrationError: names the fields that differ.
        """
        made_with = self.only(name).entry.fingerprint
        if made_with is None:
            return
        here = fingerprint_of(denoiser)
        differences = made_with.differences(here)
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise CalibrationError(
                f"This calibration of {self.method} was made with another denoiser than {name}: "
                f"{'; '.join(differences[:3])}{more}. Make one for it: {command(self.method)}"
            )
        if None not in (made_with.weights, here.weights) and made_with.weights != here.weights:
            text = f"The weights of {name} are not those that this calibration of {self.method} was made with."
            if strict:
                raise CalibrationError(f"{text} strict=True refuses that. Make one for them: {command(self.method)}")
            warnings.warn(f"{text} That may do for a fine-tuned denoiser; compare before use.", stacklevel=4)

    def verdict(self) -> str:
        """How good it is, in words: one line per denoiser of the fit, and one of the trial."""
        lines = []
        for name, entry in self.entries.items():
            r2 = "" if entry.quality.r2 is None else f" (R² {entry.quality.r2:.3f})"
            lines.append(f"{name}: {entry.quality.verdict}{r2}")
        lines.append(self.trial.verdict() if self.trial is not None else UNTRIED)
        return "\n".join(lines)

    @property
    def is_sound(self) -> bool:
        """Whether the numbers fit, and the method was worth them in the trial."""
        fits = all(entry.quality.is_good for entry in self.entries.values())
        return fits and self.trial is not None and self.trial.is_won

    def plots(self) -> dict[str, str]:
        """A picture of every fit that has one, as the text of an SVG file, by denoiser."""
        found = {}
        for name, entry in self.entries.items():
            figure = self.statistic.figure(entry.sums, Fit(entry.fit, entry.quality)) if entry.sums else None
            if figure is not None:
                found[name] = figure.svg(f"{self.method}, {name}: {entry.quality.verdict}")
        return found

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            FileFormatError: it cannot be written there.
        """
        tensors: dict[str, Tensor] = {}
        denoisers = {}
        for name, entry in self.entries.items():
            shapes: dict[str, dict[str, list[int]]] = {"fit": {}, "sums": {}}
            for kind, values in (("fit", entry.fit), ("sums", entry.sums)):
                for key, value in values.items():
                    dtype = torch.float32 if value.dtype == torch.float32 else torch.float64
                    tensors[f"{name}/{kind}/{key}"] = value.detach().to("cpu", dtype).contiguous().clone()
                    shapes[kind][key] = list(value.shape)
            denoisers[name] = {
                "fingerprint": entry.fingerprint.to_dict() if entry.fingerprint is not None else None,
                "levels": entry.levels,
                "quality": asdict(entry.quality),
                **shapes,
            }
        header = {
            "format": FORMAT,
            "method": self.method,
            "options": self.options,
            "provenance": asdict(self.provenance),
            "denoisers": denoisers,
            "trial": asdict(self.trial) if self.trial is not None else None,
        }
        text = json.dumps(header)
        return write_whole(path, lambda draft: draft.write_bytes(save(tensors, metadata={_KEY: text})))


def command(method: str) -> str:
    """The command that makes a calibration."""
    return f"c4d calibrate MODEL --method {method} --prompts FILE --out {method}.safetensors"


def statistic_of(method: str, options: Mapping[str, Any]) -> Calibrator:
    """What a method measures or trains.

    Raises:
        UnknownNameError: no such method.
        CalibrationError: it measures nothing.
        SettingError: an option is unknown or out of range.
    """
    from cache4diffusion.method import METHODS, method_class

    kind = method_class(method).calibrator
    if kind is None:
        known = ", ".join(sorted(name for name, cls in METHODS.items() if cls.calibrator is not None))
        raise CalibrationError(f"{method} needs no calibration: it measures nothing. Methods that do: {known}.")
    check_names(f"The calibration of {method}", options, [entry.name for entry in fields(kind)])
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})


# --- reading ----------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Fingerprint(_Strict):
    denoiser: str
    config: dict[str, Any]
    shapes: dict[str, int]
    weights: str | None


class _Quality(_Strict):
    r2: float | None
    residual: float
    count: int
    verdict: str


class _Denoiser(_Strict):
    fingerprint: _Fingerprint | None
    levels: list[float] | None
    quality: _Quality
    fit: dict[str, list[int]]
    sums: dict[str, list[int]]


class _Provenance(_Strict):
    pipeline: str
    scheduler: str | None
    steps: int
    call: dict[str, Any]
    dtype: str
    package: str
    samples: list[str]


class _Trial(_Strict):
    method: str
    counterpart: str
    speedup: float
    counterpart_speedup: float
    errors: list[float]
    counterpart_errors: list[float]


class _Header(_Strict):
    format: int
    method: str
    options: dict[str, Any]
    provenance: _Provenance
    denoisers: dict[str, _Denoiser]
    trial: _Trial | None = None


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration.

    Raises:
        FileFormatError: the file is missing, truncated or none of ours; it was written in another format; or a field
            of it is missing, has the wrong shape or holds NaN or Inf: the field is named.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (OSError, SafetensorError) as error:
        if not path.exists():
            raise FileFormatError(f"There is no calibration {path}.") from error
        raise FileFormatError(f"{path} cannot be read: it is truncated or no safetensors file ({error}).") from error
    if _KEY not in metadata:
        raise FileFormatError(f"{path} is no calibration: its metadata has no field {_KEY!r}.")
    try:
        content = json.loads(metadata[_KEY])
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path}: the field {_KEY!r} is no JSON ({error}).") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise FileFormatError(f"{path}: format is {version!r}, and this version reads {FORMAT}. Calibrate anew.")
    try:
        header = _Header.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise FileFormatError(f"The calibration {path} cannot be used ({problems}).") from error
    return _calibration(path, header, tensors)


def _calibration(path: Path, header: _Header, tensors: dict[str, Tensor]) -> Calibration:
    steps = header.provenance.steps
    if steps < 1 or not header.denoisers:
        raise FileFormatError(f"{path}: provenance.steps is {steps} and denoisers {list(header.denoisers)}.")
    try:
        statistic = statistic_of(header.method, header.options)
    except ValueError as error:
        raise FileFormatError(f"{path}: method or options: {error}") from error
    entries, named = {}, set()
    for name, facts in header.denoisers.items():
        values: dict[str, dict[str, Tensor]] = {"fit": {}, "sums": {}}
        for kind, shapes in (("fit", facts.fit), ("sums", facts.sums)):
            for key, shape in shapes.items():
                full = f"{name}/{kind}/{key}"
                named.add(full)
                values[kind][key] = _tensor(path, full, shape, tensors)
        levels = facts.levels
        if levels is not None and (len(levels) != steps or sorted(levels, reverse=True) != levels):
            raise FileFormatError(f"{path}: {name}.levels must be {steps} numbers that never rise, one per step.")
        problem = misshapen(statistic, values["fit"], steps)
        if problem:
            raise FileFormatError(f"{path}: {name}/fit/{problem}")
        entries[name] = Entry(
            Fingerprint(**facts.fingerprint.model_dump()) if facts.fingerprint is not None else None,
            tuple(levels) if levels is not None else None,
            values["fit"],
            Quality(**facts.quality.model_dump()),
            values["sums"],
        )
    unknown = sorted(tensors.keys() - named)
    if unknown:
        raise FileFormatError(f"{path} has a tensor that its metadata does not name: {unknown[0]}.")
    origin = header.provenance.model_dump()
    provenance = Provenance(**{**origin, "samples": tuple(origin["samples"])})
    return Calibration(header.method, header.options, provenance, entries, _trial(path, header.trial))


def _trial(path: Path, facts: _Trial | None) -> Trial | None:
    if facts is None:
        return None
    if not facts.errors or len(facts.errors) != len(facts.counterpart_errors):
        counts = f"{len(facts.errors)} errors and {len(facts.counterpart_errors)} counterpart_errors"
        raise FileFormatError(f"{path}: trial has {counts}; it needs as many of both, one per prompt.")
    given = facts.model_dump()
    return Trial(**{**given, **{name: tuple(given[name]) for name in ("errors", "counterpart_errors")}})


def _tensor(path: Path, name: str, shape: list[int], tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise FileFormatError(f"{path}: the tensor {name} is missing.")
    value = tensors[name]
    if list(value.shape) != shape:
        raise FileFormatError(f"{path}: {name} has the shape {list(value.shape)}, its metadata says {shape}.")
    if not bool(value.isfinite().all()):
        raise FileFormatError(f"{path}: {name} holds NaN or Inf.")
    return value


def misshapen(statistic: Calibrator, fit: Mapping[str, Tensor], steps: int) -> str | None:
    """What is wrong with the tensors of a fit, in words; None if nothing is."""
    wanted = statistic.shapes(steps)
    missing = [name for name in wanted if name not in fit and ("*" not in name or not fit)]
    if missing:
        return f"{missing[0]} is missing."
    for name, value in fit.items():
        shape = next((shape for pattern, shape in wanted.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if shape is None:
            return f"{name} is none of {', '.join(wanted)}."
        is_right = len(shape) == value.ndim and all(a in (None, b) for a, b in zip(shape, value.shape, strict=True))
        if not is_right:
            words = ", ".join("any" if size is None else str(size) for size in shape)
            return f"{name} has the shape {list(value.shape)}, and {steps} steps need [{words}]."
    return None


@lru_cache(maxsize=16)
def _cached(path: Path, stamp: tuple[int, int]) -> Calibration:
    return load_calibration(path)


def opened(given: str | Path | Calibration, method: str) -> Calibration:
    """The calibration a setting of a method names: a file, or the reference model it ships with this library for.

    A file is read once as long as it does not change.

    Raises:
        FileFormatError: as `load_calibration`.
    """
    if isinstance(given, Calibration):
        return given
    shipped = shipped_calibrations(method)
    path = shipped.get(str(given), Path(given))
    if not path.is_file():
        known = f" Shipped ones of {method} are for {', '.join(shipped)}." if shipped else ""
        raise FileFormatError(f"There is no calibration {path}.{known}")
    facts = path.stat()
    return _cached(path.resolve(), (facts.st_mtime_ns, facts.st_size))


# --- merging ----------------------------------------------------------------------------------------------------------


def merge_calibrations(shards: Sequence[Calibration], target: Any = None) -> Calibration:
    """One calibration from several that were made alike with other prompts; equals one pass over all of them.

    Args:
        shards: the calibrations.
        target: the pipeline or denoiser they were made with; needed where the fit is made from its weights too.

    Raises:
        CalibrationError: they were made otherwise (the field is named), share a prompt and seed, or were trained; or
            the fit needs the denoiser, and it is not given or is another one.
    """
    from cache4diffusion.accelerate import denoisers_of
    from cache4diffusion.calibration.observer import fitted

    if not shards:
        raise CalibrationError("There is nothing to merge: give two calibrations or more.")
    first = shards[0]
    for shard in shards[1:]:
        for label, mine, theirs in _fields(first, shard):
            if mine != theirs:
                raise CalibrationError(f"These calibrations do not go together: {label} is {mine!r} and {theirs!r}.")
    samples = [sample for shard in shards for sample in shard.provenance.samples]
    twice = len(samples) - len(set(samples))
    if twice:
        raise CalibrationError(
            f"{twice} samples (prompt and seed) are in several of these calibrations; count each once."
        )
    statistic, entries = first.statistic, {}
    if not isinstance(statistic, Statistic):
        word, advice = ("trained", "Train") if isinstance(statistic, Training) else ("searched for", "Search")
        raise CalibrationError(
            f"What {first.method} takes was {word}, and two such do not add up to one over all prompts. {advice} once, "
            f"with all of them: {command(first.method)}"
        )
    denoisers = {} if target is None else denoisers_of(target)
    for name, entry in first.entries.items():
        parts = [shard.entries[name].sums for shard in shards]
        if not all(parts):
            raise CalibrationError(f"A calibration of {name} holds no sums, so it cannot be merged.")
        sums = statistic.merge(parts)
        if name in denoisers:
            first.check(denoisers[name], name)
        fit = fitted(statistic, sums, denoisers.get(name))
        entries[name] = replace(entry, fit=fit.tensors, quality=fit.quality, sums=sums)
    provenance = replace(first.provenance, samples=tuple(samples))
    return replace(first, provenance=provenance, entries=entries, trial=None)  # the shards' trials were of other fits


def _fields(a: Calibration, b: Calibration) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = [("method", a.method, b.method), ("options", a.options, b.options)]
    origin = ("pipeline", "scheduler", "steps", "call", "dtype", "package")
    found += [(name, getattr(a.provenance, name), getattr(b.provenance, name)) for name in origin]
    found.append(("denoisers", sorted(a.entries), sorted(b.entries)))
    for name in a.entries.keys() & b.entries.keys():
        mine, theirs = a.entries[name], b.entries[name]
        found += [(f"{name}.levels", mine.levels, theirs.levels)]
        found += [(f"{name}.fingerprint", mine.fingerprint, theirs.fingerprint)]
    return found
