"""Samples as tokens: which tokens a sample has, which of them the loss counts, and a cache of both on disk."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from litgpt.atomic_file import replacing
from litgpt.chat_template import ChatTemplate
from litgpt.prompt_style import PromptStyle
from litgpt.prompts import bos_of
from litgpt.tokenizer import Tokenizer
from litgpt.waiting import report_progress, waiting

Sample = Mapping[str, Any]
Splits = tuple[Sequence[Sample], Sequence[Sample]]  # for training, and for validation
VERSION = 4  # of the cache's files
GROUP = 512  # samples that are encoded at a time, by all cores


class Encoded(NamedTuple):
    """A sample as tokens."""

    ids: np.ndarray  # (T,)
    counted: np.ndarray  # (T,) whether the loss counts the token
    raw: int  # tokens of the texts alone, without those of the prompt style


class Part(NamedTuple):
    """A text that is encoded by itself, the tokens around it, and whether the loss counts it; or where it does: characters at
    which counted text begins and ends, in turn."""

    text: str
    bos: bool | None = False
    eos: bool = False
    counted: bool | Sequence[int] = False


class RewrittenAnswerError(ValueError):
    """A prompt style renders an answer differently when more messages follow."""


def _conversation(sample: Sample) -> tuple[list[dict[str, Any]], list[int], dict[str, Any]]:
    """Messages, which of them are answers (the first one is none), and further arguments of the prompt style."""
    messages = [dict(message) for message in sample["messages"]]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        raise ValueError("'messages' has no answer of the assistant: there is nothing to learn")
    return messages, answers, {"tools": sample["tools"]} if sample.get("tools") else {}


def render_prompt(sample: Sample, style: PromptStyle) -> tuple[str, str]:
    """What a sample asks, and its text up to the (last) response. An `input` that the style has no place for follows the
    instruction."""
    if "messages" in sample:
        messages, answers, more = _conversation(sample)
        before = messages[: answers[-1]]
        return before[-1]["content"] or "", style.render(before, **more)
    asked, about = sample["instruction"], sample.get("input") or ""
    own = {"input", "sys_prompt"} if isinstance(style, ChatTemplate) else sample.keys()
    names = own & sample.keys() - {"instruction", "output", "prompt"}
    more = {name: sample[name] for name in names if sample[name] is not None}
    text = style.render(asked, **more)
    if about.strip() and about.strip() not in text:
        text = style.render(f"{asked}\n\n{about}", **more)
    return asked, text


def parts_of(sample: Sample, tokenizer: Tokenizer, style: PromptStyle, only_last: bool = False) -> list[Part]:
    """The texts of a sample. An instruction and its response are encoded apart, and the response ends with the end token. A
    conversation is encoded as the checkpoint's chat template renders it; the loss counts the assistant's messages (`only_last`:
    the last one), each with its end token."""
    if "messages" not in sample:
        _, prompt = render_prompt(sample, style)
        return [Part(prompt, bos_of(prompt, tokenizer, style)), Part(sample["output"], eos=True, counted=True)]
    messages, answers, more = _conversation(sample)
    learned = answers[-1:] if only_last else answers
    if isinstance(style, ChatTemplate):
        return [_rendered(messages[: answers[-1] + 1], learned, tokenizer, style, more)]
    parts, done = [], ""
    for i in learned:
        before = style.render(messages[:i])
        if not before.startswith(done):
            raise RewrittenAnswerError
        context = before[len(done) :]
        if done and tokenizer.eos_id is not None:
            context = context.removeprefix(tokenizer.eos_token)
        bos = False if done else bos_of(before, tokenizer, style)
        parts += [Part(context, bos), Part(messages[i]["content"], eos=True, counted=True)]
        done = before + messages[i]["content"]
    return parts


def _rendered(
    messages: list[dict[str, Any]], learned: list[int], tokenizer: Tokenizer, style: ChatTemplate, more: dict[str, Any]
) -> Part:
    """A conversation as the template renders it. The loss counts the answers `learned`, each from its generation prompt on,
    with its end token."""
    text = style.render(messages, add_generation_prompt=False, **more)
    end_texts = [token for i in tokenizer.eos_ids if (token := tokenizer.id_to_token(i))]
    cuts: list[int] = []
    for i in learned:
        answer, before = (messages[i].get("content") or "").strip(), style.render(messages[:i], **more)
        through = text
        if i < len(messages) - 1:
            through = style.render(messages[: i + 1], add_generation_prompt=False, **more)
        start = len(before)
        if not through.startswith(before):  # a template may open answers with something that it leaves out afterwards
            bare = style.render(messages[:i], add_generation_prompt=False, **more)
            start = through.find(answer, len(os.path.commonprefix([through, bare])))
            if start < 0:
                raise ValueError("the chat template does not write conversations turn by turn")
        found = through.find(answer, start)
        said = start if found < 0 else found + len(answer)  # where the end token may be looked for
        after = [at + len(token) for token in end_texts if (at := through.find(token, said)) >= 0]
        end = min(after, default=len(through.rstrip()))
        if through[:end] != text[:end]:
            raise RewrittenAnswerError
        cuts += [start, end]
    return Part(text, counted=cuts)


def _encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[tuple[Sequence[int], np.ndarray]]:
    """The tokens of parts, and which of them are counted: a token belongs where its last character does."""
    whole = [part for part in parts if isinstance(part.counted, bool)]
    if hasattr(tokenizer, "encode_batch"):
        tokens = iter(tokenizer.encode_batch([part[:3] for part in whole]))
    else:
        tokens = (tokenizer.encode(part.text, bos=part.bos, eos=part.eos) for part in whole)
    cut = [part for part in parts if not isinstance(part.counted, bool)]
    if cut and tokenizer.backend == "huggingface":
        placed = iter(tokenizer.encode_with_places([part.text for part in cut]))
    else:
        placed = (_encode_by_prefixes(part, tokenizer) for part in cut)
    found = []
    for part in parts:
        if isinstance(part.counted, bool):
            ids = next(tokens)
            found.append((ids, np.full(len(ids), part.counted)))
        else:
            ids, ends = next(placed)
            found.append((ids, np.searchsorted(part.counted, ends) % 2 == 1))
    return found


def _encode_by_prefixes(part: Part, tokenizer: Tokenizer) -> tuple[Sequence[int], np.ndarray]:
    """As `encode_with_places`, by a tokenizer that does not tell where its tokens are; exact at the cuts of `part`."""
    ids = tokenizer.encode(part.text, bos=False).tolist()
    ends = np.full(len(ids), len(part.text))
    for cut in reversed(part.counted):
        prefix = tokenizer.encode(part.text[:cut], bos=False).tolist()
        ends[: len(os.path.commonprefix([ids, prefix]))] = cut
    return ids, ends


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
    def of(cls, samples: Sequence[Sample], tokenizer: Tokenizer, style: PromptStyle, name: str) -> "EncodedSamples":
        """Encode samples; or take them from the cache, whose files are named by all that decides what is in them. What a tokenizer
        without a `fingerprint` encodes, or a style that is not of this package and may change at any time, is not cached.

        `ValueError` if there is no sample, or one cannot be rendered.
        """
        if not samples:
            raise ValueError(f"{name}: there are no samples")
        path = None
        if hasattr(tokenizer, "fingerprint") and type(style).__module__.partition(".")[0] == "litgpt":
            about = [VERSION, type(style).__qualname__, style.init_args(), tokenizer.fingerprint]
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
            for sample in samples:
                digest.update(json.dumps(sample, sort_keys=True, default=str).encode())
            path = cache_dir() / f"{digest.hexdigest()[:32]}.safetensors"
        arrays = None
        with suppress(SafetensorError, OSError):  # not there, or not whole
            arrays = path and load_file(path)
        if arrays is None:
            with waiting(f"Encoding {name}", log=True):
                arrays = _encode(samples, tokenizer, style)
            with suppress(OSError):  # a cache that cannot be written is none
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as temporary:
                        save_file(arrays, temporary)
        return cls(arrays)


def cache_dir() -> Path:
    """Where encoded samples are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "litgpt" / "samples"


def _encode(samples: Sequence[Sample], tokenizer: Tokenizer, style: PromptStyle) -> dict[str, np.ndarray]:
    encoded: list[Encoded] = []
    source: list[int] = []
    for begin in range(0, len(samples), GROUP):
        group: list[list[Part]] = []
        for i, sample in enumerate(samples[begin : begin + GROUP], begin):
            try:
                made = _texts_of(sample, tokenizer, style)
            except ValueError as error:
                raise ValueError(f"{getattr(sample, 'place', f'sample {i}')}: {error}") from None
            group += made
            source += [i] * len(made)
        found = iter(_encode_parts([part for parts in group for part in parts], tokenizer))
        for parts in group:
            ids, counted = zip(*islice(found, len(parts)), strict=True)
            raw = sum(len(own) for part, own in zip(parts, ids, strict=True) if part.counted is not False)
            ids = np.concatenate([np.asarray(own, dtype=np.int32) for own in ids])
            encoded.append(Encoded(ids, np.concatenate(counted), raw))
        report_progress(begin + GROUP, len(samples))
    return {
        "ids": np.concatenate([sample.ids for sample in encoded]),
        "counted": np.concatenate([sample.counted for sample in encoded]),
        "raw": np.array([sample.raw for sample in encoded], dtype=np.int64),
        "ends": np.cumsum([len(sample.ids) for sample in encoded], dtype=np.int64),
        "source": np.array(source, dtype=np.int64),
    }


def _texts_of(sample: Sample, tokenizer: Tokenizer, style: PromptStyle) -> list[list[Part]]:
    """The texts of a sample; or of one for each answer of a conversation whose answers do not stay as they are."""
    try:
        return [parts_of(sample, tokenizer, style)]
    except RewrittenAnswerError:
        messages, answers, _ = _conversation(sample)
        samples = ({**sample, "messages": messages[: i + 1]} for i in answers)
        return [parts_of(part, tokenizer, style, only_last=True) for part in samples]
