"""Files of prompts, and files of answers to them."""

import json
import os
import sys
import time
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from litgpt.engine.answer import Answer
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.drafting import Drafter
from litgpt.engine.loading import Ready
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence
from litgpt.prompts import encode_prompt

SAMPLING_KEYS = tuple(field.name for field in fields(Sampling) if field.name != "processors")
WHOLE = ("max_new_tokens", "top_k", "seed")
KEYS = ("prompt", "sys_prompt", "max_new_tokens", "id", *SAMPLING_KEYS)


@dataclass(frozen=True)
class PromptLine:
    """A prompt of a file, with settings of its own where it has some."""

    number: int | None  # of the line, from 1 (None: it is from no file)
    prompt: str
    sys_prompt: str | None
    max_new_tokens: int
    sampling: Sampling
    id: Any = None


def read_prompts(
    path: Path, max_new_tokens: int, sampling: Sampling, sys_prompt: str | None = None
) -> list[PromptLine]:
    """Read a file of prompts: one a line, or, where its name ends in .jsonl, a JSON object a line.

    An object has a "prompt" and may have a "sys_prompt", "max_new_tokens", an "id", which the answer gets, and the
    settings of `Sampling`. What it does not have it gets from the arguments; seeds count up from that of `sampling`. Empty
    lines are skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a line that cannot be used, with its number, or if there is none.
    """
    as_json = path.suffix.lower() in (".jsonl", ".ndjson")
    lines = []
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            given = _parse(line) if as_json else {"prompt": line.rstrip("\r")}
            seed = None if sampling.seed is None else sampling.seed + len(lines)
            own = {key: given[key] for key in SAMPLING_KEYS if key in given}
            if own.get("logit_bias"):
                own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
            lines.append(
                PromptLine(
                    number,
                    given["prompt"],
                    given.get("sys_prompt", sys_prompt),
                    given.get("max_new_tokens", max_new_tokens),
                    replace(sampling, **{"seed": seed, **own}),
                    given.get("id"),
                )
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def _parse(line: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(given, dict):
        raise ValueError(f'a JSON object with a "prompt" is needed, got {line.strip()[:40]}')
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; there are {', '.join(KEYS)}")
    if not isinstance(given.get("prompt"), str) or not given["prompt"]:
        raise ValueError('"prompt" is missing or empty, or not a text')
    if not isinstance(given.get("sys_prompt", ""), str | None):
        raise ValueError(f'"sys_prompt" is not a text: {given["sys_prompt"]!r}')
    for key in ("max_new_tokens", *SAMPLING_KEYS):
        whole, value = key in WHOLE, given.get(key, 1)
        if key != "logit_bias" and type(value) not in ((int,) if whole else (int, float)):
            raise ValueError(f'"{key}" is not a {"whole " if whole else ""}number: {value!r}')
    if given.get("max_new_tokens", 1) < 1:
        raise ValueError(f'"max_new_tokens" must be at least 1, got {given["max_new_tokens"]}')
    if not isinstance(given.get("logit_bias", {}), dict):
        raise ValueError(f'"logit_bias" is not an object of tokens and numbers: {given["logit_bias"]!r}')
    return given


def answer_prompts(
    ready: Ready,
    lines: abc.Sequence[PromptLine],
    batch_size: int,
    out: Path | None = None,
    num_samples: int = 1,
    prompt_chunksize: int | None = None,
    logprobs: int | None = None,
    drafter: Drafter | None = None,
) -> None:
    """Answer prompts, `batch_size` at a time, and write a JSON object for every answer, in their order.

    A short answer does not wait for a long one: the next prompt takes its place. What it cost is told on stderr.

    Args:
        ready: the model and what belongs to it.
        lines: the prompts.
        batch_size: most sequences at a time.
        out: file to write (default: stdout, as soon as an answer and those before it are there).
        num_samples: answers to each prompt, with seeds of their own.
        prompt_chunksize: see `batched_generate_fn`.
        logprobs: how many likeliest tokens are told with the log-probability of each token (None: no log-probabilities).
        drafter: drafts the next tokens.

    Raises:
        ValueError: if a prompt does not fit, with its line, before any answer.
    """
    sequences: list[Sequence] = []
    for line in lines:
        tokens = encode_prompt(ready.tokenizer, ready.prompt_style, line.prompt, sys_prompt=line.sys_prompt)
        tokens = tokens.to(ready.device)  # one tensor for all samples: they share its prefill
        for i in range(num_samples):
            seed = None if line.sampling.seed is None else line.sampling.seed + i * len(lines)
            sampling = replace(line.sampling, seed=seed)
            sequences.append(Sequence(tokens, line.max_new_tokens, sampling, ready.stop_tokens, logprobs=logprobs))
    started, sources = time.perf_counter(), [line for line in lines for _ in range(num_samples)]
    longest = max(sequences, key=lambda sequence: sequence.max_length)
    suspect = longest  # the one to name if something is wrong
    try:
        rows = min(batch_size, len(sequences))
        batch = ContinuousBatch(ready.model, rows, longest.max_length, prompt_chunksize, drafter)
        for suspect in sequences:
            batch.submit(suspect)
    except ValueError as error:
        number = sources[sequences.index(suspect)].number
        raise ValueError(f"line {number}: {error}" if number else str(error)) from error
    written = 0
    with _destination(out) as file, _progress(len(sequences)) as advance:
        while batch.unfinished:
            for sequence, tokens in batch.step():
                advance(sequence.finish_reason is not None, len(tokens))
            while written < len(sequences) and sequences[written].finish_reason:
                source, answer = sources[written], Answer.of(sequences[written], ready.tokenizer)
                sample = written % num_samples if num_samples > 1 else None
                record = {"line": source.number, "id": source.id, "sample": sample}
                record = {key: value for key, value in record.items() if value is not None}
                print(json.dumps(record | {"prompt": source.prompt} | answer.record(), ensure_ascii=False), file=file)
                file.flush()
                written += 1
    seconds, new = time.perf_counter() - started, sum(sequence.n_output for sequence in sequences)
    print(
        f"{len(sequences)} answers, {new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s; "
        f"{sum(len(sequence.prompt) for sequence in sequences)} prompt tokens; {batch.batch_size} at a time",
        file=sys.stderr,
    )


@contextmanager
def _destination(out: Path | None) -> Iterator[TextIO]:
    """Where answers go: stdout, or a file that is complete or not there."""
    if out is None:
        yield sys.stdout
        return
    partial = out.with_name(f"{out.name}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr, if that is a terminal: a function to call with whether an answer is done, and its new tokens."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    console = Console(stderr=True)
    started, tokens = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(done: bool, count: int) -> None:
            nonlocal tokens
            tokens += count
            rate = f"{tokens / (time.perf_counter() - started):.1f} tokens/s"
            progress.update(task, advance=int(done), rate=rate)

        yield advance
