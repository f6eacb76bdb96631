"""The commands for fine-tuned models."""

from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from functools import partial
from pathlib import Path

from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.finetuned import Finetuned
from litgpt.checkpoint.load import load_finetuned
from litgpt.engine.loading import Ready, make_ready
from litgpt.generate import base
from litgpt.generate.options import AnswerOptions, CheckpointOptions, PromptLookupOptions, command, option
from litgpt.prompt_style import PromptStyle
from litgpt.tokenizer import Tokenizer


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


def finetuned_command(method: str, description: str, path: str, default: str, help: str) -> Callable[..., None]:
    """The command for models that were fine-tuned by `method`.

    Args:
        method: full, lora, adapter or adapter_v2.
        description: first line of the command's help.
        path, default, help: name, default and help of the option for the weights' file.
    """
    options_class = make_dataclass(
        "Options", [(path, Path, option(Path(default), help))], bases=(FinetunedOptions,), frozen=True, kw_only=True
    )

    def main(options: FinetunedOptions) -> None:
        lines = base.prompt_lines(options, options.input)
        finetuned = Finetuned(getattr(options, path), method)

        def check(checkpoint: Checkpoint, tokenizer: Tokenizer, style: PromptStyle) -> None:
            style = finetuned.prompt_style() or style
            base.check_request(options, lines, checkpoint, tokenizer, style, finetuned.path.parent)

        def load() -> Ready:
            checkpoint_dir = finetuned.base(options.checkpoint_dir)
            ready = make_ready(
                checkpoint_dir, **options.loading(), load=partial(load_finetuned, finetuned), check=check
            )
            ready.prompt_style = finetuned.prompt_style() or ready.prompt_style
            ready.trained_in = finetuned.path.parent
            return ready

        base.answer(options, lines, load)

    main.__module__, main.__qualname__ = f"litgpt.generate.{method}", "main"
    main.__doc__ = f"{description}\n\nThe answer goes to stdout, statistics to stderr."
    positional = "checkpoint_dir", "prompt", "input", "sys_prompt", path, "quantize", "max_new_tokens"
    return command(options_class, *positional, "top_k", "top_p", "temperature", "precision")(main)
