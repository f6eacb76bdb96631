"""Which draft tokens are accepted: speculative sampling (arXiv:2211.17192, arXiv:2302.01318)."""

from collections.abc import Callable

import torch

from litgpt.engine.drawing import draw, draw_from
from litgpt.engine.sampling import check_tokens, probabilities
from litgpt.engine.sequence import Sequence


def verify(
    sequence: Sequence,
    logits: torch.Tensor,
    draft_tokens: list[int],
    distributions: torch.Tensor | None,
    broadcast: Callable[[list[int]], list[int]],
) -> tuple[list[int], int]:
    """Draw a sequence's next tokens: one after each accepted draft token, and the first that differs or follows.

    Args:
        sequence: gets the tokens, which may finish it.
        logits: of the model, after the sequence's last token and after every draft token, (n + 1 or more, V).
        draft_tokens: n tokens.
        distributions: that they were drawn from, (n, V) (None: they are certain).
        broadcast: as `GPT.broadcast_tokens`.

    Returns:
        The tokens that are now known to be output, and the number of accepted draft tokens.
    """
    output: list[int] = []
    for place, draft_token in enumerate(draft_tokens):
        q = None if distributions is None else distributions[place]
        (token,) = check_tokens(broadcast([verify_token(logits[place], draft_token, q, sequence)]))
        output += sequence.append(token, logits[place])
        if token != draft_token:
            return output, place
        if sequence.finish_reason:
            return output, place + 1
    last = logits[len(draft_tokens)]
    (token,) = check_tokens(broadcast(draw(last[None], [sequence]).tolist()))
    return output + sequence.append(token, last), len(draft_tokens)


def verify_token(logits: torch.Tensor, draft_token: int, distribution: torch.Tensor | None, sequence: Sequence) -> int:
    """The next token of a sequence, distributed as if there were no draft.

    A draft token x drawn from q is accepted with probability min(1, p(x) / q(x)); otherwise the token is drawn from the
    normalised max(0, p - q), where x has probability 0. A certain draft token does not change the draw: it is accepted if x is
    drawn, so equal random numbers give the same tokens with and without drafts.

    Args:
        logits: of the model, (V,).
        draft_token: x.
        distribution: q, (V,) (None: the draft token is certain).
        sequence: so far.

    Returns:
        The token, or `NO_TOKEN` if the logits are not finite.
    """
    if distribution is None:
        return int(draw(logits[None], [sequence]))
    p = probabilities(sequence.adjust(logits)[None], sequence.sampling)[0]
    q = distribution.to(p)
    if sequence.uniform() * q[draft_token].item() < p[draft_token].item():
        return draft_token
    rest = (p - q).clamp(min=0.0)
    return draw_from(rest if rest.any() else p, sequence)  # without a rest, p and q are equal up to rounding
