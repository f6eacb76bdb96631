"""Compiled decode steps: one graph for all positions."""

from collections.abc import Sequence

import torch

from litgpt.kvcache import KVCache
from litgpt.kvcache.plan import Plan
from litgpt.model import GPT
from litgpt.rope import Rope


class CompiledDecode:
    """A `LayerRunner` for calls with one token a row, as one compiled graph; on a GPU, replayed as CUDA graphs.

    The number of slots read is symbolic, so the graph serves all positions; another batch size or cache capacity needs
    another one. The first step compiles for some tens of seconds, less in later processes, since torch keeps a cache on disk.
    """

    static_shapes, runs_head = True, False

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
        head: bool = False,
    ) -> torch.Tensor | None:
        whole = all(plan.parts and all(part.rows is None for part in plan.parts) for plan in plans)
        if idx.shape[1] > 1 or not whole:
            return None
        for plan in plans:
            for part in plan.parts:
                for planned in part.steps:
                    torch._dynamo.maybe_mark_dynamic(planned.bias, 3)
        if self.on_gpu:
            for cache in self.model.kv_caches():
                for buffer in cache.buffers():  # written in place: graphs are replayed on the same memory
                    torch._dynamo.mark_static_address(buffer)
            torch.compiler.cudagraph_mark_step_begin()
        self.model.attach_kv_caches()
        return self.step(idx, rope, plans, None)  # without the position, which would be a constant of the graph

    def runs_evictions(self, caches: Sequence[KVCache]) -> bool:
        """No: calls have one token a row."""
        return False

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the model runs its own layers, one by one."""


def compile_decode(model: GPT) -> None:
    """Run the model's decode steps as one compiled graph."""
    model.layer_runner = CompiledDecode(model)
