"""Table and plot of what training through caches wins back, from the finished runs of `adapting_to_caches.py`."""

from collections.abc import Callable, Sequence
from math import exp
from statistics import fmean

from intervals import half_width
from results import row

WAYS = {
    "before": "as it is",
    "plain": "after plain LoRA",
    "cached": "after LoRA through the cache",
    "distilled": "after self-distillation",
}
THROUGH = ("cached", "distilled")
COSTS = ("before", "plain")  # ways with which it is seen what a cache costs
FIGURES = {"loss": "perplexity", "logprob": "log-probability", "score": "answers right"}
Found = dict[str, dict[str, dict[int, dict[str, float]]]]  # cache -> way -> seed -> figures
COLOURS = ("#9aa4b2", "#e0a458", "#3b7dd8", "#2f9e6e")
WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 200, 46, 34, 16  # of a panel


def by_cache(runs: Sequence[dict]) -> Found:
    """Figures of every seed, by cache and way; caches and ways in the order of the tables."""
    found: Found = {}
    for cache in sorted(dict.fromkeys(run["cache"] for run in runs), key=lambda name: name != "dense"):
        for way in WAYS:
            if of := {run["seed"]: run["figures"] for run in runs if (run["way"], run["cache"]) == (way, cache)}:
                found.setdefault(cache, {})[way] = of
    return found


def markdown(runs: Sequence[dict]) -> str:
    """A table of all figures: means over the seeds with their 95 % intervals, and the shares of the cost that were won back."""
    found = by_cache(runs)
    seeds = len({run["seed"] for run in runs if run["way"] != "before"})
    shown_ways = [way for way in WAYS if any(way in of for of in found.values())]
    back = [(way, base) for way in THROUGH for base in COSTS if way in shown_ways and base in shown_ways]
    names = [f"won back {WAYS[way]}, of the cost {WAYS[base]}" for way, base in back]
    lines = [row(["cache", *[WAYS[way] for way in shown_ways], *names])]
    lines.append("|---" * (1 + len(shown_ways) + len(back)) + "|")
    for figure, name in FIGURES.items():
        for cache, ways in found.items():
            cells = [shown(values_of(ways.get(way, {}), figure), form_of(figure)) for way in shown_ways]
            shares = [shown(won_back(found, cache, way, figure, base), "{:.0%}".format) for way, base in back]
            lines.append(row([f"{cache}: {name}", *cells, *shares]))
    return "\n".join([f"Means of {seeds} seed{'s' * (seeds != 1)}{', 95 % intervals' * (seeds > 1)}.", "", *lines, ""])


def form_of(figure: str) -> Callable[[float], str]:
    return "{:.0%}".format if figure == "score" else "{:.2f}".format


def values_of(by_seed: dict[int, dict[str, float]], figure: str) -> list[float]:
    """A figure of all seeds, as the table has it."""
    return [exp(of[figure]) if figure == "loss" else of[figure] for of in by_seed.values()]


def shown(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Their mean and its interval."""
    if not values:
        return ""
    return form(fmean(values)) + (f" ± {form(half_width(values))}" if len(values) > 1 else "")


def won_back(found: Found, cache: str, way: str, figure: str, base: str) -> list[float]:
    """For every seed, the share that a way of training wins back of what the cache costs with `base`: the difference to the dense
    cache (nothing where the cache costs nothing)."""
    shares = []
    for seed, of in sorted(found[cache].get(way, {}).items()):
        at = 0 if base == "before" else seed  # untrained, seeds are the same
        lost, dense = (found.get(name, {}).get(base, {}).get(at) for name in (cache, "dense"))
        if lost is None or dense is None:
            continue
        cost = dense[figure] - lost[figure]
        if (cost < 0 if figure == "loss" else cost > 0) and abs(cost) > 1e-9:
            shares.append((of[figure] - lost[figure]) / cost)
    return shares


def plot(runs: Sequence[dict]) -> str:
    """Bars by cache and way with their intervals: perplexity of prose, log-probability of answers; lines for the dense cache."""
    found = by_cache(runs)
    parts = _panel(found, 0, "loss", "perplexity (less is better)")
    parts += _panel(found, 1, "logprob", "log-probability of answers")
    for j, words in enumerate(WAYS.values()):
        x = LEFT + j * 190
        parts.append(f'<rect x="{x}" y="{HEIGHT + 34}" width="10" height="10" fill="{COLOURS[j]}"/>')
        parts.append(f'<text x="{x + 15}" y="{HEIGHT + 43}">{words}</text>')
    width, height = 2 * WIDTH + 90, HEIGHT + 56
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12" fill="#555"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><g {style}>{"".join(parts)}</g></svg>\n'


def _panel(found: Found, index: int, figure: str, title: str) -> list[str]:
    """The elements of one panel."""
    values = {(c, w): values_of(of, figure) for c, ways in found.items() for w, of in ways.items()}
    means = {key: fmean(of) for key, of in values.items()}
    widths = {key: half_width(of) if len(of) > 1 else 0.0 for key, of in values.items()}
    low = min([0.0, *(means[key] - (key[0] != "dense") * widths[key] for key in means)])
    high = max([0.0, *(means[key] + (key[0] != "dense") * widths[key] for key in means)])
    y = lambda v: TOP + (HEIGHT - TOP) * (high - v) / max(high - low, 1e-9)  # noqa: E731
    x0 = index * (WIDTH + 60) + LEFT
    parts, caches = [f'<text x="{x0}" y="16">{title}</text>'], [cache for cache in found if cache != "dense"]
    group = (WIDTH - LEFT) / max(len(caches), 1)
    bar = (group - GAP) / len(WAYS)
    for i, cache in enumerate(caches):
        middle = x0 + i * group + (group - GAP) / 2
        parts.append(f'<text x="{middle:.0f}" y="{HEIGHT + 18}" text-anchor="middle">{cache}</text>')
        for j, way in enumerate(WAYS):
            if (mean := means.get((cache, way))) is None:
                continue
            x, (a, b) = x0 + i * group + j * bar, sorted((y(mean), y(0.0)))
            box = f'x="{x:.1f}" y="{a:.1f}" width="{bar - 2:.1f}" height="{max(b - a, 0.5):.1f}"'
            parts.append(f'<rect {box} fill="{COLOURS[j]}"><title>{cache}, {WAYS[way]}: {mean:.2f}</title></rect>')
            if width := widths[cache, way]:
                ends = f'x1="{x + bar / 2 - 1:.1f}" x2="{x + bar / 2 - 1:.1f}"'
                parts.append(f'<line {ends} y1="{y(mean - width):.1f}" y2="{y(mean + width):.1f}" stroke="#333"/>')
    lines = {way: means["dense", way] for way in WAYS if ("dense", way) in means}
    for way, v in lines.items():
        ends = f'x1="{x0}" x2="{x0 + WIDTH - LEFT}" y1="{y(v):.1f}" y2="{y(v):.1f}"'
        stroke = f'stroke="{COLOURS[list(WAYS).index(way)]}" stroke-dasharray="5 3"'
        parts.append(f"<line {ends} {stroke}><title>dense cache, {WAYS[way]}: {v:.2f}</title></line>")
    for v in {low, high, *lines.values()}:
        parts.append(f'<text x="{x0 - 4}" y="{y(v) + 4:.1f}" text-anchor="end" font-size="10">{v:.3g}</text>')
    return parts
