"""The command `litgpt chat`."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litgpt.chat.conversation import Conversation
from litgpt.chat.ctrl_c import CtrlC
from litgpt.chat.messages import END_OF_MESSAGE, line_reader, read_messages, split_command
from litgpt.chat.session_lock import locked
from litgpt.checkpoint.find import find_checkpoint
from litgpt.engine.answer import counted
from litgpt.engine.loading import make_ready
from litgpt.engine.sampling import Sampling
from litgpt.engine.session_file import read_session
from litgpt.errors import debugging, describe
from litgpt.generate.base import generate_fn
from litgpt.generate.options import (
    SAMPLING_NAMES,
    CacheOptions,
    CheckpointOptions,
    PromptLookupOptions,
    SamplingOptions,
    command,
    option,
)
from litgpt.model import GPT
from litgpt.runners.quantized_weights import Scheme
from litgpt.standard_streams import ClosedStream
from litgpt.waiting import tell, waiting

HELP = "/reset starts anew, /system TEXT sets the system prompt, /exit leaves, Ctrl-C stops an answer"
SAVED_EACH_TIME = 64_000_000  # bytes; writing larger files takes noticeable time


def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    stop_tokens: Sequence[Sequence[int]] = (),
    **sampling: Any,
) -> Iterator[torch.Tensor]:
    """`generate_fn` without prompt and stop sequence: yields tokens (1,)."""
    flags = {"include_prompt": False, "include_eos": False}
    return generate_fn(model, prompt, max_returned_tokens, stop_tokens=stop_tokens, **flags, **sampling)


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions, CacheOptions, PromptLookupOptions, CheckpointOptions):
    """The options of `litgpt chat`."""

    sys_prompt: str | None = option(None, "System prompt, where the model's chat template has one.")
    multiline: bool = option(False, f"Messages of several lines, each ended by a line with {END_OF_MESSAGE}.")
    session: Path | None = option(
        None,
        "File to go on from, with the caches as they were, and to save to: after every answer (while it is no larger than "
        "64 MB) and on leaving. It is made if it does not exist.",
    )


@command(ChatOptions, "checkpoint_dir")
def main(options: ChatOptions) -> None:
    """Chat with a model.

    Answers go to stdout, everything else to stderr.
    """
    sampling = {name: getattr(options, name) for name in SAMPLING_NAMES if name != "seed"}
    Sampling(**sampling)  # raises for settings out of range
    session = options.session
    if isinstance(sys.stdin, ClosedStream):
        raise ValueError("stdin is closed: chat reads messages from it, from a terminal, a pipe or a file")
    if isinstance(sys.stdout, ClosedStream):
        raise ValueError("stdout is closed: chat writes answers to it")
    if session is not None and not session.absolute().parent.is_dir():
        raise FileNotFoundError(f"--session {session}: there is no folder {session.parent}")
    with nullcontext() if session is None else locked(session):
        saved = None
        if session is not None and session.exists():
            with waiting("Reading the session"):
                saved = read_session(session)
        if options.quantize is not None:
            Scheme(options.quantize)  # raises before anything is downloaded
        path = find_checkpoint(options.checkpoint_dir, options.access_token)
        ready = make_ready(path, **options.loading(), check=lambda checkpoint, *_: options.check_caches(checkpoint))
        options = options.as_trained(ready.trained_cache)
        conversation = Conversation(
            ready,
            lambda: options.session_of(ready.model),
            options.max_new_tokens,
            sampling,
            options.sys_prompt,
            notify=tell,
            drafter=options.drafter(),
        )
        if options.compile:
            with waiting("Compiling the decoding step, once, which takes about half a minute"):
                list(conversation.session.generate([0], 4, temperature=0))
                conversation.reset()
        torch.manual_seed(options.seed)
        tell(f"Talking with {ready.model.config.name or path.resolve().name}. {HELP}.")
        if options.multiline:
            tell(f"A line with {END_OF_MESSAGE} ends a message.")
        if saved is not None:
            conversation.resume(saved)
            counts = counted(len(conversation.messages), "message"), counted(len(conversation.session.tokens), "token")
            tell(f"Going on after {', '.join(counts)}.")
        with CtrlC().handled() as ctrl_c:
            _talk(conversation, ctrl_c, options.multiline, session)


def _talk(conversation: Conversation, ctrl_c: CtrlC, multiline: bool, path: Path | None) -> None:
    """Answer messages and execute commands until the input ends; the conversation is saved to `path`."""
    read_line = line_reader()

    def read_next(prompt: str) -> str:
        # an interrupt must not lose input from a pipe; at a terminal it discards the line
        with ctrl_c.as_mode("raise" if sys.stdin.isatty() else "note"):
            return read_line(prompt)

    try:
        for message in read_messages(read_next, multiline, lambda: tell("/exit leaves")):
            command, text = split_command(message)
            if command in ("/exit", "/quit"):
                break
            if command == "/reset":
                conversation.reset()
                tell("Everything is forgotten.")
            elif command == "/system":
                conversation.sys_prompt = text or None
                conversation.reset()
                tell(f"System prompt: {text or 'of the chat template'}. Starting anew.")
            elif command == "/help":
                tell(f"{HELP}, Alt-Enter begins a new line.")
            elif message:
                _answer(conversation, message, ctrl_c)
                if path is not None:
                    _keep(conversation, path, ctrl_c)
    finally:
        if path is not None:
            with ctrl_c.as_mode("raise"), waiting("Saving the session"):
                conversation.save(path)
            tokens = counted(len(conversation.session.tokens), "token")
            tell(f"Saved to {path}: {tokens}, {path.stat().st_size / 1e6:.1f} MB.")


def _keep(conversation: Conversation, path: Path, ctrl_c: CtrlC) -> None:
    """Save the conversation, unless that takes long."""
    if path.exists() and path.stat().st_size > SAVED_EACH_TIME:
        return
    try:
        with ctrl_c.as_mode("raise"), waiting("Saving the session"):
            conversation.save(path)
    except (OSError, KeyboardInterrupt) as error:
        tell(f"error: this answer is not saved yet: {str(error) or 'interrupted'}")


def _answer(conversation: Conversation, message: str, ctrl_c: CtrlC) -> None:
    """Stream the answer, and print its statistics. Ctrl-C ends it; an error does not change the conversation."""
    started = first = time.perf_counter()
    parts = conversation.ask(message)
    try:
        with ctrl_c.as_mode("raise"), waiting(lambda: _progress(conversation)):
            part = next(parts, None)
        first = time.perf_counter()
        with ctrl_c.as_mode("stop"):
            while part is not None and not ctrl_c.pressed:
                _print(part)
                part = next(parts, None)
        parts.close()
    except KeyboardInterrupt:
        parts.close()
        conversation.renew_caches()
        if not conversation.answer_tokens:
            tell("Interrupted: the message was dropped.")
            return
    except _OutputError as error:
        parts.close()
        raise error.reason from None
    except Exception as error:
        if debugging():
            raise
        if conversation.answer_tokens:
            _print("\n")
        tell(f"error: {describe(error)}")
        return
    _print("\n")
    seconds, tokens = time.perf_counter() - first, conversation.answer_tokens
    if tokens == conversation.answer_limit:
        why = "--max_new_tokens" if tokens == conversation.max_new_tokens else "the context is full"
        tell(f"[stopped at {counted(tokens, 'token')}: {why}]")
    rate = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 else ""
    tell(
        f"[{counted(tokens, 'token')}{rate}; first after {first - started:.2f} s; "
        f"context {counted(conversation.prompt_tokens + tokens, 'token')}, {conversation.session.reused:,} of them "
        f"computed before; key-value cache {conversation.session.cache_bytes / 1e6:.1f} MB]"
    )


def _progress(conversation: Conversation) -> str:
    total = conversation.prompt_tokens
    done = min(conversation.ready.model.next_token_pos, total)  # the session's caches are in the model meanwhile
    return f"Reading: {done:,} of {total:,} tokens"


class _OutputError(Exception):
    """stdout fails, which ends the chat, unlike errors of the model."""

    def __init__(self, reason: OSError) -> None:
        self.reason = reason


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise _OutputError(error) from None
