import subprocess
import sys
from dataclasses import replace

import pytest

from litgpt.config import Config, name_to_config
from litgpt.families import families, family_of_hf, hf_from_config
from litgpt.settings import Settings

# What these repositories' `config.json` files say, as far as it matters here: the older spellings, and keys left out.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "meta-llama/Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "EleutherAI/pythia-14m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_act": "gelu",
        "hidden_size": 128,
        "intermediate_size": 512,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 512,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "tiiuae/falcon-7b": {
        "architectures": ["FalconForCausalLM"],
        "alibi": False,
        "bias": False,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "tiiuae/falcon-40b": {
        "alibi": False,
        "bias": False,
        "hidden_size": 8192,
        "layer_norm_epsilon": 1e-05,
        "model_type": "RefinedWeb",
        "n_head": 128,
        "num_kv_heads": 8,
        "n_layer": 60,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "google/gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
    },
    "Qwen/Qwen2.5-0.5B": {
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "microsoft/phi-2": {
        "architectures": ["PhiForCausalLM"],
        "hidden_act": "gelu_new",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "phi",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "rope_theta": 10000.0,
        "vocab_size": 51200,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "Qwen/Qwen3-30B-A3B": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
# LitGPT's table counts the tokenizer's ids instead of the embedding's rows, and has a larger epsilon for Gemma.
NAMED_DIFFER = ("vocab_size", "padded_vocab_size", "padding_multiple", "norm_eps")


@pytest.mark.parametrize("repository", PUBLISHED)
def test_a_published_config_gives_the_named_model(repository):
    derived = Config.from_hf(PUBLISHED[repository], name=repository)
    named = Config.from_name(repository)
    fields, expected = derived.to_dict(), named.to_dict()
    different = {key for key in expected if fields[key] != expected[key]}
    assert different <= set(NAMED_DIFFER)


@pytest.mark.parametrize("name", name_to_config)
def test_every_named_model_has_a_config_json_that_gives_it_back(name):
    config = Config.from_name(name)
    family, hf = hf_from_config(config)
    assert name in family.models
    assert Config.from_hf(hf, name=name).hf_config == config.hf_config
    anonymous = replace(config, name="mine", hf_config={})
    assert Config.from_hf(hf_from_config(anonymous)[1]).n_layer == config.n_layer


def test_every_named_model_belongs_to_one_family():
    names = [name for family in families() for name in family.models]
    assert sorted(names) == sorted(name_to_config)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_old_and_new_spellings_of_rope_mean_the_same(old, new):
    hf = {k: v for k, v in PUBLISHED["meta-llama/Llama-3.2-1B"].items() if not k.startswith("rope")}
    assert Config.from_hf(hf | old) == Config.from_hf(hf | new)


def test_windowed_layers_follow_the_familys_pattern_where_the_file_does_not_list_them():
    qwen = PUBLISHED["Qwen/Qwen2.5-0.5B"] | {"use_sliding_window": True, "max_window_layers": 22}
    assert Config.from_hf(qwen).sliding_window_indices == [0] * 22 + [1] * 2
    listed = ["full_attention", "sliding_attention"] * 12
    assert Config.from_hf(qwen | {"layer_types": listed}).sliding_window_indices == [0, 1] * 12
    gemma = hf_from_config(Config.from_name("Gemma-2-2b"))[1]
    del gemma["layer_types"]
    assert Config.from_hf(gemma).sliding_window_indices == [1, 0] * 13
    with pytest.raises(ValueError, match="layer_types of kind linear_attention"):
        Config.from_hf(qwen | {"layer_types": ["linear_attention"] * 24})


def test_a_fraction_as_linear_scaling_keeps_its_value():
    hf = PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"] | {"rope_scaling": {"type": "linear", "factor": 1.5}}
    assert Config.from_hf(hf).rope_adjustments == {"factor": 1.5}


def test_an_unknown_name_keeps_what_litgpt_reads_from_names():
    hf = PUBLISHED["google/gemma-3-4b-it"]
    config = Config.from_hf(hf, name="my-finetune")
    assert config.name == "Gemma-my-finetune"
    assert config.norm_unit_offset
    assert "norm_unit_offset" not in config.to_dict()
    assert Config.from_hf(hf, name="google/gemma-3-4b-it").name == "Gemma-3-4b-it"


def test_overrides_win_over_what_is_derived():
    hf = PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert Config.from_hf(hf, block_size=16).block_size == 16


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({}, "names neither a 'model_type' nor 'architectures'"),
        ({"model_type": "llamb"}, "'llamb' is not supported .*nearest supported: llama"),
        ({"architectures": ["BertModel"]}, "'BertModel' is not supported"),
        ({"model_type": "llama"}, "lacks 'num_hidden_layers'"),
        ({"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported for olmo"),
        ({"model_type": "qwen3_moe"}, "norm_topk_prob = False is not supported for qwen3_moe"),
        (PUBLISHED["microsoft/phi-2"] | {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        (PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"] | {"mlp_bias": True}, "mlp_bias = True is not supported"),
        (PUBLISHED["Qwen/Qwen2.5-0.5B"] | {"rope_scaling": {"type": "dynamic"}}, "'dynamic' is not supported"),
        (PUBLISHED["Qwen/Qwen2.5-0.5B"] | {"rope_scaling": {"type": "longrope"}}, "'longrope' lacks 'short_factor'"),
        (PUBLISHED["Qwen/Qwen2.5-0.5B"] | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
    ],
)
def test_what_cannot_be_computed_is_named(hf, message):
    with pytest.raises(ValueError, match=message) as error:
        Config.from_hf(hf)
    assert "\n" not in str(error.value)


def test_the_class_name_decides_where_the_type_is_missing():
    hf = {k: v for k, v in PUBLISHED["EleutherAI/pythia-14m"].items() if k != "model_type"}
    assert family_of_hf(Settings(hf))[0].model_type == "gpt_neox"


def test_a_config_that_no_architecture_has_is_named():
    with pytest.raises(ValueError, match="No architecture of transformers expresses .*'odd'"):
        hf_from_config(Config(name="odd", post_mlp_norm=True, norm_2=False))


def test_the_families_import_no_torch():
    code = "import sys; from litgpt.families import families; list(families()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
