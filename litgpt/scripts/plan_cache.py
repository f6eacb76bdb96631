"""The command `plan_cache`."""

import json as json_format
import shlex
from pathlib import Path
from typing import Any, Literal

from litgpt.engine.loading import default_device, parse_precision
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.memory import as_text, available_bytes, fitting_caches
from litgpt.planning import MemoryPlan, measured_bandwidth, parse_bytes, plan_for
from litgpt.settings import LARGEST
from litgpt.train.cached_layers import check_trainable
from litgpt.train.methods import METHODS
from litgpt.train.step_memory import StepMemory, state_bytes


def plan_cache(
    checkpoint_dir: Path,
    memory: str | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_cache: str = "dense",
    cache_length: int | None = None,
    kv_cache_args: dict[str, Any] | None = None,
    quantize: str | None = None,
    precision: str | None = None,
    prompt_chunksize: int = 512,
    bandwidth: float | None = None,
    train: Literal["lora", "full", "adapter", "adapter_v2"] | None = None,
    json: bool = False,
) -> None:
    """Tell whether a model and its key-value caches fit into a memory, and what would; no weights are loaded.

    Sizes of weights and caches are exact, the workspace is an estimate. With --train it is the memory of a training step through
    the caches.

    Args:
        checkpoint_dir: Folder of a checkpoint, a .gguf file, or the name of a model, which need not be on this disk.
        memory: What there is, such as 24GB or 16GiB. Default: what is left on this machine.
        context: Tokens of a sequence, prompt and answer together. Default: the model's context.
        batch: Sequences at a time.
        kv_cache: The caches: a policy, perhaps with a storage, as in dense-int8.
        cache_length: Slots of caches that evict.
        kv_cache_args: Further arguments of the caches, such as --kv_cache_args.budget scores.
        quantize: Quantise the weights: int8 or int4.
        precision: bf16-true, 16-true or 32-true. Default: the fastest on the device.
        prompt_chunksize: Tokens of a prefill call.
        bandwidth: Of the memory, in GB a second. Default: measured on this machine.
        train: Plan a step of fine-tuning through the caches, by lora, full, adapter or adapter_v2, with its default settings.
        json: Print a JSON object, with sizes in bytes, instead of the table.
    """
    for name, value in (("context", context), ("batch", batch), ("prompt_chunksize", prompt_chunksize)):
        if value is not None and not 1 <= value <= LARGEST:
            raise ValueError(f"--{name} must be {'at least 1' if value < 1 else f'at most {LARGEST:,}'}, got {value:,}")
    if bandwidth is not None and not 0 < bandwidth < 1e9:
        raise ValueError(f"--bandwidth must be a number above 0 and below 1e9, got {bandwidth}")
    device = default_device()
    spec = CacheSpec.parse(kv_cache, cache_length, **(kv_cache_args or {}))
    plan = plan_for(checkpoint_dir, spec, parse_precision(precision, device), quantize, prompt_chunksize)
    most = plan.config.block_size
    length = most if context is None else context
    if length > most and not spec.evicts:
        raise ValueError(f"--context {length:,} is more than the model's context of {most:,} tokens")
    available = available_bytes(device) if memory is None else parse_bytes(memory)
    if available is None:
        raise ValueError("how much memory this machine has left is not known: give --memory, as 24GB")
    if train is not None:
        check_trainable(spec)
        if length > most:
            raise ValueError(f"--context {length:,} is more than the model's context of {most:,} tokens")
        table, advice, sizes = _training(plan, checkpoint_dir, train, batch, length, available, device.type == "cpu")
    else:
        speed = measured_bandwidth() if bandwidth is None else bandwidth * 1e9
        table, sizes = _table(plan, batch, length, available, speed, "measured" if bandwidth is None else "given")
        advice = _command(plan, checkpoint_dir, quantize, precision, batch, length, available)
    if json:
        numbers = {"sequences": batch, "context": length, "memory": available, **sizes}
        print(json_format.dumps({"model": plan.config.name, **spec.describe(), **numbers, "advice": advice}))
    else:
        print(f"{table}\n\n{advice}")


def _training(
    plan: MemoryPlan, name: Path, method: str, rows: int, length: int, memory: int, on_cpu: bool
) -> tuple[str, str, dict[str, Any]]:
    """The memory of a training step, by where the inputs of layers are kept; the command to paste; and the sizes in bytes."""
    if METHODS[method].trains_all and plan.scheme is not None:
        raise ValueError("--train full needs plain weights: leave out --quantize")
    full = METHODS[method].trains_all
    step = StepMemory(plan.config, plan.spec, rows, length, plan.chunk, plan.dtype, trained_head=full)
    added, state = state_bytes(plan.config, method)
    fixed = plan.weights + added + state
    kind = str(plan.dtype).removeprefix("torch.") if plan.scheme is None else plan.scheme.mode
    lines = {
        "weights": f"{as_text(plan.weights + added)} in {kind}" + (", with what is added" if added else ""),
        "gradients": f"{as_text(state)} with AdamW's numbers, in float32",
        "one layer": f"{as_text(step.one_layer)}: its keys and values, and gradients",
        "one chunk": f"about {as_text(step.one_chunk)}, of {min(plan.chunk, length):,} tokens a sequence",
        "loss": f"about {as_text(step.logits)} of logits at a time",
    }
    sizes: dict[str, Any] = {"weights": plan.weights + added, "gradients": state, "one_layer": step.one_layer}
    sizes |= {"one_chunk": step.one_chunk, "loss": step.logits, "keep_inputs": {}}
    for place in step.places(on_cpu):
        total = fixed + step.total(place)
        sizes["keep_inputs"][place] = {"inputs": step.kept(place), "together": total, "fits": total <= memory}
        fits = "fits into" if total <= memory else f"{as_text(total - memory)} more than"
        lines[f"keep_inputs {place}"] = (
            f"{as_text(step.kept(place))} of layers' inputs; together {as_text(total)}: {fits} {as_text(memory)}"
        )
    title = (
        f"{plan.config.name}, training by {method} through {plan.spec} caches, {_sequences(rows)} of {length:,} tokens"
    )
    table = "\n".join([title, "", *(f"{key + ':':20}{text}" for key, text in lines.items())])
    place = step.what_fits(memory - fixed, on_cpu)
    if place is None:
        return table, f"Nothing fits: try {step.remedy(memory - fixed, on_cpu)}.", sizes
    words = ["litgpt", f"finetune_{method}", str(name), "--kv_cache", str(plan.spec), *_arguments(plan.spec)]
    words += [] if plan.spec.cache_length is None else ["--cache_length", str(plan.spec.cache_length)]
    words += ["--prompt_chunksize", str(plan.chunk), "--train.max_seq_length", str(length)]
    words += ["--train.micro_batch_size", str(rows), "--train.keep_inputs", str(place)]
    return table, " ".join(map(shlex.quote, words)), sizes


def _table(
    plan: MemoryPlan, rows: int, length: int, memory: int, bandwidth: float, source: str
) -> tuple[str, dict[str, Any]]:
    """What model and caches take and what fits, as text; and the sizes in bytes."""
    config, weights, caches, workspace = plan.config, plan.weights, plan.caches(rows, length), plan.workspace(rows)
    total = weights + caches + workspace
    kind = str(plan.dtype).removeprefix("torch.") if plan.scheme is None else plan.scheme.mode
    per_token, left = plan.bytes_per_token(length), memory - total
    longest, most_rows = plan.longest(rows, memory), plan.most_rows(length, memory)
    limit = " (the model's context)" if longest == config.block_size else ""
    speed = plan.tokens_per_second(rows, length, bandwidth)
    sizes = {"weights": weights, "caches": caches, "bytes_per_token": per_token, "workspace": workspace}
    sizes |= {"together": total, "fits": left >= 0, "longest": longest, "most": most_rows, "tokens_per_second": speed}
    limit = f"{longest:,} tokens{limit}" if not plan.spec.evicts or not limit else "any number of tokens"
    lines = {
        "weights": f"{as_text(weights)} in {kind}",
        "caches": f"{as_text(caches)}, {as_text(per_token)} a further token of a sequence",
        "workspace": f"about {as_text(workspace)}, for prefill calls of {min(plan.chunk, length):,} tokens",
        "together": f"{as_text(total)}: "
        + (f"fits into {as_text(memory)}" if left >= 0 else f"{as_text(-left)} more than {as_text(memory)}"),
        "longest": f"{limit} for {_sequences(rows)}" if longest else "not one token fits",
        "most": f"{_sequences(most_rows)} of {length:,} tokens at a time",
        "speed": f"at most {speed:,.1f} tokens/s with full caches, by {bandwidth / 1e9:.1f} GB/s ({source})",
    }
    title = f"{config.name}, {plan.spec} caches, {_sequences(rows)} of {length:,} tokens"
    return "\n".join([title, "", *(f"{name + ':':11}{text}" for name, text in lines.items())]), sizes


def _sequences(rows: int) -> str:
    return f"{rows:,} sequence{'s' * (rows != 1)}"


def _arguments(spec: CacheSpec) -> list[str]:
    """A cache's further arguments, as options."""
    pairs = ((name, list(value) if isinstance(value, tuple) else value) for name, value in spec.arguments)
    return [word for name, value in pairs for word in (f"--kv_cache_args.{name}", str(value))]


def _command(
    plan: MemoryPlan, name: Path, quantize: str | None, precision: str | None, rows: int, length: int, memory: int
) -> str:
    """The command to paste, or what would fit."""
    spec, left = plan.spec, memory - plan.weights - plan.workspace(rows)
    cache = [] if spec == CacheSpec() else ["--kv_cache", str(spec), *_arguments(spec)]
    slots = spec.cache_length
    if slots is None and not spec.evicts and spec != CacheSpec() and length < plan.config.block_size:
        slots = length  # else it is made for the model's whole context
    cache += [] if slots is None else ["--cache_length", str(slots)]
    if left < plan.caches(rows, length):
        fitting = list(fitting_caches(plan.config, rows, length, plan.dtype, left)) if left > 0 else []
        if not fitting:
            smaller = "fewer or shorter sequences" if quantize else "--quantize int4, fewer or shorter sequences"
            return f"No caches fit: try {smaller}, or a smaller model."
        cache = ["--kv_cache", *fitting[0].split()]
    words = ["litgpt", "generate", str(name), *cache, "--prompt_chunksize", str(plan.chunk)]
    words += [f"--{option}={value}" for option, value in (("quantize", quantize), ("precision", precision)) if value]
    return " ".join(map(shlex.quote, words))
