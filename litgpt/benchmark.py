"""What `LLM.benchmark` measures, and the results as a table."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from time import perf_counter

import torch

BYTES_PER_GB = 1e9


def measure(stream: Callable[[], Iterator[torch.Tensor]], times: int) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Read a stream of tokens to its end, `times` times.

    Returns:
        The last one's tokens (n,); and for every run the seconds in total and to the first token, the number of tokens, tokens
        per second, and on a GPU the memory allocated.
    """
    results: dict[str, list[float]] = defaultdict(list)
    for _ in range(times):
        started, first, pieces = perf_counter(), None, []
        for piece in stream():
            first = first or perf_counter()
            pieces.append(piece)
        seconds = perf_counter() - started
        tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
        results["Seconds total"].append(seconds)
        results["Seconds to first token"].append((first or perf_counter()) - started)
        results["Tokens generated"].append(len(tokens))
        results["Inference speed in tokens/sec"].append(len(tokens) / seconds)
        if tokens.is_cuda:
            results["Total GPU memory allocated in GB"].append(torch.cuda.max_memory_allocated() / BYTES_PER_GB)
    return tokens, dict(results)


def benchmark_dict_to_markdown_table(data: dict[str, list[float]]) -> str:
    """The results of `LLM.benchmark` as a table: mean and standard deviation of each figure."""
    rows = [("Metric", "Mean", "Std Dev")]
    for name, values in data.items():
        column = torch.tensor(values, dtype=torch.float64)
        spread = column.std().item() if len(values) > 1 else float("nan")
        rows.append((name, f"{column.mean().item():.2f}", f"{spread:.2f}"))
    widths = (35, 27, 27)
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
