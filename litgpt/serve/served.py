"""A model that is served: its prompts, limits, batch and kept prefixes."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from litgpt.engine.caches import CacheLease
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.loading import Ready
from litgpt.engine.prefixes import PrefixStore
from litgpt.prompts import encode_prompt
from litgpt.serve.options import ServeOptions
from litgpt.serve.tools import Tools

DEFAULT_LENGTH = 8192  # most tokens of a row of dense caches where no length is given
MOST_TRANSCRIPTS = 256


@dataclass(eq=False)
class ServedModel:
    """A model with its batch.

    Attributes:
        transcripts: texts of conversations with the tokens that they had, so that a prompt which continues one begins with
            the tokens that the model drew, as they are cached.
    """

    name: str
    ready: Ready
    batch: ContinuousBatch
    prefixes: PrefixStore | None
    limit: int | None  # most tokens of a sequence
    transcripts: "OrderedDict[str, list[int]]" = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, name: str, ready: Ready, options: ServeOptions) -> "ServedModel":
        options = options.as_trained(ready.trained_cache)
        model = ready.model
        options.assign_caches(model, options.batch_size)
        lease = CacheLease.take(model)
        takes_rows = model.caches.default or not model.caches.caches or model.caches.takes_rows_apart
        prefixes = PrefixStore(options.prefix_cache * 1_000_000) if options.prefix_cache and takes_rows else None
        length = None
        if not model.caches.caches or model.caches.default:
            length = min(model.max_seq_length, options.cache_length or DEFAULT_LENGTH)
        batch = ContinuousBatch(
            model, options.batch_size, length, options.prompt_chunksize, lease=lease, prefixes=prefixes
        )
        caches = lease.caches or model.caches
        limit = None if caches.unbounded else min(model.max_seq_length, caches.max_length or model.max_seq_length)
        return cls(name, ready, batch, prefixes, limit)

    @property
    def room(self) -> int:
        """Most tokens of a prompt and its answer where the client sets no limit."""
        return self.ready.model.max_seq_length if self.limit is None else self.limit

    def chat_prompt(
        self, messages: list[dict[str, Any]], **variables: Any
    ) -> tuple[str, torch.Tensor, tuple[int, ...]]:
        """Text and tokens of a conversation, and the number of the system prompt's tokens if it has one."""
        style, tokenizer = self.ready.prompt_style, self.ready.tokenizer
        text = style.render(messages, **variables)
        with self.lock:
            known = max((one for one in self.transcripts if text.startswith(one)), key=len, default=None)
            begin = self.transcripts.get(known) if known else None
        if begin is None:
            tokens = encode_prompt(tokenizer, style, messages, **variables)
        else:
            rest = tokenizer.encode(text[len(known) :], bos=False).tolist()
            tokens = torch.tensor([*begin, *rest])
        return text, tokens, ()

    def with_tools(self, messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
        """The conversation, with the tools in its system message where the chat template has no place for them."""
        if "tools" in getattr(self.ready.prompt_style, "template", ""):
            return messages
        system = [tools.instructions]
        if messages[0]["role"] == "system":
            system, messages = [messages[0]["content"], *system], messages[1:]
        return [{"role": "system", "content": "\n\n".join(system)}, *messages]

    def note(self, text: str, tokens: list[int]) -> None:
        """Remember the tokens of a conversation's text."""
        with self.lock:
            self.transcripts[text] = tokens
            self.transcripts.move_to_end(text)
            while len(self.transcripts) > MOST_TRANSCRIPTS:
                self.transcripts.popitem(last=False)
