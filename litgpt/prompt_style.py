"""What a prompt style is: a way to write down a question, or a conversation, for the model that answers it."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.tokenizer import Tokenizer

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


class PromptStyle:
    """Writes a prompt as the text a model was trained to answer. Subclasses implement `apply`.

    `class Mine(PromptStyle, name="mine", models=r"my-model-.*")` is registered by name, and as the style of the models
    whose whole name (without the organisation, in any case) matches the pattern; both keywords are optional.
    """

    styles: ClassVar[dict[str, type["PromptStyle"]]] = {}
    _style_of_models: ClassVar[dict[str, type["PromptStyle"]]] = {}

    takes_messages: ClassVar[bool] = False
    """Whether `apply` takes a list of messages too; not inherited by a class that defines its own `apply`."""

    def __init_subclass__(cls, name: str | None = None, models: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "apply" in vars(cls) and "takes_messages" not in vars(cls):
            cls.takes_messages = False
        if name is not None:
            PromptStyle.styles[name] = cls
        if models is not None:
            PromptStyle._style_of_models[models] = cls

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """Returns the text for one prompt, ending where the answer begins.

        Args:
            prompt: what the user says; a list of `{"role": ..., "content": ...}` too where `takes_messages`.
            sys_prompt: replaces the style's own system text, where it has a place for one.
            kwargs: further fields, such as `input` for Alpaca; a style ignores those it does not know.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define apply(prompt, *, sys_prompt=None, **kwargs)")

    def render(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **kwargs: Any) -> str:
        """Returns the text for a prompt or a conversation, whatever `apply` takes.

        A style that only takes single prompts writes one user turn at a time, and the answers stand between them.
        """
        if isinstance(prompt, str) or self.takes_messages:
            return self.apply(prompt, sys_prompt=sys_prompt, **kwargs)  # type: ignore[arg-type]
        text = ""
        for role, content in turns(prompt):
            if role == "system":
                sys_prompt = content
            elif role == "user":
                text += self.apply(content, sys_prompt=sys_prompt, **kwargs)
                sys_prompt = None
            else:
                text += content
        return text

    def stop_tokens(self, tokenizer: "Tokenizer") -> tuple[list[int], ...]:
        """Returns the token sequences that end an answer: the end-of-sequence tokens, unless a style knows more."""
        return tuple([token_id] for token_id in eos_ids(tokenizer))

    def init_args(self) -> dict[str, Any]:
        """Returns the constructor arguments that make an equal style: what is saved of it besides its class."""
        return {}

    @classmethod
    def from_name(cls, name: str) -> "PromptStyle":
        """Returns the style of that name; `ValueError` with the nearest names if there is none."""
        if name not in PromptStyle.styles:
            from difflib import get_close_matches

            near = get_close_matches(name, PromptStyle.styles) or PromptStyle.styles
            raise ValueError(f"unknown prompt style {name!r}; choose from {', '.join(near)}")
        return PromptStyle.styles[name]()

    @classmethod
    def from_model_name(cls, model_name: str) -> "PromptStyle":
        """Returns the style for the name of a model (`org/name` too), the bare prompt if there is none for it."""
        name = model_name.rsplit("/", 1)[-1]
        for pattern, style in PromptStyle._style_of_models.items():
            if re.fullmatch(pattern, name, flags=re.IGNORECASE):
                return style()
        return PromptStyle.styles["default"]()

    @classmethod
    def from_config(cls, config: "Config") -> "PromptStyle":
        """Returns the style for the name of the model."""
        return cls.from_model_name(config.name)


def eos_ids(tokenizer: "Tokenizer") -> list[int]:
    """Returns all ids that end a text; a tokenizer of another package may know one `eos_id` only."""
    ids = (tokenizer.eos_id, *getattr(tokenizer, "eos_ids", ()))
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Returns (role, content) of every message; `ValueError` naming a message that is none."""
    for index, message in enumerate(messages):
        valid = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not valid:
            raise ValueError(
                f"message {index} is {message!r}; expected a dictionary with 'role' (one of {', '.join(ROLES)}) "
                "and 'content' (a string)"
            )
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("a conversation needs at least one user message")
    return [(message["role"], message["content"]) for message in messages]


def _fill(template: str, **texts: str) -> str:
    # In one pass, so that braces in what people wrote stay as they are.
    return re.sub(r"\{(system|user)\}", lambda match: texts.get(match[1], ""), template)


class TurnStyle(PromptStyle):
    """A style given by the texts around the turns; a subclass is a row of such texts.

    A user's turn is `user`; in the first one `{system}` is the system text in `system`, later it is empty. An answer stands
    between `answer_start` and `answer_end`. The class keyword `turn` gives all four at once, for styles whose turns differ
    only in `{role}` and `{text}`.
    """

    takes_messages = True
    start: str = ""
    system_message: str | None = None
    system: str = "{system}"
    user: str = "{user}"
    answer_start: str = ""
    answer_end: str = "\n"
    stops: tuple[tuple[str | int, ...], ...] = ()
    """Sequences of tokens, or ids of tokens, that end an answer besides the end-of-sequence token."""

    def __init_subclass__(cls, turn: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if turn is not None:
            cls.system = turn.replace("{role}", "system").replace("{text}", "{system}")
            cls.user = "{system}" + turn.replace("{role}", "user").replace("{text}", "{user}")
            cls.answer_start, cls.answer_end = turn.replace("{role}", "assistant").split("{text}")

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **kwargs: str) -> str:
        text, system = self.start, sys_prompt or self.system_message
        for role, content in [("user", prompt)] if isinstance(prompt, str) else turns(prompt):
            if role == "system":
                system = content
            elif role == "user":
                wrapped = "" if system is None else _fill(self.system, system=system)
                text += _fill(self.user, system=wrapped, user=content)
                system = None
            else:
                text += self.answer_start + content + self.answer_end
        return text + self.answer_start

    def stop_tokens(self, tokenizer: "Tokenizer") -> tuple[list[int], ...]:
        sequences = (_token_ids(tokenizer, sequence) for sequence in self.stops)
        return (*super().stop_tokens(tokenizer), *(ids for ids in sequences if ids))


def _token_ids(tokenizer: "Tokenizer", sequence: tuple[str | int, ...]) -> list[int]:
    try:
        return [tokenizer.token_to_id(token) if isinstance(token, str) else token for token in sequence]
    except ValueError:  # a tokenizer without such a token never produces it
        return []
