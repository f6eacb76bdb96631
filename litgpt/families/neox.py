"""GPT-NeoX: Pythia, StableLM-alpha, StableCode-alpha."""

from litgpt.families.base import Family, named

GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_PYTHIA = {"block_size": 2048, "padding_multiple": 128}

_MODELS = (
    named(
        _PYTHIA,
        ("EleutherAI/pythia-14m", 6, 128, 4, None, None, {"block_size": 512}),
        ("EleutherAI/pythia-31m", 6, 256, 8, None, None, {"block_size": 1024}),
        ("EleutherAI/pythia-70m{,-deduped}", 6, 512, 8, None, None),
        ("EleutherAI/pythia-160m{,-deduped}", 12, 768, 12, None, None),
        ("EleutherAI/pythia-410m{,-deduped}", 24, 1024, 16, None, None),
        ("EleutherAI/pythia-1b{,-deduped}", 16, 2048, 8, None, None),
        ("EleutherAI/pythia-1.4b{,-deduped}", 24, 2048, 16, None, None),
        ("EleutherAI/pythia-2.8b{,-deduped}", 32, 2560, 32, None, None),
        ("EleutherAI/pythia-6.9b{,-deduped}", 32, 4096, 32, None, None, {"padding_multiple": 256}),
        ("EleutherAI/pythia-12b{,-deduped}", 36, 5120, 40, None, None, {"padding_multiple": 512}),
    )
    | named(
        {},
        ("stabilityai/stablelm-{base,tuned}-alpha-3b", 16, 4096, 32, None, None),
        ("stabilityai/stablelm-{base,tuned}-alpha-7b", 16, 6144, 48, None, None, {"padding_multiple": 256}),
    )
    | named(
        {"vocab_size": 49152},
        ("stabilityai/stablecode-completion-alpha-3b", 32, 2560, 32, None, None, {"block_size": 16384}),
        ("stabilityai/stablecode-{completion-alpha-3b-4k,instruct-alpha-3b}", 32, 2560, 32, None, None),
    )
)

NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    keys={
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "padded_vocab_size": "vocab_size",
        "n_head": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "gelu_approximate": "hidden_act",
        "parallel_residual": "use_parallel_residual",
    },
    values={"hidden_act": GELU},
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    | {"use_parallel_residual": True, "partial_rotary_factor": 0.25},
    expects={"attention_bias": (True,)},
    rope_keys=("rotary_emb_base", "rotary_pct"),
    outer={"transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm"}
    | {"lm_head": "embed_out"},
    blocks="gpt_neox.layers",
    block={
        "norm_1": "input_layernorm",
        "attn.qkv": "attention.query_key_value",
        "attn.proj": "attention.dense",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    },
    interleaved_qkv=True,
    prefixes={"lm_head.": "embed_out."},  # its name in transformers since version 5
    ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    models=_MODELS,
)
FAMILIES = (NEOX,)
