"""LitGPT's functions that copy state dicts, against what reading and writing whole checkpoints does."""

import pytest
import torch

from litgpt.checkpoint.incremental import incremental_save
from litgpt.checkpoint.weights import WeightMap
from litgpt.config import Config
from litgpt.families import family_of_type
from litgpt.model import GPT
from litgpt.scripts import convert_hf_checkpoint as to_litgpt
from litgpt.scripts import convert_lit_checkpoint as to_hf

SIZES = {"n_layer": 2, "n_embd": 16, "n_head": 4, "padded_vocab_size": 32, "intermediate_size": 24}
# model, its model_type, functions to LitGPT and back
CASES = [
    ("pythia-14m", "gpt_neox", "gpt_neox", "gpt_neox"),
    ("falcon-7b", "falcon", "falcon", "falcon"),
    ("falcon-40b", "falcon", "falcon", "falcon"),
    ("Llama-3.2-1B", "llama", "hf_llama", "llama"),
    ("Mixtral-8x7B-v0.1", "mixtral", "hf_llama", "llama"),
    ("OLMo-2-1124-7B", "olmo2", "olmo2", "olmo2"),
    ("phi-2", "phi", "phi", "phi"),
    ("Phi-3-mini-4k-instruct", "phi3", "phi", "phi"),
    ("Gemma-2-2b", "gemma2", "gemma_2", "gemma_2"),
    ("Gemma-3-1b-it", "gemma3_text", "gemma_3", "gemma_3"),
    ("Qwen2.5-0.5B", "qwen2", "qwen_2_5", "qwen_2_5"),
    ("Qwen3-0.6B", "qwen3", "qwen_3", "qwen_3"),
    ("Qwen3-30B-A3B", "qwen3_moe", "qwen_3", "qwen_3"),
]


def tiny(name):
    config = Config.from_name(name)
    groups = 1 if config.n_query_groups == 1 else 2 if config.n_query_groups < config.n_head else 4
    experts = {"n_expert": 3, "n_expert_per_token": 2} if config.n_expert else {}
    inner = {"moe_intermediate_size": 8} if config.moe_intermediate_size else {}
    torch.manual_seed(0)
    return GPT(Config.from_name(name, n_query_groups=groups, head_size=8, **SIZES, **experts, **inner))


def to(function, config, hf, waiting, state_dict, **kwargs):
    copy = getattr(to_litgpt, f"copy_weights_{function}")
    if function.startswith("gemma"):
        copy(waiting, state_dict, hf, **kwargs)
    elif function in ("gpt_neox", "falcon"):
        copy(config, state_dict, hf, **kwargs)
    else:
        copy(config, waiting, state_dict, hf, **kwargs)


@pytest.mark.parametrize(("name", "model_type", "function", "back"), CASES)
def test_weights_are_copied_there_and_back(name, model_type, function, back):
    model = tiny(name)
    ours = model.state_dict()
    hf = {}
    getattr(to_hf, f"copy_weights_{back}")(model.config, hf, ours)
    weights = WeightMap(family_of_type(model_type), model.config)
    expected = weights.theirs([n for n in ours if not (back.startswith("gemma") and n == "lm_head.weight")])
    assert set(hf) == set(expected)
    for their_name, sources in expected.items():
        assert torch.equal(hf[their_name], weights.build(their_name, sources, ours.__getitem__))

    # one tensor a call, as of files that split them in any way
    waiting, copied = {}, {}
    for their_name, tensor in reversed(list(hf.items())):
        to(function, model.config, {their_name: tensor}, waiting, copied)
    assert not any(waiting.values())
    tied = "lm_head.weight" not in expected and back.startswith("gemma")
    wanted = {**ours, "lm_head.weight": ours["transformer.wte.weight"]} if tied else ours
    assert set(copied) == set(wanted)
    assert all(torch.equal(copied[n], wanted[n]) for n in wanted)


def test_weights_are_written_as_they_are_copied_in_another_type(tmp_path):
    model, hf = tiny("Llama-3.2-1B"), {}
    to_hf.copy_weights_llama(model.config, hf, model.state_dict())
    del hf["lm_head.weight"]
    with incremental_save(tmp_path / "x.pth") as saver:
        copied = {}
        to_litgpt.copy_weights_hf_llama(model.config, {}, copied, hf, saver=saver, dtype=torch.bfloat16)
        saver.save(copied)
    read = torch.load(tmp_path / "x.pth")
    assert torch.equal(read["lm_head.weight"], read["transformer.wte.weight"])
    assert torch.equal(
        read["transformer.h.1.attn.qkv.weight"], model.state_dict()["transformer.h.1.attn.qkv.weight"].bfloat16()
    )


def test_weights_of_other_architectures_are_named():
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.rotary.weight' is no weight of .*olmo2"):
        to_litgpt.copy_weights_olmo2(None, {}, {}, {"model.layers.0.self_attn.rotary.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="merge"):
        to_hf.check_conversion_supported({"lm_head.lora_A": None})
    with pytest.raises(NotImplementedError, match="adapter"):
        to_hf.check_conversion_supported({"x.gating_factor": None})


def test_query_key_and_value_rows_alternate_by_head_group():
    config = Config(n_embd=8, n_head=4, n_query_groups=2, head_size=1, n_layer=1)
    rows = torch.tensor([10, 11, 12, 13, 20, 21, 30, 31])
    interleaved = torch.tensor([10, 11, 20, 30, 12, 13, 21, 31])
    assert torch.equal(to_hf.qkv_reassemble(rows, config), interleaved)
    assert torch.equal(to_litgpt.qkv_reassemble(interleaved, config), rows)


def test_layer_names_and_numbers():
    assert to_litgpt.layer_template("model.layers.12.mlp.experts.3.w1", 2) == (
        "model.layers.{}.mlp.experts.{}.w1",
        12,
        3,
    )
    assert to_litgpt.layer_template("model.layers.12.mlp.experts.3.w1") == ("model.layers.{}.mlp.experts.3.w1", 12)
    assert to_litgpt.layer_template("lm_head.weight") == ("lm_head.weight", -1)
