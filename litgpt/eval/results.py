"""Results of tasks, in the form of the LM Evaluation Harness: values by task and metric, a table, a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.atomic_file import replacing

Results = dict[str, Any]
_HEADS = ("Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr")
_RIGHT = (1, 3, 6, 8)  # columns of numbers


@dataclass(frozen=True)
class TaskResult:
    """What one task of our own gave.

    Attributes:
        metrics: value and standard error by name.
        lower_is_better: names of metrics.
        samples: everything about every sample.
        config: what the task was.
    """

    metrics: Mapping[str, tuple[float, float]]
    samples: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    lower_is_better: frozenset[str] = field(default=frozenset())

    def results(self, name: str) -> Results:
        """As the harness's results of one task."""
        values: dict[str, Any] = {"alias": name}
        for metric, (value, error) in self.metrics.items():
            values[f"{metric},none"], values[f"{metric}_stderr,none"] = value, error
        n = len(self.samples)
        return {
            "results": {name: values},
            "group_subtasks": {name: []},
            "configs": {name: dict(self.config)},
            "versions": {name: 1.0},
            "n-shot": {name: 0},
            "higher_is_better": {name: {metric: metric not in self.lower_is_better for metric in self.metrics}},
            "n-samples": {name: {"original": n, "effective": n}},
            "samples": {name: list(map(dict, self.samples))},
        }


def merged(parts: Sequence[Results]) -> Results:
    """The results of several runs as one; later ones add tasks, and replace what is about the run itself."""
    result: Results = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict) and isinstance(result.get(name), dict):
                result[name] = result[name] | value
            else:
                result[name] = value
    return result


def write_results(results: Results, path: Path) -> None:
    """Write results to a file, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False, default=str), encoding="utf-8")


def table(results: Results) -> str:
    """Every metric of every task, in Markdown and with the columns of the harness's table."""
    rows = []
    for name, values in results["results"].items():
        label, version, shots = name, str(results["versions"][name]), str(results["n-shot"][name])
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if key == "alias" or metric.endswith("_stderr"):
                continue
            error = values[f"{metric}_stderr,{filter_name}"]
            arrow = "↑" if results["higher_is_better"][name][metric] else "↓"
            rows.append([label, version, filter_name, shots, metric, arrow, f"{value:.4f}", "±", f"{error:.4f}"])
            label = version = ""
    return _markdown(["Tasks", *_HEADS], rows)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    widths = [max(width, 3) if head else width for width, head in zip(widths, heads, strict=True)]

    def line(cells: Sequence[str], right: Sequence[int]) -> str:
        parts = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"|{'|'.join(parts)}|"

    rule = [("-" * (width - 1) + ":") if i in _RIGHT else "-" * width for i, width in enumerate(widths)]
    return "\n".join([line(heads, ()), f"|{'|'.join(rule)}|", *(line(row, _RIGHT) for row in rows)]) + "\n"
