"""The files that fine-tuning writes, and LoRA weights as a checkpoint of their own."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from litgpt import adapter, adapter_v2, lora
from litgpt.checkpoint.base import HEAD, WEIGHTS_NAME, Checkpoint, RowShard
from litgpt.checkpoint.files import copy_side_files, load_state_dict
from litgpt.checkpoint.meta_model import meta_model
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
from litgpt.settings import Settings, read_yaml
from litgpt.tokenizer import Tokenizer

HYPERPARAMETERS_NAME = "hyperparameters.yaml"
# In mixed precision the weights themselves are float32
_PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32, "32": torch.float32}
_PRECISIONS |= {"bf16-mixed": torch.float32, "16-mixed": torch.float32}


class _Method(NamedTuple):
    """A way to fine-tune that adds weights to a model."""

    mark: str  # part of the names of some of its weights, and of no other method's
    kind: type[GPT]
    add: Callable[[GPT, Any], None]
    finish: Callable[[GPT], None]  # makes inference faster, after the weights were loaded
    is_trained: Callable[[str, Any], bool]


_METHODS = {
    "lora": _Method("lora_", lora.GPT, lora.add_lora, lora.finish_lora, lora.lora_filter),
    "adapter_v2": _Method(
        "adapter_scale", adapter_v2.GPT, adapter_v2.add_adapter_v2, adapter.freeze_prefixes, adapter_v2.adapter_filter
    ),
    "adapter": _Method(
        "gating_factor", adapter.GPT, adapter.add_prefixes, adapter.freeze_prefixes, adapter.adapter_filter
    ),
}


def trained_cache(folder: Path) -> dict[str, Any]:
    """The options of the key-value cache through which the model in `folder` was trained (empty: there was none)."""
    path = folder / HYPERPARAMETERS_NAME
    if not path.is_file():
        return {}
    settings = Settings(read_yaml(path), str(path))
    if settings.text("kv_cache", None, null=True) is None:
        return {}
    kinds = {"kv_cache": str, "cache_length": int | None, "kv_cache_args": dict | None, "prompt_chunksize": int | None}
    return {name: settings.value(name, kind, None) for name, kind in kinds.items()}


@dataclass
class Finetuned:
    """The result of fine-tuning: a file of weights, and `hyperparameters.yaml` next to it.

    Args:
        path: The file, or the folder that holds it under LitGPT's name.
        method: How it was trained; a "full" file has all weights of the model.

    Raises `FileNotFoundError` for a missing file, `ValueError` for one that cannot be read or is of another method.
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
        marks = {method: facts.mark for method, facts in _METHODS.items()}
        found = next((method for method, mark in marks.items() if any(mark in name for name in self.weights)), "full")
        if found != self.method:
            raise ValueError(f"{path} holds {found} weights, not {self.method} ones: use `litgpt generate_{found}`")

    @cached_property
    def hyperparameters(self) -> Settings:
        """The options of the fine-tuning (empty if the file is missing)."""
        path = self.path.parent / HYPERPARAMETERS_NAME
        return Settings(read_yaml(path) if path.is_file() else {}, str(path))

    def base(self, checkpoint_dir: Path | None) -> Path:
        """The checkpoint that was fine-tuned: `checkpoint_dir`, or else the one in the hyperparameters."""
        base = checkpoint_dir or self.hyperparameters.text("checkpoint_dir", None, null=True)
        if base is None:
            raise ValueError(f"name the checkpoint that was fine-tuned: no {HYPERPARAMETERS_NAME} by {self.path} does")
        return Path(base)

    def config(self, base_config: Config) -> Config:
        """The configuration of the fine-tuned model; `ValueError` if the hyperparameters of LoRA are missing."""
        if self.method == "full":
            return base_config
        if self.method == "lora":
            return lora.Config.extending(base_config, **self._lora_settings())
        lengths = {
            int(match[1]): len(tensor)
            for name, tensor in self.weights.items()
            if (match := re.search(r"\.h\.(\d+)\.attn\.adapter_wte\.", name))
        }
        if not lengths:  # a model of so few layers that none has a prefix
            return adapter.Config.extending(base_config)
        settings = {"adapter_prompt_length": max(lengths.values()), "adapter_start_layer": min(lengths)}
        return adapter.Config.extending(base_config, **settings)

    def _lora_settings(self) -> dict[str, Any]:
        """The LoRA options in the hyperparameters; missing ones are inferred from the weights, or are the defaults."""
        options = self.hyperparameters
        if not len(options):
            raise ValueError(
                f"{options.where} is missing or empty: keep it in the folder of {self.path.name}, where fine-tuning wrote "
                "it"
            )
        found = {"lora_projection": ".attn.proj.lora_", "lora_mlp": ".mlp.", "lora_head": "lm_head.lora_"}
        flags = {
            flag: options.flag(flag, any(mark in name and "lora_" in name for name in self.weights))
            for flag, mark in found.items()
        }
        rank = options.whole(
            "lora_r", next((x.shape[-1] for name, x in self.weights.items() if "lora_B" in name), 0), least=0
        )
        stacked = next((len(x) for name, x in self.weights.items() if name.endswith(".qkv.lora_A")), 0) // max(rank, 1)
        parts = ("lora_query", "lora_value", "lora_key")
        stacked -= sum(options.flag(part, False) for part in parts)
        for part in parts:
            flags[part] = options.flag(part, stacked > 0)
            stacked -= part not in options
        return flags | {
            "lora_r": rank,
            "lora_alpha": options.number("lora_alpha", lora.Config.lora_alpha),
            "lora_dropout": options.number("lora_dropout", lora.Config.lora_dropout, least=0),
            "lora_all": options.flag("lora_all", False),
            "lora_rslora": options.flag("lora_rslora", False),
            "lora_dora": any("lora_magnitude" in name for name in self.weights),
        }

    def add_to(self, model: GPT, config: Config) -> None:
        """Gives a model of `config` the modules of the method, with the trained weights, for inference."""
        method = _METHODS[self.method]
        method.add(model, config)
        model.load_state_dict(self.weights, strict=False)
        method.finish(model)

    def part(self, config: Config) -> GPT:
        """A model of that config with the trained weights, and all others on the meta device.

        Raises `ValueError` if the trained weights do not fit.
        """
        method, problems = _METHODS[self.method], []
        model = meta_model(config, method.kind)
        try:
            missing, extra = model.load_state_dict(self.weights, strict=False, assign=True)
            missing = [name for name in missing if method.is_trained(name, None)]
            problems = [f"{kind} {names[0]}" for kind, names in (("lacks", missing), ("has", extra)) if names]
        except RuntimeError as error:
            problems = [str(error).splitlines()[1].strip()]
        if problems:
            name = model.config.name or "the checkpoint's model"
            raise ValueError(f"{self.path} was not made from {name}: it {' and '.join(problems)}")
        return model

    def dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        """Data type of the trained weights: by the `precision` of the hyperparameters, else `base_dtype`."""
        precision = self.hyperparameters.text("precision", None, null=True)
        if precision is None:
            return base_dtype
        dtype = _PRECISIONS.get(precision)
        if dtype is None:
            raise self.hyperparameters.error("precision", f"must be one of {', '.join(_PRECISIONS)}")
        return dtype

    def prompt_style(self) -> PromptStyle | None:
        """The style that was trained, if it was saved with the weights."""
        folder = self.path.parent
        return load_prompt_style(folder) if has_prompt_style(folder) else None


class LoRACheckpoint(Checkpoint):
    """A folder with LoRA weights only, read as the checkpoint that was fine-tuned with the matrices merged into it.

    Weights are added in float32. `dtype` is the data type of the fine-tuning.

    Args:
        finetuned: The LoRA weights.
        base: The checkpoint that was fine-tuned.
    """

    def __init__(self, finetuned: Finetuned, base: Checkpoint) -> None:
        super().__init__(finetuned.path.parent)
        self._finetuned, self._base = finetuned, base
        self.files = [*base.files, finetuned.path]
        self._has_tokenizer = any((self.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    @cached_property
    def config(self) -> Config:
        return self._base.config

    @cached_property
    def dtype(self) -> torch.dtype:
        return self._finetuned.dtype(self._base.dtype)

    @cached_property
    def tied(self) -> bool:
        return self._base.tied and HEAD not in self._layers

    @cached_property
    def _layers(self) -> dict[str, lora.LoRALinear]:
        """The LoRA layers by the names of the weights that they are merged into."""
        model = self._finetuned.part(self._finetuned.config(self.config))
        layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, lora.LoRALinear))
        return {f"{name}.weight": layer for name, layer in layers if layer.r > 0}

    def row_shards(self, meta: bool = False) -> Iterator[RowShard]:
        if meta:
            return ((name, row, shard.to(self.dtype)) for name, row, shard in self._base.row_shards(meta=True))
        return ((name, 0, tensor) for name, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._base.tensors():
            if name in self._layers:
                tensor = self._layers[name].merged_weight(tensor)
            yield name, tensor.to(self.dtype)

    @property
    def eos_ids(self) -> list[int]:
        return super().eos_ids or self._base.eos_ids

    def tokenizer(self) -> Tokenizer:
        return super().tokenizer() if self._has_tokenizer else self._base.tokenizer()

    def copy_side_files(self, out_dir: Path) -> None:
        if not self._has_tokenizer:
            self._base.copy_side_files(out_dir)
        copy_side_files(self.path, out_dir)

    def prompt_style(self, tokenizer: Tokenizer | None = None) -> PromptStyle:
        return self._finetuned.prompt_style() or self._base.prompt_style(tokenizer)
