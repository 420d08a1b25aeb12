"""The results of a benchmark: what was measured, for which method, under which conditions.

The JSON form is ``{"conditions": {...}, "rows": [...]}``; row 0 is the uncached baseline, then come the rows
``"fewer-steps-N"`` (the uncached pipeline at fewer steps, the honest reference at equal cost), then the methods.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..files import write_whole
from .errors import MeasureError

SCHEMA_VERSION = 1
FEWER_STEPS = re.compile(r"fewer-steps-(\d+)")

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Fidelity = Literal["code", "paper", "reconstructed", "ours", "baseline", "peer"]


def _read_psnr(value: Any) -> Any:
    return math.inf if value is None else value


def _write_psnr(value: float) -> float | None:
    return None if math.isinf(value) else value


Psnr = Annotated[
    float,
    Field(gt=-math.inf),  # refuses NaN too
    BeforeValidator(_read_psnr),
    PlainSerializer(_write_psnr, when_used="json"),
]
"""Decibels. Infinite for identical images; JSON has no infinity, so there it is written as ``null``."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


class Conditions(_Strict):
    """Everything a number depends on besides the method.

    ``seeds`` has one seed per caption; ``captions`` is their number. ``batch`` is what the latencies were measured at.
    ``peak_source`` says what ``peak_bytes`` is of, see `PeakMemory`. ``counted`` is the number of captions that FLOPs
    and the error per step are of. ``left_out`` says which methods were asked for and could not be run, and why.
    ``extra`` takes anything else worth stating.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    denoiser: str
    steps: PositiveInt
    resolution: Annotated[list[PositiveInt], Field(min_length=2, max_length=3)]  # height, width[, frames]
    batch: PositiveInt
    captions: PositiveInt
    seeds: list[int]
    dtype: str
    device: str
    threads: PositiveInt | None = None
    scheduler: str | None = None
    guidance: Finite | None = None
    flops_scope: str = "whole pipeline calls"
    counted: PositiveInt | None = None
    peak_source: str = ""
    level: Share = 0.95
    date: str | None = None
    versions: dict[str, str] = {}
    left_out: dict[str, str] = {}
    extra: dict[str, Any] = {}

    def caption(self) -> str:
        """One line that belongs under every number, for example ``"scenes-flux, 50 steps, 128 x 128, ..."``."""
        first, last = (self.seeds[0], self.seeds[-1]) if self.seeds else (None, None)
        seeds = f"seed {first}" if first == last else f"seeds {first}..{last}"
        parts = [
            self.denoiser,
            f"{self.steps} steps",
            " × ".join(str(size) for size in self.resolution),  # noqa: RUF001
            f"{self.captions} captions in batches of {self.batch}",
            seeds,
            self.dtype,
            self.device + (f" ({self.threads} thread{'s' * (self.threads != 1)})" if self.threads else ""),
            self.scheduler,
            f"guidance {self.guidance:g}" if self.guidance is not None else None,
            f"FLOPs of {self.flops_scope}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            self.date,
        ]
        return " · ".join(part for part in parts if part)


class Row(_Strict):
    """One method at one setting. Means are over captions; intervals are ``[lower, upper]`` at ``conditions.level``.

    Attributes:
        method: ``"uncached"``, ``"fewer-steps-N"``, or the method's name.
        label: tells rows of one method apart; the name itself unless given.
        settings: as the method was called.
        full_steps, total_steps: per run; a mean, hence maybe a fraction, where runs of a batch decide for themselves.
        flops_speedup, latency_speedup: baseline over this row, measured; 1 for the baseline, higher is better.
        psnr (dB), ssim, flip: against the uncached images of the same seeds; ``psnr`` is infinite (JSON: ``null``) if
            all are identical, else the mean over those that differ.
        accuracy: share of images that meet their caption's demands, 0..1; None without a judge. ``accuracy_interval``
            is Wilson's; ``accuracy_by_family`` has the share per task family.
        cache_bytes: held by the method's caches at their largest.
        peak_bytes: peak memory of the process or device during the runs, see `PeakMemory`.
        strip: one letter per step: ``F`` full, ``c`` cached, ``p`` partial.
        fidelity: ``code``, ``paper``, ``reconstructed``, ``ours`` (DESIGN §5); ``baseline`` for rows without a method,
            ``peer`` for another library's implementation.
        flops: per image. latency_ms: per image, at the batch of the conditions.
        pipeline_flops_speedup: as ``flops_speedup``, but of the whole pipeline where that is of the denoiser alone.
        predicted_flops_speedup: expected from the strip: what each kind of step costs by the denoiser's shapes, times
            how many of each there were.
        predicted_latency_speedup: expected from that and from the measured share ``s`` of the uncached run's time that
            lies in its sampling steps: ``1 / (1 - s + s / predicted_flops_speedup)``. What ``latency_speedup`` lacks of
            it is what caching itself costs. None without a fewer-steps row, which is what ``s`` is measured with.
        accuracy_difference: this row's accuracy minus the baseline's, on the same captions and seeds, -1..1; its
            interval is Tango's for paired outcomes. ``accuracy_vs_reference``: the same, minus the ``reference_row``'s.
        reference_row: the fewer-steps row that this method is compared with: the one of the fewest steps among those
            that cost at least as many FLOPs, so that a method never wins by a larger budget.
        psnr_wins: share of captions on which the method's PSNR is above that row's, 0..1; a tie is no win. Its interval
            is Wilson's.
        error_per_step: relative L2 distance of the latent from the uncached run's, after each step; mean over
            ``conditions.counted`` captions.
        psnr_per_caption, correct_per_caption: what the means are of, in the order of the captions.
        temporal_error: of videos: how differently they change from frame to frame than the uncached ones, 0..2, see
            `measure.video.temporal_error`; None for images.
        psnr_per_frame, ssim_per_frame, flip_per_frame: of videos: per frame, means over captions, of a PSNR over those
            that differ. ``psnr`` is then of all frames' mean squared error, ``ssim`` and ``flip`` are means over them.
        syncs: host synchronisations per run.
        notes: what was unusual, such as images with NaN; a report prints them.
    """

    method: Annotated[str, Field(min_length=1)]
    label: str = ""
    settings: dict[str, Any] = {}
    full_steps: NonNegativeInt | NonNegativeFloat
    total_steps: PositiveInt
    flops_speedup: PositiveFloat
    latency_speedup: PositiveFloat
    psnr: Psnr
    ssim: Annotated[float, Field(ge=-1, le=1)]
    flip: Share
    accuracy: Share | None = None
    cache_bytes: NonNegativeInt = 0
    peak_bytes: NonNegativeInt = 0
    strip: Annotated[str, Field(pattern=r"^[A-Za-z.]*$")] = ""
    fidelity: Fidelity

    flops: NonNegativeInt | None = None
    latency_ms: NonNegativeFloat | None = None
    pipeline_flops_speedup: PositiveFloat | None = None
    predicted_flops_speedup: PositiveFloat | None = None
    predicted_latency_speedup: PositiveFloat | None = None
    accuracy_interval: Interval | None = None
    accuracy_by_family: dict[str, Share] | None = None
    accuracy_difference: Finite | None = None
    accuracy_difference_interval: Interval | None = None
    reference_row: str | None = None
    accuracy_vs_reference: Finite | None = None
    accuracy_vs_reference_interval: Interval | None = None
    psnr_wins: Share | None = None
    psnr_wins_interval: Interval | None = None
    error_per_step: list[Finite] | None = None
    psnr_per_caption: list[Psnr] | None = None
    correct_per_caption: list[bool] | None = None
    temporal_error: NonNegativeFloat | None = None
    psnr_per_frame: list[Psnr] | None = None
    ssim_per_frame: list[Finite] | None = None
    flip_per_frame: list[Share] | None = None
    syncs: NonNegativeFloat | None = None
    notes: list[str] = []

    @model_validator(mode="after")
    def _consistent(self) -> Row:
        if self.full_steps > self.total_steps:
            raise ValueError(f"full_steps {self.full_steps} is more than total_steps {self.total_steps}")
        if self.strip and len(self.strip) != self.total_steps:
            raise ValueError(f"strip {self.strip!r} has {len(self.strip)} letters for {self.total_steps} steps")
        return self

    @property
    def name(self) -> str:
        """What this row is called in tables and plots: its label, else its method."""
        return self.label or self.method

    @property
    def kind(self) -> Literal["uncached", "fewer-steps", "method"]:
        """Which of the three kinds of row this is."""
        if self.method == "uncached":
            return "uncached"
        return "fewer-steps" if FEWER_STEPS.fullmatch(self.method) else "method"


class Results(_Strict):
    """Conditions and rows; the order of the rows is checked: uncached, fewer-steps-N, methods."""

    conditions: Conditions
    rows: Annotated[list[Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> Results:
        order = {"uncached": 0, "fewer-steps": 1, "method": 2}
        kinds = [order[row.kind] for row in self.rows]
        if kinds[0] != 0 or kinds.count(0) != 1:
            raise ValueError("the first row, and only it, is 'uncached'")
        if kinds != sorted(kinds):
            raise ValueError("rows come in this order: 'uncached', 'fewer-steps-N', methods")
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"several rows are called {', '.join(twice)}: give each its own label")
        return self

    def row(self, name: str) -> Row:
        """The row of this label or method.

        Raises:
            MeasureError: there is none; the message lists what there is.
        """
        for row in self.rows:
            if name in (row.name, row.method):
                return row
        raise MeasureError(f"No row {name!r}; there are: {', '.join(row.name for row in self.rows)}.")

    @property
    def baseline(self) -> Row:
        """The uncached row."""
        return self.rows[0]

    @property
    def methods(self) -> list[Row]:
        """The rows of methods, without baselines."""
        return [row for row in self.rows if row.kind == "method"]

    @property
    def left_out(self) -> dict[str, str]:
        """Names of what was asked for and could not be run, and why: names that share a reason in one string.

        A method's settings are named only where it ran at others.
        """
        ran, by_reason = {row.method for row in self.methods}, dict[str, dict[str, None]]()
        for title, reason in self.conditions.left_out.items():
            method = title.partition(" (")[0]
            by_reason.setdefault(reason, {})[title if method in ran else method] = None
        return {", ".join(names): reason for reason, names in by_reason.items()}

    @property
    def fewer_steps(self) -> list[Row]:
        """The rows ``fewer-steps-N``."""
        return [row for row in self.rows if row.kind == "fewer-steps"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict: no infinities, an infinite ``psnr`` is ``None``."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Valid JSON, one line per field, so that long per-caption lists do not fill the screen."""
        data = self.to_dict()
        rows = ",\n  ".join(_fields(row, "   ") for row in data["rows"])
        return f'{{\n "conditions": {_fields(data["conditions"], "  ")},\n "rows": [\n  {rows}\n ]\n}}\n'

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to ``path`` (folders are made). Written whole or not at all.

        Raises:
            FileFormatError: it cannot be written there.
        """
        return write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a file written by `save`.

        Raises:
            MeasureError: the file is missing, no JSON, or does not fit the schema; says where and why.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise MeasureError(f"Cannot read results from {path}: {reason}.") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise MeasureError(
                f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})."
            ) from error
        return cls.from_dict(data, source=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "results") -> Results:
        """Build from what `to_dict` gives; errors as in `load`."""
        if not isinstance(data, Mapping) or not {"conditions", "rows"} <= set(data):
            raise MeasureError(f'{source} is no results file: expected {{"conditions": {{...}}, "rows": [...]}}.')
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise MeasureError(f"{source} does not fit the results schema: {_explain(error)}") from error


def _fields(data: Mapping[str, Any], indent: str) -> str:
    lines = ",\n".join(
        f"{indent}{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in data.items()
    )
    return "{\n" + lines + "\n" + indent[:-1] + "}"


def _explain(error: ValidationError, most: int = 5) -> str:
    problems = []
    for problem in error.errors()[:most]:
        place = ".".join(str(part) for part in problem["loc"]) or "whole file"
        problems.append(f"{place}: {problem['msg']}")
    more = error.error_count() - most
    return "; ".join(problems) + (f"; and {more} more." if more > 0 else ".")
