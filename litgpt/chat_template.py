"""The chat template of a checkpoint: Jinja source that Hugging Face and GGUF files carry, rendered without trust."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from litgpt.prompt_style import Message, PromptStyle
from litgpt.template_sandbox import TemplateLimit, TemplateRefusal, render

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

# Names of the field with a model's reasoning; templates read the first, GPT-OSS's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


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
        self.special_tokens = special_tokens

    @classmethod
    def from_tokenizer(cls, tokenizer: "Tokenizer") -> "ChatTemplate":
        """Returns the style of a tokenizer; `ValueError` if it has no chat template."""
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        texts = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        texts |= getattr(tokenizer, "special_tokens", {})
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
            except TemplateRefusal:
                if [message["role"] for message in messages[:2]] != ["system", "user"]:
                    raise
                system, user, *rest = messages
                user = {**user, "content": f"{system['content']}\n\n{user['content']}"}
                return self._render([user, *rest], kwargs)
        except TemplateRefusal as error:
            raise ValueError(f"the checkpoint's chat template rejects this conversation: {error}") from error
        except TemplateLimit as error:
            raise ValueError(f"the checkpoint's chat template was stopped: {error}") from error
        except Exception as error:  # the template is foreign code: whatever it does wrong is one error to the user
            line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the checkpoint's chat template is broken{line}: {problem}") from error

    def _render(self, messages: list[Message], variables: dict[str, Any]) -> str:
        standard = {"tools": None, "documents": None, "add_generation_prompt": True}
        messages = [_normalized(message) for message in messages]
        return render(self.template, standard | self.special_tokens | variables | {"messages": messages})

    def init_args(self) -> dict[str, Any]:
        return {"template": self.template, **self.special_tokens}


def _normalized(message: Message) -> Message:
    """A message as `transformers` gives it to templates: without fields that are None, reasoning under all its names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
