# SPDX-License-Identifier: Apache-2.0
"""The report's plots as inline SVG.

Positions are percentages of the plot and sizes are pixels, so a plot takes the width of any screen while its text and
markers keep theirs. Colours are CSS variables, ``--c0`` (the base) to ``--c5``, and follow the page's light or dark
mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6
_SHAPES = ('<circle r="5"/>', '<rect x="-4.5" y="-4.5" width="9" height="9"/>', '<path d="M0-6.2 6.2 0 0 6.2-6.2 0Z"/>',
           '<path d="M0-5.8 5.6 4.4H-5.6Z"/>', '<path d="M0 5.8 5.6-4.4H-5.6Z"/>',
           '<rect x="-6" y="-3" width="12" height="6"/>')


@dataclass(frozen=True)
class Scale:
    """``low`` to ``high`` as 0 to 100 %, linearly or by logarithm. ``ticks``: values that are labelled."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        at = [math.log(v) if self.log else v for v in (self.low, min(max(value, self.low), self.high), self.high)]
        return 100 * (at[1] - at[0]) / (at[2] - at[0])


def linear(values: Iterable[float], ticks: int = 5) -> Scale:
    """A scale over ``values`` that ends on round numbers, about ``ticks`` apart."""
    values = list(values)
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step = min((m * 10.0**e for e in range(-6, 12) for m in (1, 2, 5)), key=lambda s: abs(span / s - ticks))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Scale(first * step, last * step, tuple(i * step for i in range(first, last + 1)))


def logarithmic(values: Iterable[float]) -> Scale:
    """A scale over positive ``values`` with ticks at 1, 2 and 5 times powers of ten, or at the powers alone."""
    values = list(values)
    low, high = min(values) / 1.15, max(values) * 1.15
    marks = [m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(marks) > 5:
        marks = [mark for mark in marks if math.isclose(math.log10(mark), round(math.log10(mark)))]
    return Scale(low, high, tuple(marks), log=True)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def marker(index: int, x: float, y: str, hollow: bool = False, title: str = "") -> str:
    """The model's shape at x % and ``y`` (with its unit)."""
    look = ' class="hollow"' if hollow else ""
    colour, shape = f"--c:var(--c{index % COLOURS})", _SHAPES[index % len(_SHAPES)]
    return (f'<svg x="{x:.2f}%" y="{y}" class="mark"><g{look} style="{colour}"><title>{escape(title)}</title>{shape}'
            "</g></svg>")


def legend(labels: Sequence[str], skip: int = 0) -> str:
    """Names of the models beside their markers, without the first ``skip``."""
    items = (f'<span><svg class="key">{marker(i, 50, "50%")}</svg>{escape(label)}</span>'
             for i, label in enumerate(labels) if i >= skip)
    return f'<p class="legend">{"".join(items)}</p>'


def _line(x1: float, y1: str, x2: float, y2: str, kind: str, style: str = "") -> str:
    return f'<line x1="{x1:.2f}%" y1="{y1}" x2="{x2:.2f}%" y2="{y2}" class="{kind}"{style}/>'


def _colour(index: int) -> str:
    return f' style="stroke:var(--c{index % COLOURS})"'


@dataclass(frozen=True)
class Row:
    """A row of the recovery plot: per candidate the value with the ends of its interval, or None."""

    name: str
    note: str
    values: list[tuple[float, float, float] | None]
    strong: bool = False


def recovery_plot(rows: Sequence[Row], labels: Sequence[str], floor: float) -> str:
    """Recovery with its interval, a row per task and a line per candidate. ``labels`` are those after the base."""
    found = [end for row in rows for value in row.values if value for end in value]
    scale = linear([*(min(max(end, 0), 180) for end in found), 100, floor], ticks=6)
    parts = []
    for row in rows:
        height = 18 * len(row.values) + 10
        lines = "".join(_interval(value, i, scale, label) for i, (value, label) in
                        enumerate(zip(row.values, labels, strict=True), 1))
        numbers = "".join(f'<b style="color:var(--c{i % COLOURS})">{f"{v[0]:.1f}" if v else "–"}</b>'
                          for i, v in enumerate(row.values, 1))
        parts.append(
            f'<div class="row{" strong" if row.strong else ""}"><div class="name">{escape(row.name)}<small>'
            f'{escape(row.note)}</small></div><div class="track"><svg style="height:{height}px">{_grid(scale, floor)}'
            f'{lines}</svg></div><div class="numbers">{numbers}</div></div>')
    axis = "".join(f'<text x="{scale(t):.2f}%" y="14" text-anchor="middle">{number(t)}</text>' for t in scale.ticks)
    parts.append(f'<div class="row axis"><div class="name"></div><div class="track"><svg style="height:20px">{axis}'
                 '</svg></div><div class="numbers">%</div></div>')
    return f'<div class="forest">{"".join(parts)}</div>'


def _grid(scale: Scale, floor: float) -> str:
    lines = "".join(_line(scale(t), "0", scale(t), "100%", "grid") for t in scale.ticks)
    return (lines + _line(scale(floor), "0", scale(floor), "100%", "limit")
            + _line(scale(100), "0", scale(100), "100%", "base"))


def _interval(value: tuple[float, float, float] | None, index: int, scale: Scale, label: str) -> str:
    if value is None:
        return ""
    middle, low, high = value
    y = f"{18 * index - 4}"
    title = f"{label}: {middle:.1f} % ({low:.1f} to {high:.1f})"
    whisker = _line(scale(low), y, scale(high), y, "whisker", _colour(index))
    return whisker + marker(index, scale(middle), y, title=title)


@dataclass(frozen=True)
class Point:
    """One model in a plot. ``low``, ``high``: ends of y's interval."""

    index: int
    label: str
    x: float
    y: float
    low: float
    high: float


def pareto_plot(points: Sequence[Point], title: str, x_title: str, y_title: str) -> str:
    """Models by cost and recovery; a line joins those that no other one beats in both."""
    across = linear([*(p.x for p in points), 1])
    up = linear([*(max(p.low, 0) for p in points), *(min(p.high, 180) for p in points), 100])
    front = [p for p in points if not any(q.x >= p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y) for q in points)]
    front.sort(key=lambda p: p.x)
    lines = [_line(across(a.x), f"{100 - up(a.y):.2f}%", across(b.x), f"{100 - up(b.y):.2f}%", "front")
             for a, b in zip(front, front[1:], strict=False)]
    marks = []
    for p in points:
        x, y = across(p.x), f"{100 - up(p.y):.2f}%"
        marks.append(_line(x, f"{100 - up(p.low):.2f}%", x, f"{100 - up(p.high):.2f}%", "whisker", _colour(p.index)))
        marks.append(marker(p.index, x, y, title=f"{p.label}: {p.x:.2f}×, {p.y:.1f} %"))
    boxes: list[tuple[float, float, float, float]] = []
    for p in sorted(points, key=lambda p: -p.y):
        marks.append(_label(p, across(p.x), 100 - up(p.y), boxes))
    return _panel(title, across, up, [*lines, *marks], x_title, y_title, 260, lambda v: f"{v:g}×")


def _label(point: Point, x: float, y: float, boxes: list[tuple[float, float, float, float]]) -> str:
    """The model's name beside its marker, on the side where it covers the fewest names so far (``boxes``, in %)."""
    width, height = 3.2 * len(point.label) + 4, 6.0  # of a panel on a phone, the narrowest there is
    places = [(side, dy) for dy in (-8, 18, -24, 34) for side in ("start", "end")]

    def box(side: str, dy: int) -> tuple[float, float, float, float]:
        left = x if side == "start" else x - width
        return left, y + dy / 2.6 - height, left + width, y + dy / 2.6

    def clash(place: tuple[str, int]) -> float:
        left, top, right, bottom = box(*place)
        covered = sum(left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in boxes)
        return covered + (left < 0) + (right > 104)

    side, dy = min(places, key=clash)
    boxes.append(box(side, dy))
    return (f'<text x="{x:.2f}%" y="{y:.2f}%" dx="{-9 if side == "end" else 9}" dy="{dy}" text-anchor="{side}" '
            f'class="label" style="fill:var(--c{point.index % COLOURS})">{escape(point.label)}</text>')


def curve_plot(curves: Sequence[tuple[int, str, list[tuple[float, float, bool]]]], limit: float, title: str,
               y_title: str) -> str:
    """A latency over the query rate, both logarithmic. curves: model's index, its label, and (rate, value, met the
    limits) by rate; a rate that missed a limit is drawn hollow."""
    values = [point for _, _, points in curves for point in points]
    across, up = logarithmic(x for x, _, _ in values), logarithmic([limit, *(y for _, y, _ in values)])
    parts = [_line(0, f"{100 - up(limit):.2f}%", 100, f"{100 - up(limit):.2f}%", "limit")]
    for index, label, points in curves:
        places = [(across(x), f"{100 - up(y):.2f}%") for x, y, _ in points]
        parts += [_line(*a, *b, "curve", _colour(index)) for a, b in zip(places, places[1:], strict=False)]
        parts += [marker(index, *place, hollow=not met, title=f"{label}: {number(x)} queries/s, {number(y)} ms")
                  for place, (x, y, met) in zip(places, points, strict=True)]
    return _panel(title, across, up, parts, "queries/s", y_title, 170, number)


def _panel(title: str, across: Scale, up: Scale, parts: Sequence[str], x_title: str, y_title: str, height: int,
           x_text: Callable[[float], str]) -> str:
    grid = [_line(across(t), "0", across(t), "100%", "grid") for t in across.ticks]
    grid += [_line(0, f"{100 - up(t):.2f}%", 100, f"{100 - up(t):.2f}%", "grid") for t in up.ticks]
    text = [f'<text x="{across(t):.2f}%" y="{height + 18}" text-anchor="middle">{x_text(t)}</text>'
            for t in across.ticks]
    text += [f'<text x="-8" y="{100 - up(t):.2f}%" dy="4" text-anchor="end">{number(t)}</text>' for t in up.ticks]
    return (f'<figure class="panel"><figcaption>{escape(title)}<small>{escape(y_title)}</small></figcaption>'
            f'<div class="plot"><svg style="height:{height}px">{"".join([*grid, *text, *parts])}</svg></div>'
            f'<p class="x">{escape(x_title)}</p></figure>')
