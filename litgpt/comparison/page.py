"""The results as one HTML page, with plots and without scripts."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from typing import Any

from litgpt.comparison.asking import INSIDE, OUTSIDE
from litgpt.comparison.figure import Figure
from litgpt.comparison.plot import N_COLOURS, WIDTH, Point, heat_map, marker, quality_over_bytes
from litgpt.comparison.table import Column, Row, columns_by_task, columns_of, shown
from litgpt.kvcache.memory import as_text
from litgpt.tasks.ruler import RULER

_LIGHT = ("#2a6fb5", "#d1651a", "#2c8c4f", "#b8397a", "#7a5bc0", "#8a6d1d", "#158a94", "#c23b32")
_DARK = ("#6cb0f2", "#f2a05c", "#67cc8c", "#f07fb4", "#b39df0", "#d6bb62", "#5cc9d3", "#f4837a")
_PLOTS = {
    "Text": (("KL divergence from dense", "kl", ("perplexity",), False),),
    "Retrieval": tuple((f"score, question {x}", f"{x}_score", ("retrieval",), True) for x in (INSIDE, OUTSIDE)),
    "RULER": tuple((f"mean score, question {x}", f"{x}_score", tuple(RULER), True) for x in (INSIDE, OUTSIDE)),
}
"""By heading: the name of an axis, a figure, its tasks, and whether higher is better."""


def html_page(rows: Sequence[Row], title: str, about: str) -> str:
    """The page. `about` says in one line what was compared."""
    series = {name: i for i, name in enumerate(dict.fromkeys(row.cache for row in rows))}
    sections = [*_plots(rows, series), *_maps(rows), _section("All figures", _table(columns_of(rows)))]
    if by_task := columns_by_task(rows):
        sections.append(_section("RULER by task", _table(by_task)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>\n{_css()}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="about">{escape(about)}</p>\n{_legend(series)}{"".join(sections)}</main>\n'
        "</body>\n</html>\n"
    )


def _plots(rows: Sequence[Row], series: dict[str, int]) -> list[str]:
    sections = []
    for heading, plots in _PLOTS.items():
        drawn = []
        for length in dict.fromkeys(row.length for row in rows):
            same = [row for row in rows if row.length == length]
            for axis, name, tasks, higher in plots:
                points = [_point(row, figure, series) for row in same if (figure := row.figure(name, *tasks))]
                if not points:
                    continue
                caption = f"{length:,} tokens; bars are 95 % intervals, the dashed line is the Pareto front"
                caption += "" if higher else "; 0 is drawn at the bottom"
                drawn.append(_captioned(quality_over_bytes(points, axis, higher), caption))
        if drawn:
            sections.append(_section(heading, f'<div class="plots">{"".join(drawn)}</div>'))
    return sections


def _point(row: Row, figure: Figure, series: dict[str, int]) -> Point:
    label = f"{row.cache}, budget {row.budget:g}: {shown('', figure)} at {as_text(row.bytes)}"
    return Point(row.bytes, *figure, series[row.cache], label)


def _maps(rows: Sequence[Row]) -> list[str]:
    """Retrieval by depth and length, a map for every cache and budget."""
    sections = []
    for where in (INSIDE, OUTSIDE):
        scores: dict[str, dict[tuple[float, int], list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            for reply in row.records.get("retrieval", {}).get("replies", ()):
                if reply["question"] == where:
                    scores[f"{row.cache}, {row.budget:g}"][reply["depth"], row.length].append(reply["score"])
        maps = [
            _captioned(heat_map({place: sum(x) / len(x) for place, x in by_place.items()}, name), name)
            for name, by_place in scores.items()
        ]
        if maps:
            heading = f"Retrieval by depth (down) and length (across), question {where}"
            sections.append(_section(heading, f'<div class="plots">{"".join(maps)}</div>'))
    return sections


def _table(columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for _, heading, _ in columns)
    lines = []
    for i in range(len(columns[0][2])):
        lines.append("<tr>" + "".join(_cell(name, values[i]) for name, _, values in columns) + "</tr>\n")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody></table></div>'


def _cell(name: str, value: Any) -> str:
    text = escape(shown(name, value, interval=False))
    if isinstance(value, Figure) and value.low != value.high:
        low, high = (escape(shown(name, Figure.exact(x))) for x in value[1:])
        text += f'<span class="interval">{low} to {high}</span>'
    return f"<td>{text}</td>"


def _legend(series: dict[str, int]) -> str:
    entries = (
        f'<li><svg viewBox="-8 -8 16 16" width="16" height="16" class="series c{i % N_COLOURS}" aria-hidden="true">'
        f"{marker(i, 0, 0)}</svg>{escape(name)}</li>"
        for name, i in series.items()
    )
    return f'<ul class="legend">{"".join(entries)}</ul>\n'


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>\n"


def _captioned(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _css() -> str:
    def colours(values: Sequence[str]) -> str:
        return " ".join(f"--c{i}: {value};" for i, value in enumerate(values))

    series = "\n".join(f".c{i} {{ --own: var(--c{i}); }}" for i in range(N_COLOURS))
    return f""":root {{ color-scheme: light dark; --paper: #ffffff; --ink: #1c2127; --soft: #5b6570; --rule: #dfe3e8;
  --heat: #2a6fb5; --on-heat: #ffffff; {colours(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171b; --ink: #e6e9ed; --soft: #9aa5b1; --rule: #2e353d; --heat: #6cb0f2; --on-heat: #0d1117;
    {colours(_DARK)} }}
}}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }}
h1 {{ font-size: 26px; margin: 0 0 4px; }}
h2 {{ font-size: 18px; margin: 40px 0 12px; }}
.about, figcaption, .interval {{ color: var(--soft); }}
.legend {{ position: sticky; top: 0; background: var(--paper); display: flex; flex-wrap: wrap; gap: 6px 20px; padding: 10px 0;
  margin: 0; list-style: none; }}
.legend li {{ display: flex; align-items: center; gap: 6px; }}
.plots {{ display: flex; flex-wrap: wrap; gap: 20px 28px; }}
figure {{ margin: 0; max-width: 100%; }}
figure svg {{ max-width: 100%; height: auto; }}
figcaption {{ font-size: 13px; max-width: 560px; }}
text {{ font: 12px system-ui, sans-serif; fill: var(--ink); }}
@media (max-width: 620px) {{ figure svg[width="{WIDTH}"] text {{ font-size: 15px; }} }}
.tick {{ fill: var(--soft); }}
.grid {{ stroke: var(--rule); }}
.axis {{ stroke: var(--soft); }}
.front {{ fill: none; stroke: var(--soft); stroke-width: 2; stroke-dasharray: 5 4; }}
.series circle, .series polygon {{ fill: var(--own); stroke: var(--paper); }}
.series line, .series polyline {{ fill: none; stroke: var(--own); stroke-opacity: 0.55; stroke-width: 1.5; }}
.heat {{ fill: var(--heat); }}
.strong {{ fill: var(--on-heat); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--paper); }}
th {{ font-weight: 600; vertical-align: bottom; }}
.interval {{ display: block; font-size: 12px; }}
{series}
"""
