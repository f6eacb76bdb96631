"""Keys in 5 bits, values in 4."""

from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import register_storage
from litgpt.kvcache.storages.codecs import Codec, Int4, Int5
from litgpt.kvcache.storages.quantized import QuantizedStorage


@register_storage("int4")
class Int4Storage(QuantizedStorage):
    """Integers of 4 bits for values and 5 for keys, with a scale and a minimum for every 64 numbers, after a Hadamard rotation:
    0.31 of bfloat16's bytes at a head size of 64.

    With keys of 4 bits, small models lose about three times as much: they decide which tokens are seen. Latent keys
    (`value_size`) are not rotated: their beginnings are values.
    """

    @classmethod
    def codecs_for(cls, params: KVCacheParams) -> tuple[Codec, ...]:
        if params.value_size is not None:
            return (Int5(params.head_size),)
        return Int5(params.head_size, rotated=True), Int4(params.head_size, rotated=True)
