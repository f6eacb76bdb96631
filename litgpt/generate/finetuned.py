"""What the commands for fine-tuned models share."""

import inspect
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.finetuned import Finetuned
from litgpt.engine.loading import choose_kv_caches, make_ready
from litgpt.engine.sampling import Sampling
from litgpt.generate import base
from litgpt.prompts import PromptStyle, encode_prompt
from litgpt.tokenizer import Tokenizer


def answer(
    finetuned: Finetuned,
    checkpoint_dir: Path | None,
    prompt: str,
    input: str,
    sys_prompt: str | None,
    max_new_tokens: int,
    top_k: int | None,
    top_p: float,
    temperature: float,
    quantize: str | None,
    precision: str | None,
    compile: bool,
    kv_cache: str,
    cache_length: int | None,
    sinks: int,
    prompt_chunksize: int | None,
    seed: int,
) -> None:
    """What the commands for fine-tuned models do: answer a prompt. The options are those of `litgpt generate`."""
    base.check_options(prompt, 1, max_new_tokens, cache_length)
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    started = time.perf_counter()
    ready = make_ready(finetuned.base(checkpoint_dir), precision, quantize, compile, load=finetuned.load)
    ready.prompt_style = finetuned.prompt_style() or ready.prompt_style
    choose_kv_caches(ready.model, kv_cache, cache_length, sinks=sinks)
    tokens = encode_with_input(ready.tokenizer, ready.prompt_style, prompt, input, sys_prompt).to(ready.device)
    print(f"Model loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    base.print_answers(ready, tokens, max_new_tokens, sampling, prompt_chunksize=prompt_chunksize)


def encode_with_input(
    tokenizer: Tokenizer, style: PromptStyle, prompt: str, input: str, sys_prompt: str | None
) -> torch.Tensor:
    """Tokens (T,) of a prompt and of the text it is about; `ValueError` if the style has no place for such a text."""
    plain = encode_prompt(tokenizer, style, prompt, sys_prompt=sys_prompt)
    if not input:
        return plain
    tokens = encode_prompt(tokenizer, style, prompt, sys_prompt=sys_prompt, input=input)
    if torch.equal(tokens, plain):
        raise ValueError(
            f"the prompt style {type(style).__name__} has no place for an input: make it part of the prompt"
        )
    return tokens


def explained_by(other: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Completes the docstring of a command with the explanations that `other` has for parameters of the same name."""
    lines = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(other).partition("Args:\n")[2], re.MULTILINE)

    def complete(command: Callable[..., Any]) -> Callable[..., Any]:
        doc = inspect.getdoc(command)
        missing = [name for name in inspect.signature(command).parameters if f"    {name}: " not in doc]
        texts = dict(lines)
        command.__doc__ = "\n".join([doc, *(f"    {name}: {texts[name]}" for name in missing)])
        return command

    return complete
