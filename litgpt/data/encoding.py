"""Samples as tokens: which tokens a sample has, which of them the loss counts, and a cache of both on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from litgpt.atomic_file import replacing
from litgpt.chat_template import ChatTemplate
from litgpt.prompt_style import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt.waiting import report_progress, waiting

Sample = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
VERSION = 2  # of the cache's files
GROUP = 512  # samples that are encoded at a time, by all cores

_logger = logging.getLogger("litgpt")


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


class Part(NamedTuple):
    """A text to encode, the tokens around it, and whether the loss counts it."""

    text: str
    bos: bool | None = False
    eos: bool = False
    counted: bool = False


class Plan(NamedTuple):
    """What of a sample is to be encoded.

    Attributes:
        parts: encoded apart and put together; if `whole`, the first is all of the text, and its pieces follow.
    """

    parts: list[Part]
    whole: bool = False


class RewrittenAnswerError(ValueError):
    """A template writes an answer otherwise once more messages follow."""


def prompt_of(sample: Sample) -> tuple[str | list[dict[str, str]], dict[str, Any]]:
    """What is said before the (last) response, and further arguments of the prompt style."""
    if "messages" in sample:
        messages = [dict(message) for message in sample["messages"]]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return messages[:last], {"tools": sample["tools"]} if sample.get("tools") else {}
    rest = {
        k: v for k, v in sample.items() if k not in ("instruction", "output", "prompt", "messages") and v is not None
    }
    return sample["instruction"], rest


def render_prompt(sample: Sample, style: PromptStyle) -> str:
    """The text of a sample up to its (last) response. An `input` that the style has no place for follows the instruction."""
    prompt, more = prompt_of(sample)
    if isinstance(prompt, str) and isinstance(style, ChatTemplate):
        more = {name: value for name, value in more.items() if name in ("input", "sys_prompt")}
    text = style.render(prompt, **more)
    about = more.get("input", "") if isinstance(prompt, str) else ""
    if about.strip() and about.strip() not in text:
        text = style.render(f"{prompt}\n\n{about}", **more)
    return text


def bos_of(text: str, tokenizer: Tokenizer, style: PromptStyle) -> bool | None:
    """Whether a BOS token goes before a rendered text: not (False) if it is written there, else as the tokenizer has it."""
    bos_token = getattr(tokenizer, "bos_token", None)
    return False if isinstance(style, ChatTemplate) or (bos_token and text.startswith(bos_token)) else None


def encode_sample(
    sample: Sample, tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int = -1, mask_prompt: bool = True
) -> Encoded:
    """A sample as tokens, cut to `max_seq_length` (-1: not). With `mask_prompt` only responses are counted.

    An instruction and its response are encoded apart, and the response ends with the end token. A conversation is encoded
    as the checkpoint's chat template writes it down; counted is what the assistant says, with the end token of its turn.

    Raises:
        ValueError: if the style cannot write the sample down, or rewrites answers that more messages follow.
    """
    plan = plan_of(sample, tokenizer, style)
    return _assemble(plan, _encode_parts(plan.parts, tokenizer), tokenizer, max_seq_length, mask_prompt)


def plan_of(sample: Sample, tokenizer: Tokenizer, style: PromptStyle) -> Plan:
    """The texts of a sample."""
    if "messages" not in sample:
        prompt = render_prompt(sample, style)
        bos = bos_of(prompt, tokenizer, style)
        return Plan([Part(prompt, bos), Part(sample["output"], eos=True, counted=True)])
    messages = [dict(message) for message in sample["messages"]]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    more = {"tools": sample["tools"]} if sample.get("tools") else {}
    learned = answers[-1:] if sample.get("learn") == "last" else answers
    if isinstance(style, ChatTemplate):
        return _plan_of_template(messages[: answers[-1] + 1], learned, tokenizer, style, more)
    parts: list[Part] = []
    done = ""
    for i in learned:
        before = style.render(messages[:i])
        if not before.startswith(done):
            raise RewrittenAnswerError(_REWRITTEN)
        context = before[len(done) :]
        if done and tokenizer.eos_id is not None:
            context = context.removeprefix(tokenizer.eos_token)
        parts += [
            Part(context, False if done else bos_of(before, tokenizer, style)),
            Part(messages[i]["content"], eos=True, counted=True),
        ]
        done = before + messages[i]["content"]
    return Plan(parts)


_REWRITTEN = (
    "the prompt style writes an answer otherwise once more messages follow: split the conversation into samples that end "
    "with the answer to be learned"
)


def _plan_of_template(
    messages: list[dict[str, Any]], learned: list[int], tokenizer: Tokenizer, style: ChatTemplate, more: dict[str, Any]
) -> Plan:
    text = style.render(messages, add_generation_prompt=False, **more)
    cuts = [0]
    end_texts = [tokenizer.id_to_token(i) for i in tokenizer.eos_ids]
    for i in learned:
        through = (
            text if i == len(messages) - 1 else style.render(messages[: i + 1], add_generation_prompt=False, **more)
        )
        start = _start_of_answer(messages, i, through, style, more)
        content = (messages[i].get("content") or "").strip()
        found = through.find(content, start)
        said = start if found < 0 else found + len(content)  # where the end token may be looked for
        ends = [at + len(token) for token in end_texts if token and (at := through.find(token, said)) >= 0]
        end = min(ends) if ends else len(through.rstrip())
        if through[:end] != text[:end]:
            raise RewrittenAnswerError(_REWRITTEN)
        cuts += [start, end]
    pieces = [Part(text[a:b], counted=i % 2 == 1) for i, (a, b) in enumerate(pairwise([*cuts, len(text)]))]
    return Plan([Part(text), *pieces], whole=True)


def _start_of_answer(
    messages: list[dict[str, Any]], i: int, through: str, style: ChatTemplate, more: dict[str, Any]
) -> int:
    """Where answer `i` begins in the text that ends with it: where the model is asked to write it."""
    before = style.render(messages[:i], **more)
    if through.startswith(before):
        return len(before)
    # a template may open answers with something that it leaves out afterwards
    bare = style.render(messages[:i], add_generation_prompt=False, **more)
    common = os.path.commonprefix([through, bare])
    found = through.find((messages[i].get("content") or "").strip(), len(common))
    if found < 0:
        raise ValueError("the chat template does not write conversations turn by turn")
    return found


def _encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[list[int]]:
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch([part[:3] for part in parts])
    return [list(tokenizer.encode(part.text, bos=part.bos, eos=part.eos)) for part in parts]


def _assemble(
    plan: Plan, encoded: Sequence[Sequence[int]], tokenizer: Tokenizer, max_seq_length: int, mask_prompt: bool
) -> Encoded:
    parts = plan.parts[1:] if plan.whole else plan.parts
    pieces = encoded[1:] if plan.whole else encoded
    ids = np.array([i for tokens in pieces for i in tokens], dtype=np.int32)
    counted = np.repeat([part.counted for part in parts], [len(tokens) for tokens in pieces])
    raw = int(counted.sum())
    if plan.whole:
        raw = len(encoded[0])
        if ids.tolist() != encoded[0]:  # the text has other tokens where its pieces meet
            ids, counted = np.array(encoded[0], dtype=np.int32), np.zeros(raw, dtype=bool)
            text, begin = "", 0
            for part in parts:
                text += part.text
                end = _common(ids, tokenizer.encode(text, bos=False).tolist())
                counted[begin:end], begin = part.counted, end
    if not mask_prompt:
        counted = np.ones(len(ids), dtype=bool)
    end = len(ids) if max_seq_length < 0 else max_seq_length
    return Encoded(ids[:end], counted[:end], raw)


def _common(ids: np.ndarray, others: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    n = min(len(ids), len(others))
    different = np.flatnonzero(ids[:n] != np.array(others[:n], dtype=np.int32))
    return int(different[0]) if len(different) else n


def sample_problem(sample: Any) -> str | None:
    """What is wrong with a sample, in words (None: nothing)."""
    if not isinstance(sample, Mapping):
        return f"expected a mapping with 'instruction' and 'output', or 'messages', got {type(sample).__name__}"
    if "messages" in sample:
        messages = sample["messages"]
        if not isinstance(messages, list) or not messages:
            return "'messages' must be a list of messages"
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                return f"'messages[{i}].role' must be one of {', '.join(ROLES)}"
            calls = message["role"] == "assistant" and message.get("tool_calls")
            if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
                return f"'messages[{i}].content' must be a text"
        if all(message["role"] != "assistant" for message in messages):
            return "'messages' has no message of the assistant"
        return None
    for name in ("instruction", "output"):
        if not isinstance(sample.get(name), str):
            return f"'{name}' is missing" if name not in sample else f"'{name}' must be a text"
    for name in ("input", "sys_prompt"):
        if not isinstance(sample.get(name), str | None):
            return f"'{name}' must be a text"
    return None


class EncodedSamples(Sequence[Encoded]):
    """Samples as tokens, in a few arrays; made by `of`. `source[i]` is the sample that number i was made of: a conversation
    becomes several where the template rewrites answers that more messages follow, one for each answer."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._ids, self._counted, self._raw = arrays["ids"], arrays["counted"], arrays["raw"]
        self._ends, self.source = arrays["ends"], arrays["source"]

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

        A tokenizer without a `fingerprint`, or a style that is not of this package and may change at any time, is not cached.

        Raises:
            ValueError: if there is no sample, one cannot be written down, or no token is to be learned in any.
        """
        if not samples:
            raise ValueError(f"{name}: there are no samples")
        path = None
        if hasattr(tokenizer, "fingerprint") and type(style).__module__.partition(".")[0] == "litgpt":
            about = [VERSION, type(style).__qualname__, style.init_args(), tokenizer.fingerprint]
            digest = hashlib.sha256(json.dumps([*about, max_seq_length, mask_prompt], sort_keys=True).encode())
            for sample in samples:
                digest.update(json.dumps(sample, sort_keys=True, default=str).encode())
            path = cache_dir() / f"{digest.hexdigest()[:32]}.safetensors"
        arrays = None if path is None else _read(path)
        if arrays is None:
            with waiting(f"Encoding {name}", log=True):
                arrays = _encode(samples, tokenizer, style, max_seq_length, mask_prompt)
            with suppress(OSError):  # a cache that cannot be written is none
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as temporary:
                        save_file(arrays, temporary)
        found = cls(arrays)
        empty = sum(not sample.counted.any() for sample in found)
        if empty == len(found):
            raise ValueError(f"{name}: no sample has a token to be learned")
        if empty:
            _logger.warning(
                f"{name}: {empty} of {len(found)} samples have no token to be learned within {max_seq_length} tokens"
            )
        return found


def cache_dir() -> Path:
    """Where encoded samples are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litgpt" / "samples"


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return load_file(path)
    except (SafetensorError, OSError):  # not there, or not whole
        return None


def _encode(
    samples: Sequence[Sample], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int, mask_prompt: bool
) -> dict[str, np.ndarray]:
    encoded: list[Encoded] = []
    source: list[int] = []
    for begin in range(0, len(samples), GROUP):
        plans: list[Plan] = []
        for i, sample in enumerate(samples[begin : begin + GROUP], begin):
            try:
                made = _plans_of(sample, tokenizer, style)
            except ValueError as error:
                raise ValueError(f"{getattr(sample, 'place', f'sample {i}')}: {error}") from None
            plans += made
            source += [i] * len(made)
        tokens = iter(_encode_parts([part for plan in plans for part in plan.parts], tokenizer))
        for plan in plans:
            encoded.append(_assemble(plan, [next(tokens) for _ in plan.parts], tokenizer, max_seq_length, mask_prompt))
        report_progress(begin + GROUP, len(samples))
    return {
        "ids": np.concatenate([sample.ids for sample in encoded]),
        "counted": np.concatenate([sample.counted for sample in encoded]),
        "raw": np.array([sample.raw for sample in encoded], dtype=np.int64),
        "ends": np.cumsum([len(sample.ids) for sample in encoded], dtype=np.int64),
        "source": np.array(source, dtype=np.int64),
    }


def _plans_of(sample: Sample, tokenizer: Tokenizer, style: PromptStyle) -> list[Plan]:
    """One plan; or one for each answer of a conversation whose answers do not stay as they are."""
    try:
        return [plan_of(sample, tokenizer, style)]
    except RewrittenAnswerError:
        messages = sample["messages"]
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = ({**sample, "messages": messages[:end], "learn": "last"} for end in ends)
        return [plan_of(part, tokenizer, style) for part in parts]
