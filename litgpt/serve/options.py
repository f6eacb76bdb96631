"""The options of `litgpt serve`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt.generate.options import CacheOptions, CheckpointOptions, SamplingOptions, option


@dataclass(frozen=True, kw_only=True)
class ServeOptions(SamplingOptions, CacheOptions, CheckpointOptions):
    """The options of `litgpt serve`."""

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines connect.")
    port: int = option(8000, "Port to listen at.", least=0, most=65535)
    api_key: str | None = option(
        None, "Key that clients have to send (Authorization: Bearer, or X-API-Key). Default: $LIT_SERVER_API_KEY."
    )
    cors: str | None = option(
        None, "Web pages of this origin, or * for all, may use the server. Default: only its own."
    )
    batch_size: int = option(8, "Most answers that are generated together.", least=1)
    max_queue: int = option(64, "Most requests that wait; further ones are refused with status 429.", least=0)
    prefix_cache: int = option(
        1000, "Megabytes for states of the key-value cache, from which later prompts that begin alike go on.", least=0
    )
    strict_model: bool = option(False, "Refuse requests that name another model.")
    max_body: int = option(16, "Most megabytes of a request's body.", least=1)
    grace: int = option(30, "Seconds that running answers have after SIGTERM.", least=0)
    timeout: int = option(30, "Seconds that a request may wait for its turn; then its status is 504.", least=1)
    max_seconds: int | None = option(
        None,
        "Most seconds of an answer, from its request on; it then ends with what there is. Default: no limit.",
        least=1,
    )
    stream: bool = option(False, "Let /predict stream its answer as JSON lines.")
    api_path: str = option("/predict", "Path of LitGPT's own endpoint.")
    openai_spec: bool = option(False, "Has no effect: OpenAI's endpoints are always there.")
    devices: int = option(1, "Number of devices: this server runs a model on one.", least=1)
    generate_strategy: Literal["sequential", "tensor_parallel"] | None = option(
        None, "How several devices share a model: not supported by this server."
    )
    accelerator: Literal["auto", "cuda", "cpu", "mps"] = option("auto", "auto, cuda, cpu or mps.")
    lora: str | None = option(
        None,
        "Folders of LoRA weights, with commas between them, to serve beside the model, whose weights they share. Each has the "
        "name of its folder, or with NAME=FOLDER another one.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.api_path.startswith("/"):
            raise ValueError(f"api_path must begin with /, got {self.api_path!r}")
        self.loras()  # raises at once
        if self.devices > 1 or self.generate_strategy is not None:
            raise ValueError("this server runs a model on one device: leave devices and generate_strategy out")

    def loras(self) -> dict[str, Path]:
        """The folders of LoRA weights by their names; `ValueError` if two have the same."""
        found: dict[str, Path] = {}
        for text in (self.lora or "").split(","):
            name, equals, folder = text.strip().rpartition("=")
            if not folder:
                continue
            path = Path(folder)
            if not equals:
                whole = path.resolve()
                name = whole.parent.name if whole.name == "final" else whole.name  # as fine-tuning calls it
            if name in found:
                raise ValueError(f"two folders of LoRA weights are called {name!r}: give one another name, NAME=FOLDER")
            found[name] = path
        return found

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("LIT_SERVER_API_KEY") or None
