"""Does a guess of the next token stand? Speculative sampling (arXiv:2211.17192, arXiv:2302.01318)."""

import torch

from litgpt.engine.sampling import Draws, draw, pick, probabilities


def draw_beside(logits: torch.Tensor, guess: int, guessed_from: torch.Tensor | None, row: Draws) -> int:
    """The next token of a sequence, distributed as if nothing had been guessed: the guess, as often as that allows.

    A guess x that was drawn from q stands with probability min(1, p(x) / q(x)); if it does not, the token is drawn from
    max(0, p - q), normalised, where x has no part. A guess that was certain leaves the draw as it is: it stands if x is
    drawn, so that the tokens are also those that the same random numbers give without guesses.

    Args:
        logits: of the model, (V,).
        guess: x.
        guessed_from: q, (V,) (None: the guess was certain).
        row: the sequence so far.
    """
    if guessed_from is None:
        return int(draw(logits[None], [row]))
    adjusted = row.sampling.adjust(logits, row.tokens, row.prompt_length)
    p = probabilities(adjusted[None], row.sampling)[0]
    q = guessed_from.to(p)
    if row.uniform() * q[guess].item() < p[guess].item():
        return guess
    rest = (p - q).clamp(min=0.0)
    return draw_from(rest if rest.any() else p, row)  # without a rest, p and q are equal but for rounding


def draw_from(weights: torch.Tensor, row: Draws) -> int:
    """An index of `weights` (V,), as often as each of them says, by the row's own random numbers."""
    chance = torch.tensor([row.uniform()], dtype=torch.float64, device=weights.device)
    return int(pick(weights[None], chance))
