"""Keys and values in 4 bits."""

from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import register_storage
from litgpt.kvcache.storages.codecs import Codec, Int4
from litgpt.kvcache.storages.quantized import QuantizedStorage


@register_storage("int4")
class Int4Storage(QuantizedStorage):
    """Integers of 4 bits, with a scale and a minimum for every 32 numbers, after a Hadamard rotation: 0.31 of bfloat16's bytes.

    Latent keys (`value_size`) are not rotated: their beginnings are values.
    """

    @classmethod
    def codecs_for(cls, params: KVCacheParams) -> tuple[Codec, ...]:
        if params.value_size is not None:
            return (Int4(params.head_size),)
        codec = Int4(params.head_size, rotated=True)
        return codec, codec
