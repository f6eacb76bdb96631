"""Counts the graphs that a compiled decode step needs for a text, with a cache that evicts, and compares it with the same model
uncompiled.

    python extensions/benchmarks/one_graph.py --tokens 4096

The text enters token by token, and both see the same tokens. See README.md next to this file.
"""

import argparse
import os
import sys

os.environ["LITGPT_KERNELS"] = "0"  # with kernels, nothing is compiled on a CPU

import torch
from environments import parse_numbers
from torch._dynamo.utils import counters

from litgpt.engine.loading import Ready, make_ready
from litgpt.kvcache import CacheSpec
from litgpt.tasks.document import read_document

SHOWN = 256  # positions between two lines of output
ERROR = 1e-3  # of logits, relative to the largest


def main() -> int:
    args = parse_arguments()
    spec = CacheSpec.parse(args.kv_cache, args.cache_length)
    both = [ready(args, spec, compile) for compile in (True, False)]
    tokens = both[0].tokenizer.encode(read_document(None), bos=False)[: args.tokens]
    worst, same = 0.0, 0
    with torch.inference_mode():
        for position, token in enumerate(tokens):
            ours, wanted = (of.model(token.view(1, 1), position)[0, -1] for of in both)
            worst = max(worst, ((ours - wanted).abs().max() / wanted.abs().max()).item())
            same += int(ours.argmax() == wanted.argmax())
            if position % SHOWN == SHOWN - 1 or position == len(tokens) - 1:
                graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
                print(
                    f"positions 0 to {position}: {graphs} graphs, {breaks} breaks; the likeliest token is the same at {same}; "
                    f"largest difference of logits {worst:.1e}",
                    flush=True,
                )
    if (graphs, breaks) != (1, 0) or worst > ERROR:
        print("error: that is not one graph, or not the same model", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder of a checkpoint, or the name of a model (default: the default model)")
    add("--kv_cache", default="h2o", help="(default: %(default)s)")
    add("--cache_length", type=int, default=1024, help="slots (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="of the text (default: %(default)s)")
    return parse_numbers(parser, cache_length=1, tokens=3)


def ready(args: argparse.Namespace, spec: CacheSpec, compile: bool) -> Ready:
    loaded = make_ready(args.checkpoint, "32-true", compile=compile, device=torch.device("cpu"), pack=compile)
    loaded.model.assign_kv_caches(spec.create(loaded.model, 1))
    return loaded


if __name__ == "__main__":
    sys.exit(main())
