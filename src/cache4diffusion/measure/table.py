"""Results as tables: for the console (rich) and as markdown."""

# ruff: noqa: RUF001 -- the multiplication sign, the dash and the minus sign are meant

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ..units import size_text, value_text
from .results import Results, Row

MINUS = "\u2212"  # a real minus sign, as wide as a digit


def speedup(value: float | None) -> str:
    """``3.42×``, or an en dash for None."""
    return "–" if value is None else f"{value:.2f}×"


def decibels(value: float | None) -> str:
    """``31.2``; ``∞`` for identical images."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else f"{value:.1f}"


def points(value: float | None, interval: list[float] | None = None) -> str:
    """A difference of shares in percentage points with its interval: ``−0.4 [−1.8, +0.9]``."""
    if value is None:
        return "–"
    text = _signed(100 * value)
    return text if interval is None else f"{text} [{_signed(100 * interval[0])}, {_signed(100 * interval[1])}]"


def percent(value: float | None) -> str:
    """``91.2 %``."""
    return "–" if value is None else f"{100 * value:.1f} %"


def small(value: float | None) -> str:
    """Four decimals: ``0.0031``; an en dash for None."""
    return "–" if value is None else f"{value:.4f}"


def size(value: int | None) -> str:
    """Bytes in binary units: ``12.5 MiB``; an en dash for None."""
    return "–" if value is None else size_text(value)


def milliseconds(value: float | None) -> str:
    """Three digits: ``12.3``, ``1,234``."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def steps(row: Row) -> str:
    """Full steps of all steps: ``13 / 50``."""
    full = row.full_steps
    return f"{full if isinstance(full, int) else round(full, 1):g} / {row.total_steps}"


def settings(row: Row) -> str:
    """``interval=5, full_steps=[0..8, 10, 17]``; what is unset (None, an empty list) is left out."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in row.settings.items() if value not in (None, [], ()))


def _signed(value: float) -> str:
    value = round(value, 1) + 0.0  # no "−0.0"
    return f"{'+' if value > 0 else MINUS if value < 0 else ''}{abs(value):.1f}"


@dataclass(frozen=True)
class _Column:
    """One column; on a narrow console those of the highest ``rank`` go first, rank 0 always stays."""

    header: str
    text: Callable[[Row], str]
    rank: int
    optional: bool = False  # left out where no row has it
    left: bool = False


_COLUMNS = [
    _Column("method", lambda row: row.name, 0, left=True),
    _Column("fidelity", lambda row: row.fidelity, 0, left=True),
    _Column("settings", settings, 12, optional=True, left=True),
    _Column("full / steps", steps, 8),
    _Column("FLOPs", lambda row: speedup(row.flops_speedup), 0),
    _Column("expected", lambda row: speedup(row.predicted_flops_speedup), 11, optional=True),
    _Column("latency", lambda row: speedup(row.latency_speedup), 0),
    _Column("expected", lambda row: speedup(row.predicted_latency_speedup), 4, optional=True),
    _Column("ms / image", lambda row: milliseconds(row.latency_ms), 10, optional=True),
    _Column("PSNR dB", lambda row: decibels(row.psnr), 0),
    _Column("SSIM", lambda row: f"{row.ssim:.3f}", 6),
    _Column("FLIP", lambda row: f"{row.flip:.3f}", 7),
    _Column("temporal", lambda row: small(row.temporal_error), 6, optional=True),
    _Column("accuracy", lambda row: percent(row.accuracy), 1, optional=True),
    _Column(
        "Δ points", lambda row: points(row.accuracy_difference, row.accuracy_difference_interval), 2, optional=True
    ),
    _Column("PSNR wins", lambda row: percent(row.psnr_wins), 3, optional=True),
    _Column("cache", lambda row: size(row.cache_bytes), 5),
    _Column("peak", lambda row: size(row.peak_bytes), 9),
]
"""An ``expected`` belongs to the speed-up on its left, which is measured."""


def _shown(results: Results) -> list[_Column]:
    return [
        column
        for column in _COLUMNS
        if not column.optional or any(column.text(row) not in ("–", "") for row in results.rows)
    ]


def console_table(results: Results, *, width: int | None = None, strips: bool = True) -> Table:
    """A rich table of ``results``; print it with ``rich.console.Console().print``.

    Args:
        width: characters there are, such as ``console.width``; the least important columns are left out until the table
            fits. None: all columns.
        strips: add each method's strip (``FFFccc...``) under its name, if it fits.
    """

    def taken(columns: list[_Column]) -> int:
        return 1 + sum(
            3 + max(len(column.header), *(len(column.text(row)) for row in results.rows)) for column in columns
        )

    shown = _shown(results)
    while width is not None and taken(shown) > width and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    longest = max(len(row.strip) for row in results.rows)
    names = max(len(row.name) for row in results.rows)
    strips = strips and (width is None or taken(shown) + max(0, longest - names) <= width)

    table = Table(title=results.conditions.denoiser, caption=results.conditions.caption(), header_style="bold")
    for column in shown:
        table.add_column(column.header, justify="left" if column.left else "right", no_wrap=True)
    kind = results.rows[0].kind
    for row in results.rows:
        if row.kind != kind:
            table.add_section()
            kind = row.kind
        cells: list[Text] = [Text(column.text(row)) for column in shown]
        if row.kind == "method":
            cells[0].stylize("bold")
            if strips and row.strip:
                cells[0] = Text.assemble(cells[0], "\n", _strip(row.strip))
        table.add_row(*cells, style="dim" if row.kind == "fewer-steps" else None)
    return table


def _strip(strip: str) -> Text:
    colours = {"F": "blue", "c": "dim", "p": "yellow"}
    return Text.assemble(*((letter, colours.get(letter, "magenta")) for letter in strip))


def left_out(results: Results) -> list[str]:
    """A line for every reason why methods that were asked for could not be run."""
    return [f"left out: {names}: {reason}" for names, reason in results.left_out.items()]


def markdown_table(results: Results) -> str:
    """A GitHub-flavoured markdown table of ``results`` with its conditions below; ends with a newline."""
    shown = _shown(results)
    lines = [
        "| " + " | ".join(column.header for column in shown) + " |",
        "|" + "|".join(" --- " if column.left else " ---: " for column in shown) + "|",
    ]
    lines += [
        "| " + " | ".join(column.text(row).replace("|", "\\|").replace("\n", " ") for column in shown) + " |"
        for row in results.rows
    ]
    lines += ["", results.conditions.caption()]
    without = left_out(results)
    lines += ["", *(f"- {line}" for line in without)] if without else []
    return "\n".join(lines) + "\n"
