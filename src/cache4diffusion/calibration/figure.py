"""Points and lines on two axes, as an SVG that needs no library and opens in any browser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
COLOURS = ("#1f5fa8", "#c0504d", "#4f8f3a", "#8064a2", "#d08a1d", "#2f8f9d")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 70, 20, 40, 50


@dataclass(frozen=True)
class Figure:
    """What is drawn.

    Args:
        x, y: titles of the axes.
        points: clouds of points, by name.
        lines: lines through points, by name.
    """

    x: str
    y: str
    points: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)

    def svg(self, title: str = "") -> str:
        """The figure as the text of an SVG file."""
        everything = [p for group in (*self.points.values(), *self.lines.values()) for p in group if _is_finite(p)]
        xs, ys = _ticks([p[0] for p in everything]), _ticks([p[1] for p in everything])

        def place(point: Point) -> tuple[float, float]:
            return (
                LEFT + (point[0] - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (point[1] - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM),
            )

        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            ' font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        ]
        for value in xs:
            px = place((value, ys[0]))[0]
            out.append(f'<path d="M{px:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>')
            out.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
        for value in ys:
            py = place((xs[0], value))[1]
            out.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
            out.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>')
        middle = (TOP + HEIGHT - BOTTOM) / 2
        out.append(
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(self.x)}</text>'
        )
        out.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y)}</text>')
        names = [*self.points, *self.lines]
        for name, group in self.points.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            for px, py in (place(point) for point in group if _is_finite(point)):
                out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2" fill="{colour}" fill-opacity="0.4"/>')
        for name, group in self.lines.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(point) for point in group if _is_finite(point)))
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for i, name in enumerate(names):
            colour = COLOURS[i % len(COLOURS)]
            out.append(f'<text x="{WIDTH - RIGHT}" y="{TOP + 14 + 15 * i}" text-anchor="end" fill="{colour}">')
            out[-1] += f"{escape(name)}</text>"
        return "\n".join([*out, "</svg>", ""])


def _is_finite(point: Point) -> bool:
    return all(math.isfinite(value) for value in point)


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that enclose the values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]
