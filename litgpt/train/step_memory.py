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
from litgpt.kvcache.policies import PositionalPolicy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.train.cached_layers import CHUNKS_AT_ONCE, PLANNED_NUMBERS
from litgpt.train.loss import LEAN_LOGITS_BYTES, TRAINED_LOGITS_BYTES
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
        """Of the inputs of layers, and of where tokens were in caches, in the memory of the device."""
        if keep_inputs in ("cpu", "disk"):
            return 0
        layers = self.config.n_layer
        every = 1 if keep_inputs == "device" else min(keep_inputs, layers)
        return (-(-layers // every) + every - 1) * (self.inputs + self._positions)

    @property
    def _positions(self) -> int:
        """Of a layer's int32 positions of the tokens in the cache, for every call of it."""
        if self._by_position:
            return 0
        heads, tokens, slots = 1, self.chunk, self._slots
        if issubclass(self.spec.policy_class, ScorePolicy):
            heads, tokens = self.config.n_query_groups, min(self.chunk, self.spec.make_policy(slots).tail)
        return 4 * heads * slots * max(self.tokens // tokens - self.rows, 0)

    @property
    def _by_position(self) -> bool:
        """Whether the position of a token says what it sees, and layers have no cache."""
        return issubclass(self.spec.policy_class, PositionalPolicy) and self.spec.storage == "default"

    @property
    def _slots(self) -> int:
        slots = self.spec.length_for(self.config) if self.spec.evicts or self.spec.cache_length else self.length
        return min(slots, self.length)

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
        seen = self._slots + min(self.chunk, self.length)
        stored = 6 * self.rows * seen * config.n_query_groups * config.head_size  # keys and values, and gradients
        numbers = T * (6 * config.n_embd + 3 * qkv + 4 * max(config.intermediate_size or 0, experts)) + stored
        mask = 4 * min(PLANNED_NUMBERS, self.length * seen)
        cache = size_in_bytes(self.spec, config, self.rows, self.length, self.dtype) // config.n_layer
        return numbers * self.dtype.itemsize + mask + cache

    @property
    def logits(self) -> int:
        """Of the logits that exist at a time."""
        config = self.config
        most = TRAINED_LOGITS_BYTES if self.trained_head else LEAN_LOGITS_BYTES
        most = max(most, 16 * 4 * config.padded_vocab_size)
        return COPIES_OF_LOGITS * min(most, 4 * self.tokens * config.padded_vocab_size)

    def total(self, keep_inputs: str | int = "device") -> int:
        """The most at a time: in the loss, or in the backward pass of the last layer."""
        whole = self._by_position and keep_inputs == "device" and self.tokens <= CHUNKS_AT_ONCE * self.chunk
        graph = self._graph(self.tokens) if whole else self.one_chunk
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
