"""Keys and values in 2 bits, the newest as they are (KIVI, arXiv:2402.02750)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from litgpt.kernels.structs import Vectors
from litgpt.keys_and_values import DefaultKeysAndValues, EncodedKeysAndValues, KeysAndValues
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import Index, Storage, bits_by_side, move_rows, register_storage, write_slots
from litgpt.pages import zeros

LEVELS = 3  # the largest number of 2 bits
WORD = 16  # numbers whose codes lie in 4 bytes
BLOCK = 128  # tokens whose values lie together, as kernels read them, where a window has whole such blocks
KIND = 4  # of the encoding, for `litgpt.kernels`


@register_storage("kivi")
class KiviStorage(Storage):
    """Keys in 2 bits by channel, `group` tokens sharing a scale and a minimum, and values in 2 bits by token, `group` channels
    sharing them; between `window` and twice as many of the newest tokens as they are. 0.19 of bfloat16's bytes, and the window's.

    For dense caches: tokens are encoded `window` at a time, once as many newer ones follow them, and so all queries of a
    position see the same, however a sequence is cut into calls. Nothing in 2 bits runs in compiled code. Gradients go straight
    through: while there are any, keys and values are kept as they came as well, with the graph that they come from.
    `litgpt.kernels` read windows of whole `BLOCK`s, and groups of 16, 32 or 64.

    Of WORD numbers, byte b of 4 has numbers b, 4 + b, 8 + b and 12 + b, from its lowest bits on. Those of keys are WORD channels of
    a token, and for each WORD of a group its tokens follow one another; those of values are WORD tokens of a channel, and for each
    WORD of a block its channels follow one another.

    Args:
        group: tokens of a key's channel, and channels of a value, that share a scale.
        window: newest tokens that stay as they are, a multiple of `group`.
    """

    blocks, has_kernel_codes = True, True

    def __init__(self, params: KVCacheParams, group: int = 32, window: int = 128) -> None:
        super().__init__()
        self.group, self.window = group, window
        self.head_size, self.cache_length = params.head_size, params.cache_length
        self.block = _block(window)
        _check(params, group, window)
        with torch.inference_mode(False):  # the buffers outlive the call that makes them
            for name, (shape, dtype) in _buffers(params, group, window).items():
                self.register_buffer(name, zeros(shape, dtype, params.device), persistent=False)

    def sealed(self, length: int) -> int:
        """How many of `length` tokens are in 2 bits, once the next one attends."""
        return sealed(length, self.window)

    @property
    def ring(self) -> int:
        """Slots of the newest tokens."""
        return self.newest_keys.shape[2]

    # -- one call

    def set(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
        key, value = key.detach(), value.detach()
        if (n := max(0, key.shape[2] - self.ring)) > 0:  # a whole sequence
            n = sealed(key.shape[2] - 1, self.window)
            self._keep(self.encode(key[:, :, :n], value[:, :, :n]), 0, rows, len(key))
            key, value, slots = key[:, :, n:], value[:, :, n:], slots[..., n:]
        for buffer, new in ((self.newest_keys, key), (self.newest_values, value)):
            write_slots(buffer, new, slots % self.ring, rows)

    def keep_graph(self, key: torch.Tensor, value: torch.Tensor, start: int, rows: torch.Tensor | None) -> None:
        """Let gradients of tokens from `start` on, which `set` gets as well, go to these keys and values (B, G, T, D)."""
        if self._through is None:
            shape = *self.newest_keys.shape[:2], self.cache_length, self.head_size
            self._through = (self.newest_keys.new_zeros(shape), self.newest_keys.new_zeros(shape))
        self._through = tuple(x.clone() for x in self._through)  # autograd may have saved parts of those
        slots = torch.arange(start, start + key.shape[2], device=key.device)
        for buffer, new in zip(self._through, (key, value), strict=True):
            write_slots(buffer, new, slots, rows)

    def seal(self, start: int, rows: torch.Tensor | None, batch: int) -> None:
        """Encode tokens [start, start + window) of `rows` (None: the first `batch`)."""
        slots = slice(start % self.ring, start % self.ring + self.window)
        row = slice(batch) if rows is None else rows
        self._keep(
            self.encode(self.newest_keys[:, :, slots][row], self.newest_values[:, :, slots][row]), start, rows, batch
        )

    def _keep(self, parts: Mapping[str, torch.Tensor], start: int, rows: torch.Tensor | None, batch: int) -> None:
        row = slice(batch) if rows is None else rows
        for name, new in parts.items():
            first = start // self.tokens_of(name)
            getattr(self, name)[row, :, first : first + new.shape[2]] = new

    def tokens_of(self, name: str) -> int:
        """Tokens that share a place in the third dimension of a buffer of codes or scales."""
        return self.group if name.startswith("key") else self.block

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of whole windows of keys and values (B, G, T, D)."""
        D = self.head_size
        keys, *key_scales = _encode(key.float().unflatten(2, (-1, self.group)), 3)  # (B, G, groups, group, D)
        values = _padded(value.float(), self.group).unflatten(2, (-1, self.block)).unflatten(4, (-1, self.group))
        values, *value_scales = _encode(values, 5)  # (B, G, blocks, block, channel groups, group)
        channels = F.pad(values.flatten(4)[..., :D].mT, (0, 0, 0, -D % WORD))
        return {
            "key_codes": _pack(keys),
            "key_scales": torch.cat(key_scales, dim=3),
            "value_codes": _pack(channels),
            "value_scales": torch.stack([x.mT for x in value_scales], dim=4).flatten(3),
        }

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what `encode` gave, or of whole windows of it."""
        D = self.head_size
        scale, least = parts["key_scales"].float()[:, :, :, None].split(D, dim=4)
        keys = _unpack(parts["key_codes"], self.group, D) * scale + least
        codes = _unpack(parts["value_codes"], -(-D // WORD) * WORD, self.block).mT[..., :D]
        codes = _padded(codes, self.group).unflatten(4, (-1, self.group))
        scale, least = parts["value_scales"].float().unflatten(3, (-1, 2, self.block)).unbind(4)
        values = (codes * scale.mT[..., None] + least.mT[..., None]).flatten(4)[..., :D]
        return keys.flatten(2, 3).to(dtype), values.flatten(2, 3).to(dtype)

    def get(self, batch: int, slots: Index, rows: torch.Tensor | None = None) -> KeysAndValues:
        """As if `slots`, a slice from 0 on, were all tokens of the rows."""
        if not isinstance(slots, slice) or slots.start:
            raise ValueError("the storage kivi gives the tokens from the first one on")
        return self.tokens(sealed(slots.stop - 1, self.window), slots.stop, batch, rows)

    def tokens(self, n_sealed: int, stop: int, batch: int, rows: torch.Tensor | None) -> KeysAndValues:
        """Tokens [0, stop) of `rows` (None: the first `batch`), of which the first `n_sealed` are in 2 bits."""
        row = slice(batch) if rows is None else rows
        codes = {
            name: x[:, :, : n_sealed // self.tokens_of(name)][row]
            for name, x in self.named_buffers()
            if not name.startswith("newest")
        }
        found = KiviKeysAndValues(self, codes, self.newest_keys[row], self.newest_values[row], n_sealed, stop)
        if self._through is None or not torch.is_grad_enabled():
            return found
        through = (x[:, :, :stop][row] for x in self._through)
        plain = found.narrow(0, stop)
        return DefaultKeysAndValues(plain.keys() + _zero(next(through)), plain.values() + _zero(next(through)))

    def as_stored(self, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues:
        T = key.shape[2]
        n = sealed(T - 1, self.window)
        parts = self.encode(key[:, :, :n], value[:, :, :n])
        return KiviKeysAndValues(self, parts, key[:, :, n:], value[:, :, n:], n, T, n)

    def kernel_view(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        buffers = self._buffers  # see `DefaultStorage.kernel_view`
        readable = self.block == BLOCK and self.group in (16, 32, 64) and self._through is None
        return (buffers["newest_keys"], buffers["newest_values"]) if readable else None

    def kernel_codes(self) -> tuple[Vectors, Vectors]:
        return self.vectors(dict(self.named_buffers()))

    def vectors(self, codes: Mapping[str, torch.Tensor]) -> tuple[Vectors, Vectors]:
        """Codes and scales of keys and of values for `litgpt.kernels`."""
        both = [Vectors.of(KIND, False, codes[f"{side}_codes"], codes[f"{side}_scales"]) for side in ("key", "value")]
        for side, tokens in zip(both, (self.group, self.block), strict=True):
            side.unit, side.group = tokens, self.group
        return both[0], both[1]

    # -- rows

    def slot_buffers(self) -> list[torch.Tensor]:
        if len(self.key_codes[0, 0]):
            raise ValueError("the storage kivi is for dense caches: tokens in groups do not move on their own")
        return [self.newest_keys, self.newest_values]

    def select_rows(self, rows: Sequence[int]) -> None:
        move_rows(self.buffers(), rows)
        if self._through is not None:
            self._through = tuple(x.clone() for x in self._through)
            move_rows(self._through, rows)

    def detach_writes(self) -> None:
        """Nothing: what is read is copied, so autograd has saved none of the buffers."""

    def detach_graph(self) -> None:
        if self._through is not None:
            self._through = None

    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        n = sealed(used - 1, self.window)
        return {
            name: x[:batch] if name.startswith("newest") else x[:batch, :, : n // self.tokens_of(name)]
            for name, x in self.named_buffers()
        }

    # -- size and place

    def size_in_bits(self) -> dict[str, int]:
        return bits_by_side({name: 8 * x.numel() * x.element_size() for name, x in self.named_buffers()})

    @classmethod
    def size_in_bits_apriori(cls, params: KVCacheParams, group: int = 32, window: int = 128) -> dict[str, int]:
        _check(params, group, window)
        sizes = _buffers(params, group, window).items()
        return bits_by_side({name: 8 * torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in sizes})

    @property
    def device(self) -> torch.device:
        return self.newest_keys.device

    @property
    def dtype(self) -> torch.dtype:
        return self.newest_keys.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> "KiviStorage":
        """What `to` and the like call: scales stay what they are, on whatever device."""
        scales = {name: getattr(self, name) for name in ("key_scales", "value_scales")}
        super()._apply(fn, recurse)
        for name, x in scales.items():
            setattr(self, name, x.to(self.device))
        return self


class KiviKeysAndValues(EncodedKeysAndValues):
    """Tokens [0, stop) of a `KiviStorage`: the first `n_sealed` in 2 bits (`codes`), the others in `keys` and `values`, that at p in
    their slot (p - offset) % slots."""

    def __init__(
        self,
        storage: KiviStorage,
        codes: Mapping[str, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        n_sealed: int,
        stop: int,
        offset: int = 0,
    ) -> None:
        self.storage, self.codes, self.rest = storage, codes, (keys, values)
        self.n_sealed, self.stop, self.offset = n_sealed, stop, offset
        self.dtype = keys.dtype

    @property
    def length(self) -> int:
        return self.stop

    @property
    def n_query_groups(self) -> int:
        return self.rest[0].shape[1]

    def keys(self) -> torch.Tensor:
        return self.narrow(0, self.stop).keys()

    def values(self) -> torch.Tensor:
        return self.narrow(0, self.stop).values()

    def rotated(self) -> DefaultKeysAndValues:
        return self.narrow(0, self.stop)

    def narrow(self, start: int, stop: int) -> "_Plain":
        n, window, stop = self.n_sealed, self.storage.window, min(stop, self.stop)
        slots = torch.arange(max(start, n), max(stop, n), device=self.rest[0].device) - self.offset
        parts = [x[:, :, slots % x.shape[2]] for x in self.rest]
        if start < n:
            first, last = start // window * window, min(n, -(-stop // window) * window)
            whole = {
                name: x[:, :, first // tokens : last // tokens]
                for name, x in self.codes.items()
                for tokens in [self.storage.tokens_of(name)]
            }
            decoded = self.storage.decode(whole, self.dtype)
            inside = slice(start - first, min(stop, n) - first)
            parts = [torch.cat((x[:, :, inside], new), dim=2) for x, new in zip(decoded, parts, strict=True)]
        return _Plain(*parts)

    def for_kernels(self) -> tuple[Vectors, ...]:
        readable = self.offset == 0 and self.storage.kernel_view() is not None
        return self.storage.vectors(self.codes) if readable else ()

    def newest(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        return *self.rest, self.n_sealed

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        return query

    def rotate_output(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def expected_errors(self) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError("only dense caches have this storage")


class _Plain(DefaultKeysAndValues):
    """Some decoded tokens."""

    def rotated(self) -> DefaultKeysAndValues:
        return self


def _zero(x: torch.Tensor) -> torch.Tensor:
    """Zeros whose gradients are those of x."""
    return x - x.detach()


def sealed(length: int, window: int) -> int:
    """How many of `length` tokens are in 2 bits, once the next one attends."""
    return max(0, (length - window) // window * window)


def _block(window: int) -> int:
    """Tokens whose values lie together."""
    return window if window % BLOCK else BLOCK


def _check(params: KVCacheParams, group: int, window: int) -> None:
    for name, value in (("group", group), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} of the storage kivi must be a whole number from 1 on, got {value!r}")
    if window % group:
        raise ValueError(f"window of the storage kivi must be a multiple of group={group}, got {window}")
    if params.value_size is not None:
        raise ValueError("the storage kivi does not keep latent keys, whose beginnings are values")


def _buffers(params: KVCacheParams, group: int, window: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes. Only tokens that can come to be encoded have room for codes."""
    D, C = params.head_size, params.cache_length
    head = params.batch_size, params.n_query_groups
    n, dtype = sealed(C - 1, window), torch.get_default_dtype() if params.dtype is None else params.dtype
    newest = (*head, min(C, 2 * window), D)
    block, words = _block(window), -(-D // WORD)
    return {
        "key_codes": ((*head, n // group, words * group * 4), torch.uint8),
        "key_scales": ((*head, n // group, 2 * D), torch.bfloat16),
        "value_codes": ((*head, n // block, -(-block // WORD) * words * WORD * 4), torch.uint8),
        "value_scales": ((*head, n // block, 2 * -(-D // group) * block), torch.bfloat16),
        "newest_keys": (newest, dtype),
        "newest_values": (newest, dtype),
    }


def _encode(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers 0 to 3 for x; without `dim`, along which they share these: what 1 stands for, and the least number."""
    least, most = x.aminmax(dim=dim, keepdim=True)
    least = least.bfloat16().float()
    scale = ((most - least) / LEVELS).bfloat16().float()
    codes = ((x - least) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, LEVELS).to(torch.uint8)
    return codes, scale.squeeze(dim).bfloat16(), least.squeeze(dim).bfloat16()


def _padded(x: torch.Tensor, group: int) -> torch.Tensor:
    """x (..., D) with its last number repeated up to a multiple of `group`."""
    missing = -x.shape[-1] % group
    return torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1) if missing else x


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Words of rows of codes (..., rows, size), one word of all rows after the other: (..., words x rows x 4)."""
    words = F.pad(codes, (0, -codes.shape[-1] % WORD)).unflatten(-1, (-1, 4, 4))
    a, b, c, d = words.unbind(-2)
    return (a | b << 2 | c << 4 | d << 6).transpose(-3, -2).flatten(-3)


def _unpack(packed: torch.Tensor, rows: int, size: int) -> torch.Tensor:
    words = packed.unflatten(-1, (-1, rows, 4)).transpose(-3, -2)
    codes = torch.stack([words >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
    return codes.flatten(-3)[..., :size].float()
