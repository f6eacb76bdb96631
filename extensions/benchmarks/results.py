"""From samples to medians, ratios and tables."""

from collections.abc import Iterable, Sequence
from statistics import median

from systems import COMPILED, INT4, INT8, LITGPT, LLAMA_BF16, LLAMA_Q4_1, LLAMA_Q8_0, OURS, SYSTEMS, TRANSFORMERS

# system of ours -> peers with the same weights, or with their own of as many bits
COMPARED = {
    OURS: {"LitGPT": LITGPT, "llama.cpp": LLAMA_BF16, "transformers": TRANSFORMERS},
    COMPILED: {"LitGPT": LITGPT, "llama.cpp": LLAMA_BF16},
    INT8: {"llama.cpp": LLAMA_Q8_0},
    INT4: {"llama.cpp": LLAMA_Q4_1},
}
DECODE, PREFILL = "decode, tokens/s", "prefill, tokens/s"
MEMORY, ABOVE_IMPORTS = "peak memory, MB", "peak memory above imports, MB"
ANSWER = "`litgpt generate` to the first of the answer, s"

Samples = dict[str, dict[str, list[float]]]  # figure -> system -> one value for every round


def at(figure: str, context: int) -> str:
    """The name of a figure that is measured at several lengths of context."""
    return f"{figure}, at {context:,}"


def ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median of the ratios of the rounds in which both were measured: one in which the machine was slow was slow for both."""
    return median(a / b for a, b in zip(ours, peer, strict=False))


def ratios(samples: Samples) -> dict[str, dict[str, float]]:
    """For every figure, the ratios of those pairs that were both measured."""
    pairs = [(ours, peer) for ours, peers in COMPARED.items() for peer in peers.values()]
    return {
        figure: {f"{a} / {b}": ratio(of[a], of[b]) for a, b in pairs if a in of and b in of}
        for figure, of in samples.items()
    }


def comparison(samples: Samples, contexts: Sequence[int]) -> str:
    """A row for every context and system of ours: medians, and beside each its ratios to LitGPT and to llama.cpp."""
    figures, peers = (DECODE, PREFILL, MEMORY), ("LitGPT", "llama.cpp")
    lines = heading(cell for figure in figures for cell in (figure, *(f"/ {peer}" for peer in peers)))
    for context in contexts:
        for system, compared in COMPARED.items():
            of = {figure: samples.get(at(figure, context), {}) for figure in figures}
            if system not in of[DECODE]:
                continue
            cells = []
            for figure in figures:
                cells.append(number(median(of[figure][system])))
                for peer in peers:
                    values = of[figure].get(compared.get(peer))
                    cells.append("" if values is None else f"{ratio(of[figure][system], values):.2f}x")
            lines.append(row([f"{system}, at {context:,}", *cells]))
    return "\n".join(lines)


def medians(samples: Samples, contexts: Sequence[int]) -> str:
    """A row for every context and system, and the times of `litgpt generate`."""
    figures = (DECODE, PREFILL, MEMORY, ABOVE_IMPORTS)
    lines = heading(figures)
    for context in contexts:
        of = [samples.get(at(figure, context), {}) for figure in figures]
        lines += [
            row([f"{system.name}, at {context:,}", *(number(median(values[system.name])) for values in of)])
            for system in SYSTEMS
            if system.name in of[0]
        ]
    if ANSWER in samples:
        seconds = [f"{system} {number(median(values))}" for system, values in samples[ANSWER].items()]
        lines.append(f"\n{ANSWER}: {', '.join(seconds)}")
    return "\n".join(lines)


def heading(columns: Iterable[str]) -> list[str]:
    """The first lines of a table with numbers in all columns but the first."""
    columns = list(columns)
    return [row(["", *columns]), row(["---"] + ["---:"] * len(columns))]


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three digits or more: 2.51, 48.3, 1,975."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers share before they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
