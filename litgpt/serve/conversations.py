"""Conversations as tokens: those of a chat that goes on are the tokens that the model drew, as they are cached."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from litgpt.prompt_style import PromptStyle
from litgpt.prompts import encode_prompt
from litgpt.serve.parameters import messages_of
from litgpt.serve.tools import Tools, with_calls_as_text
from litgpt.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
MOST_TRANSCRIPTS = 256
LEAST_CHECKPOINT = 16  # tokens
_PROBE = "\ue000"  # a character for private use


@dataclass(frozen=True, eq=False)
class ChatPrompt:
    """The prompt for the next answer of a conversation.

    Attributes:
        text, tokens: of the prompt.
        checkpoints: for `Sequence`.
        messages, variables: that the text was rendered from.
    """

    text: str
    tokens: torch.Tensor
    checkpoints: tuple[int, ...]
    messages: Messages
    variables: dict[str, Any]


class Conversations:
    """Prompts of conversations, and the tokens of those so far.

    Args:
        tokenizer, style: of the model.
        evicts: whether its caches evict, so that the states of beginnings are kept at checkpoints only.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle, evicts: bool = False) -> None:
        self.tokenizer, self.style, self.evicts = tokenizer, style, evicts
        self._template = getattr(style, "template", "")
        # by the text of a conversation with the end of its last turn: the length without that end, and the tokens till there
        self._transcripts: OrderedDict[str, tuple[int, list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def prompt(self, messages: Messages, tools: Tools | None = None, **variables: Any) -> ChatPrompt:
        """The prompt for the next answer.

        Raises:
            ValueError: if the chat template rejects the conversation.
        """
        if tools is not None:
            variables = {**variables, "tools": tools.described}
        messages = self._for_template(messages, tools)
        text = self.style.render(messages, **variables)
        with self._lock:
            known = max((one for one in self._transcripts if text.startswith(one)), key=len, default=None)
            begin = None if known is None else self._transcripts[known]
        if begin is None:
            tokens = encode_prompt(self.tokenizer, self.style, messages, **variables)
        else:
            n, drawn = begin
            tokens = torch.tensor([*drawn, *self.tokenizer.encode(text[n:], bos=False).tolist()])
        checkpoints = self._checkpoints(tokens, messages, variables) if self.evicts else ()
        return ChatPrompt(text, tokens, checkpoints, messages, variables)

    def beginning(self, messages: Messages, tools: Tools | None = None, **variables: Any) -> torch.Tensor:
        """The tokens of a conversation without an answer to come; of a system prompt alone those in front of any question.

        Raises:
            ValueError: as for `prompt`.
        """
        if messages[-1]["role"] != "system":
            return self.prompt(messages, tools, **variables, add_generation_prompt=False).tokens
        a, b = (self.prompt([*messages, {"role": "user", "content": x}], tools, **variables).tokens for x in "AB")
        return a[: _n_common(a, b)]

    def _for_template(self, messages: Messages, tools: Tools | None) -> Messages:
        """The conversation, with tools and their calls as text where the chat template has no place for them."""
        if "tool_calls" not in self._template:
            messages = [with_calls_as_text(message) for message in messages]
        if tools is None or "tools" in self._template:
            return messages
        system = [tools.instructions]
        if messages[0]["role"] == "system":
            system, messages = [messages[0]["content"], *system], messages[1:]
        return [{"role": "system", "content": "\n\n".join(system)}, *messages]

    def _checkpoints(self, tokens: torch.Tensor, messages: Messages, variables: dict[str, Any]) -> tuple[int, ...]:
        """The number of first tokens that other conversations with the same system prompt and tools have too."""
        n = 1 if messages[0]["role"] == "system" else 0
        question = messages[n]["content"] if n < len(messages) else ""
        other = [*messages[:n], {"role": "user", "content": "B" if question.startswith("A") else "A"}]
        try:
            others = encode_prompt(self.tokenizer, self.style, other, **variables)
        except (ValueError, TypeError):  # the template takes no such conversation
            return ()
        common = _n_common(tokens, others)
        return (common,) if common >= LEAST_CHECKPOINT else ()

    def note(self, prompt: ChatPrompt, output: Sequence[int], answer: dict[str, Any]) -> None:
        """Remember the tokens of a conversation, by its text as the model wrote it, and as the chat template writes it once the
        client sends the answer back.

        Args:
            prompt: what the model answered.
            output: tokens of the answer.
            answer: the message that the client was given.
        """
        said = self.tokenizer.decode(list(output))
        (back,) = self._for_template(messages_of({"messages": [answer]}), None)
        later, probe = self._sent_back(prompt, back), self._sent_back(prompt, {"role": "assistant", "content": _PROBE})
        end = probe.rpartition(_PROBE)[2] if _PROBE in probe else ""
        texts = {prompt.text + said + end} if said or end else set()
        if later and probe and later.endswith(end):
            texts.add(later)
        tokens = [*prompt.tokens.tolist(), *output]
        with self._lock:
            for text in texts:
                self._transcripts[text] = len(text) - len(end), tokens
                self._transcripts.move_to_end(text)
            while len(self._transcripts) > MOST_TRANSCRIPTS:
                self._transcripts.popitem(last=False)

    def _sent_back(self, prompt: ChatPrompt, answer: dict[str, Any]) -> str:
        """The conversation with an answer, as the chat template writes it ("": it takes no such answer). Templates of models that
        reason may write neither the reasoning nor the tag that opened it."""
        variables = {**prompt.variables, "add_generation_prompt": False}
        try:
            return self.style.render([*prompt.messages, answer], **variables)
        except (ValueError, TypeError):
            return ""


def _n_common(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of first tokens that are the same."""
    size = min(len(a), len(b))
    different = (a[:size] != b[:size]).nonzero()
    return int(different[0]) if len(different) else size
