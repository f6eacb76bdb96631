"""The memory of a training step through caches, before anything is loaded.

Letters: L layers, N tokens of all rows, E embedding size, G key/value heads, D head size, C slots, T tokens of a chunk.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from litgpt.checkpoint.meta_model import meta_model
from litgpt.config import Config
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.memory import size_in_bytes
from litgpt.kvcache.policies import Policy, PositionalPolicy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.train.cached_layers import CHUNKS_AT_ONCE, PLANNED_NUMBERS
from litgpt.train.gradients_only import ROWS
from litgpt.train.loss import LEAN_LOGITS_BYTES, LOGITS_BYTES, TRAINED_LOGITS_BYTES
from litgpt.train.methods import METHODS

COPIES_OF_LOGITS = 4  # logits, their float32 scores, the gradients of both
STATE = 3  # numbers beside a trained one: its gradient, and AdamW's two


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes beside the model's weights, trained numbers and an optimizer's. Activations are estimates."""

    config: Config
    spec: CacheSpec
    rows: int  # sequences of a batch
    length: int  # tokens of each
    chunk: int = 512  # T, tokens of a row that enter the caches together
    dtype: torch.dtype = torch.float32  # of activations
    trained_head: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def inputs(self) -> int:
        """Of one layer's inputs."""
        return self.tokens * self.config.n_embd * self.dtype.itemsize

    def kept(self, keep_inputs: str | int) -> int:
        """Of the inputs of layers, and of where tokens were in caches or, of rows that run whole, what their attention came to, in
        the memory of the device."""
        if keep_inputs in ("cpu", "disk"):
            return 0
        layers, each = self.config.n_layer, list(map(self._positions, self._policies))
        if self._whole(keep_inputs):
            heads = self.config.n_head
            each = [self.tokens * heads * (self.config.head_size * self.dtype.itemsize + 4)] * layers
        every = 1 if keep_inputs == "device" else min(keep_inputs, layers)
        groups = [
            each[i : i + every] for i in range(0, layers, every)
        ]  # of the last layer in each, and of all in one of them
        inputs = (len(groups) + every - 1) * self.inputs
        return inputs + sum(group[-1] for group in groups) + max(sum(group[:-1]) for group in groups)

    @cached_property
    def _policies(self) -> list[Policy]:
        """Those of the layers."""
        spec, config = self.spec, self.config
        slots = spec.length_for(config) if spec.evicts or spec.cache_length else self.length
        return [spec.layer_policy(config, i, own) for i, own in enumerate(spec.layer_lengths(config, slots))]

    def _slots(self, policy: Policy) -> int:
        """That a sequence takes in a layer."""
        return min(policy.cache_length, self.length)

    def _by_position(self, policy: Policy) -> bool:
        """Whether the position of a token says what it sees, and the layer has no cache."""
        return isinstance(policy, PositionalPolicy) and self.spec.storage == "default"

    def _positions(self, policy: Policy) -> int:
        """Of a layer's int32 positions of the tokens in the cache, for every call of it."""
        if self._by_position(policy):
            return 0
        heads, tokens = 1, self.chunk
        if isinstance(policy, ScorePolicy):
            heads, tokens = self.config.n_query_groups, min(self.chunk, policy.tail)
        return 4 * heads * self._slots(policy) * max(self.tokens // tokens - self.rows, 0)

    @property
    def _few(self) -> bool:
        return self.tokens <= CHUNKS_AT_ONCE * self.chunk

    def _whole(self, keep_inputs: str | int) -> bool:
        """Whether all rows run through a layer together."""
        return keep_inputs == "device" and self._few and all(map(self._by_position, self._policies))

    @property
    def one_layer(self) -> int:
        """Of keys and values of a layer, their gradients, and those of its outputs."""
        config = self.config
        value_size = (config.latent_attention or {}).get("v_head_dim", config.head_size)
        numbers = 2 * self.tokens * config.n_query_groups * (config.head_size + value_size)
        return self.inputs + numbers * self.dtype.itemsize

    @property
    def one_chunk(self) -> int:
        """About that of the graph of a chunk in a layer, of the layer's cache, and of masks."""
        return self._graph(min(self.chunk, self.length) * self.rows)

    def _graph(self, T: int) -> int:
        config = self.config
        qkv = (config.n_head + 2 * config.n_query_groups) * config.head_size
        experts = (config.moe_intermediate_size or 0) * max(config.n_expert_per_token, 1)
        slots = list(map(self._slots, self._policies))
        seen = max(slots) + min(self.chunk, self.length)
        stored = 6 * self.rows * seen * config.n_query_groups * config.head_size  # keys and values, and gradients
        mlp = 4 * max(min(T, ROWS) * (config.intermediate_size or 0), T * experts)
        numbers = T * (6 * config.n_embd + 3 * qkv) + mlp + stored
        mask = 4 * min(PLANNED_NUMBERS, self.length * seen)
        cache = size_in_bytes(self.spec, config, self.rows, self.length, self.dtype) * max(slots) // sum(slots)
        return numbers * self.dtype.itemsize + mask + cache

    @property
    def logits(self) -> int:
        """Of the logits that exist at a time."""
        config = self.config
        most = TRAINED_LOGITS_BYTES if self.trained_head else LOGITS_BYTES if self._few else LEAN_LOGITS_BYTES
        most = max(most, 16 * 4 * config.padded_vocab_size)
        return COPIES_OF_LOGITS * min(most, 4 * self.tokens * config.padded_vocab_size)

    def total(self, keep_inputs: str | int = "device") -> int:
        """The most at a time: in the loss, or in the backward pass of the last layer."""
        graph = self._graph(self.tokens) if self._whole(keep_inputs) else self.one_chunk
        return self.kept(keep_inputs) + max(self.one_layer + graph, 2 * self.inputs + self.logits)

    @cached_property
    def best_number(self) -> int:
        """The k for which inputs of every k-th layer take least."""
        layers = self.config.n_layer
        return min(range(1, layers + 1), key=lambda k: (-(-layers // k) + k, k))

    def places(self, on_cpu: bool) -> list[str | int]:
        """Values of `keep_inputs`, the fastest first."""
        return ["device", *([] if on_cpu else ["cpu"]), self.best_number, "disk"]

    def what_fits(self, memory: int, on_cpu: bool) -> str | int | None:
        """The fastest `keep_inputs` with which the step fits into a memory (None: with none)."""
        return next((place for place in self.places(on_cpu) if self.total(place) <= memory), None)

    def remedy(self, memory: int, on_cpu: bool) -> str:
        """The options with which it fits."""
        for rows, option in ((self.rows, ""), (1, "--train.micro_batch_size 1")):
            if (fitting := replace(self, rows=rows).what_fits(memory, on_cpu)) is not None:
                kept = f"--train.keep_inputs {fitting}" if not option or fitting != "device" else ""
                return f"{option} {kept}".strip()
        return "a shorter --train.max_seq_length with --train.keep_inputs disk, a smaller --prompt_chunksize or --cache_length"


def trained_numbers(config: Config, method: str) -> int:
    """Numbers that a method trains in a model, with its default settings."""
    way, model = METHODS[method], meta_model(config)
    settings = {"lora_query": True, "lora_value": True, "lora_r": 8} if method == "lora" else {}
    with torch.device("meta"):
        way.prepare(model, way.config.extending(config, **settings))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def state_bytes(config: Config, method: str) -> tuple[int, int]:
    """Bytes of the trained numbers that a method adds to a model, and of their gradients and AdamW's numbers, in float32."""
    numbers = trained_numbers(config, method)
    return (0 if METHODS[method].trains_all else 4 * numbers), 4 * STATE * numbers
