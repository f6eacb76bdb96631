"""Keep the tokens that the model needs to repeat the text (arXiv:2505.23416)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from litgpt.kvcache.policies.base import register_policy
from litgpt.kvcache.policies.score import ScorePolicy
from litgpt.kvcache.tokens import CachedTokens


@register_policy("kvzip")
@dataclass(frozen=True)
class KVzipPolicy(ScorePolicy):
    """The largest attention weight that a token gets, in any of the heads that share keys, while the model reads the prompt a
    second time ("KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", here without the words that ask for the
    repetition). Later tokens count by the weights that they get. Independent of a question. Needs all queries and a number for every
    token. A prompt longer than the cache needs dense caches while it is read, twice or three times its prefill, and a context for
    the prompt and a piece of it (`litgpt.engine.second_reading`).

    Args:
        piece: tokens that are read again at a time, each after the whole prompt.
    """

    piece: int = 1024

    slot_state = 1
    reads_twice: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("piece", 1, None)

    def observe(self, tokens: CachedTokens) -> None:
        tokens.slot_state = torch.maximum(tokens.slot_state, tokens.largest_weights())

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return tokens.slot_state[0]
