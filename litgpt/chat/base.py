"""The command `litgpt chat`."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from litgpt.chat.conversation import Conversation
from litgpt.engine.drafting import PromptLookup
from litgpt.engine.loading import Quantization, make_ready
from litgpt.engine.sampling import check_sampling
from litgpt.engine.session import Session
from litgpt.engine.session_file import read_session
from litgpt.generate.base import generate_fn
from litgpt.model import GPT

HELP = "/reset starts anew, /system TEXT sets the system prompt, /exit leaves, Ctrl-C stops an answer"
END_OF_MESSAGE = "!submit"
SAVED_EACH_TIME = 64_000_000  # bytes: a larger file takes long enough to write to be noticed after every answer


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
    prompt_lookup: int | None = None,
    session: Path | None = None,
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
        quantize: Keep the weights in fewer bits: int8, int4, or those of bitsandbytes (bnb.*, needs a GPU).
        precision: bf16-true, 16-true or 32-true. Default: what the device computes well in.
        compile: Compile the decoding step. Takes a while at first, and is faster then.
        multiline: Messages of several lines, each ended by a line with !submit.
        access_token: Of the Hugging Face hub, for models that ask for one.
        kv_cache: What the key-value cache keeps: dense (every token) or lastrec (the last cache_length ones).
        cache_length: Tokens that the key-value cache holds. Default: as many as are needed (dense), 1024 (lastrec).
        sinks: First tokens that a lastrec cache never drops.
        prompt_chunksize: Most tokens of a prompt that go through the model at once. Default: all of them.
        prompt_lookup: Guess up to this many next tokens at a time from what was said, and check them in one call: the same
            answers, faster where they repeat much of it. 15 is a good value. Default: no drafts.
        session: File to go on from, with the caches as they were, and to save to: after every answer (while it is no larger
            than 64 MB) and on leaving. It is made if it does not exist.
        seed: Of the random numbers.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if cache_length is not None and cache_length < 1:
        raise ValueError(f"cache_length must be at least 1, got {cache_length}")
    check_sampling(temperature, top_k, top_p)
    drafter = None if prompt_lookup is None else PromptLookup(prompt_lookup)
    if session is not None and not session.absolute().parent.is_dir():
        raise FileNotFoundError(f"--session {session}: there is no folder {session.parent}")
    saved = read_session(session) if session is not None and session.exists() else None
    torch.manual_seed(seed)
    ready = make_ready(checkpoint_dir, precision, quantize, compile, access_token=access_token)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    caches = Session(ready.model, kv_cache, cache_length, sinks, prompt_chunksize)
    conversation = Conversation(ready, caches, max_new_tokens, sampling, sys_prompt, notify=_tell, drafter=drafter)
    if saved is not None:
        conversation.resume(saved)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history at the prompt

    _tell(f"Talking with {ready.model.config.name}. {HELP}.")
    if multiline:
        _tell(f"A line with {END_OF_MESSAGE} ends a message.")
    if saved is not None:
        _tell(f"Going on after {len(conversation.messages)} messages, {len(caches.tokens)} tokens.")
    for message in _messages(multiline):
        if message in ("/exit", "/quit", "exit", "quit"):
            break
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
            if session is not None:
                _keep(conversation, session)
    if session is not None:
        conversation.save(session)
        _tell(f"Saved to {session}: {len(caches.tokens)} tokens, {session.stat().st_size / 1e6:.1f} MB.")


def _keep(conversation: Conversation, path: Path) -> None:
    """Save what was said so far, unless that takes long."""
    if path.exists() and path.stat().st_size > SAVED_EACH_TIME:
        return
    try:
        conversation.save(path)
    except (OSError, KeyboardInterrupt) as error:
        _tell(f"error: this answer is not saved yet: {str(error) or 'interrupted'}")


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
        f"computed before; key-value cache {conversation.session.cache_bytes / 1e6:.1f} MB]"
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
