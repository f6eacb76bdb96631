"""Measures a training step through key-value caches beside plain fine-tuning: seconds, and memory above the model.

    python extensions/benchmarks/training_through_caches.py SmolLM2-135M-Instruct --out results.json

Every figure comes from a process of its own, on one sequence of random tokens, LoRA on queries and values. See README.md.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

CACHE_LENGTH, CHUNK = 1024, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint, or the name of a model")
    add("--lengths", default="2048,4096,8192,16384,32768", help="tokens of the sequences (default: %(default)s)")
    add("--systems", default="plain,checkpointing,dense,lastrec", help="what is measured (default: %(default)s)")
    add("--keep_inputs", default="device", help="device, cpu, disk or numbers of layers, separated by commas")
    add("--steps", type=int, default=2, help="steps, the first of which is not timed (default: %(default)s)")
    add("--longest_plain", type=int, default=8192, help="longest sequence without caches (default: %(default)s)")
    add("--rounds", type=int, default=1, help="times that all is measured (default: %(default)s)")
    add("--out", type=Path, help="where the figures go, as JSON")
    add("--layers", type=int, help="take only the first of the model's layers (default: all)")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.checkpoint, **json.loads(args.worker))))
        return
    results = []
    for _ in range(args.rounds):
        for length in map(int, args.lengths.split(",")):
            for system in args.systems.split(","):
                for keep in args.keep_inputs.split(",") if system not in ("plain", "checkpointing") else ["device"]:
                    if system in ("plain", "checkpointing", "dense") and length > args.longest_plain:
                        continue
                    work = {"system": system, "length": length, "steps": args.steps, "keep_inputs": keep}
                    work["layers"] = args.layers
                    results.append(work | run_worker(args.checkpoint, work))
                    print(row(results[-1]), flush=True)
    for line in flatness(results):
        print(line)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def run_worker(checkpoint: str, work: dict) -> dict:
    command = [sys.executable, __file__, checkpoint, "--worker", json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def row(result: dict) -> str:
    name = f"{result['system']:14} {result['keep_inputs']:7} {result['length']:6}"
    if "failed" in result:
        return f"{name}  {result['failed']}"
    speed, expected = result["length"] / result["seconds"], result.get("expected")
    ratio = f"  {result['peak'] / expected:.2f}x of {expected / 1e6:.0f} MB" if expected else ""
    beyond = f"  beyond the model's context of {result['context']:,} tokens" * (result["length"] > result["context"])
    return f"{name}  {result['seconds']:7.2f} s  {speed:6.0f} tokens/s  {result['peak'] / 1e6:7.0f} MB{ratio}{beyond}"


def flatness(results: list[dict]) -> list[str]:
    """For every system that was measured at several lengths, its speeds and how far apart they are: medians of the rounds."""
    speeds: dict[tuple[str, str], dict[int, list[float]]] = {}
    for result in results:
        if "failed" not in result:
            of_system = speeds.setdefault((result["system"], result["keep_inputs"]), {})
            of_system.setdefault(result["length"], []).append(result["length"] / result["seconds"])
    lines = []
    for (system, keep), by_length in speeds.items():
        if len(by_length) > 1:
            found = {length: median(of) for length, of in by_length.items()}
            shown = ", ".join(f"{speed:.0f} at {length:,}" for length, speed in found.items())
            spread = max(found.values()) / min(found.values()) - 1
            lines.append(f"{system} {keep}: tokens/s {shown}: the fastest is {spread:.0%} above the slowest")
    return lines


def measure(checkpoint: str, system: str, length: int, steps: int, keep_inputs: str, layers: int | None) -> dict:
    """Median seconds of a step and the peak of memory above that of the model; where the caches evict, also what inputs of
    layers, one layer's keys, values and gradients, and the graph of a chunk come to."""
    import torch

    from litgpt import LLM
    from litgpt.kvcache import CacheSpec
    from litgpt.lora import Config as LoRAConfig
    from litgpt.lora import add_lora, mark_only_lora_as_trainable
    from litgpt.train.cached_layers import CachedLayers
    from litgpt.train.model import TrainingModel

    torch.manual_seed(0)
    model = LLM.load(checkpoint, init="pretrained", precision="32-true").prepare_for_training()
    config = model.config
    if layers is not None:
        del model.transformer.h[layers:]
        config.n_layer = layers
    context = config.block_size
    config.block_size = max(length, context)  # beyond the model's context: same rotations, any positions
    add_lora(model, LoRAConfig.extending(model.config, lora_r=8, lora_alpha=16, lora_query=True, lora_value=True))
    mark_only_lora_as_trainable(model)
    model.float().train()
    model.max_seq_length = config.block_size
    spec = {
        "dense": CacheSpec("dense", cache_length=length),
        "lastrec": CacheSpec("lastrec", cache_length=CACHE_LENGTH),
    }
    cached = None
    if system in spec:
        cached = CachedLayers(model, spec[system], CHUNK, int(keep_inputs) if keep_inputs.isdigit() else keep_inputs)
    training = TrainingModel(model, system == "checkpointing", cached)
    idx, seconds = torch.randint(0, model.config.vocab_size, (1, length + 1)), []
    short = idx[:, :CHUNK]  # what the first step allocates for good
    training(short, short.clone()).backward()
    before, peak = resident_bytes(), Peak()
    for _ in range(steps):
        began = time.perf_counter()
        (training(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()) / length).backward()
        seconds.append(time.perf_counter() - began)
    result = {"seconds": median(seconds[1:] or seconds), "peak": peak.stop() - before, "context": context}
    if system == "lastrec" and keep_inputs == "device":
        config = model.config
        of_tokens = 4 * length * (config.n_layer * config.n_embd + 4 * config.n_query_groups * config.head_size)
        result["expected"] = of_tokens + graph_bytes(model)
    return result


def graph_bytes(model) -> int:
    """Bytes that autograd keeps for a chunk of a layer that sees a full cache."""
    import torch

    config, kept = model.config, {}
    note = lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x  # noqa: E731
    x = torch.randn(1, CACHE_LENGTH + CHUNK, config.n_embd)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        block, rope = model.transformer.h[0], model.rope_rows(0, CACHE_LENGTH + CHUNK, False)
        block(x.requires_grad_(), rope, None, None)
    total = sum(size for place, size in kept.items() if place not in weights)
    return round(total * CHUNK / (CACHE_LENGTH + CHUNK))


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Peak:
    """The most memory that is resident from now on, looked at every 5 ms."""

    def __init__(self) -> None:
        self.bytes, self._done = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, resident_bytes())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.bytes


if __name__ == "__main__":
    main()
