"""Answers to many prompts, in a continuous batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from litgpt.engine.caches import CacheLease
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.loading import Ready, choose_kv_caches
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.sampling import Sampling
from litgpt.engine.sequence import Sequence as GeneratedSequence
from litgpt.engine.text_stream import TextStream
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.layers import LayerCaches

PREFIX_BYTES = 500_000_000


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and until when.

    Attributes:
        stops: texts that end the answer and are not part of it.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling(temperature=0.0)


def generate_texts(
    ready: Ready,
    prompts: Sequence[Prompt],
    spec: CacheSpec,
    batch_size: int,
    prompt_chunksize: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The answers to prompts, in their order; a finished answer makes room for the next prompt.

    Raises:
        ValueError: if a prompt and its answer are more tokens than the model or the caches take, before any work.
    """
    lease = CacheLease(ready.model, LayerCaches())
    if spec != CacheSpec():
        lease.run(choose_kv_caches, ready.model, spec, batch_size)
    evicts = any(cache.evicts for cache in lease.caches.caches)
    longest = max(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
    batch = ContinuousBatch(
        ready.model,
        min(batch_size, len(prompts)),
        longest,
        prompt_chunksize,
        lease=lease,
        prefixes=None if evicts else PrefixStore(PREFIX_BYTES),
    )
    # those that begin alike come one after the other
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tokens)
    texts, streams = [""] * len(prompts), {}
    for i in order:
        prompt = prompts[i]
        tokens = torch.tensor(prompt.tokens, device=ready.device)
        sequence = GeneratedSequence(tokens, prompt.max_new_tokens, prompt.sampling, ready.stop_tokens)
        streams[sequence] = i, TextStream(ready.tokenizer, prompt.stops)
        batch.submit(sequence)
    done = 0
    while batch.unfinished:
        for sequence, tokens in batch.step():
            i, stream = streams[sequence]
            texts[i] += stream.push(tokens)
            if stream.stopped and not sequence.finish_reason:
                batch.cancel(sequence)
            if sequence.finish_reason:
                texts[i] += stream.finish()
                done += 1
                progress(done, len(prompts))
    return texts
