"""The chat template of a checkpoint: Jinja source that Hugging Face and GGUF files carry, rendered without trust."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litgpt.prompt_style import Message, PromptStyle

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer


class _Refusal(TemplateError):
    """The template called `raise_exception`, e.g. because it knows no system role."""


class _Generation(Extension):
    """Lets `{% generation %} ... {% endgeneration %}`, which marks answers for training, render its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which changes what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment.from_string(source)


class ChatTemplate(PromptStyle):
    """A checkpoint's own chat template, rendered in a sandbox as `transformers` does.

    Args:
        template: Jinja source, as in `tokenizer_config.json`, `chat_template.jinja` or GGUF metadata.
        special_tokens: texts the template may name, such as `bos_token="<s>"` and `eos_token="</s>"`.
    """

    takes_messages = True

    def __init__(self, template: str, **special_tokens: str) -> None:
        super().__init__()
        self.template = template
        self.special_tokens = {"bos_token": "", "eos_token": "", **special_tokens}

    @classmethod
    def from_tokenizer(cls, tokenizer: "Tokenizer") -> "ChatTemplate":
        """Returns the style of a tokenizer; `ValueError` if it has no chat template."""
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        texts = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return cls(tokenizer.chat_template, **{name: text for name, text in texts.items() if text is not None})

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **kwargs: Any) -> str:
        """As in `PromptStyle`; `kwargs` are further variables of the template, such as `enable_thinking`.

        A system text goes in front of the first user message if the template rejects the system role.

        Raises:
            ValueError: the template is broken, or rejects the conversation.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
            raise ValueError(f"expected a list of messages, dictionaries with 'role' and 'content', got {prompt!r}")
        if sys_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": sys_prompt}, *messages]
        try:
            try:
                return self._render(messages, kwargs)
            except _Refusal:
                if [message["role"] for message in messages[:2]] != ["system", "user"]:
                    raise
                system, user, *rest = messages
                user = {**user, "content": f"{system['content']}\n\n{user['content']}"}
                return self._render([user, *rest], kwargs)
        except _Refusal as error:
            raise ValueError(f"the checkpoint's chat template rejects this conversation: {error}") from error
        except Exception as error:  # the template is foreign code: whatever it does wrong is one error to the user
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the checkpoint's chat template is broken{line}: {problem}") from error

    def _render(self, messages: list[Message], variables: dict[str, Any]) -> str:
        standard = {"tools": None, "documents": None, "add_generation_prompt": True}
        return _compile(self.template).render(standard | self.special_tokens | variables | {"messages": messages})

    def init_args(self) -> dict[str, Any]:
        return {"template": self.template, **self.special_tokens}
