"""A layer of a model that is trained in bfloat16, as one kernel in each pass: what its parts give each other stays in the processor's
caches, and Python's share of a step is small. Layers of another structure run part by part (`litgpt.train.linear`,
`litgpt.train.attention`)."""

import ctypes
import struct
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn

from litgpt.attention import MultiHeadSelfAttention
from litgpt.kernels import ops, structs, training
from litgpt.kernels.library import training_library
from litgpt.kernels.matrices import are_faster
from litgpt.kernels.row_attention import Seen
from litgpt.model import Block, CausalSelfAttention, LLaMAMLP, RMSNorm, Rows
from litgpt.rope import Rope, layer_rope
from litgpt.train.kept_gradients import KeptGradients
from litgpt.train.linear import are_alike, as_rows
from litgpt.train.room import Room


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, trained: torch.Tensor, layer: "TrainedBlock", rope: Rope | None, sizes: Sequence[int]
    ) -> torch.Tensor:
        x, ctx.layer, ctx.rope = x.contiguous(), layer, rope
        y, ctx.logs = torch.empty_like(x), x.new_empty(layer.fixed.H, x.shape[1], dtype=torch.float32)
        ctx.ends = struct.pack(f"{len(sizes)}q", *accumulate(sizes))
        ctx.memory, kept = layer.room.take(as_rows(x), *layer.sizes)
        ctx.call = call = structs.Block.from_buffer_copy(layer.fixed)
        call.T, call.n_rows, call.ends = x.shape[1], len(sizes), ctx.ends
        if rope is not None:
            call.cos, call.sin = (of.data_ptr() for of in rope)
        call.weights[:] = [weight.data_ptr() for weight in layer.weights]
        call.kept[:] = [of.data_ptr() for of in (x, *kept[:2], ctx.logs, *kept[2:])]
        ctx.save_for_backward(x, *layer.weights)
        training_library().run_block(ctypes.byref(call), y.data_ptr())
        return y

    @staticmethod
    def backward(ctx, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, ctx.call, layer = ctx.call, None, ctx.layer
        if call is None:
            raise RuntimeError("the gradients of this layer have been taken already: compute it anew")
        d_y, d_x = d_y.contiguous(), torch.empty_like(ctx.saved_tensors[0])
        gradients = structs.BlockGradients(*map(layer.kept.take, layer.weights))
        training_library().run_block_backward(ctypes.byref(call), d_y.data_ptr(), d_x.data_ptr(), gradients)
        layer.room.give(ctx.memory)
        return d_x, None, None, None, None


class TrainedBlock:
    """A layer that `fits`, all of whose weights are trained."""

    def __init__(self, block: Block, kept: KeptGradients) -> None:
        attention, mlp, config = block.attn, block.mlp, block.config
        parts = block.norm_1, attention.qkv, attention.proj, block.norm_2, mlp.fc_1, mlp.fc_2, mlp.proj
        self.block, self.kept, self.room, self.weights = block, kept, Room(), [part.weight for part in parts]
        (heads, E), inner = attention.qkv.weight.shape, len(mlp.fc_1.weight)
        self.sizes = heads, attention.proj.weight.shape[1], E, inner, inner  # of what a token keeps
        shape = E, config.n_head, config.n_query_groups, config.head_size, inner, ops.ACTIVATIONS[mlp.activation]
        numbers = (structs.Norm(of.eps, float(of.add_unit_offset)) for of in (block.norm_1, block.norm_2))
        seen = Seen.within(config.window(attention.block_idx))
        self.fixed = structs.Block(0, *shape, seen.window, 0, None, (structs.Norm * 2)(*numbers), attention.mha.scale)

    @staticmethod
    def fits(block: nn.Module, kept: KeptGradients) -> bool:
        """Whether there is a kernel for such a layer, and the gradients of all its weights are kept."""
        if type(block) is not Block or "forward" in vars(block) or type(block.attn) is not CausalSelfAttention:
            return False
        attention, mlp, config = block.attn, block.mlp, block.config
        return (
            not config.parallel_residual
            and all(type(of) is nn.Identity for of in (block.post_attention_norm, block.post_mlp_norm))
            and all(type(of) is RMSNorm and len(of.weight) % 16 == 0 for of in (block.norm_1, block.norm_2))
            and attention.norm_q is attention.sinks is None
            and type(attention.mha) is MultiHeadSelfAttention
            and attention.mha.has_plain_scores()
            and config.head_size % 16 == 0
            and not (config.rope_interleave and attention.rope_kind is not None)
            and type(mlp).forward is LLaMAMLP.forward
            and mlp.activation in training.GATES
            and all(
                type(of) is nn.Linear and of.bias is None for of in (attention.qkv, attention.proj, *mlp.children())
            )
            and all(p in kept and p.dtype == torch.bfloat16 for p in block.parameters())
            and are_faster()
        )

    def __call__(
        self, x: torch.Tensor, rope: list[Rope], plan: Rows | None = None, token_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the layer gives."""
        rope, plan = layer_rope(rope, plan)
        attention, weights = self.block.attn, self.weights
        own = None if attention.rope_kind is None else rope[attention.rope_kind]
        is_alike = torch.is_grad_enabled() and len(x) == 1 and are_alike(x, *weights)
        if not is_alike or not (own is None or training.can_rotate_heads(self.fixed.D, x.dtype, *own)):
            return Block.forward(self.block, x, rope, plan, token_idx)
        return _Block.apply(x, weights[0], self, own, [x.shape[1]] if plan is None else plan.sizes)
