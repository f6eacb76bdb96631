"""Samples as tokens: which tokens a sample has, which of them the loss counts, and a cache of both on disk."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from litgpt.atomic_file import replacing
from litgpt.chat_template import ChatTemplate
from litgpt.prompt_style import PromptStyle
from litgpt.prompts import encode_prompt
from litgpt.tokenizer import Tokenizer

Sample = Mapping[str, Any]
VERSION = 1  # of the cache's files


class Encoded(NamedTuple):
    """A sample as tokens.

    Attributes:
        ids: (T,) tokens.
        counted: (T,) whether the loss counts the token.
        raw: tokens of the texts alone, without those of the prompt style.
    """

    ids: np.ndarray
    counted: np.ndarray
    raw: int


def prompt_of(sample: Sample) -> tuple[str | list[dict[str, str]], dict[str, str]]:
    """What is said before the (last) response, and further arguments of the prompt style."""
    if "messages" in sample:
        messages = list(sample["messages"])
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return messages[:last], {}
    rest = {name: value for name, value in sample.items() if name not in ("instruction", "output")}
    return sample["instruction"], rest


def encode_sample(
    sample: Sample, tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int = -1, mask_prompt: bool = True
) -> Encoded:
    """A sample as tokens, cut to `max_seq_length` (-1: not). With `mask_prompt` only responses are counted.

    An instruction and its response are encoded apart, and the response ends with the end token; a conversation is encoded
    as the style writes it down.
    """
    if "messages" in sample:
        ids, counted = encode_conversation(sample["messages"], tokenizer, style)
        raw = len(ids)
    else:
        prompt, more = prompt_of(sample)
        before = encode_prompt(tokenizer, style, prompt, **more)
        after = tokenizer.encode(sample["output"], bos=False, eos=True)
        ids = torch.cat((before, after)).numpy()
        counted = np.arange(len(ids)) >= len(before)
        raw = len(after)
    if not mask_prompt:
        counted = np.ones(len(ids), dtype=bool)
    end = len(ids) if max_seq_length < 0 else max_seq_length
    return Encoded(ids[:end].astype(np.int32), counted[:end], raw)


def encode_conversation(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, style: PromptStyle
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (T,) of a conversation, and which of them the assistant says, the end token of its turn included.

    What comes before an answer and the answer itself are encoded apart, as they are when the model answers.

    Raises:
        ValueError: if no message is the assistant's, or the style writes an answer otherwise once more messages follow.
    """
    messages = [dict(message) for message in messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    ids: list[int] = []
    counted: list[bool] = []
    done = ""
    for i in answers:
        before, through = _texts_around(messages, i, style)
        if not before.startswith(done):
            raise ValueError(
                "the prompt style writes an answer otherwise once more messages follow: split the conversation into "
                "samples that end with the answer to be learned"
            )
        if done:
            context = tokenizer.encode(before[len(done) :], bos=False).tolist()
        else:
            context = encode_prompt(tokenizer, style, messages[:i]).tolist()
        answer = tokenizer.encode(through[len(before) :], bos=False, eos=not isinstance(style, ChatTemplate)).tolist()
        ends = [at for at, token in enumerate(answer) if token in (tokenizer.eos_id, *tokenizer.eos_ids)]
        said = ends[0] + 1 if ends else len(answer)  # a line break after the end token is not the assistant's
        ids += context + answer
        counted += [False] * len(context) + [True] * said + [False] * (len(answer) - said)
        done = through
    return np.array(ids, dtype=np.int32), np.array(counted)


def _texts_around(messages: list[dict[str, str]], i: int, style: PromptStyle) -> tuple[str, str]:
    """The text up to where answer `i` begins, and the text up to its end."""
    before = style.render(messages[:i])
    if isinstance(style, ChatTemplate):
        through = style.render(messages[: i + 1], add_generation_prompt=False)
        if not through.startswith(before):  # a template may open answers with something that it leaves out afterwards
            bare = style.render(messages[:i], add_generation_prompt=False)
            content = through.find(messages[i]["content"].strip(), len(bare))
            if not through.startswith(bare) or content < 0:
                raise ValueError("the chat template does not write conversations turn by turn")
            before = through[:content]
        return before, through
    return before, before + messages[i]["content"]


def sample_problem(sample: Any) -> str | None:
    """What is wrong with a sample, in words (None: nothing)."""
    if not isinstance(sample, Mapping):
        return f"expected a mapping with 'instruction' and 'output', or 'messages', got {type(sample).__name__}"
    if "messages" in sample:
        messages = sample["messages"]
        if not isinstance(messages, list) or not messages:
            return "'messages' must be a list of messages"
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant"):
                return f"'messages[{i}]' must have a 'role': system, user or assistant"
            if not isinstance(message.get("content"), str):
                return f"'messages[{i}].content' must be a text"
        if all(message["role"] != "assistant" for message in messages):
            return "'messages' has no message of the assistant"
        return None
    for name in ("instruction", "output"):
        if not isinstance(sample.get(name), str):
            return f"'{name}' is missing" if name not in sample else f"'{name}' must be a text"
    if not isinstance(sample.get("input", ""), str):
        return "'input' must be a text"
    return None


class EncodedSamples(Sequence[Encoded]):
    """Samples as tokens, in three arrays; made by `of`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._ids, self._counted, self._raw = arrays["ids"], arrays["counted"], arrays["raw"]
        self._ends = arrays["ends"]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Encoded:
        begin = self._ends[index - 1] if index else 0
        part = slice(begin, self._ends[index])
        return Encoded(self._ids[part], self._counted[part], int(self._raw[index]))

    @property
    def lengths(self) -> list[int]:
        return np.diff(self._ends, prepend=0).tolist()

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        tokenizer: Tokenizer,
        style: PromptStyle,
        max_seq_length: int,
        mask_prompt: bool,
        name: str,
    ) -> "EncodedSamples":
        """Encode samples, or take them from the cache, whose files are named by all that decides what is in them.

        Raises:
            ValueError: if there is no sample, or no token to be learned in any.
        """
        if not samples:
            raise ValueError(f"{name}: there are no samples")
        about = [
            VERSION,
            type(style).__qualname__,
            style.init_args(),
            tokenizer.fingerprint,
            max_seq_length,
            mask_prompt,
        ]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for sample in samples:
            digest.update(json.dumps(sample, sort_keys=True, default=str).encode())
        path = cache_dir() / f"{digest.hexdigest()[:32]}.safetensors"
        arrays = _read(path)
        if arrays is None:
            arrays = _encode(samples, tokenizer, style, max_seq_length, mask_prompt, name)
            with suppress(OSError):  # a cache that cannot be written is none
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    save_file(arrays, temporary)
        if not arrays["counted"].any():
            raise ValueError(f"{name}: no sample has a token to be learned")
        return cls(arrays)


def cache_dir() -> Path:
    """Where encoded samples are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litgpt" / "samples"


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return None


def _encode(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    mask_prompt: bool,
    name: str,
) -> dict[str, np.ndarray]:
    encoded = [
        encode_sample(sample, tokenizer, style, max_seq_length, mask_prompt)
        for sample in track(samples, description=f"Encoding {name}", console=Console(stderr=True), transient=True)
    ]
    return {
        "ids": np.concatenate([sample.ids for sample in encoded]),
        "counted": np.concatenate([sample.counted for sample in encoded]),
        "raw": np.array([sample.raw for sample in encoded], dtype=np.int64),
        "ends": np.cumsum([len(sample.ids) for sample in encoded], dtype=np.int64),
    }
