"""The command `litgpt chat`."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from litgpt.chat.conversation import Conversation
from litgpt.generate.base import generate_fn
from litgpt.generate.sampling import check_sampling
from litgpt.generate.setup import Quantization, cache_bytes, choose_kv_caches, make_ready
from litgpt.model import GPT

HELP = "/reset starts anew, /system TEXT sets the system prompt, /exit leaves, Ctrl-C stops an answer"
END_OF_MESSAGE = "!submit"


def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
) -> Iterator[torch.Tensor]:
    """`generate_fn` without the prompt and without the stop sequence: yields tokens (1,)."""
    return generate_fn(
        model,
        prompt,
        max_returned_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        include_prompt=False,
        include_eos=False,
    )


def main(
    checkpoint_dir: Path | None = None,
    *,
    sys_prompt: str | None = None,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: Quantization | None = None,
    precision: str | None = None,
    compile: bool = False,
    multiline: bool = False,
    access_token: str | None = None,
    kv_cache: Literal["dense", "lastrec"] = "dense",
    cache_length: int | None = None,
    sinks: int = 0,
    prompt_chunksize: int | None = None,
    seed: int = 1234,
) -> None:
    """Talk with a model.

    Answers go to stdout, everything else to stderr.

    Args:
        checkpoint_dir: Folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name. Default: a small
            model that is fetched once.
        sys_prompt: System prompt, where the model's chat template has one.
        max_new_tokens: Most tokens of an answer.
        top_k: Draw each token from the k likeliest ones only.
        top_p: Draw each token from the likeliest ones whose probabilities add up to this.
        temperature: Below 1 the likelier tokens gain, above 1 they lose; 0 always takes the likeliest.
        quantize: Quantisation of the weights (needs a GPU).
        precision: bf16-true, 16-true or 32-true. Default: what the device computes well in.
        compile: Compile the decoding step. Takes a while at first, and is faster then.
        multiline: Messages of several lines, each ended by a line with !submit.
        access_token: Of the Hugging Face hub, for models that ask for one.
        kv_cache: What the key-value cache keeps: dense (every token) or lastrec (the last cache_length ones).
        cache_length: Tokens that the key-value cache holds. Default: as many as are needed (dense), 1024 (lastrec).
        sinks: First tokens that a lastrec cache never drops.
        prompt_chunksize: Most tokens of a prompt that go through the model at once. Default: all of them.
        seed: Of the random numbers.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if cache_length is not None and cache_length < 1:
        raise ValueError(f"cache_length must be at least 1, got {cache_length}")
    check_sampling(temperature, top_k, top_p)
    torch.manual_seed(seed)
    ready = make_ready(checkpoint_dir, precision, quantize, compile, access_token=access_token)
    choose_kv_caches(ready.model, kv_cache, cache_length, sinks=sinks)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    conversation = Conversation(ready, max_new_tokens, sampling, sys_prompt, prompt_chunksize, notify=_tell)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history at the prompt

    _tell(f"Talking with {ready.model.config.name}. {HELP}.")
    if multiline:
        _tell(f"A line with {END_OF_MESSAGE} ends a message.")
    for message in _messages(multiline):
        if message in ("/exit", "/quit", "exit", "quit"):
            return
        if message == "/reset":
            conversation.reset()
            _tell("Everything is forgotten.")
        elif message.startswith("/system"):
            conversation.sys_prompt = message.removeprefix("/system").strip() or None
            conversation.reset()
            _tell(f"System prompt: {conversation.sys_prompt or 'that of the chat template'}. Starting anew.")
        elif message.startswith("/"):
            _tell(HELP)
        elif message:
            _answer(conversation, message)


def _answer(conversation: Conversation, message: str) -> None:
    """Print the answer as it comes, and then what it cost. Ctrl-C ends it."""
    started, first = time.perf_counter(), None
    pieces = conversation.ask(message)
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    except ValueError as error:
        _tell(f"error: {error}")
        return
    print(flush=True)
    seconds = time.perf_counter() - (first or started)
    rate = f", {(conversation.answer_tokens - 1) / seconds:.1f} tokens/s" if conversation.answer_tokens > 1 else ""
    _tell(
        f"[{conversation.answer_tokens} tokens{rate}; first after {(first or time.perf_counter()) - started:.2f} s; "
        f"context {conversation.prompt_tokens + conversation.answer_tokens} tokens, {conversation.session.reused} of them "
        f"computed before; key-value cache {cache_bytes(conversation.ready.model) / 1e6:.1f} MB]"
    )


def _messages(multiline: bool) -> Iterator[str]:
    """What the user says, until the input ends."""
    lines: list[str] = []
    while True:
        try:
            if sys.stdin.isatty():
                print("... " if lines else ">>> ", end="", file=sys.stderr, flush=True)
            line = input()
        except EOFError:
            if lines:
                yield "\n".join(lines).strip()
            return
        except KeyboardInterrupt:
            lines.clear()
            _tell("\n/exit leaves")
            continue
        if multiline and not (line.startswith("/") and not lines):
            if line.strip() != END_OF_MESSAGE:
                lines.append(line)
                continue
            line = "\n".join(lines)
            lines.clear()
        yield line.strip()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
