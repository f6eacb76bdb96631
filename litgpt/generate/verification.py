"""Which guesses of the next tokens stand: speculative sampling (arXiv:2302.01318)."""

from collections.abc import Sequence

import torch

from litgpt.generate.sampling import Draws, pick, probabilities


def verify(logits: torch.Tensor, guesses: Sequence[int], guessed_from: torch.Tensor | None, row: Draws) -> list[int]:
    """The next tokens of a sequence, distributed as if they had been drawn one by one: the guesses that stand, and one more.

    Guess x, which had the probability q(x), stands with probability min(1, p(x) / q(x)); in place of the first that does
    not, a token is drawn from max(0, p - q), normalised; after the last, one from p.

    Args:
        logits: of the model, (n + 1, V): for the token in place of each guess, and for the one after them.
        guesses: n tokens.
        guessed_from: distributions (n, V) that they were drawn from (None: they were certain).
        row: the sequence before the guesses.
    """
    tokens: list[int] = []
    for i in range(len(guesses) + 1):
        adjusted = row.sampling.adjust(logits[i], [*row.tokens, *tokens], row.prompt_length)
        p = probabilities(adjusted[None], row.sampling)[0]
        if i < len(guesses):
            guess = guesses[i]
            q = None if guessed_from is None else guessed_from[i].to(p)
            if row.uniform() * (1.0 if q is None else q[guess].item()) < p[guess].item():
                tokens.append(guess)
                continue
            if q is None:
                p[guess] = 0.0
            else:
                p = (p - q).clamp(min=0.0)
        chance = torch.tensor([row.uniform()], dtype=torch.float64, device=p.device)
        return [*tokens, int(pick(p[None], chance))]
    raise AssertionError("the token after the last guess is always drawn")
