"""A tokenizer and where its tokens go: what LitGPT's `LLM` is given."""

import torch

from litgpt.tokenizer import Tokenizer


class Preprocessor:
    """Text to tokens and back."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> None:
        self.tokenizer = tokenizer
        self.device = torch.device(device)

    def encode(self, text: str) -> torch.Tensor:
        """Tokens (T,) of a text, without a prompt style."""
        return self.tokenizer.encode(text, self.device)

    def decode(self, token_ids: torch.Tensor) -> str:
        """The text of tokens (T,)."""
        return self.tokenizer.decode(token_ids)
