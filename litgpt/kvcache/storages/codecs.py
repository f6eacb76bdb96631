"""How vectors of keys or values are kept in few bits: codecs, which know neither slots nor attention."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

GROUP = 32  # numbers of a vector that share a scale, in 4 bits


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
class Int4(Codec):
    """Integers of 4 bits, with a scale and a minimum for each group of 32 numbers.

    In a group of `GROUP` numbers of the codes, byte i has number i in its low half and number i + GROUP / 2 in its high one.
    """

    kind = 2

    @property
    def groups(self) -> int:
        return -(-self.size // GROUP)

    @property
    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (self.groups * GROUP // 2, torch.uint8), "scales": (2 * self.groups, torch.bfloat16)}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.rotate(x.float())
        if missing := self.groups * GROUP - self.size:
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
        x = x.unflatten(-1, (self.groups, GROUP))
        least, most = x.aminmax(dim=-1, keepdim=True)
        least = least.bfloat16()
        scale = ((most - least) / 15).bfloat16()
        codes = ((x - least) / _nonzero(scale)).round_().clamp_(0, 15).to(torch.uint8)
        low, high = codes.chunk(2, dim=-1)
        return (low | high << 4).flatten(-2), torch.cat((scale, least), dim=-1).flatten(-2)

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        codes, scales = parts
        codes = codes.unflatten(-1, (self.groups, GROUP // 2))
        scale, least = scales.float().unflatten(-1, (self.groups, 2)).split(1, dim=-1)
        numbers = torch.cat((codes & 15, codes >> 4), dim=-1)
        return (numbers * scale + least).flatten(-2)[..., : self.size]

    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor:
        return parts[1].float().unflatten(-1, (self.groups, 2))[..., 0].norm(dim=-1) * (GROUP / 12) ** 0.5


@dataclass(frozen=True)
class Float8(Codec):
    """Floating-point numbers of 8 bits (e4m3), with a scale for each vector."""

    @property
    def parts(self) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (self.size, torch.float8_e4m3fn), "scales": (1, torch.bfloat16)}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.rotate(x.float())
        scale = (x.abs().amax(-1, keepdim=True) / 448).bfloat16()
        return (x / _nonzero(scale)).clamp_(-448, 448).to(torch.float8_e4m3fn), scale

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        codes, scale = parts
        return codes.float() * scale.float()

    def expected_error(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.decode(*parts).norm(dim=-1) / (
            8 * 12**0.5 * 1.5
        )  # steps are an eighth of a power of two, numbers 1.5 of it


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
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))
