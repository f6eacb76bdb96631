"""From the file that fine-tuning wrote to a model with what is in it, and what the commands for such models share."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml

from litgpt import adapter, adapter_v2, lora
from litgpt.checkpoint.base import WEIGHTS_NAME, Checkpoint
from litgpt.checkpoint.files import load_state_dict
from litgpt.checkpoint.litgpt_folder import LitGPTCheckpoint
from litgpt.checkpoint.load import load_model, meta_model
from litgpt.config import Config
from litgpt.engine.loading import Ready, make_ready
from litgpt.generate import base
from litgpt.generate.options import AnswerOptions, CheckpointOptions, PromptLookupOptions, option
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style

HYPERPARAMETERS_NAME = "hyperparameters.yaml"
_LORA_FIELDS = [f.name for f in fields(lora.Config) if f.name.startswith("lora_")]


class _Method(NamedTuple):
    """A way to fine-tune that leaves the weights of the model as they are, and adds its own."""

    mark: str  # in the names of some of its weights, and of no other method's
    kind: type[GPT]
    add: Callable[[GPT, Any], None]
    finish: Callable[[GPT], None]  # once weights are loaded, makes inference faster
    is_trained: Callable[[str, Any], bool]


_METHODS = {
    "lora": _Method("lora_", lora.GPT, lora.add_lora, lora.unwrap_lora, lora.lora_filter),
    "adapter_v2": _Method(
        "adapter_scale", adapter_v2.GPT, adapter_v2.add_adapter_v2, adapter.freeze_prefixes, adapter_v2.adapter_filter
    ),
    "adapter": _Method(
        "gating_factor", adapter.GPT, adapter.add_prefixes, adapter.freeze_prefixes, adapter.adapter_filter
    ),
}


@dataclass
class Finetuned:
    """What fine-tuning wrote: a file of weights, and `hyperparameters.yaml` next to it.

    Args:
        path: the file, or the folder that holds it under LitGPT's name.
        method: how it was made; "full" means that all weights of the model are in it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or holds the weights of another method.
    """

    path: Path
    method: Literal["full", "lora", "adapter", "adapter_v2"]

    def __post_init__(self) -> None:
        path = Path(self.path)
        if path.is_dir():
            path = path / (WEIGHTS_NAME if self.method == "full" else f"{WEIGHTS_NAME}.{self.method}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(path)!r} does not exist: give the file that fine-tuning wrote, or its folder"
            )
        self.path, self.weights = path, load_state_dict(path)
        if not self.weights:
            raise ValueError(f"{path} holds no weights")
        found = "full"
        for method, facts in _METHODS.items():
            if found == "full" and any(facts.mark in name for name in self.weights):
                found = method
        if found != self.method:
            raise ValueError(f"{path} holds {found} weights, not {self.method} ones: use `litgpt generate_{found}`")

    @cached_property
    def hyperparameters(self) -> dict[str, Any]:
        """The options of the fine-tuning (empty if there is no file of them)."""
        path = self.path.parent / HYPERPARAMETERS_NAME
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold names and values, found {type(values).__name__}")
        return values

    def base(self, checkpoint_dir: Path | None) -> Path:
        """The checkpoint that was fine-tuned: as given, or else as the hyperparameters have it."""
        named = checkpoint_dir or self.hyperparameters.get("checkpoint_dir")
        if named is None:
            raise ValueError(f"name the checkpoint that was fine-tuned: no {HYPERPARAMETERS_NAME} by {self.path} does")
        return Path(named)

    def config(self, base_config: Config) -> Config:
        """The configuration of the fine-tuned model.

        Raises `ValueError` where hyperparameters are needed and missing: ranks and scales of LoRA.
        """
        if self.method == "full":
            return base_config
        if self.method == "lora":
            path = self.path.parent / HYPERPARAMETERS_NAME
            if missing := [name for name in _LORA_FIELDS if name not in self.hyperparameters]:
                problem = f"does not tell {', '.join(missing)}" if path.is_file() else "does not exist"
                raise ValueError(
                    f"{path} {problem}: it has to stay with {self.path.name}, which fine-tuning wrote with it"
                )
            return lora.Config.extending(base_config, **{name: self.hyperparameters[name] for name in _LORA_FIELDS})
        lengths = {
            int(match[1]): len(tensor)
            for name, tensor in self.weights.items()
            if (match := re.search(r"\.h\.(\d+)\.attn\.adapter_wte\.", name))
        }
        settings = {"adapter_prompt_length": max(lengths.values()), "adapter_start_layer": min(lengths)}
        return adapter.Config.extending(base_config, **(settings if lengths else {}))

    def load(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantize: str | None = None
    ) -> GPT:
        """The model of `checkpoint`, fine-tuned, for inference. Nothing is loaded if what was trained does not fit it.

        With `quantize` the weights of the checkpoint are quantised, and what an adapter or LoRA adds to them is not.
        """
        config = self.config(checkpoint.config)
        if self.method == "full":
            return load_model(LitGPTCheckpoint(self.path.parent, self.path.name, config), dtype, device, quantize)
        method = _METHODS[self.method]
        self._check(meta_model(config, method.kind), method)
        model = load_model(checkpoint, dtype, device, quantize)
        method.add(model, config)
        model.load_state_dict(self.weights, strict=False)
        method.finish(model)
        return model

    def _check(self, model: GPT, method: _Method) -> None:
        """Raises `ValueError` if the weights are not those that `model`, on the meta device, takes."""
        problems = []
        try:
            missing, extra = model.load_state_dict(self.weights, strict=False, assign=True)
            missing = [name for name in missing if method.is_trained(name, None)]
            problems = [f"{kind} {names[0]}" for kind, names in (("lacks", missing), ("has", extra)) if names]
        except RuntimeError as error:
            problems = [str(error).splitlines()[1].strip()]
        if problems:
            name = model.config.name or "the checkpoint's model"
            raise ValueError(f"{self.path} was not made from {name}: it {' and '.join(problems)}")

    def prompt_style(self) -> PromptStyle | None:
        """The style that was trained, if it was saved with the weights."""
        folder = self.path.parent
        return load_prompt_style(folder) if has_prompt_style(folder) else None


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
        ready = make_ready(checkpoint_dir, **options.loading(), load=finetuned.load)
        ready.prompt_style = finetuned.prompt_style() or ready.prompt_style
        return ready

    base.answer(options, lines, load, lambda ready: options.drafter())
