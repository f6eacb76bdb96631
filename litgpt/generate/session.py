"""A sequence that is continued again and again: its tokens, and the caches that hold them."""

from collections.abc import Iterator, Sequence

import torch

from litgpt.generate.engine import Engine, decode, prepare_caches
from litgpt.generate.request import Request
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT


class Session:
    """Generates from prompts of which each begins, mostly, as what came before.

    What the caches hold already is not computed again: the common beginning stays, and only the rest of the prompt is run.

    Args:
        model: its caches belong to the session from now on.
        prompt_chunksize: most tokens of a call in the prefill (None: as many as the caches take).
    """

    def __init__(self, model: GPT, prompt_chunksize: int | None = None) -> None:
        self.model = model
        self.prompt_chunksize = prompt_chunksize
        self.tokens: list[int] = []  # those that the caches hold
        self.reused = 0  # tokens of the last prompt that were in the caches

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = []
        for cache in self.model.kv_caches():
            cache.clear()

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop_tokens: Sequence[Sequence[int]] = (),
    ) -> Iterator[int]:
        """Generate after `prompt`, the whole sequence so far; the arguments are those of `sample`.

        Yields:
            Tokens, without the stop sequence that ends them. The iterator may be left at any time.

        Raises:
            ValueError: for an empty prompt, or more tokens than the model or its caches take, before any work.
        """
        prompt = list(prompt)
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token")
        prepare_caches(self.model, 1, len(prompt) + max_new_tokens, roomy=True)
        self.reused = self._keep_common_beginning(prompt)
        tokens = torch.tensor(prompt, device=self.model.cos.device)
        request = Request(tokens, max_new_tokens, Sampling(temperature, top_k, top_p), stop_tokens)
        engine = Engine(self.model, self.prompt_chunksize)
        for (released,) in decode(engine, [request], held=self.reused):
            self.tokens = prompt + request.tokens[:-1]  # the last one drawn was not run yet
            yield from released or ()

    def _keep_common_beginning(self, prompt: list[int]) -> int:
        """Rewind the caches to where `prompt` departs from what they hold, and tell how many tokens that is."""
        held = self.tokens if self.model.next_token_pos == len(self.tokens) else []  # not: interrupted, or replaced
        limit = min(len(held), len(prompt) - 1)  # one token has to be run, for its logits
        common = next((i for i in range(limit) if held[i] != prompt[i]), limit)
        if common == len(held) and common or common and self.model.crop_kv_caches(common):
            return common
        self.reset()
        return 0
