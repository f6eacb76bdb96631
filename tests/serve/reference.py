"""What a model answers to one request alone, and whether another answer is due to rounding."""

import threading
from collections.abc import Sequence as Tokens
from functools import partial

import torch

from litgpt.api import LLM
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.sampling import Sampling, draw_rows
from litgpt.engine.sequence import Sequence
from litgpt.prompts import ChatTemplate, all_stop_tokens, encode_prompt

GAPS = (1e-6, 1e-5, 1e-4)  # differences of logits that rounding may make, the least that explains an answer counts
MOST_TIES = 2  # in an answer


class Reference:
    """The answers of a model to single requests of HTTP.

    Args:
        llm: the model.
        context: most tokens of a prompt and its answer.
    """

    def __init__(self, llm: LLM, context: int) -> None:
        self.tokenizer, self.style = llm.preprocessor.tokenizer, ChatTemplate.from_tokenizer(llm.preprocessor.tokenizer)
        self.batch, self.context = ContinuousBatch(llm.model, 1), context
        self.stops = all_stop_tokens(self.tokenizer, self.style)
        self.lock = threading.Lock()

    def gap(self, path: str, body: dict, found: list[str], whole: bool = True) -> float | None:
        """0 if the texts that a server gave are the model's own, None if they are not; where they would be if draws between
        tokens with nearly the same logits had gone the other way, the difference of these logits.

        Args:
            path, body: of the request.
            found: a text for each answer.
            whole: False: their beginnings.
        """
        with self.lock:
            gaps = [self.answer(path, body, i).gap(text, whole) for i, text in enumerate(found)]
        return None if None in gaps else max(gaps)

    def answer(self, path: str, body: dict, index: int) -> "ReferenceAnswer":
        """One of the answers to a request."""
        if path == "/v1/completions":
            prompt = self.tokenizer.encode(body["prompt"])
        else:
            prompt = encode_prompt(self.tokenizer, self.style, body.get("messages") or body["prompt"])
        names = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")
        settings = {name: body[name] for name in names if name in body}
        count = min(body.get("max_new_tokens") or body["max_tokens"], self.context - len(prompt))
        sampling = Sampling(**settings, seed=body["seed"] + index)
        return ReferenceAnswer(self, prompt, count, sampling, body.get("stop", ()))


class ReferenceAnswer:
    """One answer of a model, and those that it would give if some draws had gone the other way."""

    def __init__(self, reference: Reference, prompt: torch.Tensor, count: int, sampling: Sampling, stop: Tokens[str]):
        self.reference, self.prompt, self.count, self.sampling, self.stop = reference, prompt, count, sampling, stop

    def gap(self, text: str, whole: bool) -> float | None:
        """See `Reference.gap`."""
        own, tokens, seen = self.run(())
        if _fits(text, own, whole):
            return 0.0
        return next((gap for gap in GAPS if self._explains(gap, tokens, seen, 0, text, whole, MOST_TIES)), None)

    def run(self, forced: Tokens[int]) -> tuple[str, list[int], list[torch.Tensor]]:
        """Text, tokens and the logits that these were drawn from, of an answer whose first tokens are given."""
        seen: list[torch.Tensor] = []
        own = Sampling(**{**vars(self.sampling), "processors": (partial(_force, seen, forced, len(self.prompt)),)})
        sequence, batch = Sequence(self.prompt, self.count, own, self.reference.stops), self.reference.batch
        batch.submit(sequence)
        while batch.unfinished:
            batch.step()
        text = self.reference.tokenizer.decode(sequence.output)
        ends = [text.index(stop) for stop in self.stop if stop in text]
        return text[: min(ends)] if ends else text, sequence.new_tokens, seen

    def _explains(
        self, gap: float, tokens: list[int], seen: list[torch.Tensor], first: int, text: str, whole: bool, ties: int
    ) -> bool:
        """Whether other draws from tokens that are this close, from the place `first` on, lead to the text."""
        draws = Sequence(self.prompt, 1, self.sampling)
        uniforms = [0.0 if self.sampling.is_greedy else draws.uniform() for _ in tokens]
        for place in range(first, len(tokens)):
            for other in alternatives(seen[place], self.sampling, uniforms[place], gap) - {tokens[place]}:
                found, others, their_seen = self.run([*tokens[:place], other])
                if _fits(text, found, whole):
                    return True
                if ties > 1 and self._explains(gap, others, their_seen, place + 1, text, whole, ties - 1):
                    return True
        return False


def alternatives(logits: torch.Tensor, sampling: Sampling, uniform: float, gap: float) -> set[int]:
    """Tokens that may be drawn if each of the logits (V,) is off by half of `gap`, so that the order of two whose difference is
    less may be another."""
    if sampling.is_greedy:
        return set((logits >= logits.max() - gap).nonzero()[:, 0].tolist())
    near = torch.zeros(len(logits), dtype=torch.bool)
    for top_p in {sampling.top_p, min(1.0, sampling.top_p + gap / 2), sampling.top_p - gap / 2}:
        changed = Sampling(sampling.temperature, sampling.top_k, top_p)
        for shift in (-gap / 2, 0, gap / 2):  # of the sums of probabilities that the random number falls between
            at = torch.tensor([min(max(uniform + shift, 0.0), 1 - 2**-33)], dtype=torch.float64)
            near |= (logits - logits[draw_rows(logits[None], changed, at)]).abs() < gap
    return set(near.nonzero()[:, 0].tolist())


def _force(
    seen: list[torch.Tensor], forced: Tokens[int], n_prompt: int, tokens: list[int], logits: torch.Tensor
) -> torch.Tensor:
    seen.append(logits.clone())
    place = len(tokens) - n_prompt
    if place < len(forced):
        logits = torch.full_like(logits, float("-inf"))
        logits[forced[place]] = 0
    return logits


def _fits(text: str, expected: str, whole: bool) -> bool:
    return text == (expected if whole else expected[: len(text)])
