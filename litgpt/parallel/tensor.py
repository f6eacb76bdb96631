"""Tensor parallelism: the part of a model that one of several processes holds (arXiv:1909.08053).

Of every layer a process has some query heads with their keys and values, and some of the inner rows of each MLP; of the
embeddings it has some rows. Outputs of attention and MLPs are summed over the processes, logits are concatenated; norms and
routers are replicated.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from litgpt.checkpoint.base import Checkpoint, RowShard
from litgpt.checkpoint.load import check_weights, fill_model, is_tied, quantize_meta
from litgpt.checkpoint.meta_model import meta_model
from litgpt.config import Config
from litgpt.model import GPT, RMSNorm
from litgpt.runners.quantized_weights import BNB_MODES, Scheme

_LAYER_OR_EXPERT = re.compile(r"^transformer\.h\.\d+\.|(?<=\.experts)\.\d+")


def chunk_sizes(num_units: int, devices: int) -> list[int]:
    """`num_units` divided as evenly as possible; larger shares come last."""
    least, more = divmod(num_units, devices)
    return [least] * (devices - more) + [least + 1] * more


def chunks(num_units: int, devices: int) -> list[range]:
    """Consecutive ranges of 0..num_units-1 with the sizes of `chunk_sizes`."""
    stops = [sum(chunk_sizes(num_units, devices)[: i + 1]) for i in range(devices)]
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


@dataclass(frozen=True)
class Shard:
    """The part of a model in process `rank` of `world_size`.

    Key/value heads are divided together with the query heads that share them. If there are fewer of them than processes,
    several processes hold the same one, and divide its query heads.

    Args:
        whole: the model's configuration.
        rank: 0..world_size-1.
        world_size: number of processes.

    Raises:
        ValueError: if the model cannot be divided among so many processes.
    """

    whole: Config
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        whole = self.whole
        for name in ("n_head", "intermediate_size", "moe_intermediate_size", "padded_vocab_size"):
            if (count := getattr(whole, name)) is not None and count < self.world_size:
                raise ValueError(f"{whole.name!r} has {name} = {count}: too few for {self.world_size} processes")
        if self.sums_norms and whole.norm_class_name != "RMSNorm":
            raise ValueError(
                f"{whole.name!r} has a {whole.norm_class_name} over all heads, which processes cannot share"
            )

    @property
    def sums_norms(self) -> bool:
        """Whether norms of queries and keys are over the heads of all processes."""
        return self.whole.norm_qk and self.whole.norm_qk_type == "olmo2"

    @cached_property
    def _heads(self) -> tuple[range, range, int]:
        """Query heads, key/value heads, and the number of processes with the latter."""
        H, G = self.whole.n_head, self.whole.n_query_groups
        if self.world_size <= G:
            groups = chunks(G, self.world_size)[self.rank]
            return range(groups.start * (H // G), groups.stop * (H // G)), groups, 1
        for group, ranks in enumerate(chunks(self.world_size, G)):
            if self.rank in ranks:
                heads = chunks(H // G, len(ranks))[self.rank - ranks.start]
                first = group * (H // G)
                return range(first + heads.start, first + heads.stop), range(group, group + 1), len(ranks)
        raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {self.rank}")

    @property
    def group_copies(self) -> int:
        """Number of processes with the same key/value heads."""
        return self._heads[2]

    @cached_property
    def vocabulary(self) -> range:
        """The tokens with embedding rows in this process."""
        return self._part(self.whole.padded_vocab_size)

    @cached_property
    def config(self) -> Config:
        """The configuration of this process's layers."""
        heads, groups, _ = self._heads
        experts = self.whole.moe_intermediate_size
        return replace(
            self.whole,
            n_head=len(heads),
            n_query_groups=len(groups),
            intermediate_size=len(self._part(self.whole.intermediate_size)),
            moe_intermediate_size=None if experts is None else len(self._part(experts)),
        )

    def _part(self, size: int) -> range:
        return chunks(size, self.world_size)[self.rank]

    @cached_property
    def rows(self) -> dict[str, list[range]]:
        """This process's rows of modules divided by rows, by their names without layer and expert."""
        whole, (heads, groups, _) = self.whole, self._heads
        D, H, G = whole.head_size, whole.n_head, whole.n_query_groups
        rows = {
            "transformer.wte": [self.vocabulary],
            "lm_head": [self.vocabulary],
            "attn.qkv": [_times(heads, D), _times(groups, D, H), _times(groups, D, H + G)],
            "attn.sinks": [heads],
        }
        if self.sums_norms:
            rows |= {"attn.norm_q": [_times(heads, D)], "attn.norm_k": [_times(groups, D)]}
        if whole.latent_attention is not None:
            queries = [_times(heads, whole.qk_head_dim)]
            rows |= {"attn.q_proj": queries, "attn.q_b_proj": queries}
            rows["attn.kv_b_proj"] = [_times(heads, whole.qk_nope_head_dim + whole.v_head_dim)]
        for mlp, inner in self._inner.items():
            rows |= dict.fromkeys((f"{mlp}.fc", f"{mlp}.fc_1", f"{mlp}.fc_2"), [inner])
        return rows

    @cached_property
    def columns(self) -> dict[str, range]:
        """This process's columns of modules divided by columns, whose outputs are summed."""
        value_size = self.whole.head_size if self.whole.latent_attention is None else self.whole.v_head_dim
        columns = {f"{mlp}.proj": inner for mlp, inner in self._inner.items()}
        return columns | {"attn.proj": _times(self._heads[0], value_size)}

    @cached_property
    def _inner(self) -> dict[str, range]:
        """This process's inner rows of MLPs, by the MLP's name."""
        dense = self._part(self.whole.intermediate_size)
        expert = self._part(self.whole.moe_intermediate_size or self.whole.intermediate_size)
        shared = _times(expert, self.whole.n_shared_expert or 1)
        return {"mlp": dense, "mlp.experts": expert, "mlp.shared_experts": shared}

    def pieces(self, pieces: Iterable[RowShard]) -> Iterator[RowShard]:
        """This process's parts of row shards of the whole model, as views, so that nothing else is read.

        A bias that is added to a sum is in the first process, and zero in the others.
        """
        for name, row, piece in pieces:
            module = _LAYER_OR_EXPERT.sub("", name).removesuffix(".weight").removesuffix(".bias")
            if module in self.columns and name.endswith(".bias"):
                yield name, row, piece if self.rank == 0 else torch.zeros_like(piece)
            elif module in self.columns:
                columns = self.columns[module]
                yield name, row, piece[:, columns.start : columns.stop]
            elif module in self.rows:
                before = 0
                for rows in self.rows[module]:
                    start, stop = max(row, rows.start), min(row + len(piece), rows.stop)
                    if start < stop:
                        yield name, before + start - rows.start, piece[start - row : stop - row]
                    before += len(rows)
            else:
                yield name, row, piece


def _times(units: range, size: int, first: int = 0) -> range:
    """Rows of `units` of `size` rows each, after `first` other units."""
    return range((first + units.start) * size, (first + units.stop) * size)


class ShardedGPT(GPT):
    """A `GPT` divided among a group of processes, which make the same calls and get the same logits."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard.config)
        E, config = shard.whole.n_embd, shard.config
        self.shard = shard
        self.transformer["wte"] = nn.Embedding(len(shard.vocabulary), E)
        self.lm_head = nn.Linear(E, len(shard.vocabulary), bias=config.lm_head_bias)
        for block in self.transformer.h:
            # their inputs are the outputs of attention and MLP, also if those layers are replaced
            block.post_attention_norm.register_forward_pre_hook(_sum_input)
            block.post_mlp_norm.register_forward_pre_hook(_sum_input)
            if shard.sums_norms:
                D = config.head_size
                block.attn.norm_q = ShardedRMSNorm(config, config.n_head * D, shard.whole.n_head * D)
                block.attn.norm_k = ShardedRMSNorm(
                    config, config.n_query_groups * D, shard.whole.n_query_groups * D, shard.group_copies
                )

    def embed(self, idx: torch.Tensor) -> torch.Tensor:
        idx = idx - self.shard.vocabulary.start
        elsewhere = (idx < 0) | (idx >= len(self.shard.vocabulary))
        x = super().embed(idx.masked_fill(elsewhere, 0))
        return _sum(x.masked_fill(elsewhere.unsqueeze(-1), 0))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        sizes = chunk_sizes(self.config.padded_vocab_size, self.shard.world_size)
        logits = super().logits(x)
        logits = F.pad(logits, (0, max(sizes) - logits.shape[-1]))  # gathered tensors have equal sizes
        parts = [torch.empty_like(logits) for _ in sizes]
        dist.all_gather(parts, logits)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def broadcast_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens that the first process has drawn."""
        drawn = torch.tensor(tokens)
        dist.broadcast(drawn, src=0)
        return drawn.tolist()


class ShardedRMSNorm(RMSNorm):
    """A root-mean-square norm over `total` elements, of which `copies` processes, this one included, hold the same `size`."""

    def __init__(self, config: Config, size: int, total: int, copies: int = 1) -> None:
        super().__init__(size, eps=config.norm_eps, add_unit_offset=config.norm_unit_offset)
        self.total, self.copies = total, copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squares = _sum(x.float().square().sum(-1, keepdim=True) / self.copies)
        weight = self.weight.float() + 1 if self.add_unit_offset else self.weight.float()
        return (x.float() * torch.rsqrt(squares / self.total + self.eps) * weight).to(x.dtype)


def _sum_input(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return _sum(inputs[0])


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    dist.all_reduce(x)
    return x


def load_shard(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    world_size: int,
    quantize: str | None = None,
) -> ShardedGPT:
    """A process's part of a checkpoint's model. Only its weights are read, and with `quantize` (int8 or int4) quantised.

    Raises:
        ValueError: as `load_model` and `Shard` do.
    """
    check_weights(checkpoint, meta_model(checkpoint.config))
    model = _meta_shard(checkpoint.config, rank, world_size)
    if quantize in BNB_MODES:
        raise ValueError(f"quantize={quantize!r} is for one device: use int8 or int4")
    if quantize is not None:
        quantize_meta(model, Scheme(quantize), dtype, checkpoint.tied)
    return fill_model(model, model.shard.pieces(checkpoint.row_shards()), checkpoint.tied, dtype, device)


def shard_model(model: GPT, dtype: torch.dtype, device: torch.device, rank: int, world_size: int) -> ShardedGPT:
    """A process's part of a model."""
    pieces = ((name, 0, tensor) for name, tensor in model.state_dict().items())
    part = _meta_shard(model.config, rank, world_size)
    return fill_model(part, part.shard.pieces(pieces), is_tied(model), dtype, device).requires_grad_(False)


def _meta_shard(config: Config, rank: int, world_size: int) -> ShardedGPT:
    shard = Shard(config, rank, world_size)
    return meta_model(config, lambda config: ShardedGPT(shard))
