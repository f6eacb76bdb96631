"""Keys in 8 bits, values in 4."""

from litgpt.kvcache.params import KVCacheParams
from litgpt.kvcache.storages.base import register_storage
from litgpt.kvcache.storages.codecs import Codec, Int4, Int8
from litgpt.kvcache.storages.quantized import QuantizedStorage


@register_storage("k8v4")
class K8V4Storage(QuantizedStorage):
    """Keys as in `int8`, values as in `int4`, which bear rounding better: 0.41 of bfloat16's bytes at a head size of 64.

    Raises:
        ValueError: in models whose values are parts of the keys (latent attention).
    """

    @classmethod
    def codecs_for(cls, params: KVCacheParams) -> tuple[Codec, ...]:
        if params.value_size is not None:
            raise ValueError("latent attention stores keys and values as the same numbers: use int8 or int4, not k8v4")
        return Int8(params.head_size), Int4(params.head_size, rotated=True)
