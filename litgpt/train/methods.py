"""The ways to fine-tune: what each adds to a model, what it trains, and what it saves."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from litgpt import adapter, adapter_v2, lora
from litgpt.config import Config
from litgpt.model import GPT


@dataclass(frozen=True)
class Method:
    """A way to fine-tune."""

    name: str
    suffix: str = ""  # of the file that holds the trained weights, after `lit_model.pth`
    config: type[Config] = Config  # of the model
    add: Callable[[GPT, Any], None] = lambda *_: None  # gives a model, in place, the modules that are trained
    is_trained: Callable[[str, Any], bool] = lambda name, value: True  # and saved

    @property
    def trains_all(self) -> bool:
        """Whether all weights of the model are trained."""
        return not self.suffix

    def check(self, quantization: Any) -> None:
        """Raise `ValueError` for weights that are quantised in some way (None: they are not) and would all be trained."""
        if self.trains_all and quantization is not None:
            raise ValueError("the weights are quantised, and full fine-tuning needs plain weights: use finetune_lora")

    def saving(self, file: Path) -> str:
        """What is said when it is saved."""
        is_adapter = self.name.startswith("adapter")
        return f"Saving adapter weights to '{file}'" if is_adapter else f"Saving checkpoint to '{file.parent}'"

    @property
    def fields(self) -> set[str]:
        """Fields of the configuration that a plain one lacks."""
        return {f.name for f in fields(self.config)} - {f.name for f in fields(Config)}

    def extend(self, config: Config, options: Any, **more: Any) -> Config:
        """`config` with these fields as `options` and `more` say."""
        own = {name: getattr(options, name) for name in self.fields if hasattr(options, name)}
        return self.config.extending(config, **own, **more)

    def prepare(self, model: GPT, config: Config) -> None:
        """Add what is trained to `model`, in place, and freeze the rest."""
        self.add(model, config)
        model.config = config
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self.is_trained(name, parameter)


METHODS = {
    method.name: method
    for method in (
        Method("full"),
        Method("lora", ".lora", lora.Config, lora.add_lora, lora.lora_filter),
        Method("adapter", ".adapter", adapter.Config, adapter.add_prefixes, adapter.adapter_filter),
        Method("adapter_v2", ".adapter_v2", adapter.Config, adapter_v2.add_adapter_v2, adapter_v2.adapter_filter),
    )
}
