"""Numbers of the quantised blocks of GGUF files, for the commonest kinds: 32 numbers that share a scale.

The `gguf` package has all kinds; it takes 16 rows at a time, which is most of the time that a small model takes to load.
Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable

import torch

SIZE = 32  # numbers of a block
PIECE = 2**15  # blocks that are decoded at a time


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).mul_(_halves(blocks, 0)).add_(_halves(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32).mul_(_halves(blocks, 0))


# kind -> bytes of a block, and what decodes blocks (n, bytes) to float32 (n, SIZE)
DECODERS: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
}


def decode_blocks(kind: str, data: torch.Tensor) -> torch.Tensor:
    """The numbers (n,) in float32 of whole blocks of a kind in `DECODERS`, whose bytes are `data` (uint8)."""
    nbytes, decode = DECODERS[kind]
    blocks = data.view(-1, nbytes)
    numbers = torch.empty(len(blocks), SIZE)
    for part, target in zip(blocks.split(PIECE), numbers.split(PIECE), strict=True):
        target.copy_(decode(part))
    return numbers.flatten()


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number from byte `start` on of each block: (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The low halves of bytes (n, SIZE / 2), then the high ones: (n, SIZE)."""
    return torch.cat((codes & 15, codes >> 4), dim=1).to(torch.float32)
