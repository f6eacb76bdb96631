"""The next tokens of sequences, each by its own settings and random numbers."""

from collections import abc, defaultdict

import torch

from litgpt.engine.sampling import check_tokens, draw_rows, pick
from litgpt.engine.sequence import Sequence


def draw(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
    """Draw a token for each sequence from logits (B, V): (B,) int64, `NO_TOKEN` where logits are not finite.

    Sequences with equal settings are drawn together.
    """
    if any(sequence.sampling.adjusts for sequence in sequences):
        logits = torch.stack([sequence.adjust(x) for sequence, x in zip(sequences, logits, strict=True)])
    if len(sequences) == 1:
        return _draw_alike(logits, sequences)
    groups: dict[tuple | None, list[int]] = defaultdict(list)
    for i, sequence in enumerate(sequences):
        s = sequence.sampling
        groups[None if s.is_greedy else (s.temperature, s.top_k, s.top_p, s.min_p)].append(i)
    if len(groups) == 1:
        return _draw_alike(logits, sequences)
    tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for members in groups.values():
        index = torch.tensor(members, device=logits.device)
        tokens[index] = _draw_alike(logits[index], [sequences[i] for i in members])
    return tokens


def _draw_alike(logits: torch.Tensor, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
    """`draw` for sequences with the same settings."""
    sampling, uniforms = sequences[0].sampling, None
    if not sampling.is_greedy and any(sequence.has_seed for sequence in sequences):
        uniforms = [sequence.uniform() for sequence in sequences]
        uniforms = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    return draw_rows(logits, sampling, uniforms)


def draw_from(weights: torch.Tensor, sequence: Sequence) -> int:
    """An index drawn with probabilities proportional to `weights` (V,), by the sequence's own random numbers.

    Raises:
        ValueError: if weights are not finite.
    """
    uniform = torch.tensor([sequence.uniform()], dtype=torch.float64, device=weights.device)
    return check_tokens(pick(weights[None], uniform).tolist())[0]
