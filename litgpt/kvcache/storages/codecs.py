"""How vectors of keys or values are kept in few bits: codecs, which know neither slots nor attention."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

GROUP = 64  # numbers of a vector that share a scale, in 4 and 5 bits
UNIT = 32  # numbers of a vector whose codes lie together


@dataclass(frozen=True)
class Codec(ABC):
    """Encodes vectors (..., D) of floating-point numbers, each on its own.

    Args:
        size: D.
        rotated: whether vectors are multiplied with a Hadamard matrix first, which spreads outliers over all numbers of a
            vector (QuaRot, arXiv:2404.00456). Products of rotated vectors equal those of the vectors.
    """

    kind: ClassVar[int] = 0  # for `litgpt.kernels`; 0: they do not read it
    size: int
    rotated: bool = False

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        """What is kept of a vector: names, and how many numbers of which dtype."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of vectors (..., D)."""

    @abstractmethod
    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        """Vectors (..., D) in float32, rotated if the codec rotates."""

    @abstractmethod
    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor:
        """The norm of what encoding a vector has lost, as its scale lets expect, (...,) float32."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply vectors (..., D) with the Hadamard matrix, if the codec does. It is its own inverse."""
        return x @ hadamard(self.size, x.dtype, x.device) if self.rotated else x


@dataclass(frozen=True)
class Int8(Codec):
    """Integers of 8 bits, symmetric, with a scale for each vector."""

    kind = 1

    @property
    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (self.size, torch.int8), "scales": (1, torch.bfloat16)}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.rotate(x.float())
        scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16()
        codes = (x / _nonzero(scale)).round().clamp_(-127, 127)
        return codes.to(torch.int8), scale

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        codes, scale = parts
        return codes.float() * scale.float()

    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor:
        return parts[1][..., 0].float() * (self.size / 12) ** 0.5  # of numbers that are uniform within a step


@dataclass(frozen=True)
class Grouped(Codec):
    """Integers of 4 or 5 bits, with a scale and a minimum for each group of `GROUP` numbers.

    Of every `UNIT` numbers, byte i of the codes has the low 4 bits of number i in its low half and those of number i + UNIT / 2
    in its high one. The fifth bits of all numbers follow, 8 in a byte.
    """

    bits: ClassVar[int]

    @property
    def padded(self) -> int:
        """Numbers of a vector that have codes."""
        return -(-self.size // UNIT) * UNIT

    @property
    def groups(self) -> int:
        return -(-self.size // GROUP)

    @property
    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (self.padded * self.bits // 8, torch.uint8), "scales": (2 * self.groups, torch.bfloat16)}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.rotate(x.float())
        if missing := self.groups * GROUP - self.size:
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
        x = x.unflatten(-1, (self.groups, GROUP))
        least, most = x.aminmax(dim=-1, keepdim=True)
        least, largest = least.bfloat16(), 2**self.bits - 1
        scale = ((most - least) / largest).bfloat16()
        codes = ((x - least) / _nonzero(scale)).round_().clamp_(0, largest).to(torch.uint8)
        codes = codes.flatten(-2)[..., : self.padded]
        low, high = (codes & 15).unflatten(-1, (-1, 2, UNIT // 2)).unbind(-2)
        packed = [(low | high << 4).flatten(-2)]
        if self.bits == 5:
            packed.append(((codes >> 4).unflatten(-1, (-1, 8)) << _bits(x.device)).sum(-1, dtype=torch.uint8))
        return torch.cat(packed, dim=-1), torch.cat((scale, least), dim=-1).flatten(-2)

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        codes, scales = parts
        pairs = codes[..., : self.padded // 2].unflatten(-1, (-1, UNIT // 2))
        numbers = torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3)
        if self.bits == 5:
            fifth = codes[..., self.padded // 2 :].unsqueeze(-1) >> _bits(codes.device) & 1
            numbers = numbers | fifth.flatten(-2) << 4
        scale, least = scales.float().unflatten(-1, (self.groups, 2)).unbind(-1)
        x = numbers[..., : self.size].float()
        for group, own in enumerate(x.split(GROUP, dim=-1)):  # scales of all numbers would take as much memory
            own.mul_(scale[..., group, None]).add_(least[..., group, None])
        return x

    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor:
        return (
            parts[1].float().unflatten(-1, (self.groups, 2))[..., 0].norm(dim=-1) * (min(GROUP, self.size) / 12) ** 0.5
        )


@dataclass(frozen=True)
class Int4(Grouped):
    """Integers of 4 bits."""

    kind = 2
    bits = 4


@dataclass(frozen=True)
class Int5(Grouped):
    """Integers of 5 bits."""

    kind = 3
    bits = 5


@dataclass(frozen=True)
class Float8(Codec):
    """Floating-point numbers of 8 bits (e4m3), kept as bytes, with a scale for each vector."""

    @property
    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (self.size, torch.uint8), "scales": (1, torch.bfloat16)}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.rotate(x.float())
        scale = (x.abs().amax(-1, keepdim=True) / 448).bfloat16()  # the largest number there is
        codes = (x / _nonzero(scale)).clamp_(-448, 448).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), scale

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        codes, scale = parts
        return codes.view(torch.float8_e4m3fn).float() * scale.float()

    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor:
        # steps are an eighth of a power of two, numbers 1.5 of it
        return self.decode(*parts).norm(dim=-1) / (8 * 12**0.5 * 1.5)


def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Scales that one can divide by."""
    return torch.where(scale == 0, 1.0, scale.float())


def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An orthonormal symmetric matrix (size, size), of blocks as large as the greatest power of two that divides `size`."""
    return _hadamard(size).to(device, dtype) if torch.compiler.is_compiling() else _placed_hadamard(size, dtype, device)


@functools.cache
def _placed_hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return _hadamard(size).to(device, dtype)


def _hadamard(size: int) -> torch.Tensor:
    block = torch.ones(1, 1, dtype=torch.float32)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))
