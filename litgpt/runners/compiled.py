"""Compiled decoding: one graph for the step of one token, whatever the position."""

from collections.abc import Sequence

import torch

from litgpt.kvcache.plan import Plan
from litgpt.model import GPT
from litgpt.rope import Rope


def compile_decode(model: GPT) -> None:
    """Have the model's single-token calls run as one compiled graph; on a GPU, replayed as CUDA graphs.

    The number of slots read is a symbol of the graph, so it serves all positions; a new graph is made only for another
    batch size or cache capacity. The first step compiles, for some tens of seconds; torch keeps what it compiled on disk,
    so that later processes take a part of that.
    """
    on_gpu = model.transformer.wte.weight.is_cuda
    step = torch.compile(model.run_layers, fullgraph=True, mode="reduce-overhead" if on_gpu else None)

    def decode(
        idx: torch.Tensor, rope: list[Rope], plans: list[Plan], input_pos: int, wanted: Sequence[int] | None = None
    ) -> torch.Tensor | None:
        if idx.shape[1] > 1 or any(part.rows is not None for plan in plans for part in plan.parts):
            return None  # of single tokens, all are wanted
        for plan in plans:
            for part in plan.parts:
                for planned in part.steps:
                    torch._dynamo.maybe_mark_dynamic(planned.bias, 3)
        if on_gpu:
            for cache in model.kv_caches():
                for buffer in cache.buffers():  # written to in place: graphs are replayed on the same memory
                    torch._dynamo.mark_static_address(buffer)
            torch.compiler.cudagraph_mark_step_begin()
        return step(idx, rope, plans, None)  # not the position: a host integer would be compiled in

    model.fast_layers = decode
    model.static_decode = True
