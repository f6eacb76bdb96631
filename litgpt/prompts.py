"""Prompt styles: the texts around the turns of a conversation that each model was trained with, and a checkpoint's style.

The built-in styles are data: every class below is a row of such texts, with the names of its models.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt.atomic_file import replacing
from litgpt.chat_template import ChatTemplate
from litgpt.errors import one_line
from litgpt.prompt_style import Message, PromptStyle, TurnStyle, eos_ids
from litgpt.settings import read_yaml

if TYPE_CHECKING:
    import torch

    from litgpt.config import Config
    from litgpt.tokenizer import Tokenizer

_FILE_NAME = "prompt_style.yaml"


class Default(TurnStyle, name="default"):
    """The bare prompt, for models that continue a text. System texts are left out."""


class Alpaca(TurnStyle, name="alpaca"):
    system_message = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    system_message_with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    user = "{system}### Instruction:\n{user}\n\n"
    answer_start = "### Response:\n"
    answer_end = "\n\n"

    takes_messages = True

    def apply(self, prompt: str | Sequence[Message], *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """As in `PromptStyle`; `input` is the text that a single prompt's instruction is about."""
        if isinstance(prompt, str) and kwargs.get("input"):
            prompt = f"{prompt}\n\n### Input:\n{kwargs['input']}"
            sys_prompt = sys_prompt or self.system_message_with_input
        return super().apply(prompt, sys_prompt=sys_prompt)


class FLAN(TurnStyle, name="flan"):
    system_message = Alpaca.system_message
    user, answer_start, answer_end = Alpaca.user, Alpaca.answer_start, Alpaca.answer_end


class Longform(FLAN, name="longform"):
    system_message = Alpaca.system_message_with_input


class StableLMAlpha(TurnStyle, name="stablelm-alpha", models=r"stablelm-tuned-alpha-.*"):
    system_message = (
        "# StableLM Tuned (Alpha version)\n"
        "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
        "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered "
        "harmful to the user.\n"
        "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, "
        "and make jokes.\n"
        "- StableLM will refuse to participate in anything that could harm a human."
    )
    system = "<|SYSTEM|>{system}"
    user = "{system}<|USER|>{user}"
    answer_start = "<|ASSISTANT|>"
    answer_end = ""
    stops = (("<|SYSTEM|>",), ("<|ASSISTANT|>",), ("<|USER|>",))


class StableLMZephyr(TurnStyle, name="stablelm-zephyr", models=r"stablelm-zephyr-.*"):
    user = "<|user|>\n{user}<|endoftext|>\n"
    answer_start = "<|assistant|>\n"
    answer_end = "<|endoftext|>\n"


class Falcon(TurnStyle, name="falcon", models=r"falcon-\d+b-instruct"):
    user = "{user}\n"
    answer_start = "Answer:"
    stops = (("User", ":"), (193, "User"))


class Falcon3(StableLMZephyr, name="falcon3", models=r"falcon3-.*-instruct"):
    stops = (("<|endoftext|>",),)


class Llama2(TurnStyle, name="llama2", models=r"llama-2-\d+b-chat(-hf)?"):
    system_message = (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
        " Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
        "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
        "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
        "something not correct. If you don't know the answer to a question, please don't share false information."
    )
    system = "<<SYS>>\n{system}\n<</SYS>>\n\n "
    user = "[INST] {system}{user} [/INST] "
    answer_end = " </s><s>"


class CodeLlama(TurnStyle, name="codellama", models=r"codellama-(?!34b-instruct).*|mi[sx]tral-.*-instruct.*"):
    system = "<<SYS>>\n{system}\n<</SYS>>\n\n"
    user = "[INST] {system}{user} [/INST]"
    answer_end = " </s><s>"


class Llama2FunctionCalling(TurnStyle, name="llama2-function-calling", models=r"llama-2-.*-function-calling.*"):
    start = (
        '<FUNCTIONS>{{"function": "search_bing", "description": "Search the web for content on Bing. This allows users '
        'to search online/the internet/the web for content.", "arguments": [{{"name": "query", "type": "string", '
        '"description": "The search query string"}}]}}</FUNCTIONS>\n\n'
    )
    system_message = (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as"
        "possible. Your only response should be JSON formatted functions"
    )
    system = "<<SYS>>\n{system}\n<</SYS>>\n\n"
    user = "[INST]{system}{user}[/INST]\n\n"
    answer_end = " </s><s>"


class Llama3(
    TurnStyle,
    name="llama3",
    models=r"(meta-)?llama-3.*-instruct.*|olmo-2-.*-(sft|dpo|instruct)|codellama-34b-instruct.*",
    turn="<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
):
    start = "<|begin_of_text|>"
    system_message = "You are a helpful assistant."
    stops = (("<|eot_id|>",),)


class R1Base(TurnStyle, name="r1-base", models=r"(deepseek-)?r1-distill-llama-.*"):
    user = "{system}<｜User｜>{user}"
    answer_start = "<｜Assistant｜>"
    answer_end = "<｜end▁of▁sentence｜>"
    stops = (("<｜end▁of▁sentence｜>",),)


class FreeWilly2(TurnStyle, name="freewilly2", models=r"freewilly2"):
    system_message = "This is a system prompt, please behave and help the user."
    system = "### System:\n{system}\n\n"
    user = "{system}### User:\n{user}\n\n"
    answer_start = "### Assistant:\n"
    answer_end = "\n\n"


class Platypus(TurnStyle, name="platypus", models=r".*platypus.*"):
    user = "### Instruction:\n\n{user}\n\n"
    answer_start = "### Response:\n"
    answer_end = "\n\n"


class StableCode(TurnStyle, name="stablecode", models=r"stablecode-instruct-.*"):
    user = "###Instruction\n{user}"
    answer_start = "###Response\n"


class Phi1(TurnStyle, name="phi-1", models=r"phi-1.*"):
    user = "{user}\n\n"
    answer_start = "Answer:"
    answer_end = "\n\n"
    stops = (("Answer", ":"), (198, "Answer", ":"))


class Phi2(TurnStyle, name="phi-2", models=r"phi-2"):
    user = "Instruct: {user}\n"
    answer_start = "Output:"


class Phi3(TurnStyle, name="phi-3", models=r"phi-3.*", turn="<|{role}|>\n{text}<|end|>\n"):
    system_message = "You are a helpful assistant."


class Phi4(TurnStyle, name="phi-4", models=r"phi-4", turn="<|im_start|>{role}<|im_sep|>{text}<|im_end|>"):
    pass


class Phi4Reasoning(Phi4, name="phi-4-reasoning", models=r"phi-4-reasoning.*"):
    system_message = (
        "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves "
        "thoroughly exploring questions through a systematic thinking process before providing the final precise and "
        "accurate solutions. This requires engaging in a comprehensive cycle of analysis, summarizing, exploration, "
        "reassessment, reflection, backtracing, and iteration to develop well-considered thinking process. Please "
        "structure your response into two main sections: Thought and Solution using the specified format: <think> "
        "{Thought section} </think> {Solution section}. In the Thought section, detail your reasoning process in "
        "steps. Each step should include detailed considerations such as analysing questions, summarizing relevant "
        "findings, brainstorming new ideas, verifying the accuracy of the current steps, refining any errors, and "
        "revisiting previous steps. In the Solution section, based on various attempts, explorations, and reflections "
        "from the Thought section, systematically present the final solution that you deem correct. The Solution "
        "section should be logical, accurate, and concise and detail necessary steps needed to reach the conclusion. "
        "Now, try to solve the following question through the above guidelines:"
    )


class Phi4Mini(TurnStyle, name="phi-4-mini", models=r"phi-4-mini-instruct", turn="<|{role}|>{text}<|end|>"):
    pass


class Phi4MiniReasoning(Phi4Mini, name="phi-4-mini-reasoning", models=r"phi-4-mini-reasoning"):
    system_message = "Your name is Phi, an AI math expert developed by Microsoft."


class TinyLlama(TurnStyle, name="tinyllama", models=r"tiny-?llama-.*-chat.*", turn="<|{role}|>\n{text}</s>\n"):
    system_message = "You are a friendly chatbot who always gives helpful, detailed, and polite answers."


class Gemma(TurnStyle, name="gemma", models=r"(code)?gemma-.*-it"):
    user = "<start_of_turn>user\n{user}<end_of_turn>\n"
    answer_start = "<start_of_turn>model\n"
    answer_end = "<end_of_turn>\n"


class OLMo(TurnStyle, name="olmo", models=r"olmo-\d+b.*"):
    start = "<|endoftext|>"
    user = "<|user|>\n{user}\n"
    answer_start = "<|assistant|>\n"
    answer_end = "<|endoftext|>\n"


class ChatML(TurnStyle, name="chatml", turn="<|im_start|>{role}\n{text}<|im_end|>\n"):
    def __init__(self, system_message: str | None = None) -> None:
        super().__init__()
        if system_message is not None:
            self.system_message = system_message

    def init_args(self) -> dict[str, Any]:
        # a subclass with its own constructor may take other arguments, or none
        return dict(vars(self)) if type(self).__init__ is ChatML.__init__ else {}


class Qwen2_5(ChatML, name="qwen2.5", models=r"qwen2\.5-(?!math).*"):
    system_message = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Qwen2_5_Math(ChatML, name="qwen2.5-math", models=r"qwen2\.5-math.*"):
    system_message = "Please reason step by step, and put your final answer within \\boxed{}."


class QwQ(ChatML, name="qwq", models=r"qwq.*"):
    system_message = (
        "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
    )


class Qwen3(ChatML, name="qwen3", models=r"qwen3.*"):
    pass


class SmolLM2(ChatML, name="smollm2", models=r"smollm2-.*-instruct"):
    system_message = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Salamandra(ChatML, name="salamandra", models=r"salamandra-.*-instruct"):
    system_message = (
        "I am Salamandra, an AI language model developed at the Barcelona Supercomputing Centre (BSC) by the Language "
        "Technologies Unit. My knowledge base was last updated on August 2023. Today Date: 2024-09-30\n"
        "Soy Salamandra, un modelo lingüístico de IA desarrollado en el Barcelona Supercomputing Centre (BSC) por la "
        "Language Technologies Unit. Mi base de conocimientos se actualizó por última vez en agosto de 2023.\n"
        "Soc Salamandra, un model de llenguatge d'IA desenvolupat al Barcelona Supercomputing Centre (BSC) per la "
        "Language Technologies Unit."
    )


prompt_styles = PromptStyle.styles


def model_name_to_prompt_style(model_name: str) -> PromptStyle:
    """Returns the style for the name of a model (`org/name` too), the bare prompt if there is none for it."""
    return PromptStyle.from_model_name(model_name)


def style_for(checkpoint: str | Path, tokenizer: "Tokenizer | None", config: "Config | None") -> PromptStyle:
    """Returns the style for a checkpoint: saved with it, else its chat template, else by its name.

    Args:
        checkpoint: folder, file or name of the checkpoint.
        tokenizer: its tokenizer, whose `chat_template` may be None.
        config: its configuration with its `name` (default: the last part of `checkpoint`).
    """
    path = Path(checkpoint)
    if has_prompt_style(path):
        return load_prompt_style(path)
    if getattr(tokenizer, "chat_template", None):
        return ChatTemplate.from_tokenizer(tokenizer)
    return PromptStyle.from_config(config) if config is not None else model_name_to_prompt_style(path.resolve().name)


def all_stop_tokens(tokenizer: "Tokenizer", style: PromptStyle) -> tuple[list[int], ...]:
    """Returns every token sequence that ends an answer, without duplicates: the tokenizer's and the style's."""
    sequences = ([token_id] for token_id in eos_ids(tokenizer))
    unique = dict.fromkeys(tuple(sequence) for sequence in (*sequences, *style.stop_tokens(tokenizer)))
    return tuple(list(sequence) for sequence in unique if sequence)


def encode_prompt(
    tokenizer: "Tokenizer",
    style: PromptStyle,
    prompt: str | Sequence[Message],
    sys_prompt: str | None = None,
    **kwargs: Any,
) -> "torch.Tensor":
    """Returns the token ids (T,) of a prompt or conversation in a style."""
    text = style.render(prompt, sys_prompt=sys_prompt, **kwargs)
    return tokenizer.encode(text, bos=bos_of(text, tokenizer, style))


def bos_of(text: str, tokenizer: "Tokenizer", style: PromptStyle) -> bool | None:
    """Whether the tokenizer adds a BOS token to a text that a style rendered: not (False) to that of a chat template, which has
    the model's, nor to one that begins with it; else as it does by default (None)."""
    bos_token = getattr(tokenizer, "bos_token", None)
    return False if isinstance(style, ChatTemplate) or (bos_token and text.startswith(bos_token)) else None


def save_prompt_style(style: str | PromptStyle, checkpoint_dir: Path) -> None:
    """Writes `prompt_style.yaml` into a checkpoint folder; LitGPT reads it too."""
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    content: dict[str, Any] = {"class_path": f"{type(style).__module__}.{type(style).__qualname__}"}
    if init_args := style.init_args():
        content["init_args"] = init_args
    with replacing(Path(checkpoint_dir) / _FILE_NAME) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def has_prompt_style(checkpoint_dir: Path) -> bool:
    """Whether a style was saved with the checkpoint."""
    return (Path(checkpoint_dir) / _FILE_NAME).is_file()


def load_prompt_style(checkpoint_dir: Path) -> PromptStyle:
    """Reads the style that was saved with a checkpoint. No module is imported for it.

    Raises:
        ValueError: the file does not name a class of this module, or another `PromptStyle` class that is imported already,
            or the class cannot be made with its `init_args`.
    """
    path = Path(checkpoint_dir) / _FILE_NAME
    try:
        content = read_yaml(path)
        module, _, name = content["class_path"].rpartition(".")
        style = getattr(sys.modules.get(module), name, None)
        if not isinstance(style, type) or not issubclass(style, PromptStyle):
            raise TypeError(
                f"{module}.{name} is no style of litgpt.prompts; import a PromptStyle class of your own first"
            )
        return style(**content.get("init_args", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a prompt style: {one_line(error)}") from error


def parse_prompts(prompt: Any) -> tuple[list[str | list[Message]], bool]:
    """Texts and lists of messages of one prompt or of a list of prompts, and whether it is such a list."""
    given = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str | Mapping) else prompt
    several = isinstance(given, list) and not (given and all(isinstance(one, Mapping) for one in given))
    prompts = [list(one) if isinstance(one, tuple) else one for one in (given if several else [given])]
    if not prompts or any(isinstance(one, str | list) and not one for one in prompts):
        raise ValueError("the prompt is empty: give some text")
    for one in prompts:
        messages = one if isinstance(one, list) else []
        if not isinstance(one, str) and not (messages and all(isinstance(message, Mapping) for message in messages)):
            raise ValueError(
                'a prompt is a text or a list of messages, {"role": ..., "content": ...} each, or a list of such prompts; '
                f"got {prompt if several and one is prompt else one!r:.80}"
            )
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(f'a message has a "role" and a "content", got {message!r:.80}')
    return prompts, several
