"""Whatever stands in a `config.json`, it is read, or refused in one line that names the file and the field."""

import json

import pytest

from litgpt.config import Config
from litgpt.families import families, hf_from_config

VALUES = [
    "7",
    -1,
    0,
    2.5,
    None,
    True,
    [],
    ["x"],
    {},
    {"a": 1},
    float("nan"),
    float("inf"),
    10**9,
    10**30,
    10**400,
    1e308,
]
SMALL = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_query_groups": None,
    "head_size": 16,
    "intermediate_size": 32,
    "padded_vocab_size": 64,
    "block_size": 64,
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": True,
        "attention_factor": 1.2,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
    },
}


def small_config_json(family):
    """A small model's `config.json` with everything that the family knows."""
    model = next(iter(family.models))
    sizes = SMALL | ({"n_query_groups": 1} if family.model_type == "falcon" else {})
    sizes |= {"n_expert": 16} if Config.from_name(model).mlp_class_name == "LLaMAMoE" else {}
    sizes |= {"rope_adjustments": None} if Config.from_name(model).latent_attention is None else {}
    hf = hf_from_config(Config.from_name(model, **sizes))[1]
    assert Config.from_hf(hf).n_layer == 2
    return hf


def read_or_refuse(hf, key, path):
    path.write_text(json.dumps(hf))
    try:
        config = Config.from_hf(path, name="mine")
    except ValueError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert len(message) < 500
        return message
    assert config.n_layer <= 2000
    assert config.n_expert <= 2000
    return None


@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_type)
def test_every_field_with_every_kind_of_value(family, tmp_path):
    hf = small_config_json(family)
    path = tmp_path / "config.json"
    for key in hf:
        for value in VALUES:
            message = read_or_refuse(hf | {key: value}, key, path)
            numeric = isinstance(hf[key], (int, float)) and not isinstance(hf[key], bool)
            if numeric and value in ("7", [], {}, True) and key not in family.expects:
                assert message is not None, f"{key} = {value!r} was accepted"
                assert key in message


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_every_field_of_rope_with_every_kind_of_value(kind, place, tmp_path):
    hf = small_config_json(next(f for f in families() if f.model_type == "llama")) | {"rope_scaling": None}
    assert read_or_refuse(hf | {place: ROPES[kind]}, place, tmp_path / "config.json") is None
    for key in ROPES[kind]:
        for value in VALUES:
            message = read_or_refuse(hf | {place: ROPES[kind] | {key: value}}, key, tmp_path / "config.json")
            if value in ("7", -1, float("inf"), {"a": 1}):
                assert message is not None, f"{key} = {value!r} was accepted"
                assert key in message or "RoPE scaling of type" in message
    without = {key: value for key, value in ROPES[kind].items() if key != "factor"} | {
        "original_max_position_embeddings": 64
    }
    if kind != "longrope":
        assert "lacks 'factor'" in read_or_refuse(hf | {place: without}, place, tmp_path / "config.json")


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    "key",
    ["model_type", "architectures", "text_config", "rope_parameters", "layer_types", "_name_or_path", "is_causal"],
)
def test_other_fields_of_the_wrong_type(key, value, tmp_path):
    hf = small_config_json(next(f for f in families() if f.model_type == "qwen2"))
    hf |= {"model_type": None} if key == "architectures" else {}
    read_or_refuse(hf | {key: value}, key, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "speed": 3}}, "rope_scaling.speed"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, "'ntk'"),
        ({"is_causal": False}, "is_causal"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"layer_types": ["full_attention"], "use_sliding_window": True, "sliding_window": 4}, "layer_types"),
    ],
)
def test_what_would_change_the_result_and_is_not_understood_is_refused(changes, field, tmp_path):
    hf = small_config_json(next(f for f in families() if f.model_type == "qwen2"))
    assert field in read_or_refuse(hf | changes, field, tmp_path / "config.json")


@pytest.mark.parametrize("context", [16, 40, 64, 100])
def test_with_yarn_the_context_is_that_of_the_scaling(context):
    hf = small_config_json(next(f for f in families() if f.model_type == "llama"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = Config.from_hf(hf | {"rope_scaling": yarn, "max_position_embeddings": context})
    assert config.block_size == max(context, 64)
    assert hf_from_config(config)[0].model_type == "llama"


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("params", [{"rope_type": "default"}, {"rope_type": "default", "rope_theta": 3e4}, {}])
def test_rope_scaling_counts_where_both_spellings_are_there(kind, params):
    hf = small_config_json(next(f for f in families() if f.model_type == "llama")) | {"rope_theta": 5e4}
    both = Config.from_hf(hf | {"rope_parameters": params, "rope_scaling": ROPES[kind]})
    assert both == Config.from_hf(hf | {"rope_scaling": ROPES[kind]})
    assert both.rope_base == 50000


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("phi", {"num_attention_heads": 7, "head_dim": None}, ("hidden_size = 64", "num_attention_heads = 7")),
        ("llama", {"num_key_value_heads": 3}, ("num_key_value_heads = 3", "num_attention_heads = 4")),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, ("num_kv_heads = 3",)),
        ("falcon", {"n_head": 5, "num_attention_heads": 5}, ("hidden_size = 64", "num_attention_heads = 5")),
        ("mixtral", {"num_experts_per_tok": 0}, ("num_experts_per_tok = 0", "num_local_experts")),
        ("deepseek_v3", {"n_group": 5}, ("n_group = 5", "n_routed_experts")),
        ("olmo", {"hidden_size": 10**9}, ("hidden_size = 1000000000",)),
        ("gpt_neox", {"rotary_pct": 1.5}, ("rotary_pct = 1.5",)),
    ],
)
def test_what_does_not_fit_together_is_named_as_in_the_file(family, changes, names, tmp_path):
    hf = small_config_json(next(f for f in families() if f.model_type == family))
    message = read_or_refuse(hf | changes, "", tmp_path / "config.json")
    assert message is not None
    for name in names:
        assert name in message
