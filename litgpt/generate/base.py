"""Generating text: the functions that scripts call, and the command `litgpt generate`."""

import sys
import time
from collections import abc
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.meta_model import meta_model
from litgpt.engine.answer import counted
from litgpt.engine.caches import CacheLease, prepare_caches
from litgpt.engine.drafting import Drafter
from litgpt.engine.engine import Engine, decode
from litgpt.engine.loading import Ready, make_ready
from litgpt.engine.sampling import Sampling, batched_sample, multinomial_num_samples_1, sample, sample_top_p
from litgpt.engine.sequence import Sequence
from litgpt.generate.options import AnswerOptions, CheckpointOptions, PromptLookupOptions, command
from litgpt.generate.prompts_file import PromptLine, answer_prompts, answers_to, read_prompts, sequences_of, submitted
from litgpt.model import GPT
from litgpt.prompt_style import PromptStyle
from litgpt.runners.huge_pages import use_huge_pages
from litgpt.tokenizer import Tokenizer

__all__ = [
    "batched_generate_fn",
    "batched_next_token",
    "batched_sample",
    "generate",
    "generate_fn",
    "main",
    "multinomial_num_samples_1",
    "next_token",
    "sample",
    "sample_top_p",
]


LONG_ANSWER = 150  # tokens; for fewer, huge pages take longer than they save


@torch.inference_mode()
def next_token(
    model: GPT, input_pos: int, x: torch.Tensor, input_pos_maxp1: int | None = None, **sample_kwargs: Any
) -> torch.Tensor:
    """Run the tokens x (1, T), which start at `input_pos`, and sample the next one: (1,) int64.

    `sample_kwargs` are those of `sample`; `input_pos_maxp1` is not needed. `x` may come before `input_pos`.
    """
    input_pos, x = _position_first(input_pos, x)
    return sample(model(x, input_pos, last_token_only=True), **sample_kwargs)


@torch.inference_mode()
def batched_next_token(
    model: GPT, input_pos: int, x: torch.Tensor, kwargs: dict[str, Any] | list[dict[str, Any]]
) -> torch.Tensor:
    """Run the tokens x (B, T), which start at `input_pos`, and sample the next one of every row: (B, 1) int64.

    `kwargs` are the arguments of `sample`, for all rows or for each. `x` may come before `input_pos`.
    """
    input_pos, x = _position_first(input_pos, x)
    return batched_sample(model(x, input_pos, last_token_only=True), kwargs)


def _position_first(a: int | torch.Tensor, b: int | torch.Tensor) -> tuple[int | torch.Tensor, torch.Tensor]:
    """A position and tokens, in either order: LitGPT and its pull request #2061 differ. A position is an int or has fewer
    dimensions than tokens."""
    swapped = isinstance(b, int) or (isinstance(a, torch.Tensor) and a.ndim > b.ndim)
    return (b, a) if swapped else (a, b)


def batched_generate_fn(
    model: GPT,
    prompts: torch.Tensor | abc.Sequence[torch.Tensor],
    max_returned_tokens: int,
    prompt_chunksize: int | None = None,
    *,
    sample_args: list[dict[str, Any]] | dict[str, Any],
    stop_tokens: abc.Sequence[abc.Sequence[int]] = (),
    include_prompt: bool,
    include_eos: bool,
    max_new_tokens: int | None = None,
) -> Iterator[list[torch.Tensor | None]]:
    """Generate from several prompts at once, step by step.

    Args:
        model: in evaluation mode. Assigned caches are used; otherwise each iterator has default ones, which it leaves to the
            model at its end.
        prompts: (B, T) tokens, or B tensors (T_b,) of different lengths.
        max_returned_tokens: most tokens of a row, its prompt included.
        prompt_chunksize: most tokens of a prefill call (None: as many as the caches take).
        sample_args: fields of `Sampling`, for all rows or for each.
        stop_tokens: sequences of tokens, each of which ends a row.
        include_prompt: yield the prompts first.
        include_eos: yield the stop sequence.
        max_new_tokens: also, most new tokens of a row.

    Yields:
        For every step a list with, for every row, tokens (n,) int64, or None: the row has ended, or its new tokens may begin a
        stop sequence.

    Raises:
        ValueError: for an empty prompt, settings out of range, or more tokens than the model or its caches take; before any
            work.
    """
    prompts = [prompt if prompt.ndim == 1 else prompt.reshape(-1) for prompt in prompts]
    args = list(sample_args) if isinstance(sample_args, list) else [sample_args] * len(prompts)
    if not prompts:
        raise ValueError("there are no prompts: every prompt needs at least one token")
    if len(args) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(args)} sets of sampling arguments")
    longest = max(len(prompt) for prompt in prompts)
    if max_returned_tokens <= longest:
        raise ValueError(f"max_returned_tokens={max_returned_tokens} leaves no room after a prompt of {longest} tokens")
    most = max_returned_tokens if max_new_tokens is None else max_new_tokens
    sequences = [
        Sequence(prompt, min(max_returned_tokens - len(prompt), most), Sampling(**row_args), stop_tokens, include_eos)
        for prompt, row_args in zip(prompts, args, strict=True)
    ]
    lease = CacheLease.take(model)
    engine = Engine(model, prompt_chunksize, lease=lease)
    try:
        lease.run(prepare_caches, model, len(prompts), max(sequence.max_length for sequence in sequences))
        if include_prompt:
            yield [prompt.to(torch.int64) for prompt in prompts]
        device = prompts[0].device
        for released in decode(engine, sequences):
            if any(released):
                yield [torch.tensor(tokens, device=device) if tokens else None for tokens in released]
    finally:
        lease.release()


def generate_fn(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    prompt_chunksize: int | None = None,
    *,
    include_prompt: bool,
    include_eos: bool,
    stop_tokens: abc.Sequence[abc.Sequence[int]] = (),
    **sampling: Any,
) -> Iterator[torch.Tensor]:
    """Generate from one prompt (T,): `batched_generate_fn` for a batch of one; `sampling` are fields of `Sampling`.

    Yields:
        The prompt, if `include_prompt`, and then tokens (1,) int64.
    """
    flags = {"include_prompt": include_prompt, "include_eos": include_eos}
    steps = batched_generate_fn(
        model, [prompt], max_returned_tokens, prompt_chunksize, sample_args=sampling, stop_tokens=stop_tokens, **flags
    )
    if include_prompt:
        yield next(steps)[0]
    for step in steps:
        yield from step[0].split(1)


def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    prompt_chunksize: int | None = None,
    *,
    eos_id: int | None = None,
    include_prompt: bool = True,
    **sampling: Any,
) -> torch.Tensor:
    """Generate from one prompt (T,) until `eos_id`, which is included, or `max_returned_tokens`: (n,) int64.

    The other arguments are those of `generate_fn`.
    """
    settings = {"include_prompt": include_prompt, "include_eos": True, **sampling}
    stop_tokens = () if eos_id is None else ([eos_id],)
    return torch.cat(
        [*generate_fn(model, prompt, max_returned_tokens, prompt_chunksize, stop_tokens=stop_tokens, **settings)]
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions, PromptLookupOptions, CheckpointOptions):
    """The options of `litgpt generate`."""


@command(GenerateOptions, "checkpoint_dir", "prompt")
def main(options: GenerateOptions) -> None:
    """Answer a prompt, or a file of prompts.

    The answer goes to stdout, statistics to stderr.
    """
    lines = prompt_lines(options)

    def load() -> Ready:
        check = partial(check_request, options, lines)
        return make_ready(options.checkpoint_dir, **options.loading(), huge_pages=options.as_json, check=check)

    answer(options, lines, load)


def prompt_lines(options: AnswerOptions, input: str = "") -> list[PromptLine]:
    """The lines of the file of prompts, or the one prompt."""
    sampling = options.sampling()
    if options.prompts is not None:
        return read_prompts(options.prompts, options.max_new_tokens, sampling, options.sys_prompt, input)
    return [PromptLine(None, options.prompt, options.sys_prompt, options.max_new_tokens, sampling, input=input)]


class Unread(Ready):
    """A model whose weights are not read."""

    device = torch.device("cpu")  # of prompts


def check_request(
    options: AnswerOptions,
    lines: abc.Sequence[PromptLine],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    style: PromptStyle,
    trained_in: Path | None = None,
) -> None:
    """Raise `ValueError` for caches that a model cannot have, and for prompts that do not fit, before its weights are read.

    Args:
        trained_in: see `Ready`.
    """
    config = copy(checkpoint.config)
    if config.n_expert:
        config.first_k_dense_replace = config.n_layer  # hundreds of experts take seconds, and play no part here
    ready = Unread(meta_model(config), tokenizer, style, checkpoint.path, trained_in)
    options = options.as_trained(ready.trained_cache, tell=False)
    rows = options.rows(len(lines))
    options.assign_caches(ready.model, rows)
    submitted(ready, lines, options, rows)


def answer(
    options: AnswerOptions,
    lines: abc.Sequence[PromptLine],
    load: Callable[[], Ready],
    drafter: Callable[[Ready], Drafter] | None = None,
    note: str = "",
) -> None:
    """Answer prompts, on stdout or in a file, with statistics on stderr; common to all commands that generate.

    Args:
        options: of the command.
        lines: the prompts.
        load: loads the model.
        drafter: makes a drafter for it (None: `options.drafter`).
        note: is added to the message about the loading time.
    """
    with answers_to(options.out) as write:
        started = time.perf_counter()
        ready = load()
        options = options.as_trained(ready.trained_cache)
        rows = options.rows(len(lines))
        options.assign_caches(ready.model, rows)
        drafts = options.drafter() if drafter is None else drafter(ready)
        print(f"Model loaded in {time.perf_counter() - started:.1f} s{note}", file=sys.stderr)
        if options.as_json:
            answer_prompts(ready, lines, options, rows, write, drafts)
        else:
            print_answers(ready, lines[0], options, drafts)


def print_answers(ready: Ready, line: PromptLine, options: AnswerOptions, drafter: Drafter | None = None) -> None:
    """Print the answer to a prompt to stdout, with statistics on stderr. One answer is streamed; several are printed when all
    are complete."""
    sequences = sequences_of(ready, line, options)
    started, first = time.perf_counter(), None
    engine = Engine(ready.model, options.prompt_chunksize, drafter)
    prepare_caches(ready.model, len(sequences), sequences[0].max_length)

    def stream() -> Iterator[list[int]]:
        nonlocal first
        for released in decode(engine, sequences):
            is_first, first = first is None, first or time.perf_counter()
            yield released[0] or []
            if is_first and options.max_new_tokens >= LONG_ANSWER:  # the first words do not wait for it
                use_huge_pages(ready.model)

    if len(sequences) == 1:
        for text in ready.tokenizer.decode_stream(stream()):
            print(text, end="", flush=True)
        print()
    else:
        for _ in stream():
            pass
        for sequence in sequences:
            print(ready.tokenizer.decode(sequence.output))
    seconds, new = time.perf_counter() - started, sum(sequence.n_output for sequence in sequences)
    wait = (first or time.perf_counter()) - started
    accepted = f"; {engine.n_accepted} of {counted(engine.n_drafted, 'draft token')} accepted" if drafter else ""
    print(
        f"{counted(new, 'token')} in {seconds:.2f} s, {new / seconds:.1f} tokens/s; "
        f"{counted(sequences[0].prompt_length, 'prompt token')}, first token after {wait:.2f} s; "
        f"key-value cache {ready.model.caches.size_in_bytes() / 1e6:.1f} MB{accepted}",
        file=sys.stderr,
    )
