"""Results of `LLM.benchmark` as text."""

import torch


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
