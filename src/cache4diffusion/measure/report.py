"""One self-contained HTML report of a benchmark: opens offline, needs nothing beside itself."""

# ruff: noqa: RUF001 -- the multiplication sign and the dash are meant

from __future__ import annotations

import base64
import gzip
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from . import table
from .errors import MeasureError, require
from .metrics import quantile
from .results import FEWER_STEPS, Results, Row
from .video import animate, filmstrip, is_video, wall

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT_LIBRARIES = ("jinja2", "plotly.offline")
"""What `write_report` imports when it is called."""

IMAGE_BUDGET = 4_000_000  # bytes of PNG in all: with base64 and plotly.js (2 MB packed) the page stays below 8 MB
_SIZES = (512, 384, 256, 192, 128, 96, 64)  # longest side in pixels, the largest that fits the budget is taken

FIDELITY = {
    "code": "follows the official code",
    "paper": "follows the paper's formulas; there is no official code to compare with",
    "reconstructed": "no readable formula: our reading of the paper's idea, its results are not the paper's",
    "ours": "our own method",
    "baseline": "the pipeline itself, without a method",
    "peer": "another library's implementation, run in the same harness",
}


def write_report(
    results: Results,
    images: Mapping[str, Sequence[Image | Sequence[Image]]],
    captions: Sequence[str],
    path: str | Path,
    *,
    title: str | None = None,
) -> Path:
    """Write the report of ``results`` to ``path``, one HTML file of less than 8 MB.

    Args:
        results: what `bench` measured.
        images: for each row's name, images of ``captions`` in their order; rows may be missing, also all of them. The
            grid needs those of ``"uncached"``. They are embedded as PNG, shrunk as far as the size of the page asks. A
            clip (a list of images) is embedded as a filmstrip, and all clips move in an animated file of the same name
            that ends in ``.webp``.
        captions: what the images show.
        path: of the HTML file; folders are made.
        title: of the page; from the denoiser's name if None.
    Returns:
        ``path``.
    Raises:
        MeasureError: ``images`` of unknown rows, or not one per caption.
        MissingExtraError: jinja2 or plotly is not installed.
        FileFormatError: it cannot be written there.
    """
    names = [row.name for row in results.rows]
    for name, several in images.items():
        if name not in names:
            raise MeasureError(f"Images of {name!r}, but there is no such row; rows: {', '.join(names)}.")
        if len(several) != len(captions):
            raise MeasureError(f"{len(several)} images of {name!r} for {len(captions)} captions.")
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "speedup": table.speedup,
        "decibels": table.decibels,
        "points": table.points,
        "percent": table.percent,
        "size": table.size,
        "milliseconds": table.milliseconds,
        "small": table.small,
        "steps": table.steps,
        "settings": table.settings,
        "rival": _rival,
        "safe_json": _inside_script,
    }
    environment.globals |= {"whisker": _whisker(results), "shade": _shade(results)}
    clips = {name: images[name] for name in names if name in images and is_video(list(images[name]))}
    embedded = _embed({name: _stills(several) for name, several in images.items()}, names)
    animation = Path(path).with_suffix(".webp")
    if clips:
        animate(animation, wall(list(clips.values())))  # type: ignore[arg-type]
    library: str = require("plotly.offline").get_plotlyjs()
    page = environment.get_template("report.html.j2").render(
        title=title or f"Feature caching on {results.conditions.denoiser}",
        results=results,
        rows=results.rows,
        headline=headline(results),
        best=best_method(results),
        fidelity=FIDELITY,
        level=f"{100 * results.conditions.level:g}",
        margin=f"{100 * MARGIN:g}",
        families=_families(results),
        widest=max(row.total_steps for row in results.rows),
        has=_has(results),
        captions=list(captions),
        animation=animation.name if clips else None,
        animated=list(clips),
        data=_data(results, embedded, captions),
        plotly=base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode(),
        json=results.to_json(),
    )
    return write_whole(path, page)


MARGIN = 0.03
"""Loss of accuracy that a method must be shown to stay below, to be called as good as not caching."""

WINS = 0.9
"""Share of captions on which it must be closer to the uncached image than fewer steps that cost no less."""


def best_method(results: Results) -> Row | None:
    """The fastest method (by FLOPs) of which the numbers allow to say that it is as good as not caching.

    That is: the interval of its accuracy difference lies above ``-MARGIN`` (where accuracy was judged), and its PSNR is
    above that of fewer steps that cost no less for at least `WINS` of the captions, and for more than half of all
    captions there might be (by the interval of that share). None if there is no such method.
    """
    fine = [
        row
        for row in results.methods
        if row.flops_speedup > 1
        and (row.accuracy_difference_interval is not None or row.psnr_wins is not None)
        and not _may_lose(row)
        and not _wins_too_little(row)
    ]
    return max(fine, key=lambda row: row.flops_speedup, default=None)


def _may_lose(row: Row) -> bool:
    interval = row.accuracy_difference_interval
    return interval is not None and interval[0] <= -MARGIN


def _wins_too_little(row: Row) -> bool:
    if row.psnr_wins is None:
        return False
    return row.psnr_wins < WINS or (row.psnr_wins_interval is not None and row.psnr_wins_interval[0] <= 0.5)


def headline(results: Results) -> str:
    """The main finding in a sentence or two, and no more than the intervals allow."""
    best = best_method(results)
    if best is None:
        return _no_finding(results)
    text = f"{best.name} (fidelity: {best.fidelity}) samples with {best.flops_speedup:.1f}× fewer FLOPs"
    if best.latency_speedup > 1:
        text += f", {best.latency_speedup:.1f}× faster"
    else:
        text += f", though not faster here ({best.latency_speedup:.2f}×)"
    if best.accuracy_difference_interval is not None:
        low, high = best.accuracy_difference_interval
        text += (
            f", and its accuracy differs by {table.points(best.accuracy_difference)} points "
            f"({100 * results.conditions.level:g}\u00a0% interval {table.points(low)} to {table.points(high)})"
        )
    if best.psnr_wins is not None:
        text += (
            f"; closer to the uncached image than {_rival(best)} without caching, which cost no less, on "
            f"{_share(best.psnr_wins)} of the captions"
        )
    return text + "."


def _no_finding(results: Results) -> str:
    rows, captions = results.methods, results.conditions.captions
    if not rows:
        return "Only baselines were measured."
    margin = f"{100 * MARGIN:g} points"
    reasons = [
        (
            sum(map(_may_lose, rows)),
            f"may lose more than {margin} of accuracy, for all that {captions} caption{'s' * (captions != 1)} can tell",
        ),
        (
            sum(map(_wins_too_little, rows)),
            f"came closer to the uncached image than fewer steps that cost no less on too few captions (below "
            f"{_share(WINS)}, or too few to tell)",
        ),
        (sum(row.flops_speedup <= 1 for row in rows), "saved nothing"),
        (
            sum(row.accuracy_difference_interval is None and row.psnr_wins is None for row in rows),
            "had neither a judge nor fewer steps to be compared with",
        ),
    ]
    said = "; ".join(f"{count} {words}" for count, words in reasons if count)
    text = f"No method is shown here to keep the quality. Of {len(rows)}: {said}."
    z = quantile(results.conditions.level)
    needed = math.floor(z * z * (1 - MARGIN) / MARGIN) + 1
    if reasons[0][0] and captions < needed:
        text += f" Below {needed} captions no method can be shown to lose less than {margin}."
    return text


def _rival(row: Row) -> str:
    """``15 steps``: the fewer-steps row that a method is compared with."""
    found = FEWER_STEPS.fullmatch(row.reference_row or "")
    return f"{found[1]} steps" if found else "fewer steps"


def _share(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"


def _inside_script(text: str) -> Any:
    """JSON that cannot end the script element it stands in."""
    return require("markupsafe").Markup(text.replace("<", "\\u003c"))


def _shade(results: Results) -> Any:
    """A function from an accuracy to 0..1, the lowest and the highest of the page."""
    shares = [share for row in results.rows for share in (row.accuracy_by_family or {}).values()]
    low, high = min(shares, default=0.0), max(shares, default=1.0)
    return lambda share: 0 if share is None else round((share - low) / max(high - low, 0.05), 3)


def _whisker(results: Results, width: int = 110) -> Any:
    """A function that draws a row's accuracy interval as a small SVG; one scale for all rows, zero marked."""
    markup = require("markupsafe").Markup
    intervals = [row.accuracy_difference_interval for row in results.rows if row.accuracy_difference_interval]
    low = min([-MARGIN, *(interval[0] for interval in intervals)])
    high = max([0.01, *(interval[1] for interval in intervals)])

    def x(value: float) -> float:
        return round(width * (value - low) / (high - low), 1)

    def draw(row: Row) -> Any:
        interval = row.accuracy_difference_interval
        if interval is None or row.accuracy_difference is None:
            return ""
        colour = "var(--bad)" if interval[1] < 0 else "var(--good)" if interval[0] > -MARGIN else "var(--faint)"
        return markup(
            f'<svg class="interval" width="{width}" height="12" aria-hidden="true">'
            f'<line x1="{x(0)}" x2="{x(0)}" y1="0" y2="12" stroke="var(--line)" stroke-width="1.5"/>'
            f'<line x1="{x(interval[0])}" x2="{x(interval[1])}" y1="6" y2="6" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{x(row.accuracy_difference)}" cy="6" r="3.5" fill="{colour}"/></svg>'
        )

    return draw


def _has(results: Results) -> dict[str, bool]:
    fields = (
        "accuracy",
        "latency_ms",
        "predicted_flops_speedup",
        "predicted_latency_speedup",
        "pipeline_flops_speedup",
        "psnr_wins",
        "temporal_error",
        "error_per_step",
        "accuracy_by_family",
    )
    found = {name: any(getattr(row, name) is not None for row in results.rows) for name in fields}
    return found | {"identical": any(math.isinf(row.psnr) for row in results.rows if row.kind != "uncached")}


def _families(results: Results) -> list[str]:
    return list(dict.fromkeys(name for row in results.rows for name in row.accuracy_by_family or {}))


def _data(results: Results, embedded: dict[str, list[str]], captions: Sequence[str]) -> dict[str, Any]:
    """What the page's script draws from."""
    rows = [
        {
            "name": row.name,
            "kind": row.kind,
            "fidelity": row.fidelity,
            "flops": row.flops_speedup,
            "latency": row.latency_speedup,
            "psnr": None if math.isinf(row.psnr) else row.psnr,
            "ssim": row.ssim,
            "accuracy": row.accuracy,
            "interval": row.accuracy_interval,
            "settings": table.settings(row),
            "steps": table.steps(row),
            "error": row.error_per_step,
        }
        for row in results.rows
    ]
    best = best_method(results)
    return {"rows": rows, "images": embedded, "captions": list(captions), "best": best.name if best else None}


def _embed(images: Mapping[str, Sequence[Image]], order: list[str]) -> dict[str, list[str]]:
    """Data URIs in the order of the rows, at the largest of a few sizes that fits the budget."""
    encoded: dict[str, list[bytes]] = {}
    longest = max((max(image.size) for several in images.values() for image in several), default=0)
    sizes = [size for size in _SIZES if size < longest]
    for size in [longest, *sizes]:
        if size > _SIZES[0]:
            continue
        encoded = {name: [_png(image, size) for image in images[name]] for name in order if name in images}
        if sum(len(png) for several in encoded.values() for png in several) <= IMAGE_BUDGET:
            break
    else:
        raise MeasureError(
            f"{sum(map(len, images.values()))} images are too many for one page; give fewer captions or rows."
        )
    return {
        name: ["data:image/png;base64," + base64.b64encode(png).decode() for png in several]
        for name, several in encoded.items()
    }


def _stills(several: Sequence[Image | Sequence[Image]]) -> list[Image]:
    return [filmstrip(each) if isinstance(each, Sequence) else each for each in several]


def _png(image: Image, longest: int) -> bytes:
    image = image.convert("RGB")
    if max(image.size) > longest:
        scale = longest / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
