"""Compiled decoding: one graph for the step of one token, whatever the position."""

from collections.abc import Sequence

import torch

from litgpt.kvcache.plan import Plan
from litgpt.model import GPT
from litgpt.rope import Rope


class CompiledDecode:
    """A `LayerRunner` for calls of a single token a row, which run as one compiled graph; on a GPU, replayed as CUDA graphs.

    The number of slots read is a symbol of the graph, so it serves all positions; a new graph is made only for another
    batch size or cache capacity. The first step compiles, for some tens of seconds; torch keeps what it compiled on disk,
    so that later processes take a part of that.
    """

    static_shapes = True

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.on_gpu = model.transformer.wte.weight.is_cuda
        self.step = torch.compile(model.run_layers, fullgraph=True, mode="reduce-overhead" if self.on_gpu else None)

    def __call__(
        self,
        idx: torch.Tensor,
        rope: list[Rope],
        plans: list[Plan],
        input_pos: int,
        output_tokens: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        whole = all(plan.parts and all(part.rows is None for part in plan.parts) for plan in plans)
        if idx.shape[1] > 1 or not whole:
            return None  # of single tokens, all are output tokens
        for plan in plans:
            for part in plan.parts:
                for planned in part.steps:
                    torch._dynamo.maybe_mark_dynamic(planned.bias, 3)
        if self.on_gpu:
            for cache in self.model.kv_caches():
                for buffer in cache.buffers():  # written to in place: graphs are replayed on the same memory
                    torch._dynamo.mark_static_address(buffer)
            torch.compiler.cudagraph_mark_step_begin()
        return self.step(idx, rope, plans, None)  # not the position: a host integer would be compiled in

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model runs its own layers, one by one."""


def compile_decode(model: GPT) -> None:
    """Have the model's single-token calls run as one compiled graph."""
    model.layer_runner = CompiledDecode(model)
