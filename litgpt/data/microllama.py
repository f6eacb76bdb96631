"""The data of MicroLlama: SlimPajama."""

from dataclasses import dataclass, field

from litgpt.data.tinyllama import TinyLlama


@dataclass
class MicroLlama(TinyLlama):
    """As `TinyLlama`, without code."""

    use_starcoder: bool = field(default=False, init=False)
