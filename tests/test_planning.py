"""Memory that is foreseen against memory that is then allocated."""

import json

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt

from litgpt.__main__ import main
from litgpt.checkpoint.load import load_model, quantize_meta, save_litgpt
from litgpt.checkpoint.meta_model import meta_model
from litgpt.config import Config
from litgpt.engine.caches import prepare_caches
from litgpt.engine.loading import choose_kv_caches
from litgpt.kvcache import CacheSpec, memory
from litgpt.planning import MemoryPlan, parse_bytes, plan_for
from litgpt.runners.quantized_weights import Scheme


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_litgpt(tiny_gpt(**VOCABULARY, name="tiny", block_size=256, n_layer=3), folder)
    return folder


def allocated(model):
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_weights_are_foreseen_to_the_byte(checkpoint, dtype, quantize):
    plan = plan_for(checkpoint, CacheSpec(), dtype, quantize)
    assert plan.weights == allocated(load_model(checkpoint, dtype, quantize=quantize))


@pytest.mark.parametrize(
    "spec",
    [CacheSpec(), CacheSpec("lastrec", cache_length=40), CacheSpec("h2o", "int8", cache_length=40, budget="pyramid")]
    + [CacheSpec("expected", "int4", cache_length=40), CacheSpec("dense", "kivi", cache_length=100, window=32)],
)
def test_caches_are_foreseen_to_the_byte(checkpoint, spec):
    model = load_model(checkpoint)
    plan = plan_for(checkpoint, spec, torch.float32)
    choose_kv_caches(model, spec, 2)
    prepare_caches(model, 2, 100)
    buffers = [buffer for cache in model.kv_caches() for buffer in cache.buffers()]
    assert plan.caches(2, 100) == sum(x.numel() * x.element_size() for x in buffers)


def test_the_longest_and_the_most_are_the_last_that_fit(checkpoint):
    plan = plan_for(checkpoint, CacheSpec(), torch.float32)
    for memory_size in (plan.total(2, 57), plan.total(2, 58) - 1):
        assert plan.longest(2, memory_size) == 57
    for memory_size in (plan.total(5, 57), plan.total(6, 57) - 1):
        assert plan.most_rows(57, memory_size) == 5
    assert plan.longest(1, plan.weights) == 0
    assert plan.longest(1, 10**12) == 256


def test_a_tied_head_counts_once_and_only_some_experts_are_read():
    config = tiny_gpt(**VOCABULARY).config
    tied, apart = (MemoryPlan(config, CacheSpec(), torch.float32, tied=tied).weights for tied in (True, False))
    assert apart - tied == 4 * config.padded_vocab_size * config.n_embd
    experts = tiny_gpt(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, moe_intermediate_size=512).config
    plan = MemoryPlan(experts, CacheSpec(), torch.float32)
    assert plan.tokens_per_second(1, 1, 1.0) > 2 / plan.total(1, 1)


def test_models_that_are_not_on_this_disk_are_known_by_name():
    plan = plan_for("meta-llama/Llama-3.1-8B", CacheSpec())
    assert plan.weights // 10**8 == 160
    assert plan.caches(1, 131072) == 2 * 32 * 8 * 128 * 131072 * 2
    assert plan.bytes_per_token(131072) == 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("1.5m", 1_500_000), ("5120", 5120)]
)
def test_sizes_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "0GB", "1e9"])
def test_other_texts_are_no_sizes(text):
    with pytest.raises(ValueError, match="is no size of memory"):
        parse_bytes(text)


def test_a_few_bytes_are_no_memory():
    with pytest.raises(ValueError, match="'24' is a size of 24 bytes: write it with its unit, as 24GB"):
        parse_bytes("24")


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_layers_that_are_alike_are_weighed_once(quantize):
    config = Config.from_name("DeepSeek-V3", n_layer=6, n_expert=8, n_expert_groups=4, n_topk_groups=2)
    plan = MemoryPlan(config, CacheSpec(), torch.bfloat16, None if quantize is None else Scheme(quantize))
    model = meta_model(config)
    if quantize is not None:
        quantize_meta(model, plan.scheme, torch.bfloat16, False)
    buffers = sum(x.numel() * x.element_size() for x in model.buffers())
    assert plan.weights == buffers + 2 * sum(x.numel() for x in model.parameters())


def test_the_command_says_what_fits(checkpoint, capsys):
    arguments = ["plan_cache", str(checkpoint), "--bandwidth", "20", "--context", "200"]
    assert main([*arguments, "--memory", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "fits into 1 GB" in said
    assert said.splitlines()[-1] == f"litgpt generate {checkpoint} --prompt_chunksize 512"
    assert main([*arguments, "--memory", "1GB", "--kv_cache", "dense-int8"]) == 0
    assert "--kv_cache dense-int8 --cache_length 200 " in capsys.readouterr().out.splitlines()[-1]
    by_head = ["--kv_cache", "kvzip", "--kv_cache_args.budget", "scores", "--cache_length", "100"]
    assert main([*arguments, "--memory", "1GB", *by_head]) == 0
    said = capsys.readouterr().out
    assert "1 sequence of 200 tokens at a time" in said
    assert f"generate {checkpoint} {' '.join(by_head)} " in said.splitlines()[-1]
    assert main([*arguments, "--memory", "1GB", *by_head, "--batch", "2"]) == 1
    assert "for one sequence at a time, not for 2" in capsys.readouterr().err
    plan = plan_for(checkpoint, CacheSpec(), torch.float32)
    room = plan.total(1, 100)
    assert main([*arguments, "--precision", "32-true", "--memory", str(room)]) == 0
    said = capsys.readouterr().out
    assert f"more than {memory.as_text(room)}" in said
    assert "--kv_cache" in said.splitlines()[-1]


def test_programs_read_the_plan_as_json(checkpoint, capsys):
    plan = plan_for(checkpoint, CacheSpec("h2o", "int8", cache_length=64), torch.float32)
    arguments = [
        "plan_cache",
        str(checkpoint),
        "--json",
        "--kv_cache",
        "h2o-int8",
        "--cache_length",
        "64",
        "--batch",
        "2",
    ]
    arguments += ["--context", "200", "--memory", "1GB", "--precision", "32-true"]
    assert main([*arguments, "--bandwidth", "20"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: said[name] for name in ("kv_cache", "cache_length", "sequences", "context", "memory")} == {
        **{"kv_cache": "h2o-int8", "cache_length": 64, "sequences": 2, "context": 200, "memory": 10**9}
    }
    assert (said["weights"], said["caches"]) == (plan.weights, plan.caches(2, 200))
    assert said["together"] == plan.total(2, 200)
    assert said["fits"] is True
    assert said["tokens_per_second"] == plan.tokens_per_second(2, 200, 20e9)
    assert said["advice"].startswith(f"litgpt generate {checkpoint} --kv_cache h2o-int8 --cache_length 64 ")
    assert main([*arguments, "--train", "lora"]) == 0
    said = json.loads(capsys.readouterr().out)
    kept = said["keep_inputs"]["device"]
    assert kept["together"] > said["weights"] + said["gradients"] + kept["inputs"]
    assert kept["inputs"] > 0
    assert said["keep_inputs"]["disk"]["inputs"] == 0
    assert kept["fits"] is True


@pytest.mark.parametrize(
    "option",
    ["--memory=none", "--context=0", "--context=1000", "--bandwidth=0", "--kv_cache=x", f"--batch={10**19}"]
    + [f"--prompt_chunksize={10**30}"],
)
def test_wrong_options_are_refused(checkpoint, option, capsys):
    assert main(["plan_cache", str(checkpoint), option]) in (1, 2)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "internal error" not in said


@pytest.mark.parametrize("make", [lambda m: prepare_caches(m, 2, 100), lambda m: choose_kv_caches(m, "lastrec", 2)])
def test_caches_that_do_not_fit_are_refused_with_those_that_would(checkpoint, monkeypatch, make):
    model = load_model(checkpoint)
    monkeypatch.setattr(memory, "STORAGES", ["default", "int8"])
    room = memory.size_in_bytes(CacheSpec("lastrec", cache_length=70), model.config, 2, 100, torch.float32)
    monkeypatch.setattr(memory, "available_bytes", lambda device: room)
    fits = "what fits is (--kv_cache dense-int8 --cache_length 100 or )?--kv_cache lastrec --cache_length 64"
    with pytest.raises(ValueError, match=rf"need \d+ kB, but \d+ kB are left on cpu: {fits}"):
        make(model)
    assert not model.kv_caches()
