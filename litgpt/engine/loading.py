"""From what a user names to a model that is ready to generate. All front ends begin here."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.load import load_model
from litgpt.kernels import processor
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.prompt_style import PromptStyle
from litgpt.prompts import all_stop_tokens
from litgpt.runners.compiled import compile_decode
from litgpt.runners.fused import fuse_layers
from litgpt.runners.packed_weights import pack_linears, unpack_linears
from litgpt.runners.quantized_weights import Scheme
from litgpt.tokenizer import Tokenizer
from litgpt.waiting import waiting

log = logging.getLogger(__name__)

Quantization = Literal["int8", "int4", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass
class Ready:
    """A model with all that belongs to it."""

    model: GPT
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    checkpoint_dir: Path

    @property
    def stop_tokens(self) -> tuple[list[int], ...]:
        """What ends a text: the tokenizer's and the model's end tokens, and the prompt style's."""
        return all_stop_tokens(self.tokenizer, self.prompt_style)

    @property
    def device(self) -> torch.device:
        return self.model.transformer.wte.weight.device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype that a precision's name stands for: `32-true`, `bf16-true`, `16-true`, or those without `-true`.

    None is bfloat16 where the device computes in it, else float32 (CPU) or float16 (CUDA).
    """
    if precision is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if processor.torch_multiplies_bfloat16() else torch.float32
    dtype = DTYPES.get(precision.removesuffix("-true"))
    if dtype is None:
        names = ", ".join(f"{name}-true" for name in DTYPES)
        raise ValueError(f"precision {precision!r} is not one of {names}")
    return dtype


def make_ready(
    checkpoint_dir: Path | str | None,
    precision: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    device: torch.device | None = None,
    access_token: str | None = None,
    pack: bool = True,
    load: Callable[..., GPT] = load_model,
) -> Ready:
    """Load the model that `checkpoint_dir` names (None: the default model) for inference.

    Args:
        checkpoint_dir: a folder, a `.gguf` file, or a model's name.
        precision: see `parse_precision`.
        quantize: how to quantise the weights as they are read (`litgpt.runners.quantized_weights`).
        compile: compile the decoding step.
        device: default: the first GPU, else the CPU.
        access_token: of the Hugging Face hub, where the model has to be fetched.
        pack: lay the weights out for the CPU's kernels (`litgpt.runners.packed_weights`); no training then.
        load: makes the model of the checkpoint, in that dtype and on that device; and with `quantize` as a keyword, if
            that is given.
    """
    device = default_device() if device is None else device
    dtype = parse_precision(precision, device)
    if quantize is not None:
        Scheme(quantize)  # says what is missing before anything is fetched
        load = partial(load, quantize=quantize)
    path = find_checkpoint(checkpoint_dir, access_token)
    with waiting(f"Loading {path.resolve().name}", log=True):
        checkpoint = open_checkpoint(path)
        tokenizer = checkpoint.tokenizer()
        style = checkpoint.prompt_style(tokenizer)
        model = load(checkpoint, dtype, device).requires_grad_(False)
        if tokenizer.n_tokens > (rows := model.config.padded_vocab_size):
            log.warning(
                f"The tokenizer has {tokenizer.n_tokens:,} tokens, the model's embedding only {rows:,} rows: prompts with "
                "tokens beyond them are refused. If that is not meant so, the tokenizer is another model's."
            )
        if pack:
            speed_up_decode(model, compile)
    return Ready(model, tokenizer, style, path)


def speed_up_decode(model: GPT, compile: bool = False) -> None:
    """Have the model run as fast as it can: with packed weights and all layers in one call, where that works, else layer by
    layer, or with `compile` single tokens by a compiled graph."""
    pack_linears(model)
    if not fuse_layers(model) and compile:
        compile_decode(model)


def slow_down_decode(model: GPT) -> None:
    """Undo `speed_up_decode`: plain layers, with the same parameters as before."""
    model.layer_runner = None
    unpack_linears(model)


def choose_kv_caches(model: GPT, spec: CacheSpec | str, batch_size: int = 1) -> None:
    """Give the model the caches that are asked for, in the place of those that it has.

    Dense caches without a `cache_length` are default caches, which are made when it is known how long they have to be.

    Raises:
        ValueError: if there are no such caches.
    """
    spec = CacheSpec.parse(spec)
    model.clear_kv_caches(assigned=True)
    if spec != CacheSpec():
        model.assign_kv_caches(spec.create(model, batch_size))


def cache_bytes(model: GPT) -> int:
    """Bytes that the model's caches have allocated."""
    return model.caches.size_in_bytes()
