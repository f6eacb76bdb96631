"""Plots as SVG, for a page that says by CSS what the colours are."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from litgpt.scale import Scale

WIDTH, HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 48
N_COLOURS = 8
_SHAPES = ("circle", "square", "diamond", "triangle")


class Point(NamedTuple):
    """A cache at a budget: its bytes, its quality with an interval, and which cache it is."""

    x: float
    y: float
    low: float
    high: float
    series: int
    label: str


def quality_over_bytes(points: Sequence[Point], quality: str, higher_is_better: bool) -> str:
    """A scatter plot with the Pareto front: the points than which none is both smaller and better. Qualities of which lower is
    better are on a logarithmic axis, with 0 at its end, and so are the bytes."""
    positive = [point.y for point in points if point.y > 0]
    log = not higher_is_better and bool(positive)
    x = Scale(min(p.x for p in points) * 0.85, max(p.x for p in points) * 1.18, _LEFT, WIDTH - _RIGHT, True)
    if higher_is_better:
        low, high = min(p.low for p in points), max(p.high for p in points)
        margin = (high - low or 1.0) * 0.06
        low, high = low - margin, high + margin
    else:
        low, high = (min(positive) / 2, max(positive) * 2) if log else (0.0, 1.0)
    y = Scale(low, high, HEIGHT - _BOTTOM, _TOP, log)
    parts = [*_axes(x, y, quality)]
    front = pareto_front(points, higher_is_better)
    parts.append(f'<polyline class="front" points="{_steps(front, x, y)}"/>')
    for series in sorted({point.series for point in points}):
        own = sorted(point for point in points if point.series == series)
        line = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in own)
        colour = f"c{series % N_COLOURS}"
        parts.append(f'<g class="series {colour}">')
        parts += [f'<polyline points="{line}"/>'] if len(own) > 1 else []
        for point in own:
            at = x(point.x)
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>')
            parts.append(marker(series, at, y(point.y), point.label))
        parts.append("</g>")
    return _svg(WIDTH, HEIGHT, f"{quality} over bytes", parts)


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points than which no other is at least as small and as good, and better in one; by bytes."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def heat_map(values: dict[tuple[float, int], float], title: str) -> str:
    """Scores by depth (down) and length (across)."""
    depths, lengths = (sorted({key[i] for key in values}) for i in (0, 1))
    cell, row, left, top = 52, 26, 44, 20
    parts = [
        f'<text class="tick" x="{left + cell * (j + 0.5):.1f}" y="{top - 6}" text-anchor="middle">{length:,}</text>'
        for j, length in enumerate(lengths)
    ]
    for i, depth in enumerate(depths):
        y = top + row * i
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 17}" text-anchor="end">{depth:.0%}</text>')
        for j, length in enumerate(lengths):
            if (value := values.get((depth, length))) is None:
                continue
            x, kind = left + cell * j, "strong" if value > 0.55 else "weak"
            hint = f"<title>depth {depth:.0%}, length {length:,}: {value:.2f}</title>"
            parts.append(
                f'<g>{hint}<rect class="heat" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{row - 2}" rx="3" '
                f'fill-opacity="{0.08 + 0.92 * value:.2f}"/>'
                f'<text class="{kind}" x="{x + cell / 2}" y="{y + 17}" text-anchor="middle">{value:.2f}</text></g>'
            )
    return _svg(left + cell * len(lengths) + 2, top + row * len(depths) + 2, title, parts)


def marker(series: int, x: float, y: float, label: str = "") -> str:
    """The sign of a series, with a text that shows when it is pointed at."""
    shape, title = _SHAPES[series % len(_SHAPES)], f"<title>{escape(label)}</title>" if label else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
    corners = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "triangle": ((0, -6), (5.5, 4.5), (-5.5, 4.5)),
    }[shape]
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}">{title}</polygon>'


def _axes(x: Scale, y: Scale, quality: str) -> list[str]:
    bottom, parts = HEIGHT - _BOTTOM, []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x.ticks():
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{bottom + 19}" text-anchor="middle">{_bytes(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">bytes of the caches</text>')
    at = (_TOP + bottom) / 2
    parts.append(
        f'<text class="name" transform="translate(15 {at}) rotate(-90)" text-anchor="middle">{escape(quality)}</text>'
    )
    return parts


def _steps(front: Sequence[Point], x: Scale, y: Scale) -> str:
    corners = [(x(front[0].x), y(front[0].y))]
    for point in front[1:]:
        corners += [(x(point.x), corners[-1][1]), (x(point.x), y(point.y))]
    corners.append((WIDTH - _RIGHT, corners[-1][1]))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)


def _bytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
