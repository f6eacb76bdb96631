"""Falcon of the first generation: 7B, 40B, 180B."""

from typing import Any

from litgpt.families.base import Family, named
from litgpt.families.neox import GELU
from litgpt.settings import Settings

_MODELS = named(
    {"block_size": 2048, "vocab_size": 65024, "padded_vocab_size": 65024, "rotary_percentage": 1.0, "bias": False},
    ("tiiuae/falcon-7b{,-instruct}", 32, 4544, 71, 1, None, {"shared_attention_norm": True}),
    ("tiiuae/falcon-40b{,-instruct}", 60, 8192, 128, 8, None),
    ("tiiuae/falcon-180B{,-chat}", 80, 14848, 232, 8, None),
)


def _read(hf: Settings) -> dict[str, Any]:
    """Head groups and norms, whose meaning depends on the generation of the architecture."""
    n_head = hf.whole("num_attention_heads" if "num_attention_heads" in hf else "n_head")
    groups = hf.whole("num_kv_heads", None, null=True) or n_head
    norms = hf.whole("num_ln_in_parallel_attn", None, most=2, null=True)
    if hf.flag("new_decoder_architecture", False):
        return {"n_query_groups": groups, "parallel_residual": True, "shared_attention_norm": norms == 1}
    n_query_groups = 1 if hf.flag("multi_query", True) else n_head
    parallel = hf.flag("parallel_attn", True)
    if parallel and norms == 2:
        raise hf.error("num_ln_in_parallel_attn", "is not supported for falcon without new_decoder_architecture")
    return {"n_query_groups": n_query_groups, "parallel_residual": parallel, "shared_attention_norm": parallel}


def _write(config: Any) -> dict[str, Any]:
    new = config.parallel_residual and (not config.shared_attention_norm or 1 < config.n_query_groups < config.n_head)
    return {
        "new_decoder_architecture": new,
        "num_kv_heads": config.n_query_groups,
        "num_ln_in_parallel_attn": (1 if config.shared_attention_norm else 2) if new else None,
        "multi_query": config.n_query_groups == 1,
        "parallel_attn": config.parallel_residual,
    }


FALCON = Family(
    "falcon",
    "FalconForCausalLM",
    keys={
        "block_size": "max_position_embeddings",
        "n_layer": ("num_hidden_layers", "n_layer"),
        "n_embd": ("hidden_size", "n_embed"),
        "padded_vocab_size": "vocab_size",
        "n_head": ("num_attention_heads", "n_head"),
        "intermediate_size": "ffn_hidden_size",
        "norm_eps": "layer_norm_epsilon",
        "gelu_approximate": "activation",
        "bias": "bias",
    },
    values={"activation": GELU},
    defaults={"max_position_embeddings": 2048, "ffn_hidden_size": None, "layer_norm_epsilon": 1e-5}
    | {"activation": "gelu", "bias": False},
    expects={"alibi": (False,)},
    outer={"transformer.wte": "transformer.word_embeddings", "transformer.ln_f": "transformer.ln_f"}
    | {"lm_head": "lm_head"},
    blocks="transformer.h",
    block={
        "norm_1": lambda c: "ln_attn" if c.parallel_residual and not c.shared_attention_norm else "input_layernorm",
        "attn.qkv": "self_attention.query_key_value",
        "attn.proj": "self_attention.dense",
        "norm_2": lambda c: "ln_mlp" if c.parallel_residual else "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    },
    interleaved_qkv=True,
    tied=True,
    read=_read,
    write=_write,
    models=_MODELS,
)
FAMILIES = (FALCON,)
