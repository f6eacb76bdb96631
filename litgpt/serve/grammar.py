"""Answers that follow a grammar: the tokens with which an answer can still come to be valid. Needs `pip install 'litgpt[grammar]'`."""

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from litgpt.serve.errors import bad_request
from litgpt.tokenizer import Tokenizer


class Vocabulary:
    """The tokens of a model, as llguidance asks for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.n_tokens)]
        # those without text, which are special, are never part of an answer
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or f"<special {i}>".encode() for i, piece in enumerate(pieces)]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, bos=False).tolist()


class FollowsSchema:
    """Logits processor that allows only tokens with which the answer can still become JSON of a schema.

    The engine gives every sequence a copy of its own.
    """

    def __init__(self, matcher: Any, n_read: int | None = None) -> None:
        self._matcher = matcher
        self._n_read = n_read  # tokens of the sequence so far (None: nothing is drawn yet)

    def __copy__(self) -> "FollowsSchema":
        return FollowsSchema(self._matcher.deep_copy(), self._n_read)

    def __call__(self, tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if self._n_read is not None:
            self._matcher.consume_tokens(list(tokens[self._n_read :]))
        self._n_read = len(tokens)
        if self._matcher.is_error():  # a limit of the library; an error here would end the answers of others too
            return logits
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))[: len(logits)]
        mask = torch.zeros(len(logits), dtype=torch.bool)
        mask[: len(allowed)] = allowed
        return logits.masked_fill(~mask.to(logits.device), float("-inf"))


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(Vocabulary(tokenizer)))


def follow_schema(tokenizer: Tokenizer, schema: Any, param: str) -> FollowsSchema:
    """A processor for JSON of a schema.

    Raises:
        ApiError: if llguidance is not installed, or takes no such schema.
    """
    if find_spec("llguidance") is None:
        raise bad_request(
            f"{param} needs a package that the server does not have: pip install 'litgpt[grammar]'", param
        )
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        problem = LLMatcher.validate_grammar(grammar)
    except (ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        raise bad_request(f"{param} cannot be followed: {' '.join(problem.split())[:200]}", param)
    return FollowsSchema(LLMatcher(_vocabulary(tokenizer), grammar, log_level=0))


def schema_of(body: dict[str, Any]) -> Any:
    """The JSON schema that a request's `response_format` asks for (None: any text)."""
    given = body.get("response_format")
    if given is None or given == {"type": "text"}:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "json_object":
        return {"type": "object"}
    described = given.get("json_schema") if kind == "json_schema" else None
    if isinstance(described, dict) and isinstance(described.get("schema"), dict):
        return described["schema"]
    raise bad_request(
        'response_format must be {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": '
        '{"schema": {...}}}',
        "response_format",
    )
