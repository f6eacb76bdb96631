"""The runs of one side of a comparison with kvpress: cache by cache, share by share, each noted as soon as it is done. Imports the
standard library only, as every interpreter runs it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Logprobs = dict[str, list[float]]


def each_run(job: dict, run: Callable[[object, float, list[dict]], Logprobs]) -> None:
    """Append what `run(cache, removed, samples)` gives for every run of the job to its file of records. A run that cannot be made
    is noted with the reason, the last line of its message."""
    samples = json.loads(Path(job["samples"]).read_text(encoding="utf-8"))
    for one in job["runs"]:
        began, record = time.perf_counter(), {"key": one["key"]}
        try:
            record["logprobs"] = run(one["cache"], one["removed"], samples)
        except (RuntimeError, ValueError, AttributeError, AssertionError, NotImplementedError) as error:
            record["error"] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        record["seconds"] = round(time.perf_counter() - began, 1)
        with open(job["records"], "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{one['key']}: {record.get('error', record['seconds'])}", file=sys.stderr, flush=True)


def queries_of(sample: dict) -> Iterator[tuple[list[int], list[int]]]:
    """What is put in after the context, and what is predicted then: an answer, or how a text goes on after its first token."""
    for question, right in sample["queries"]:
        yield (question, right) if question else (right[:1], right[1:])
