"""Files of prompts, and files of answers to them."""

import itertools
import json
import math
import os
import sys
import time
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from litgpt.atomic_file import replacing
from litgpt.engine.answer import Answer, counted
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.drafting import Drafter
from litgpt.engine.loading import Ready
from litgpt.engine.sampling import Sampling
from litgpt.engine.second_reading import check_alone
from litgpt.engine.sequence import Sequence
from litgpt.generate.options import SAMPLING_NAMES, AnswerOptions, SamplingOptions, checked, converted
from litgpt.prompts import encode_prompt
from litgpt.settings import shown
from litgpt.standard_streams import check_text
from litgpt.waiting import report_progress, waiting

KINDS: dict[str, Any] = {field.name: field for field in fields(SamplingOptions)}  # settings of a line
KEYS = ("prompt", "sys_prompt", "input", "id", *KINDS)
MOST_LEVELS = 100  # of nested brackets in a line


@dataclass(frozen=True)
class PromptLine:
    """A prompt with its settings."""

    number: int | None  # of the line, from 1 (None: not from a file)
    prompt: str
    sys_prompt: str | None
    max_new_tokens: int
    sampling: Sampling
    id: Any = None
    input: str = ""  # for prompt styles with a place for it


def read_prompts(
    path: Path, max_new_tokens: int, sampling: Sampling, sys_prompt: str | None = None, input: str = ""
) -> list[PromptLine]:
    """Read a file of prompts: one a line, or, where its name ends in .jsonl, a JSON object a line.

    An object has a "prompt" and may have a "sys_prompt", an "input", "max_new_tokens", an "id" for the answer, and the settings
    of `Sampling`. Missing or null values come from the arguments; seeds count up from the seed of `sampling`. Empty lines are
    skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a line that cannot be used, with its number and field, or if there are no prompts.
    """
    as_json = path.suffix.lower() in (".jsonl", ".ndjson")
    lines: list[PromptLine] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            given = parse_line(_decoded(line)) if as_json else {"prompt": _decoded(line).rstrip("\r")}
            seed = None if sampling.seed is None else sampling.seed + len(lines)
            own = {key: given[key] for key in SAMPLING_NAMES if key in given}
            lines.append(
                PromptLine(
                    number,
                    given["prompt"],
                    given.get("sys_prompt", sys_prompt),
                    given.get("max_new_tokens", max_new_tokens),
                    replace(sampling, **{"seed": seed, **own}),
                    given.get("id"),
                    given.get("input", input),
                )
            )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompts")
    return lines


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8: {error.reason} at byte {error.start + 1} of the line") from None


def parse_line(line: str) -> dict[str, Any]:
    """The JSON object of a line, checked; fields that are null are left out, except "id".

    Raises:
        ValueError: with the field, for anything else.
    """
    try:
        given = json.loads(
            line,
            object_pairs_hook=_distinct,
            parse_constant=_finite,
            parse_int=_parse_int,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError(f"more than {MOST_LEVELS} levels of brackets") from None
    if not isinstance(given, dict):
        raise ValueError(f'a JSON object with a "prompt" is needed, got {shown(given)}')
    if unknown := [key for key in given if key not in KEYS]:
        raise ValueError(f"unknown key {shown(unknown[0])}; there are {', '.join(KEYS)}")
    _check_texts('"id"', given.get("id"))
    given = {key: value for key, value in given.items() if value is not None or key == "id"}
    if not isinstance(given.get("prompt"), str) or not given["prompt"]:
        raise ValueError('"prompt" is missing or empty, or not a text')
    for key, value in given.items():
        if key in KINDS:
            given[key] = checked(KINDS[key], value, f'"{key}"')
        elif key != "id":
            given[key] = converted(f'"{key}"', value, str)
    return given


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `ValueError` for duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(shown(key) for key in keys if keys.count(key) > 1)} occurs twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shown(text)} is not a finite number")
    return number


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a number of {len(text):,} digits is too long") from None


def _check_texts(name: str, value: Any, level: int = 1) -> None:
    """Raise `ValueError` if a JSON value has text that UTF-8 cannot encode, or too many levels."""
    if level > MOST_LEVELS:
        raise ValueError(f"{name} has more than {MOST_LEVELS} levels of brackets")
    if isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_texts(name, inner, level + 1)


def sequences_of(ready: Ready, line: PromptLine, options: AnswerOptions, seed_step: int = 1) -> list[Sequence]:
    """A sequence for each answer to a prompt, with a shared prefill; their seeds count up by `seed_step`."""
    prompt, seed = encode_line(ready, line), line.sampling.seed
    seeds = [None if seed is None else seed + i * seed_step for i in range(options.num_samples)]
    settings = {"stop_tokens": ready.stop_tokens, "logprobs": options.logprobs}
    return [Sequence(prompt, line.max_new_tokens, replace(line.sampling, seed=s), **settings) for s in seeds]


def submitted(
    ready: Ready,
    lines: abc.Sequence[PromptLine],
    options: AnswerOptions,
    batch_size: int,
    drafter: Drafter | None = None,
) -> tuple[list[Sequence], ContinuousBatch]:
    """The sequences of all answers, and a batch of at most `batch_size` that has taken them, before any work.

    Raises:
        ValueError: if a prompt does not fit, with its line.
    """
    sequences: list[Sequence] = []
    sources = [line for line in lines for _ in range(options.num_samples)]
    for line in lines:
        with _naming(line):
            sequences += sequences_of(ready, line, options, len(lines))
    longest = max(range(len(sequences)), key=lambda i: sequences[i].max_length)
    with _naming(sources[longest]):
        rows, length = min(batch_size, len(sequences)), sequences[longest].max_length
        batch = ContinuousBatch(ready.model, rows, length, options.prompt_chunksize, drafter)
    for source, sequence in zip(sources, sequences, strict=True):
        with _naming(source):
            batch.submit(sequence)
            check_alone(ready.model, sequence.prompt_length, min(rows, len(lines)))
    return sequences, batch


def answer_prompts(
    ready: Ready,
    lines: abc.Sequence[PromptLine],
    options: AnswerOptions,
    batch_size: int,
    write: Callable[[dict[str, Any]], None],
    drafter: Drafter | None = None,
) -> None:
    """Answer prompts, `batch_size` at a time, with statistics on stderr.

    `write` gets a record for each answer (see `answers_to`), in order, as soon as it and all before it are complete; after an
    error, all complete ones. A finished answer makes room for the next prompt.

    Raises:
        ValueError: if a prompt does not fit, with its line, before any answer.
    """
    num_samples = options.num_samples
    sources = [line for line in lines for _ in range(num_samples)]
    sequences, batch = submitted(ready, lines, options, batch_size, drafter)
    started = time.perf_counter()

    def write_answer(i: int) -> None:
        record = {
            "line": sources[i].number,
            "id": sources[i].id,
            "sample": i % num_samples if num_samples > 1 else None,
        }
        record = {key: value for key, value in record.items() if value is not None}
        write(record | {"prompt": sources[i].prompt} | Answer.of(sequences[i], ready.tokenizer).record())

    def progress() -> str:
        new = sum(sequence.n_output for sequence in sequences)
        return f"Answering: {new:,} tokens, {new / (time.perf_counter() - started):.1f} tokens/s"

    written = 0
    try:
        with waiting(progress):
            while batch.unfinished:
                batch.step()
                report_progress(sum(sequence.finish_reason is not None for sequence in sequences), len(sequences))
                while written < len(sequences) and sequences[written].finish_reason:
                    write_answer(written)
                    written += 1
    except BaseException:
        with suppress(OSError):  # the first error is reported
            for i in range(written, len(sequences)):
                if sequences[i].finish_reason:
                    write_answer(i)
        raise
    seconds, new = time.perf_counter() - started, sum(sequence.n_output for sequence in sequences)
    print(
        f"{counted(len(sequences), 'answer')}, {counted(new, 'token')} in {seconds:.2f} s, {new / seconds:.1f} tokens/s; "
        f"{counted(sum(len(sequence.prompt) for sequence in sequences), 'prompt token')}; {batch.batch_size} at a time",
        file=sys.stderr,
    )


@contextmanager
def _naming(line: PromptLine) -> Iterator[None]:
    """Adds the line's number to errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"line {line.number}: {error}" if line.number else str(error)) from error


def encode_line(ready: Ready, line: PromptLine) -> torch.Tensor:
    """The tokens (T,) of a prompt, on the model's device.

    Raises:
        ValueError: if the prompt style has no place for the line's input, or `logit_bias` has tokens that do not exist.
    """
    size = ready.model.config.padded_vocab_size
    if (largest := max(line.sampling.logit_bias or (0,))) >= size:
        raise ValueError(f"logit_bias has the token {largest}, but the model's tokens are 0..{size - 1}")
    tokenizer, style = ready.tokenizer, ready.prompt_style
    plain = encode_prompt(tokenizer, style, line.prompt, sys_prompt=line.sys_prompt)
    if not line.input:
        return plain.to(ready.device)
    tokens = encode_prompt(tokenizer, style, line.prompt, sys_prompt=line.sys_prompt, input=line.input)
    if torch.equal(tokens, plain):
        raise ValueError(
            f"the prompt style {type(style).__name__} has no place for an input: make it part of the prompt"
        )
    return tokens.to(ready.device)


@contextmanager
def answers_to(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a record as a line of JSON, to stdout or to a file.

    A file gets its name when it is complete; after an error the lines so far are kept in a file beside it, named on stderr.
    Pipes and devices are written directly.

    Raises:
        OSError: if the file cannot be written; on entering, if that shows then.
    """
    if out is None:
        in_ascii = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        yield lambda record: print(json.dumps(record, ensure_ascii=in_ascii), flush=True)
        return
    count = size = 0  # complete lines, and their bytes

    def write(record: dict[str, Any]) -> None:
        nonlocal count, size
        line = rest = f"{json.dumps(record, ensure_ascii=False)}\n".encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(out)) from error
        count, size = count + 1, size + len(line)

    with replacing(out) as temporary, open(temporary, "wb", buffering=0) as file:
        try:
            yield write
        except BaseException:
            if count and temporary != out:
                file.truncate(size)
                kept = _unused(Path(os.path.realpath(out)))
                os.rename(temporary, kept)
                print(f"{counted(count, 'complete answer')} kept in {kept}", file=sys.stderr)
            raise


def _unused(out: Path) -> Path:
    """An unused name for the partial contents of `out`."""
    names = (out.with_name(f"{out.name}.partial{i or ''}") for i in itertools.count())
    return next(name for name in names if not os.path.lexists(name))
