"""Speculative decoding: a draft model drafts tokens, and the target model verifies several of them in one call.

The output is the target model's own: the same tokens with greedy sampling, else the same distribution
(arXiv:2211.17192).
"""

from collections import abc
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.find import find_checkpoint
from litgpt.engine.caches import prepare_caches
from litgpt.engine.drafting import DraftModel, draw_draft_token
from litgpt.engine.engine import Engine, decode
from litgpt.engine.loading import Ready, make_ready
from litgpt.engine.sampling import Sampling, sample
from litgpt.engine.sequence import Sequence
from litgpt.engine.verification import verify
from litgpt.generate.base import answer, check_request, prompt_lines
from litgpt.generate.options import AnswerOptions, ModelOptions, command, option
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

__all__ = ["check_same_vocabulary", "generate", "main", "sample", "speculative_decoding"]


def generate(
    draft_model: GPT,
    target_model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    stop_tokens: abc.Sequence[abc.Sequence[int]] = (),
    include_prompt: bool = True,
    speculative_k: int,
    **sampling: Any,
) -> tuple[torch.Tensor, float]:
    """Generate from one prompt (T,) with the target model, with draft tokens of the draft model.

    Args:
        draft_model: of the same vocabulary. It gets default caches.
        target_model: with assigned caches, or default ones, made as needed.
        prompt: tokens (T,).
        max_returned_tokens: most tokens of the result, the prompt included.
        stop_tokens: sequences of tokens, each of which ends the text and is not returned.
        include_prompt: whether the result includes the prompt.
        speculative_k: draft tokens at a time.
        sampling: fields of `Sampling`.

    Returns:
        Tokens (n,) int64, and the fraction of draft tokens that was accepted.

    Raises:
        ValueError: for settings out of range, or more tokens than the target model takes; before any work.
    """
    if max_returned_tokens <= len(prompt):
        raise ValueError(
            f"max_returned_tokens={max_returned_tokens} leaves no room after {len(prompt)} tokens of prompt"
        )
    sequence = Sequence(prompt, max_returned_tokens - len(prompt), Sampling(**sampling), stop_tokens)
    draft = DraftModel(draft_model, target_model.config.padded_vocab_size, speculative_k)
    engine = Engine(target_model, drafter=draft)
    prepare_caches(target_model, 1, sequence.max_length)
    for _ in decode(engine, [sequence]):
        pass
    new = torch.tensor(sequence.output, device=prompt.device, dtype=torch.int64)
    return torch.cat((prompt.to(torch.int64), new)) if include_prompt else new, engine.acceptance_rate


@torch.inference_mode()
def speculative_decoding(
    draft_model: GPT,
    target_model: GPT,
    token: torch.Tensor,
    input_pos: int,
    input_pos_maxp1: int | None = None,
    speculative_k: int = 3,
    **sample_kwargs: Any,
) -> torch.Tensor:
    """One step: draft tokens, and verify them with the target model.

    Args:
        draft_model, target_model: their caches hold the tokens before `input_pos`, of one row.
        token: the token at `input_pos`, (1,).
        input_pos: its position.
        input_pos_maxp1: not needed.
        speculative_k: draft tokens.
        sample_kwargs: as for `sample`.

    Returns:
        The n = 1..`speculative_k` + 1 tokens that follow, (n,). The caches then hold the tokens before `input_pos` + n.

    Raises:
        ValueError: if the caches are at another position, or cannot be rewound by that many tokens.
    """
    room = min(model.caches.max_rewindable_tokens(model.max_seq_length) for model in (draft_model, target_model))
    if not 1 <= speculative_k <= room:
        raise ValueError(f"speculative_k must be in 1..{room}, which the caches can take back, got {speculative_k}")
    sequence = Sequence(token, speculative_k + 1, Sampling(**sample_kwargs))
    draft_tokens: list[int] = []
    distributions: list[torch.Tensor] = []
    for i in range(speculative_k):
        last = torch.tensor([[*sequence.tokens, *draft_tokens][-1:]], device=token.device)
        logits = draft_model(last, input_pos + i, last_token_only=True)[0, -1]
        draw_draft_token(sequence, logits, draft_tokens, distributions)
    idx = torch.tensor([sequence.tokens + draft_tokens], device=token.device)
    draft_model(idx[:, -1:], input_pos + speculative_k, skip_lm_head=True)  # for the next step, if all are accepted
    logits = target_model(idx, input_pos)[0]
    verify(
        sequence,
        logits,
        draft_tokens,
        torch.stack(distributions) if distributions else None,
        target_model.broadcast_tokens,
    )
    for model in (draft_model, target_model):
        model.caches.rewind([idx.shape[1] - sequence.n_new])
    return torch.tensor(sequence.new_tokens, device=token.device)


def check_same_vocabulary(draft: Tokenizer, target: Tokenizer) -> None:
    """Raise `ValueError` unless the tokens that both tokenizers have are the same."""
    for token_id in range(min(draft.vocab_size, target.vocab_size)):
        one, other = draft.id_to_token(token_id), target.id_to_token(token_id)
        if one != other:
            raise ValueError(
                "the draft and the target model need the same vocabulary: token "
                f"{token_id} is {one!r} in the draft's and {other!r} in the target's"
            )


@dataclass(frozen=True, kw_only=True)
class SpeculativeOptions(AnswerOptions, ModelOptions):
    """The options of `litgpt generate_speculatively`."""

    draft_model_checkpoint_dir: Path = option(
        MISSING, "The small model: folder of a checkpoint (Hugging Face or LitGPT), a .gguf file, or a model's name."
    )
    target_model_checkpoint_dir: Path = option(
        MISSING,
        "The large model. Its vocabulary has to be the small one's. The options about caches are for this model.",
    )
    speculative_k: int = option(3, "Tokens that the small model drafts at a time.", least=1)


@command(SpeculativeOptions, "draft_model_checkpoint_dir", "target_model_checkpoint_dir", "prompt")
def main(options: SpeculativeOptions) -> None:
    """Answer a prompt with a large model, for which a small one drafts tokens.

    The large model verifies several draft tokens in one call. The answer is the large model's own: with --temperature 0 the same
    text, otherwise drawn with the same probabilities. It goes to stdout, statistics to stderr.
    """
    lines = prompt_lines(options)
    draft: GPT | None = None

    def load() -> Ready:
        nonlocal draft
        folders = options.draft_model_checkpoint_dir, options.target_model_checkpoint_dir
        opened = [open_checkpoint(find_checkpoint(folder, options.access_token)) for folder in folders]
        tokenizers = [checkpoint.tokenizer() for checkpoint in opened]
        check_same_vocabulary(*tokenizers)
        check_request(options, lines, opened[1], tokenizers[1], opened[1].prompt_style(tokenizers[1]))
        draft, target = (make_ready(folder, **options.loading()) for folder in folders)
        draft = draft.model
        return target

    def drafter(target: Ready) -> DraftModel:
        vocabulary = target.model.config.padded_vocab_size
        return DraftModel(draft, vocabulary, options.speculative_k, options.prompt_chunksize)

    answer(options, lines, load, drafter)
