"""Asks the questions of a sample under a cache, with the question inside of the compressed context and outside of it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from litgpt.api import LLM
from litgpt.engine.session import Session
from litgpt.kvcache import CacheSpec
from litgpt.prompts import all_stop_tokens
from litgpt.tasks.sample import ANSWER_ROOM, Prompt

INSIDE, OUTSIDE, SECOND = "inside", "outside", "second"
"""Where a question stands: it ends the prompt that is compressed; it comes after the context was compressed without it; it is
the second one, on the cache that was compressed with the first one, and after the first one's right answer."""


@dataclass(frozen=True)
class Reply:
    """What a model said to a question.

    Attributes:
        question: "inside", "outside" or "second".
        score: share of the expected answers in what it said.
        logprob: mean log-probability of the right answer's tokens.
        retention: share of the needle's tokens that the full-attention layers and their heads held when it was asked; None where
            there is no needle or no such layer.
        depth: of the needle, if it was chosen.
        said: the answer.
    """

    question: str
    score: float
    logprob: float
    retention: float | None
    depth: float | None
    said: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask(llm: LLM, spec: CacheSpec, prompt: Prompt, prompt_chunksize: int | None = None) -> Iterator[Reply]:
    """The replies to the questions of a prompt under the caches of `spec`, each from sessions that have seen nothing else."""
    session = llm.session(spec, prompt_chunksize=prompt_chunksize)
    session.extend(prompt.context + prompt.question(0))
    yield _reply(llm, session, prompt, 0, INSIDE)
    if len(prompt.sample.questions) > 1:
        session.extend(prompt.question(1))
        yield _reply(llm, session, prompt, 1, SECOND)
    session = llm.session(spec, prompt_chunksize=prompt_chunksize)
    session.extend(prompt.context)
    session.extend(prompt.question(0))
    yield _reply(llm, session, prompt, 0, OUTSIDE)


def _reply(llm: LLM, session: Session, prompt: Prompt, i: int, where: str) -> Reply:
    """The reply to question i, which `session` ends with; the session then ends with the right answer."""
    right, question, retention = (
        prompt.right(i),
        prompt.sample.questions[i],
        needle_retention(session, prompt.needle(i)),
    )
    stops = all_stop_tokens(llm.tokenizer, llm.prompt_style)
    drawn = session.fork().generate(session.tokens, len(right) + ANSWER_ROOM, stop_tokens=stops, temperature=0.0)
    said = llm.tokenizer.decode(list(drawn))
    logprobs = session.predict(right).float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(right, device=logprobs.device)[:, None])
    depth = prompt.sample.depth if i == 0 else None
    return Reply(where, question.score(said), chosen.mean().item(), retention, depth, said)


def needle_retention(session: Session, needle: list[int]) -> float | None:
    """Share of the positions `needle` that are in the session's caches, over the heads of all layers without a sliding window."""
    config = session.model.config
    full = [cache for cache in session.kv_caches if config.window(cache.block_idx) is None]
    if not needle or not full:
        return None
    shares = []
    for cache in full:
        positions = cache.token_positions()[0]
        wanted = torch.tensor(needle, device=positions.device)
        shares.append((positions[:, :, None] == wanted).any(1).float().mean().item())
    return sum(shares) / len(shares)
