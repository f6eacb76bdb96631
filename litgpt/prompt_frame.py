"""The text that a prompt style puts around a long text and the questions about it."""

from functools import lru_cache
from typing import TYPE_CHECKING

from litgpt.prompt_style import PromptStyle
from litgpt.prompts import bos_of

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

_CONTEXT, _ANSWER, _NEXT = "<<context>>", "<<answer>>", "<<next>>"  # stand for these in a prompt style's text


class PromptFrame:
    """What stands before a context, between a question and its answer, and between that and the next question.

    Args:
        tokenizer, style: of the model.
        sys_prompt: as for `PromptStyle.apply`.
    """

    def __init__(self, tokenizer: "Tokenizer", style: PromptStyle, sys_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        turns = (("user", _CONTEXT), ("assistant", _ANSWER), ("user", _NEXT))
        text = style.render([{"role": role, "content": content} for role, content in turns], sys_prompt=sys_prompt)
        self.before, _, rest = text.partition(_CONTEXT)
        self.to_answer, _, rest = rest.partition(_ANSWER)
        self.to_next, _, _ = rest.partition(_NEXT)
        self._bos = bos_of(self.before, tokenizer, style)
        self.line = lru_cache(maxsize=None)(self._line)

    def _line(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that follows another."""
        return tuple(self.tokenizer.encode(text, bos=False).tolist()) if text else ()

    def begin(self, text: str) -> tuple[int, ...]:
        """Tokens of the text that begins a prompt."""
        return tuple(self.tokenizer.encode(self.before + text, bos=self._bos).tolist())

    def ask(self, question: str) -> tuple[int, ...]:
        """Tokens of a question that ends the turn which `begin` has begun, up to its answer."""
        return self._line(f"\n\n{question}{self.to_answer}")
