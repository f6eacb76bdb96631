"""Generating text: the functions that scripts call, and the command `litgpt generate`."""

import sys
import time
from collections import abc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from litgpt.engine.caches import CacheLease, prepare_caches
from litgpt.engine.drafting import Drafter, PromptLookup
from litgpt.engine.engine import Engine, decode
from litgpt.engine.loading import Quantization, Ready, cache_bytes, choose_kv_caches, make_ready
from litgpt.engine.sampling import (
    Sampling,
    batched_sample,
    multinomial_num_samples_1,
    sample,
    sample_top_p,
)
from litgpt.engine.sequence import Sequence
from litgpt.generate.prompts_file import PromptLine, answer_prompts, read_prompts
from litgpt.model import GPT
from litgpt.prompts import encode_prompt

DEFAULT_PROMPT = "What food do llamas eat?"

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


@torch.inference_mode()
def next_token(
    model: GPT, input_pos: int, x: torch.Tensor, input_pos_maxp1: int | None = None, **sample_kwargs: Any
) -> torch.Tensor:
    """Run the tokens x (1, T), which start at `input_pos`, and sample the next one: (1,) int64.

    `sample_kwargs` are those of `sample`; `input_pos_maxp1` is not needed.
    """
    return sample(model(x, input_pos, last_token_only=True), **sample_kwargs)


@torch.inference_mode()
def batched_next_token(
    model: GPT, input_pos: int, x: torch.Tensor, kwargs: dict[str, Any] | list[dict[str, Any]]
) -> torch.Tensor:
    """Run the tokens x (B, T), which start at `input_pos`, and sample the next one of every row: (B, 1) int64.

    `kwargs` are the arguments of `sample`, for all rows or for each.
    """
    logits = model(x, input_pos, last_token_only=True)
    return batched_sample(list(logits), kwargs if isinstance(kwargs, list) else [kwargs] * len(x))


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
        model: in evaluation mode. Its caches are used if they were assigned; else default ones, which the model has when the
            iterator has ended: several iterators do not disturb each other.
        prompts: (B, T) tokens, or B tensors (T_b,) of different lengths.
        max_returned_tokens: most tokens of a row, its prompt included.
        prompt_chunksize: prompts enter in chunks of at most that many tokens (None: in one call where the caches take it,
            else in the largest chunks they take).
        sample_args: arguments of `sample`, for all rows or for each.
        stop_tokens: sequences of tokens, each of which ends a row.
        include_prompt: give the prompts out first.
        include_eos: give the stop sequence out.
        max_new_tokens: also, most new tokens of a row.

    Yields:
        For every step a list with, for every row, tokens (n,) int64, or None where there are none: the row has ended, or
        what came may be the beginning of a stop sequence.

    Raises:
        ValueError: for an empty prompt, settings that make no sense, or more tokens than the model or its caches take;
            before any work.
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
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: abc.Sequence[abc.Sequence[int]] = (),
    include_prompt: bool,
    include_eos: bool,
) -> Iterator[torch.Tensor]:
    """Generate from one prompt (T,), token by token: `batched_generate_fn` for a batch of one.

    Yields:
        The prompt, if `include_prompt`, and then tokens (1,) int64.
    """
    first = include_prompt
    for step in batched_generate_fn(
        model,
        [prompt],
        max_returned_tokens,
        prompt_chunksize,
        sample_args={"temperature": temperature, "top_k": top_k, "top_p": top_p},
        stop_tokens=stop_tokens,
        include_prompt=include_prompt,
        include_eos=include_eos,
    ):
        if first:
            yield step[0]
            first = False
        else:
            yield from step[0].split(1)


def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    prompt_chunksize: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_id: int | None = None,
    include_prompt: bool = True,
) -> torch.Tensor:
    """Generate from one prompt (T,) until `eos_id` comes or there are `max_returned_tokens`: (n,) int64.

    The other arguments are those of `batched_generate_fn` and `sample`. An `eos_id` that ends the text is part of it.
    """
    pieces = generate_fn(
        model,
        prompt,
        max_returned_tokens,
        prompt_chunksize,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=() if eos_id is None else ([eos_id],),
        include_prompt=include_prompt,
        include_eos=True,
    )
    return torch.cat(list(pieces))


def main(
    checkpoint_dir: Path | None = None,
    prompt: str = DEFAULT_PROMPT,
    *,
    prompts: Path | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 0.8,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logprobs: int | None = None,
    quantize: Quantization | None = None,
    precision: str | None = None,
    compile: bool = False,
    kv_cache: Literal["dense", "lastrec"] = "dense",
    cache_length: int | None = None,
    sinks: int = 0,
    prompt_chunksize: int | None = None,
    prompt_lookup: int | None = None,
    seed: int = 1234,
) -> None:
    """Answer a prompt, or a file of prompts.

    The answer goes to stdout, what it cost to stderr.

    Args:
        checkpoint_dir: Folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name. Default: a small
            model that is fetched once.
        prompt: What to answer.
        prompts: File of prompts to answer instead: one a line, or, if it is called .jsonl, JSON objects with a "prompt" and,
            if need be, a "sys_prompt", "max_new_tokens", "id", and settings such as "temperature" or "seed". Answers are
            JSON objects, one a line, in the same order.
        out: File for answers as JSON lines. Default: stdout.
        batch_size: Most answers to a file of prompts that are generated at the same time.
        sys_prompt: System prompt, where the model's chat template has one.
        num_samples: Number of answers to a prompt, generated together as one batch.
        max_new_tokens: Most tokens of an answer.
        top_k: Draw each token from the k likeliest ones only.
        top_p: Draw each token from the likeliest ones whose probabilities add up to this.
        min_p: Draw each token from those that are at least this times as likely as the likeliest one.
        temperature: Below 1 the likelier tokens gain, above 1 they lose; 0 always takes the likeliest.
        repetition_penalty: Above 1 makes tokens that were there before, prompt included, less likely.
        presence_penalty: Taken off the logits of tokens that the answer has.
        frequency_penalty: Taken off the logits of the answer's tokens as often as it has them.
        logprobs: Give answers as JSON with each token's log-probability, and those of this many likeliest ones.
        quantize: Keep the weights in fewer bits: int8, int4, or those of bitsandbytes (bnb.*, needs a GPU).
        precision: bf16-true, 16-true or 32-true. Default: what the device computes well in.
        compile: Compile the decoding step. Takes a while at first, and is faster then.
        kv_cache: What the key-value cache keeps: dense (every token) or lastrec (the last cache_length ones).
        cache_length: Tokens that the key-value cache holds. Default: as many as are needed (dense), 1024 (lastrec).
        sinks: First tokens that a lastrec cache never drops.
        prompt_chunksize: Most tokens of the prompt that go through the model at once. Default: all of them.
        prompt_lookup: Guess up to this many next tokens at a time from the text so far, and check them in one call. The
            answer stays the same; one that repeats much of the prompt comes faster. 15 is a good value. Default: no drafts.
        seed: Of the random numbers. Every answer has its own; they count up from this.
    """
    check_options(prompt, num_samples, max_new_tokens, cache_length)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if prompts is not None and prompt != DEFAULT_PROMPT:
        raise ValueError("there are a --prompt and a file of --prompts: give one of them")
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {str(out.absolute().parent)!r} for {out.name}")
    if logprobs is not None and logprobs < 0:
        raise ValueError(f"logprobs must be at least 0, got {logprobs}")
    drafter = None if prompt_lookup is None else PromptLookup(prompt_lookup)
    sampling = Sampling(
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed=seed
    )
    lines = [PromptLine(None, prompt, sys_prompt, max_new_tokens, sampling)]
    if prompts is not None:
        lines = read_prompts(prompts, max_new_tokens, sampling, sys_prompt)
    as_json = prompts is not None or out is not None or logprobs is not None
    rows = min(batch_size, len(lines) * num_samples) if as_json else num_samples
    started = time.perf_counter()
    ready = make_ready(checkpoint_dir, precision, quantize, compile)
    choose_kv_caches(ready.model, kv_cache, cache_length, rows, sinks)
    print(f"Model loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if as_json:
        answer_prompts(ready, lines, rows, out, num_samples, prompt_chunksize, logprobs, drafter)
    else:
        tokens = encode_prompt(ready.tokenizer, ready.prompt_style, prompt, sys_prompt=sys_prompt).to(ready.device)
        print_answers(ready, tokens, max_new_tokens, sampling, num_samples, prompt_chunksize, drafter)


def check_options(prompt: str, num_samples: int, max_new_tokens: int, cache_length: int | None = None) -> None:
    """Raise `ValueError` for options of a command that mean nothing."""
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not prompt:
        raise ValueError("the prompt is empty: give some text with --prompt")
    if cache_length is not None and cache_length < 1:
        raise ValueError(f"cache_length must be at least 1, got {cache_length}")


def print_answers(
    ready: Ready,
    prompt: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int = 1,
    prompt_chunksize: int | None = None,
    drafter: Drafter | None = None,
) -> None:
    """What all commands that generate do: stream the answer to stdout, and then tell on stderr what it cost.

    Args:
        ready: the model and what belongs to it.
        prompt: tokens (T,).
        max_new_tokens: most tokens of an answer.
        sampling: how they are drawn. The seeds of several answers follow each other.
        num_samples: number of answers, generated together as one batch; they are printed when all are there.
        prompt_chunksize: see `batched_generate_fn`.
        drafter: drafts the next tokens.
    """
    seeds = [None if sampling.seed is None else sampling.seed + i for i in range(num_samples)]
    sequences = [Sequence(prompt, max_new_tokens, replace(sampling, seed=seed), ready.stop_tokens) for seed in seeds]
    started, first = time.perf_counter(), None
    engine = Engine(ready.model, prompt_chunksize, drafter)
    prepare_caches(ready.model, num_samples, sequences[0].max_length)

    def stream() -> Iterator[list[int]]:
        nonlocal first
        for released in decode(engine, sequences):
            first = first or time.perf_counter()
            yield released[0] or []

    if num_samples == 1:
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
    stood = f"; {engine.n_accepted} of {engine.n_drafted} draft tokens accepted" if drafter else ""
    print(
        f"{new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s; {len(prompt)} prompt tokens, first token after "
        f"{wait:.2f} s; key-value cache {cache_bytes(ready.model) / 1e6:.1f} MB{stood}",
        file=sys.stderr,
    )
