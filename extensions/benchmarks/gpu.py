"""Measures a model with random weights on a GPU: prefill, decode steps, memory beside the plan, and training through a cache.

    python extensions/benchmarks/gpu.py --model Llama-3.2-1B --out results.json

Every row comes from a process of its own. A few of them compile at the same time, and then measure one after the other.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

SLOTS, LONG, SHORT, STEPS = 2048, 16384, 512, 48
ROWS = [  # system, cache, batch, tokens before the decode steps
    *(("ours", cache, 1, n) for cache in ("dense", "dense-int8", "dense-int4") for n in (SHORT, LONG)),
    *(("ours", cache, 1, LONG) for cache in ("lastrec", "h2o", "snapkv")),
    ("ours", "dense", 16, SHORT),
    ("ours", "dense", 16, 4096),
    ("ours", "snapkv", 16, 4096),
    *(("transformers", cache, 1, n) for cache in ("dynamic", "static") for n in (SHORT, LONG)),
    ("transformers", "dynamic", 16, 4096),
]
TRAINING = [("plain", 8192), ("lastrec", 8192), ("lastrec", 32768)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="Llama-3.2-1B", help="name of a configuration (default: %(default)s)")
    add("--layers", type=int, help="take only so many of its layers (default: all)")
    add("--only", default="", help="rows whose name has this, such as ours-dense or training")
    add("--no_compile", action="store_true", help="leave out what has to be compiled")
    add("--profile", action="store_true", help="print what takes the time of a step without compiled code")
    add("--at_once", type=int, default=4, help="processes that prepare themselves together (default: %(default)s)")
    add("--out", type=Path, help="where the figures go, as JSON")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args, json.loads(args.worker))
        return
    rows = [("-".join(map(str, row)), row) for row in ROWS]
    rows += [(f"training-{system}-{length}", ("training", system, length)) for system, length in TRAINING]
    rows = [(name, row) for name, row in rows if args.only in name]
    if args.no_compile:
        rows = [(name, row) for name, row in rows if "static" not in name]
    results: dict[str, dict] = {}
    for first in range(0, len(rows), args.at_once):
        for name, figures in measure(rows[first : first + args.at_once]):
            results[name] = figures
            print(name, json.dumps(figures), flush=True)
            if args.out is not None:
                args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def measure(rows: list[tuple[str, tuple]]) -> Iterator[tuple[str, dict]]:
    """The figures of rows whose processes prepare themselves at the same time."""
    workers = []
    for name, row in rows:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps(row)]
        workers.append((name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)))
    ready = {name: process.stdout.readline() == "ready\n" for name, process in workers}
    for name, process in workers:
        said, _ = process.communicate("go\n" if ready[name] else None)
        *tables, figures = said.splitlines() or [""]
        print("\n".join(tables), end="\n" * bool(tables))
        yield name, json.loads(figures) if ready[name] and not process.returncode else {"failed": True}


def work(args: argparse.Namespace, row: list) -> None:
    """What the process of one row does: prepare, say so, wait for its turn, and print figures."""
    import torch

    kinds = {"ours": Ours, "transformers": Transformers, "training": Training}
    subject = kinds[row[0]](args, *row[1:])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    print("ready", flush=True)
    sys.stdin.readline()
    torch.cuda.reset_peak_memory_stats()
    figures = subject.measure()
    figures["peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(figures), flush=True)


def the_model(args: argparse.Namespace):
    """The model, in bfloat16 on the GPU."""
    import torch

    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config.from_name(args.model, **({} if args.layers is None else {"n_layer": args.layers}))
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = GPT(config)
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def timed(function) -> float:
    """Seconds that a call takes, until the GPU is done."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Ours:
    """`GPT` with a cache: plain layers, and compiled ones."""

    def __init__(self, args: argparse.Namespace, cache: str, batch: int, length: int) -> None:
        import torch

        from litgpt.kvcache import CacheSpec
        from litgpt.kvcache.memory import size_in_bytes
        from litgpt.planning import MemoryPlan
        from litgpt.runners.compiled import compile_decode

        self.args, self.batch, self.length, self.model = args, batch, length, the_model(args)
        dense = cache.startswith("dense")
        slots = -(-(length + STEPS + 8) // 256) * 256 + 1 if dense else SLOTS  # one is never read, for compiled code
        spec = CacheSpec.parse(cache, cache_length=slots)
        self.model.assign_kv_caches(spec.create(self.model, batch))
        self.cache_bytes = size_in_bytes(spec, self.model.config, batch, slots, torch.bfloat16)
        self.plan = MemoryPlan(self.model.config, spec, torch.bfloat16, tied=False).total(batch, slots)
        self.prompt = torch.randint(0, 1000, (batch, length), device="cuda")
        self.runner = None
        self.prefill()
        if not args.no_compile:
            compile_decode(self.model)
            self.runner, began = self.model.layer_runner, time.perf_counter()
            self.decode(6)
            self.compile_seconds = time.perf_counter() - began
            self.model.layer_runner = None
        self.decode(2)

    def prefill(self) -> None:
        import torch

        from litgpt.engine.prefill import prefill

        torch.cuda.synchronize()
        prefill(self.model, list(self.prompt), 2048)

    def decode(self, steps: int) -> list[float]:
        """Seconds of steps, each of which ends when the host knows its tokens, as when they are streamed."""
        import torch

        seconds, idx = [], self.prompt[:, :1]
        with torch.inference_mode():
            for _ in range(steps):
                began = time.perf_counter()
                idx = self.model(idx, self.model.next_token_pos)[:, -1].argmax(-1, keepdim=True)
                idx.tolist()
                seconds.append(time.perf_counter() - began)
        return seconds

    def measure(self) -> dict:
        import torch

        found = {"prefill": self.batch * self.length / timed(self.prefill)}
        found |= {"plan": self.plan, "cache_bytes": self.cache_bytes}
        found["decode"] = self.batch / median(self.decode(STEPS // 2)[4:])
        if self.args.profile:
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
                self.decode(2)
            print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=60))
        if self.runner is not None:
            self.prefill()
            self.model.layer_runner = self.runner
            found["compile_seconds"] = self.compile_seconds
            found["compiled"] = self.batch / median(self.decode(STEPS)[8:])
            if self.args.profile:
                with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
                    self.decode(2)
                print(
                    profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=60)
                )
        return found


class Transformers:
    """`generate` of transformers on a model of the same sizes."""

    def __init__(self, args: argparse.Namespace, cache: str, batch: int, length: int) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from litgpt.config import Config

        config, self.batch, self.length = Config.from_name(args.model), batch, length
        sizes = LlamaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=args.layers or config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_query_groups,
            head_dim=config.head_size,
            max_position_embeddings=config.block_size,
            tie_word_embeddings=False,
        )
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            self.model = LlamaForCausalLM(sizes).eval()
            torch.set_default_dtype(torch.float32)
        self.prompt = torch.randint(3, 1000, (batch, length), device="cuda")
        self.options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if cache == "static":
            self.options["cache_implementation"] = "static"
        self.run(12)
        self.run(1)

    def run(self, tokens: int) -> None:
        mask = self.prompt.new_ones(self.prompt.shape)
        self.model.generate(self.prompt, attention_mask=mask, max_new_tokens=tokens, **self.options)

    def measure(self) -> dict:
        first = timed(lambda: self.run(1))
        rest = timed(lambda: self.run(1 + STEPS)) - first
        return {"prefill": self.batch * self.length / first, "decode": self.batch * STEPS / rest}


class Training:
    """A step of LoRA on queries and values, through a cache or without one."""

    def __init__(self, args: argparse.Namespace, system: str, length: int) -> None:
        import torch

        from litgpt.kvcache import CacheSpec
        from litgpt.lora import Config as LoRAConfig
        from litgpt.lora import add_lora, mark_only_lora_as_trainable
        from litgpt.train.cached_layers import CachedLayers
        from litgpt.train.model import TrainingModel

        model, self.length = the_model(args), length
        lora = LoRAConfig.extending(model.config, lora_r=8, lora_alpha=16, lora_query=True, lora_value=True)
        add_lora(model, lora)
        mark_only_lora_as_trainable(model)
        model.to("cuda", torch.bfloat16).train()
        cached = None if system == "plain" else CachedLayers(model, CacheSpec(system, cache_length=1024), 512)
        self.training = TrainingModel(model, system == "plain", cached)
        self.idx = torch.randint(0, 1000, (1, length + 1), device="cuda")
        self.step(1024)
        torch.cuda.empty_cache()
        self.before = torch.cuda.memory_allocated()

    def step(self, length: int) -> None:
        inputs, labels = self.idx[:, :length].contiguous(), self.idx[:, 1 : length + 1].contiguous()
        (self.training(inputs, labels) / length).backward()

    def measure(self) -> dict:
        import torch

        seconds = timed(lambda: self.step(self.length))
        peak = torch.cuda.max_memory_allocated()
        return {"seconds": seconds, "tokens": self.length / seconds, "beside_model": peak - self.before}


if __name__ == "__main__":
    main()
