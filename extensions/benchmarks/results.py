"""From samples to medians, ratios and a table."""

from collections.abc import Sequence
from statistics import median

from environments import PEERS

OURS, COMPILED = "this", "this, `--compile`"
LITGPT, TRANSFORMERS = f"LitGPT {PEERS['litgpt']}", f"transformers {PEERS['transformers']}"
SYSTEMS = (OURS, COMPILED, LITGPT, TRANSFORMERS)
COMPARED = ((OURS, LITGPT), (COMPILED, LITGPT), (OURS, TRANSFORMERS))

Samples = dict[str, dict[str, list[float]]]  # figure -> system -> one value for every round


def ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median of the rounds' ratios: a round in which the machine was slow was slow for both.

    Raises `ValueError` if the two were not measured in the same number of rounds.
    """
    return median(a / b for a, b in zip(ours, peer, strict=True))


def ratios(samples: Samples) -> dict[str, dict[str, float]]:
    """For every figure, the ratios of those pairs that were both measured."""
    return {
        figure: {f"{a} / {b}": ratio(of[a], of[b]) for a, b in COMPARED if a in of and b in of}
        for figure, of in samples.items()
    }


def markdown(samples: Samples) -> str:
    """A row for every figure: each system's median, and the ratios."""
    pairs = [f"{a} / {b}" for a, b in COMPARED]
    lines = [row(["", *SYSTEMS, *pairs]), row(["---"] + ["---:"] * (len(SYSTEMS) + len(pairs)))]
    for figure, ratios_of in ratios(samples).items():
        of = samples[figure]
        medians = [number(median(of[system])) if system in of else "" for system in SYSTEMS]
        lines.append(row([figure, *medians, *(f"{ratios_of[p]:.2f}x" if p in ratios_of else "" for p in pairs)]))
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three digits or more: 2.51, 48.3, 1,975."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers share before they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
