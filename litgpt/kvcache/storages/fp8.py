"""Keys and values as floating-point numbers of 8 bits."""

from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import register_storage
from litgpt.kvcache.storages.codecs import Codec, Float8
from litgpt.kvcache.storages.quantized import QuantizedStorage


@register_storage("fp8")
class Float8Storage(QuantizedStorage):
    """Floating-point numbers of 8 bits (e4m3) with a scale for every token and head, for devices that convert them: the bytes of
    `int8`, which is more exact."""

    has_kernel_codes = False

    @classmethod
    def codecs_for(cls, params: KVCacheParams) -> tuple[Codec, ...]:
        codec = Float8(params.head_size)
        return (codec,) if params.value_size is not None else (codec, codec)
