"""The common part of the commands for fine-tuned models."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.load import load_finetuned
from litgpt.engine.loading import Ready, make_ready
from litgpt.generate import base
from litgpt.generate.options import AnswerOptions, CheckpointOptions, PromptLookupOptions, option


@dataclass(frozen=True, kw_only=True)
class FinetunedOptions(AnswerOptions, PromptLookupOptions, CheckpointOptions):
    """The options that the commands for fine-tuned models share."""

    checkpoint_dir: Path | None = option(
        None,
        "The checkpoint that was fine-tuned: a folder, a .gguf file, or a model's name. Default: the one that "
        "hyperparameters.yaml, next to the weights, names.",
    )
    input: str = option("", "What the prompt is about, where the prompt style has a place for it (Alpaca).")
    max_new_tokens: int = option(100, "Most tokens of an answer.", least=1)


def positions(path: str) -> list[str]:
    """The options that LitGPT's commands for fine-tuned models take by position; `path` names the weights' option."""
    first = ["checkpoint_dir", "prompt", "input", "sys_prompt", path, "quantize"]
    return [*first, "max_new_tokens", "top_k", "top_p", "temperature", "precision"]


def answer_finetuned(options: FinetunedOptions, path: Path, method: str) -> None:
    """What the commands for fine-tuned models do: answer with the weights in the file `path` and the checkpoint below."""
    lines = base.prompt_lines(options, options.input)
    finetuned = Finetuned(path, method)

    def load() -> Ready:
        checkpoint_dir = finetuned.base(options.checkpoint_dir)
        ready = make_ready(checkpoint_dir, **options.loading(), load=partial(load_finetuned, finetuned))
        ready.prompt_style = finetuned.prompt_style() or ready.prompt_style
        return ready

    base.answer(options, lines, load, lambda ready: options.drafter())
