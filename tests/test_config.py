import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from litgpt.config import Config, check_indicator_and_length, configs, find_multiple, name_to_config
from litgpt.model import Block, LLaMAMLP

# Each line: the fields of one named model that differ from the defaults on the first line. Per-layer flags are strings.
FACTS = [json.loads(line) for line in (Path(__file__).parent / "data" / "named_models.jsonl").read_text().splitlines()]
DEFAULTS, MODELS = FACTS[0]["defaults"], FACTS[1:]


@pytest.mark.parametrize("facts", MODELS, ids=lambda m: m["name"])
def test_named_model_has_the_published_hyperparameters(facts):
    expected = {**DEFAULTS, **facts}
    for key in ("sliding_window_indices", "rope_indices"):
        if expected[key] is not None:
            expected[key] = [int(flag) for flag in expected[key]]
    assert Config.from_name(facts["name"]).to_dict() == expected


def test_every_named_model_is_in_the_tables_once():
    assert len(MODELS) == 210
    assert len(configs) == len(name_to_config) == len({c["name"] for c in configs})
    assert {c["name"] for c in configs} >= {m["name"] for m in MODELS}


def test_name_may_be_the_repository_with_or_without_its_organisation():
    expected = Config.from_name("Llama-3-8B")
    assert Config.from_name("meta-llama/Meta-Llama-3-8B") == expected
    assert Config.from_name("Meta-Llama-3-8B") == expected


def test_overrides_rederive_what_depends_on_them():
    config = Config.from_name("pythia-14m", n_embd=32, vocab_size=100)
    assert (config.head_size, config.intermediate_size, config.padded_vocab_size) == (8, 128, 128)


def test_a_named_model_is_not_changed_by_changing_a_config_made_from_it():
    Config.from_name("Gemma-3-4b-it").rope_adjustments["factor"] = 0.0
    assert Config.from_name("Gemma-3-4b-it").rope_adjustments["factor"] == 8.0


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("SmolLM2-135M-Instuct", "SmolLM2-135M-Instruct"), ("EleutherAI/pythia_14m", "EleutherAI/pythia-14m")],
)
def test_a_typo_in_a_name_gets_the_nearest_names(typo, meant):
    with pytest.raises(ValueError, match=f"{typo!r} is not a supported config name.*{meant}"):
        Config.from_name(typo)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embed": 8}, r"Unknown model config field: 'n_embed'. Did you mean 'n_embd'"),
        ({"n_embd": 30, "n_head": 4}, "n_embd = 30 must be a multiple of n_head = 4"),
        ({"n_head": 6, "n_embd": 48, "n_query_groups": 4}, "n_query_groups = 4 must be a divisor of n_head = 6"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_embd": "many"}, "n_embd = 'many'"),
        ({"rotary_percentage": 2.0}, "rotary_percentage = 2.0"),
        ({"norm_class_name": "BatchNorm"}, "norm_class_name = 'BatchNorm' must be one of LayerNorm, RMSNorm"),
        ({"mlp_class_name": "LLaMAMLP"}, "intermediate_size"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 3}, "n_expert_per_token = 3"),
        ({"sliding_window_size": 8, "sliding_window_indices": [1, 0]}, "sliding_window_indices"),
        ({"sliding_window_size": 0}, "sliding_window_size = 0"),
        ({"n_expert": 4, "n_expert_groups": 3}, "n_expert_groups = 3"),
    ],
)
def test_an_impossible_value_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_window_is_the_size_in_windowed_layers_only():
    config = Config.from_name("Gemma-2-2b")
    assert [config.window(i) for i in range(3)] == [4096, None, 4096]
    assert Config.from_name("pythia-14m").window(0) is None
    assert Config(n_layer=2, sliding_window_size=7).window(1) == 7


def test_names_imply_the_norm_of_gemma_and_olmo_and_files_say_it_only_where_the_name_does_not(tmp_path):
    assert Config.from_name("Gemma-2b").norm_unit_offset
    assert not Config.from_name("OLMo-1B-hf").norm_affine
    assert not Config.from_name("Llama-3-8B").norm_unit_offset
    assert "norm_unit_offset" not in Config.from_name("Gemma-2b").to_dict()
    renamed = replace(Config.from_name("Gemma-2b"), name="mine")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(renamed.to_dict()))
    assert Config.from_file(tmp_path / "model_config.yaml") == renamed


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-3-4b-it", "Qwen3-30B-A3B", "Llama-3.2-1B"])
def test_a_config_survives_its_file(name, tmp_path):
    config = Config.from_name(name, start_of_layer_hook=print)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    loaded = Config.from_checkpoint(tmp_path)
    assert loaded == config
    assert loaded.start_of_layer_hook is None
    assert Config.from_checkpoint(tmp_path, n_layer=1).n_layer == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold the fields"),
        ("- 1", "must hold the fields"),
        ("a: [", "not valid YAML"),
        ("foo: 1", "'foo'"),
        ("{parallel_residual: false, shared_attention_norm: true}", "shared_attention_norm = True must be false"),
    ],
)
def test_a_bad_config_file_is_named(text, message, tmp_path):
    path = tmp_path / "model_config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Config.from_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_may_be_known_by_its_name(tmp_path):
    (folder := tmp_path / "pythia-14m").mkdir()
    assert Config.from_checkpoint(folder) == Config.from_name("pythia-14m")
    with pytest.raises(FileNotFoundError, match=r"model_config.yaml.* nor config.json"):
        Config.from_checkpoint(tmp_path)


def test_helpers_round_up_and_fill_in():
    assert [find_multiple(n, 5) for n in (0, 1, 5, 6)] == [0, 5, 5, 10]
    assert check_indicator_and_length(None, "x", 2) == [1, 1]
    assert check_indicator_and_length([0, 1, 1], "x", 2) == [0, 1]
    with pytest.raises(ValueError, match="x = "):
        check_indicator_and_length([0, 2], "x", 2)


def test_importing_the_config_imports_neither_torch_nor_the_tables():
    code = "import sys, litgpt.config as c; c.Config(); print([m for m in sys.modules if m in ('torch', 'litgpt.families')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mixture_all_of_whose_layers_are_dense_needs_no_experts():
    config = Config(mlp_class_name="LLaMAMoE", first_k_dense_replace=3, n_embd=32, intermediate_size=8)
    assert isinstance(Block(config, 2).mlp, LLaMAMLP)
    with pytest.raises(ValueError, match="n_expert = 0"):
        Block(config, 3)


def test_heads_with_latent_attention_have_no_groups():
    assert Config.from_name("DeepSeek-V3", n_head=8, n_query_groups=4).n_query_groups == 8
