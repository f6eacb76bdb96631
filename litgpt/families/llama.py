"""Llama, other models of its architecture, and SmolLM3."""

from typing import Any

from litgpt.families.base import Family, named
from litgpt.settings import Settings

STRUCTURE = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
KEYS = {
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "padded_vocab_size": "vocab_size",
    "n_head": "num_attention_heads",
    "n_query_groups": "num_key_value_heads",
    "head_size": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
DEFAULTS = {"max_position_embeddings": 2048, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6}
SILU = ("silu", "swish")
OUTER = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
ATTENTION = {
    "norm_1": "input_layernorm",
    "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
}
MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
EXPERTS = {
    "mlp.gate": "mlp.gate",
    "mlp.experts.{}.fc_1": "mlp.experts.{}.gate_proj",
    "mlp.experts.{}.fc_2": "mlp.experts.{}.up_proj",
    "mlp.experts.{}.proj": "mlp.experts.{}.down_proj",
}
QK_NORM = {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}


def like_llama(model_type: str, architecture: str, **facts: Any) -> Family:
    """A family that is Llama but for these facts: entries of its tables replace Llama's, and `None` removes one."""
    same = {"structure": STRUCTURE, "keys": KEYS, "defaults": DEFAULTS, "expects": {"hidden_act": SILU}}
    facts |= {table: entries | facts.get(table, {}) for table, entries in same.items()}
    for table in ("keys", "expects"):
        facts[table] = {key: value for key, value in facts[table].items() if value is not None}
    names = {"outer": OUTER, "blocks": "model.layers", "block": ATTENTION | MLP}
    return Family(model_type, architecture, **(names | facts))


_LLAMA_2 = {"vocab_size": 32000, "padding_multiple": 64}
_LLAMA_3 = {"block_size": 8192, "vocab_size": 128000, "padded_vocab_size": 128256, "rope_base": 500000}
_ADJUSTMENTS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
_LLAMA_31 = _LLAMA_3 | {"block_size": 131072, "rope_adjustments": _ADJUSTMENTS}
_LLAMA_32 = _LLAMA_31 | {"rope_adjustments": _ADJUSTMENTS | {"factor": 32.0}}
_CODE = {"block_size": 16384, "vocab_size": 32016, "padding_multiple": 16, "rope_base": 1000000}
_CODE_SMALL_VOCAB = {"vocab_size": 32000, "padding_multiple": 512, "padded_vocab_size": 32000}
_FALCON_3 = {"block_size": 32768, "vocab_size": 131072, "padded_vocab_size": 131072}
_FALCON_3 |= {"rope_base": 1000042, "norm_eps": 1e-6}
_SALAMANDRA = {"block_size": 8192, "vocab_size": 256000, "padded_vocab_size": 256000}
_SMOLLM_2 = {"block_size": 8192, "vocab_size": 49152, "padded_vocab_size": 49152, "rope_base": 100000}
_TINY = "TinyLlama/TinyLlama-1.1B-{intermediate-step-1431k-3T,Chat-v1.0}=tiny-llama-1.1b{,-chat}"
_R1 = "deepseek-ai/DeepSeek-R1-Distill-Llama"

_MODELS = (
    named(
        _LLAMA_2,
        ("meta-llama/Llama-2-7b{,-chat}-hf", 32, 4096, 32, None, 11008),
        ("meta-llama/Llama-2-13b{,-chat}-hf", 40, 5120, 40, None, 13824),
        ("meta-llama/Llama-2-70b{,-chat}-hf stabilityai/FreeWilly2", 80, 8192, 64, 8, 28672),
        ("togethercomputer/LLaMA-2-7B-32K", 32, 4096, 32, None, 11008, {"rope_condense_ratio": 8}),
        ("Trelis/Llama-2-7b-chat-hf-function-calling-v2", 32, 4096, 32, None, 11008, {"norm_eps": 1e-6}),
    )
    | named(
        _LLAMA_2 | {"block_size": 2048},
        (_TINY, 22, 2048, 32, 4, 5632),
        ("keeeeenw/MicroLlama=micro-llama-300M", 12, 1024, 16, 4, 5632),
        ("openlm-research/open_llama_3b", 26, 3200, 32, None, 8640, {"norm_eps": 1e-6}),
        ("openlm-research/open_llama_7b", 32, 4096, 32, None, 11008, {"norm_eps": 1e-6}),
        ("openlm-research/open_llama_13b", 40, 5120, 40, None, 13824, {"norm_eps": 1e-6}),
    )
    | named(
        _LLAMA_3,
        ("meta-llama/Meta-Llama-3-8B{,-Instruct}=Llama-3-8B{,-Instruct}", 32, 4096, 32, 8, 14336),
        ("meta-llama/Meta-Llama-3-70B{,-Instruct}=Llama-3-70B{,-Instruct}", 80, 8192, 64, 8, 28672),
    )
    | named(
        _LLAMA_31,
        ("meta-llama/Meta-Llama-3.1-8B{,-Instruct}=Llama-3.1-8B{,-Instruct}", 32, 4096, 32, 8, 14336),
        ("meta-llama/Meta-Llama-3.1-70B{,-Instruct}=Llama-3.1-70B{,-Instruct}", 80, 8192, 64, 8, 28672),
        ("meta-llama/Meta-Llama-3.1-405B{,-Instruct}=Llama-3.1-405B{,-Instruct}", 126, 16384, 128, 8, 53248),
        ("meta-llama/Llama-3.3-70B-Instruct nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", 80, 8192, 64, 8, 28672),
        (f"{_R1}-8B=R1-Distill-Llama-8B", 32, 4096, 32, 8, 14336),
        (f"{_R1}-70B=R1-Distill-Llama-70B", 80, 8192, 64, 8, 28672),
    )
    | named(
        _LLAMA_32,
        ("meta-llama/Llama-3.2-1B{,-Instruct}", 16, 2048, 32, 8, 8192),
        ("meta-llama/Llama-3.2-3B{,-Instruct}", 28, 3072, 24, 8, 8192),
    )
    | named(
        _CODE,
        ("codellama/CodeLlama-7b-{,Instruct-}hf", 32, 4096, 32, None, 11008),
        ("codellama/CodeLlama-13b-hf", 40, 5120, 40, None, 13824),
        ("codellama/CodeLlama-13b-Instruct-hf", 40, 5120, 40, None, 13824, {"block_size": 2048}),
        ("codellama/CodeLlama-34b-{,Python-,Instruct-}hf", 48, 8192, 64, 8, 22016, _CODE_SMALL_VOCAB),
        ("codellama/CodeLlama-70b-{,Python-}hf", 80, 8192, 64, 8, 28672),
        ("codellama/CodeLlama-70b-Instruct-hf", 80, 8192, 64, 8, 28672, {"vocab_size": 32015}),
        ("codellama/CodeLlama-7b-Python-hf", 32, 4096, 32, None, 11008, _CODE_SMALL_VOCAB),
        ("codellama/CodeLlama-13b-Python-hf", 40, 5120, 40, None, 13824, _CODE_SMALL_VOCAB),
    )
    | named(
        {"padded_vocab_size": 32000},
        ("garage-bAInd/Platypus-30B", 60, 6656, 52, None, 17920, {"block_size": 2048, "norm_eps": 1e-6}),
        ("garage-bAInd/Platypus2-7B", 32, 4096, 32, None, 11008),
        ("garage-bAInd/{,Camel-,Stable-}Platypus2-13B", 40, 5120, 40, None, 13824),
        ("garage-bAInd/Platypus2-70B", 80, 8192, 64, None, 28672),
        ("garage-bAInd/{Camel-Platypus2-70B,Platypus2-70B-instruct}", 80, 8192, 64, 8, 28672),
    )
    | named(
        _FALCON_3,
        ("tiiuae/Falcon3-1B-{Base,Instruct}", 18, 2048, 8, 4, 8192, {"block_size": 4096}),
        ("tiiuae/Falcon3-3B-{Base,Instruct}", 22, 3072, 12, 4, 9216),
        ("tiiuae/Falcon3-7B-{Base,Instruct}", 28, 3072, 12, 4, 23040),
        ("tiiuae/Falcon3-10B-{Base,Instruct}", 40, 3072, 12, 4, 23040),
    )
    | named(
        _SALAMANDRA,
        ("BSC-LT/salamandra-2b{,-instruct}", 24, 2048, 16, 16, 5440),
        ("BSC-LT/salamandra-7b{,-instruct}", 32, 4096, 32, 8, 11008, {"norm_eps": 1e-6}),
    )
    | named(
        _SMOLLM_2,
        ("HuggingFaceTB/SmolLM2-135M{,-Instruct}", 30, 576, 9, 3, 1536),
        ("HuggingFaceTB/SmolLM2-360M{,-Instruct}", 32, 960, 15, 5, 2560),
        ("HuggingFaceTB/SmolLM2-1.7B{,-Instruct}", 24, 2048, 32, 32, 8192, {"rope_base": 130000}),
    )
)


def read(hf: Settings) -> dict[str, Any]:
    attention, mlp = hf.flag("attention_bias", False), hf.flag("mlp_bias", False)
    if attention != mlp:
        raise ValueError(f"{hf.where}: attention_bias = {attention} with mlp_bias = {mlp} is not supported")
    return {"bias": attention}


def write(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.bias, "mlp_bias": config.bias}


LLAMA = like_llama(
    "llama",
    "LlamaForCausalLM",
    read=read,
    write=write,
    models=_MODELS,
    tied_models="SmolLM2-* Llama-3.2-*",
)

# SmolLM3 rotates queries and keys in three layers of four
_SMOLLM_3 = {"block_size": 65536, "vocab_size": 128256, "padded_vocab_size": 128256}
_SMOLLM_3 |= {"norm_eps": 1e-6, "rope_base": 5000000, "nope_indices": "0001"}


def _read_smollm_3(hf: Settings) -> dict[str, Any]:
    n_layer = hf.whole("num_hidden_layers")
    flags = hf.value("no_rope_layers", list | None, None)  # 1: with RoPE
    if flags is None:
        interval = hf.whole("no_rope_layer_interval", 4)
        flags = [int((i + 1) % interval != 0) for i in range(n_layer)]
    elif len(flags) != n_layer or any(flag not in (0, 1) for flag in flags):
        raise hf.error("no_rope_layers", f"must be {n_layer} times 0 or 1, one a layer")
    return read(hf) | {"nope_indices": [1 - flag for flag in flags]}


SMOLLM_3 = like_llama(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000}
    | {"use_sliding_window": False},
    expects={"use_sliding_window": (False,)},
    tied=True,
    read=_read_smollm_3,
    write=lambda config: (
        write(config) | {"no_rope_layers": [1 - flag for flag in config.nope_indices or [0] * config.n_layer]}
    ),
    models=named(_SMOLLM_3, ("HuggingFaceTB/SmolLM3-3B{,-Base}", 36, 2048, 16, 4, 11008)),
)
FAMILIES = (LLAMA, SMOLLM_3)
