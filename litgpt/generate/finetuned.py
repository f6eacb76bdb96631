"""From the file that fine-tuning wrote to a model with what is in it, and what the commands for such models share."""

import inspect
import re
import sys
import time
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
from litgpt.engine.loading import choose_kv_caches, make_ready
from litgpt.engine.sampling import Sampling
from litgpt.generate import base
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, encode_prompt, has_prompt_style, load_prompt_style
from litgpt.tokenizer import Tokenizer

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


def answer(
    finetuned: Finetuned,
    checkpoint_dir: Path | None,
    prompt: str,
    input: str,
    sys_prompt: str | None,
    max_new_tokens: int,
    top_k: int | None,
    top_p: float,
    temperature: float,
    quantize: str | None,
    precision: str | None,
    compile: bool,
    kv_cache: str,
    cache_length: int | None,
    sinks: int,
    prompt_chunksize: int | None,
    seed: int,
) -> None:
    """What the commands for fine-tuned models do: answer a prompt. The options are those of `litgpt generate`."""
    base.check_options(prompt, 1, max_new_tokens, cache_length)
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    started = time.perf_counter()
    ready = make_ready(finetuned.base(checkpoint_dir), precision, quantize, compile, load=finetuned.load)
    ready.prompt_style = finetuned.prompt_style() or ready.prompt_style
    choose_kv_caches(ready.model, CacheSpec.parse(kv_cache, cache_length, **({"n_sink": sinks} if sinks else {})))
    tokens = encode_with_input(ready.tokenizer, ready.prompt_style, prompt, input, sys_prompt).to(ready.device)
    print(f"Model loaded in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    base.print_answers(ready, tokens, max_new_tokens, sampling, prompt_chunksize=prompt_chunksize)


def encode_with_input(
    tokenizer: Tokenizer, style: PromptStyle, prompt: str, input: str, sys_prompt: str | None
) -> torch.Tensor:
    """Tokens (T,) of a prompt and of the text it is about; `ValueError` if the style has no place for such a text."""
    plain = encode_prompt(tokenizer, style, prompt, sys_prompt=sys_prompt)
    if not input:
        return plain
    tokens = encode_prompt(tokenizer, style, prompt, sys_prompt=sys_prompt, input=input)
    if torch.equal(tokens, plain):
        raise ValueError(
            f"the prompt style {type(style).__name__} has no place for an input: make it part of the prompt"
        )
    return tokens


def explained_by(other: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Completes the docstring of a command with the explanations that `other` has for parameters of the same name."""
    lines = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(other).partition("Args:\n")[2], re.MULTILINE)

    def complete(command: Callable[..., Any]) -> Callable[..., Any]:
        doc = inspect.getdoc(command)
        missing = [name for name in inspect.signature(command).parameters if f"    {name}: " not in doc]
        texts = dict(lines)
        command.__doc__ = "\n".join([doc, *(f"    {name}: {texts[name]}" for name in missing)])
        return command

    return complete
