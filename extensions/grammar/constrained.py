"""Answers that follow a JSON schema or a regular expression, by a logits processor around `outlines-core`.

pip install '.[grammar]'
python extensions/grammar/constrained.py "Describe Paris." '{"type": "object", "properties": {"country": {"type": "string"}}}'
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence

import torch
from outlines_core import Guide, Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema

from litgpt import LLM
from litgpt.tokenizer import Tokenizer


class Constrained:
    """Logits processor that allows only tokens with which the answer can still come to match a regular expression.

    It keeps where in the expression a sequence is; the engine gives every sequence a copy of its own.

    Args:
        pattern: regular expression for the whole answer.
        tokenizer: of the model.
    """

    def __init__(self, pattern: str, tokenizer: Tokenizer) -> None:
        tokens = defaultdict(list)
        for token in range(tokenizer.vocab_size):
            if text := tokenizer.token_bytes(token):
                tokens[text].append(token)
        self.index = Index(pattern, Vocabulary(tokenizer.eos_id, dict(tokens)))
        self.guide: Guide | None = None

    def __call__(self, tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if self.guide is None:  # nothing is drawn yet, these are the tokens of the prompt
            self.guide = Guide(self.index)
        else:
            self.guide.advance(tokens[-1], return_tokens=False)
        allowed = torch.tensor(self.guide.get_tokens(), device=logits.device)  # the end token where the answer may end
        return torch.full_like(logits, float("-inf")).index_copy_(0, allowed, logits[allowed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("schema", help="JSON schema")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    args = parser.parse_args()
    llm = LLM.load(args.model)
    processor = Constrained(build_regex_from_schema(args.schema), llm.tokenizer)
    for text in llm.generate(
        args.prompt, max_new_tokens=200, temperature=0, logits_processors=[processor], stream=True
    ):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
