"""From a model's name or path to a model that is ready to generate; all front ends use it."""

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.base import Checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.checkpoint.finetuned import Finetuned, trained_cache
from litgpt.checkpoint.load import load_model
from litgpt.engine.caches import CacheLease
from litgpt.kernels import ops, processor
from litgpt.kernels.library import compile_ahead
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.layers import LayerCaches
from litgpt.kvcache.memory import check_fits
from litgpt.model import GPT
from litgpt.prompt_style import PromptStyle
from litgpt.prompts import all_stop_tokens
from litgpt.runners.compiled import compile_decode
from litgpt.runners.fused import fuse_layers
from litgpt.runners.huge_pages import use_huge_pages
from litgpt.runners.opaque_weights import OpaqueLayer
from litgpt.runners.packed_weights import pack_linears, unpack_linears
from litgpt.runners.quantized_weights import Scheme
from litgpt.tokenizer import Tokenizer
from litgpt.waiting import waiting

log = logging.getLogger(__name__)

Quantization = Literal["int8", "int4", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass
class Ready:
    """A model with its tokenizer and prompt style."""

    model: GPT
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    checkpoint_dir: Path
    trained_in: Path | None = None  # where fine-tuning wrote its result, if that is not the checkpoint

    @property
    def trained_cache(self) -> dict[str, Any]:
        """The options of the cache through which the model was trained (empty: none)."""
        return trained_cache(self.trained_in or self.checkpoint_dir)

    @property
    def stop_tokens(self) -> tuple[list[int], ...]:
        """Stop sequences: the end tokens of tokenizer and model, and those of the prompt style."""
        return all_stop_tokens(self.tokenizer, self.prompt_style)

    @property
    def device(self) -> torch.device:
        return self.model.device


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_threads() -> int | None:
    """Threads for commands that are not told how many: one for every core, since two on one core share what products need.
    None: as many as torch takes."""
    cores = processor.physical_cores()
    return None if "OMP_NUM_THREADS" in os.environ or cores is None else min(cores, torch.get_num_threads())


def parse_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype for `32-true`, `bf16-true` or `16-true` (`-true` may be left out).

    None: bfloat16 where the device, or our kernels on it, multiply it fast, else float32 (CPU) or float16 (CUDA).
    """
    if precision is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if processor.torch_multiplies_bfloat16() or ops.are_vectorized() else torch.float32
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
    threads: int | None = None,
    pack: bool = True,
    load: Callable[..., GPT] = load_model,
    join: bool = True,
    huge_pages: bool = True,
    check: Callable[[Checkpoint, Tokenizer, PromptStyle], None] | None = None,
) -> Ready:
    """Load the model that `checkpoint_dir` names (None: the default model) for inference.

    Args:
        checkpoint_dir: a folder, a `.gguf` file, or a model's name.
        precision: see `parse_precision`.
        quantize: mode of quantisation (`litgpt.runners.quantized_weights`), applied while the weights are read.
        compile: compile the decode step.
        device: default: the first GPU, else the CPU.
        access_token: for the Hugging Face hub.
        threads: that compute on the CPU, in this process from now on. None: as many as before.
        pack: pack the weights for the CPU's kernels (`litgpt.runners.packed_weights`); the model cannot be trained then.
        load: makes the model, as `load_model`.
        join: whether layers with the same input may become one; not if `lend_weights` follows.
        huge_pages: move packed weights to huge pages, which takes as long as they save in some 150 decode steps.
        check: is called before weights are read, and may raise.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = default_device() if device is None else device
    if device.type == "cpu":
        compile_ahead()  # while weights are fetched
    if precision is not None:
        parse_precision(precision, device)  # raises before anything is fetched
    if quantize is not None:
        Scheme(quantize)  # raises before anything is fetched
        load = partial(load, quantize=quantize)
    path = find_checkpoint(checkpoint_dir, access_token)
    with waiting(f"Loading {path.resolve().name}", log=True):
        checkpoint = open_checkpoint(path)
        tokenizer = checkpoint.tokenizer()
        style = checkpoint.prompt_style(tokenizer)
        if check is not None:
            check(checkpoint, tokenizer, style)
        dtype = parse_precision(precision, device)  # after what needs no kernels, which are being compiled
        model = load(checkpoint, dtype, device).requires_grad_(False)
        if tokenizer.n_tokens > (rows := model.config.padded_vocab_size):
            log.warning(
                f"The tokenizer has {tokenizer.n_tokens:,} tokens, the model's embedding only {rows:,} rows: prompts with "
                "tokens beyond them are refused. If this is not intended, the tokenizer belongs to another model."
            )
        if pack:
            speed_up_decode(model, compile, join, huge_pages)
    return Ready(model, tokenizer, style, path)


def trained_spec(folder: Path) -> CacheSpec | None:
    """The cache through which the model in `folder` was trained, if there was one."""
    trained = trained_cache(folder)
    if not trained:
        return None
    return CacheSpec.parse(trained["kv_cache"], trained["cache_length"], **(trained["kv_cache_args"] or {}))


def lend_weights(ready: Ready, finetuned: Finetuned) -> Ready:
    """The model with LoRA weights, which shares all others with the one that was loaded. Its caches are its own.

    Raises:
        ValueError: if the LoRA weights do not fit it.
    """
    model, config = ready.model, finetuned.config(ready.model.config)
    finetuned.part(config)
    shared = [m for m in model.modules() if not list(m.children()) or isinstance(m, OpaqueLayer)]
    shared += [*model.parameters(), *model.buffers(), model.rope_table]
    tuned = copy.deepcopy(model, {id(one): one for one in shared})
    tuned.clear_kv_caches(assigned=True)
    finetuned.add_to(tuned, config)
    style = finetuned.prompt_style() or ready.prompt_style
    fuse_layers(tuned)
    return replace(ready, model=tuned.requires_grad_(False), prompt_style=style, trained_in=finetuned.path.parent)


def speed_up_decode(model: GPT, compile: bool = False, join: bool = True, huge_pages: bool = True) -> None:
    """Make the model fast: packed weights, in `huge_pages`, and, where supported, all layers in one kernel call; otherwise, with
    `compile`, decode steps by a compiled graph. `join`: see `pack_linears`."""
    pack_linears(model, join)
    if huge_pages:
        use_huge_pages(model)
    if not fuse_layers(model) and compile:
        compile_decode(model)


def slow_down_decode(model: GPT) -> None:
    """Undo `speed_up_decode`: plain layers, with the same parameters as before."""
    model.layer_runner = None
    unpack_linears(model)


def choose_kv_caches(model: GPT, spec: CacheSpec | str, batch_size: int = 1) -> None:
    """Replace the model's caches by those of `spec`.

    Dense caches without a `cache_length` are default caches, made once their length is known.

    Raises:
        ValueError: if there are no such caches.
    """
    spec = CacheSpec.parse(spec)
    model.clear_kv_caches(assigned=True)
    if spec != CacheSpec():
        check_fits(spec, model, batch_size, model.max_seq_length)
        model.assign_kv_caches(spec.create(model, batch_size))


def lease_caches(model: GPT, spec: CacheSpec, batch_size: int, chosen: bool) -> CacheLease:
    """Caches for one call: new ones, or for the default kind the model's, where these are free. Assigned caches are used unless
    a kind was `chosen`."""
    default = spec == CacheSpec()
    if default:
        lease = CacheLease.take(model)
        if not chosen or lease.caches is not None:
            return lease
    lease = CacheLease(model, LayerCaches())
    if not default:
        lease.run(choose_kv_caches, model, spec, batch_size)
    return lease
