"""Keys and values in 2 bits, the newest as they are (KIVI, arXiv:2402.02750)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from litgpt.attention import DefaultKeysAndValues, EncodedKeysAndValues, KeysAndValues
from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import Index, Storage, move_rows, register_storage, write_slots

LEVELS = 3  # the largest number of 2 bits


@register_storage("kivi")
class KiviStorage(Storage):
    """Keys in 2 bits by channel, `group` tokens sharing a scale and a minimum, and values in 2 bits by token, `group` channels
    sharing them; between `window` and twice as many of the newest tokens as they are. 0.19 of bfloat16's bytes, and the window's.

    For dense caches: tokens are encoded `window` at a time, once as many newer ones follow them, and so all queries of a
    position see the same, however a sequence is cut into calls. Nothing in 2 bits has gradients, nor runs in compiled code.

    Args:
        group: tokens of a key's channel, and channels of a value, that share a scale.
        window: newest tokens that stay as they are, a multiple of `group`.
    """

    blocks = True

    def __init__(self, params: KVCacheParams, group: int = 32, window: int = 128) -> None:
        super().__init__()
        self.group, self.window, self.head_size = group, window, params.head_size
        _check(params, group, window)
        with torch.inference_mode(False):  # the buffers outlive the call that makes them
            for name, (shape, dtype) in _buffers(params, group, window).items():
                self.register_buffer(name, torch.zeros(shape, device=params.device, dtype=dtype), persistent=False)

    def sealed(self, length: int) -> int:
        """How many of `length` tokens are in 2 bits, once the next one attends."""
        return sealed(length, self.window)

    @property
    def ring(self) -> int:
        """Slots of the newest tokens."""
        return self.newest_keys.shape[2]

    # -- one call

    def set(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor | None) -> None:
        if (n := max(0, key.shape[2] - self.ring)) > 0:  # a whole sequence
            n = sealed(key.shape[2] - 1, self.window)
            self._keep(self.encode(key[:, :, :n], value[:, :, :n]), 0, rows, len(key))
            key, value, slots = key[:, :, n:], value[:, :, n:], slots[..., n:]
        for buffer, new in ((self.newest_keys, key), (self.newest_values, value)):
            write_slots(buffer, new, slots % self.ring, rows)

    def seal(self, start: int, rows: torch.Tensor | None, batch: int) -> None:
        """Encode tokens [start, start + window) of `rows` (None: the first `batch`)."""
        slots = slice(start % self.ring, start % self.ring + self.window)
        row = slice(batch) if rows is None else rows
        if self.newest_keys.requires_grad:
            raise ValueError("the storage kivi has no gradients of tokens in 2 bits: use another one, such as int4")
        self._keep(
            self.encode(self.newest_keys[:, :, slots][row], self.newest_values[:, :, slots][row]), start, rows, batch
        )

    def _keep(self, parts: Mapping[str, torch.Tensor], start: int, rows: torch.Tensor | None, batch: int) -> None:
        row = slice(batch) if rows is None else rows
        for name, new in parts.items():
            first = start // (self.group if name.startswith("key_s") else 1)
            getattr(self, name)[row, :, first : first + new.shape[2]] = new

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of whole groups of keys and values (B, G, T, D)."""
        keys, key_scales = _encode(key.float().unflatten(2, (-1, self.group)), 3)  # (B, G, groups, group, D)
        values, value_scales = _encode(_padded(value.float(), self.group).unflatten(3, (-1, self.group)), 4)
        return {
            "key_codes": _pack(keys.flatten(2, 3)),
            "key_scales": key_scales.flatten(3),
            "value_codes": _pack(values.flatten(3)[..., : self.head_size]),
            "value_scales": value_scales.flatten(3),
        }

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what `encode` gave, or of whole groups of it."""
        D, group = self.head_size, self.group
        scale, least = parts["key_scales"].float().unflatten(3, (2, D)).unbind(3)
        keys = _unpack(parts["key_codes"], D).unflatten(2, (-1, group)) * scale[:, :, :, None] + least[:, :, :, None]
        codes = _padded(_unpack(parts["value_codes"], D), group).unflatten(3, (-1, group))
        scale, least = parts["value_scales"].float().unflatten(3, (2, -1)).unbind(3)
        values = (codes * scale[..., None] + least[..., None]).flatten(3)[..., :D]
        return keys.flatten(2, 3).to(dtype), values.to(dtype)

    def get(self, batch: int, slots: Index, rows: torch.Tensor | None = None) -> KeysAndValues:
        """As if `slots`, a slice from 0 on, were all tokens of the rows."""
        if not isinstance(slots, slice) or slots.start:
            raise ValueError("the storage kivi gives the tokens from the first one on")
        return self.tokens(sealed(slots.stop - 1, self.window), slots.stop, batch, rows)

    def tokens(self, n_sealed: int, stop: int, batch: int, rows: torch.Tensor | None) -> KeysAndValues:
        """Tokens [0, stop) of `rows` (None: the first `batch`), of which the first `n_sealed` are in 2 bits."""
        row = slice(batch) if rows is None else rows
        slots = torch.arange(n_sealed, stop, device=self.device) % self.ring
        newest = [x[:, :, slots][row] for x in (self.newest_keys, self.newest_values)]
        codes = {
            name: getattr(self, name)[:, :, : n_sealed // (self.group if name == "key_scales" else 1)][row]
            for name in ("key_codes", "key_scales", "value_codes", "value_scales")
        }
        return KiviKeysAndValues(self, codes, *newest)

    def as_stored(self, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues:
        n = sealed(key.shape[2] - 1, self.window)
        return KiviKeysAndValues(self, self.encode(key[:, :, :n], value[:, :, :n]), key[:, :, n:], value[:, :, n:])

    # -- rows

    def slot_buffers(self) -> list[torch.Tensor]:
        if len(self.key_codes[0, 0]):
            raise ValueError("the storage kivi is for dense caches: tokens in groups do not move on their own")
        return [self.newest_keys, self.newest_values]

    def select_rows(self, rows: Sequence[int]) -> None:
        move_rows(self.buffers(), rows)

    def state(self, batch: int, used: int) -> dict[str, torch.Tensor]:
        n, found = sealed(used - 1, self.window), {}
        for name, x in self.named_buffers():
            groups = -(-n // self.group)
            found[name] = (
                x[:batch] if name.startswith("newest") else x[:batch, :, : groups if name == "key_scales" else n]
            )
        return found

    # -- size and place

    def size_in_bits(self) -> dict[str, int]:
        return _by_side({name: 8 * x.numel() * x.element_size() for name, x in self.named_buffers()})

    @classmethod
    def size_in_bits_apriori(cls, params: KVCacheParams, group: int = 32, window: int = 128) -> dict[str, int]:
        _check(params, group, window)
        sizes = _buffers(params, group, window).items()
        return _by_side({name: 8 * torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in sizes})

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
    """Tokens of a `KiviStorage`: the first in 2 bits (`codes`, whole groups), the last as they are."""

    def __init__(
        self, storage: KiviStorage, codes: Mapping[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.storage, self.codes, self.newest = storage, codes, (keys, values)
        self.dtype = keys.dtype

    @property
    def length(self) -> int:
        return self.codes["key_codes"].shape[2] + self.newest[0].shape[2]

    def _both(self) -> tuple[torch.Tensor, torch.Tensor]:
        old = self.storage.decode(self.codes, self.dtype)
        return tuple(torch.cat(pair, dim=2) for pair in zip(old, self.newest, strict=True))

    def keys(self) -> torch.Tensor:
        return self._both()[0]

    def values(self) -> torch.Tensor:
        return self._both()[1]

    def rotated(self) -> DefaultKeysAndValues:
        return DefaultKeysAndValues(*self._both())

    def narrow(self, start: int, stop: int) -> "KeysAndValues":
        n, group = self.codes["key_codes"].shape[2], self.storage.group
        first, last = min(start, n) // group * group, min(n, -(-stop // group) * group)
        part = {
            name: x[:, :, first // group : last // group] if name == "key_scales" else x[:, :, first:last]
            for name, x in self.codes.items()
        }
        keys, values = KiviKeysAndValues(
            self.storage, part, *(x[:, :, max(0, start - n) : max(0, stop - n)] for x in self.newest)
        )._both()
        skipped = max(0, start - first) if start < n else 0
        size = min(stop, self.length) - start
        return _Plain(keys[:, :, skipped : skipped + size], values[:, :, skipped : skipped + size])

    def for_kernels(self) -> tuple:
        """Kernels do not read them."""
        return ()

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


def sealed(length: int, window: int) -> int:
    """How many of `length` tokens are in 2 bits, once the next one attends."""
    return max(0, (length - window) // window * window)


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
    return {
        "key_codes": ((*head, n, -(-D // 4)), torch.uint8),
        "key_scales": ((*head, n // group, 2 * D), torch.bfloat16),
        "value_codes": ((*head, n, -(-D // 4)), torch.uint8),
        "value_scales": ((*head, n, 2 * -(-D // group)), torch.bfloat16),
        "newest_keys": (newest, dtype),
        "newest_values": (newest, dtype),
    }


def _encode(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers 0 to 3 for x, and what 1 stands for and the least number along `dim`, (..., 2, rest)."""
    least, most = x.aminmax(dim=dim, keepdim=True)
    least = least.bfloat16().float()
    scale = ((most - least) / LEVELS).bfloat16().float()
    codes = ((x - least) / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, LEVELS).to(torch.uint8)
    return codes, torch.stack((scale.squeeze(dim), least.squeeze(dim)), dim=3).bfloat16()


def _padded(x: torch.Tensor, group: int) -> torch.Tensor:
    """x (..., D) with its last number repeated up to a multiple of `group`."""
    missing = -x.shape[-1] % group
    return torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1) if missing else x


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Four numbers (..., D) in a byte, a quarter of a vector apart."""
    a, b, c, d = _padded(codes, 4).chunk(4, dim=-1)
    return a | b << 2 | c << 4 | d << 6


def _unpack(packed: torch.Tensor, D: int) -> torch.Tensor:
    return torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)[..., :D].float()


def _by_side(bits: dict[str, int]) -> dict[str, int]:
    return {f"{side}s": sum(n for name, n in bits.items() if side in name) for side in ("key", "value")}
