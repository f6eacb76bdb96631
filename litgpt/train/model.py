"""A model with its loss: what is trained, as one module, so that wrappers for several devices see a whole forward pass."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.kernels import training
from litgpt.kernels.matrices import replaces_torch
from litgpt.lora import LoRALinear
from litgpt.model import GPT, CausalSelfAttention, LLaMAMLP, RMSNorm
from litgpt.train.attention import attention
from litgpt.train.block import TrainedBlock
from litgpt.train.cached_layers import CachedLayers
from litgpt.train.keep_loss import KeepLoss, check_keeps_by_attention
from litgpt.train.kept_gradients import KeptGradients
from litgpt.train.linear import Recomputable, gated_mlp, linear, low_rank, recomputed
from litgpt.train.loss import IGNORE_INDEX, TiedEmbedding, loss_sum
from litgpt.train.replaced_forward import replaced_forward
from litgpt.train.room import Room
from litgpt.train.teacher import Teacher


class TrainingModel(nn.Module):
    """A `GPT` whose forward pass gives the summed loss of next tokens. `restore_forward` makes it a plain one again.

    Args:
        gpt: the model.
        activation_checkpointing: keep only the inputs of layers for the backward pass, and compute the rest again then.
        cached_layers: runs the model through key-value caches, and keeps only the inputs of layers in any case.
        teacher: whose next-token distributions are learned in place of the labels, where these are counted. Without
            gradients, the loss is that of the labels.
        loss: summed loss of logits (n, V) and labels (n,), of some counted tokens at a time (None: cross-entropy).
        keep_loss: what the mean loss of what caches keep weighs beside the mean loss of counted tokens (see
            `litgpt.train.keep_loss`). It is learned, and not in the loss that is returned.
    """

    def __init__(
        self,
        gpt: GPT,
        activation_checkpointing: bool = False,
        cached_layers: CachedLayers | None = None,
        teacher: Teacher | None = None,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        keep_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if keep_loss and cached_layers is not None:
            check_keeps_by_attention(cached_layers.spec)
        self.teacher, self.loss, self.keep_loss = teacher, loss, keep_loss
        self.gpt, self.cached_layers = gpt, cached_layers
        self.kept_gradients: KeptGradients | None = None
        self.logits_room = Room()
        if activation_checkpointing and cached_layers is None:
            for block in gpt.transformer.h:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for module in gpt.modules():
            if isinstance(module, LLaMAMLP) and "gated" not in vars(module):
                module.gated = partial(recomputed, _gate_of(module))
            elif type(module) is RMSNorm and "forward" not in vars(module):
                module.forward = partial(training.norm, module)
            elif type(module) is nn.Dropout:
                module.forward = partial(training.dropout, module)
            elif isinstance(module, LoRALinear):
                module.with_matrices = partial(low_rank, module)
            elif type(module) is nn.Linear and replaces_torch():
                module.forward = partial(linear, module)

    def keep_gradients(self) -> None:
        """Have gradients where they are from step to step, and keep less for the backward pass: for one process on a CPU."""
        trained = [p for p in self.parameters() if p.requires_grad]
        self.kept_gradients = kept = KeptGradients(trained)
        if self.cached_layers is not None:
            return
        for block in self.gpt.transformer.h:
            if TrainedBlock.fits(block, kept):
                block.forward = TrainedBlock(block, kept)
        in_head = set(self.gpt.lm_head.modules())  # whose gradients are known before they are scaled
        for module in self.gpt.modules():
            if type(module) is RMSNorm and module.weight.requires_grad:
                call = partial(training.norm_call, module)
                module.forward = partial(recomputed, Recomputable(module.forward, call, (module.weight,)))
            elif isinstance(module, LLaMAMLP) and type(module).forward is LLaMAMLP.forward:
                layers = module.fc_1, module.fc_2, module.proj
                if all(type(of) is nn.Linear and of.weight.requires_grad for of in layers):
                    adds = [kept.adding(of.weight) for of in layers]
                    module.forward = partial(gated_mlp, module, _gate_of(module), adds, Room())
            elif type(module) is CausalSelfAttention:
                layers = module.qkv, module.proj
                if all(type(of) is nn.Linear and of.weight.requires_grad for of in layers):
                    module.forward = partial(attention, module, [kept.adding(of.weight) for of in layers], Room())
            elif type(module) is nn.Linear and module.weight.requires_grad:
                add = None if module in in_head else kept.adding(module.weight)
                module.forward = partial(linear, module, add=add)

    def _adding(self) -> dict[nn.Module, Callable]:
        """What stands for the embedding and the head where gradients of their weights are added to kept ones."""
        kept, head, embedding = self.kept_gradients, self.gpt.lm_head, self.gpt.transformer.wte
        if kept is None or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return {}
        own: dict[nn.Module, Callable] = {}
        if type(head) is nn.Linear and head.bias is None and head.weight in kept:
            own[head] = partial(linear, head, add=kept.adding(head.weight), room=self.logits_room)
        if type(embedding) is nn.Embedding and embedding.weight in kept:
            own[embedding] = partial(kept.embed, embedding.weight)
        return own

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        row_sizes: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Sum of the losses of all counted tokens: see `loss_sum`.

        Args:
            input_ids: (B, T), or with `row_sizes` (1, N): rows of these sizes, one after the other.
            labels: of the same shape; the token that follows each, or -100 where it is not counted.
            row_sizes: tokens of each row.
            scale: what the loss will be multiplied by before its gradients are taken (None: whatever it is).
        """
        teacher = keeping = None
        if self.teacher is not None and torch.is_grad_enabled():
            teacher = self.teacher(input_ids, row_sizes), self.teacher.logits
        gpt, heads, logits = self.gpt, [self.gpt.lm_head], self.gpt.logits
        head, embedding = gpt.lm_head, gpt.transformer.wte
        own, tied = {} if scale is None else self._adding(), None
        is_tied = getattr(head, "weight", None) is embedding.weight and embedding.weight.requires_grad
        if is_tied and embedding not in own and torch.is_grad_enabled():
            tied = []
            own = {embedding: lambda ids: TiedEmbedding.apply(ids, embedding.weight, tied)}
        with replaced_forward(own):
            if self.cached_layers is None:
                hidden = gpt(input_ids, skip_lm_head=True, row_sizes=row_sizes)
            else:
                if self.keep_loss and torch.is_grad_enabled():
                    keeping = KeepLoss((labels != IGNORE_INDEX).flatten(), gpt)
                hidden, norm = self.cached_layers.last_outputs(input_ids, row_sizes, keeping), gpt.transformer.ln_f
                heads, logits = [head, norm], lambda x: gpt.logits(norm(x))  # for a few tokens at a time
            params = [p for module in heads if module not in own for p in module.parameters() if p.requires_grad]
            scale = scale if head in own else None
            vocabulary = gpt.config.padded_vocab_size
            lean = self.cached_layers is not None and not self.cached_layers.are_few(input_ids.numel())
            loss = loss_sum(hidden, labels, logits, params, vocabulary, tied, teacher, scale, self.loss, lean)
        if keeping is not None:
            loss = loss + self.keep_loss * keeping.counted.sum() * sum(keeping.terms)
        return loss


def _gate_of(layer: LLaMAMLP) -> Recomputable:
    """The activation of an MLP's gate times what it lets through."""
    plain, call = partial(type(layer).gated, layer), partial(training.gate_call, layer.activation)
    return Recomputable(partial(training.gated, layer.activation, plain), call)


REPLACED = "forward", "gated", "with_matrices"  # methods of modules


def restore_forward(gpt: GPT) -> None:
    """Undo what a `TrainingModel` did to the modules of `gpt`."""
    for module in gpt.modules():
        for name in REPLACED:
            vars(module).pop(name, None)


def runs_as_it_is(gpt: GPT) -> bool:
    """Whether no module of `gpt` runs by another function than its own."""
    return not any(name in vars(module) for module in gpt.modules() for name in REPLACED)
