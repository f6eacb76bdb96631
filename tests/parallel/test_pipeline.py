import copy

import pytest
import torch
from tiny import VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer
from torch.overrides import TorchFunctionMode

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.load import save_litgpt
from litgpt.engine.loading import choose_kv_caches
from litgpt.generate.base import generate
from litgpt.kvcache import CacheSpec
from litgpt.parallel.pipeline import choose_devices, devices_of_layers, load_spread, spread_layers
from litgpt.parallel.tensor import chunk_sizes
from litgpt.prompts import ChatTemplate

CPU, META = torch.device("cpu"), torch.device("meta")
HYBRID = {"sliding_window_size": 6, "rope_local_base_freq": 1000.0, "rope_indices": [0, 1, 0, 1, 0]}


class ZerosForMeta(TorchFunctionMode):
    """Lets tensors of the meta device go to the CPU, as zeros; so it stands for a second device, which other operations
    do not mix with the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[0].is_meta and args[1] == CPU:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layers", "devices", "sizes"), [(50, 3, [16, 17, 17]), (12, 5, [2, 2, 2, 3, 3]), (7, 2, [3, 4]), (3, 3, [1, 1, 1])]
)
def test_layers_are_shared_out_in_order_the_first_device_has_the_fewest(layers, devices, sizes):
    assert chunk_sizes(layers, devices) == sizes
    places = devices_of_layers(layers, [f"cuda:{i}" for i in range(devices)])
    assert [place.index for place in places] == [i for i, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("count", [0, 3])
def test_more_devices_than_layers_are_refused(count):
    with pytest.raises(ValueError, match=f"2 layers cannot be spread over {count} devices"):
        spread_layers(tiny_gpt(), ["cpu"] * count)


@pytest.mark.parametrize("kwargs", [{}, HYBRID])
def test_tokens_are_those_of_one_device(kwargs):
    model, prompt = tiny_gpt(n_layer=5, **kwargs), torch.arange(11)
    expected = greedy_without_caches(model, prompt, 12)
    model = spread_layers(model, ["cpu", "cpu", "cpu"])
    for chunksize in (None, 4):
        assert torch.equal(generate(model, prompt, 23, chunksize, temperature=0, include_prompt=False), expected)


@pytest.mark.parametrize("kwargs", [{}, HYBRID])
@pytest.mark.parametrize("caches", ["default", "lastrec"])
def test_everything_that_a_layer_uses_is_on_its_device(kwargs, caches, tmp_path):
    save_litgpt(tiny_gpt(n_layer=5, **kwargs), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = load_spread(checkpoint, torch.float32, [CPU, META])
    assert [block.attn.qkv.weight.device for block in model.transformer.h] == [CPU, CPU, META, META, META]
    assert {module.weight.device for module in (model.lm_head, model.transformer.wte, model.transformer.ln_f)} == {CPU}
    if caches == "default":
        model.set_kv_caches(3)
    else:
        choose_kv_caches(model, CacheSpec(caches, cache_length=16), 3)
    assert [cache.device for cache in model.kv_caches()] == [CPU, CPU, META, META, META]
    idx, token_devices = torch.zeros(3, 9, dtype=torch.int64), set()
    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(lambda attn, inputs: token_devices.add((attn.block_idx, inputs[3].device)))
    with ZerosForMeta(), torch.inference_mode():
        assert model(idx).device == CPU  # without caches
        assert model(idx, 0).device == CPU
        assert model(idx[:, :1], 9, last_token_only=True).device == CPU
        assert model(idx[:, :5], 10).device == CPU
        model.caches.rewind([1, 2, 0])
        assert model(idx[:, :1], 15).device == CPU  # ragged
        model.caches.start(3)
        assert model(idx[:2], 0, rows=[2, 0]).device == CPU
    assert token_devices == {(0, CPU), (1, CPU), (2, META), (3, META), (4, META)}


def test_what_blocks_share_moves_once_for_each_device():
    model, moved = tiny_gpt(n_layer=6), []
    spread_layers(model, ["cpu", "cpu"])
    for block in model.transformer.h:
        block.attn.register_forward_pre_hook(lambda module, inputs: moved.append(inputs[1]))
    model(torch.arange(5)[None])
    model(torch.arange(5)[None] + 1)
    assert [moved[i] is moved[0] for i in range(12)] == [True] * 6 + [False] * 6


def test_spreading_forgets_caches_and_is_done_once():
    model = tiny_gpt()
    model.set_kv_caches(1)
    spread_layers(model, ["cpu", "cpu"])
    assert not model.kv_caches()
    with pytest.raises(ValueError, match="already"):
        spread_layers(model, ["cpu", "cpu"])


# --- the command, and LLM


@pytest.fixture
def folder(tmp_path):
    gpt, tokenizer = tiny_gpt(n_layer=4, **VOCABULARY), tiny_tokenizer()
    LLM(gpt, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(tmp_path)
    return tmp_path


def test_the_command_says_what_generate_says(folder, capsys):
    options = [str(folder), "--prompt", "Hi!", "--max_new_tokens", "9", "--precision", "32-true"]
    assert main(["generate", *options]) == 0
    expected = capsys.readouterr().out
    assert main(["generate_sequentially", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert "its layers on" in captured.err


def test_llm_spreads_its_layers(folder, monkeypatch):
    monkeypatch.setattr("litgpt.api.choose_devices", lambda number, kind: [CPU] * number)
    answers = []
    for options in ({}, {"devices": 3, "generate_strategy": "sequential", "fixed_kv_cache_size": 90}):
        llm = LLM.load(folder, distribute=None)
        llm.distribute("cpu", precision="32-true", **options)
        answers.append(llm.generate("Hi!", temperature=0, max_new_tokens=9))
    assert answers[0] == answers[1]
    assert llm.model.layer_devices == [CPU] * 4
    with pytest.raises(ValueError, match="on several devices already"):
        llm.distribute("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 2}, "devices=2 needs a generate_strategy"),
        ({"generate_strategy": "tensor"}, "generate_strategy must be 'sequential' or 'tensor_parallel', got 'tensor'"),
        ({"generate_strategy": "sequential", "devices": 2, "accelerator": "cpu"}, "there is the CPU only"),
        ({"generate_strategy": "sequential", "quantize": "bnb.nf4"}, "quantize='bnb.nf4' is for one device"),
        ({"generate_strategy": "tensor_parallel"}, "torchrun --nproc-per-node N SCRIPT.*litgpt generate_tp"),
    ],
)
def test_llm_refuses_what_it_cannot_do(folder, options, message):
    llm = LLM.load(folder, distribute=None)
    with pytest.raises(ValueError, match=message):
        llm.distribute(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has GPUs")
def test_devices_that_are_not_there_are_refused(folder, capsys):
    assert choose_devices(None) == choose_devices(1) == [CPU]
    assert main(["generate_sequentially", str(folder), "--devices", "2"]) == 1
    assert capsys.readouterr().err == "litgpt: error: devices=2, but there is the CPU only, which is one device\n"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tokens_are_those_of_one_gpu():
    model, prompt = tiny_gpt(n_layer=5, **HYBRID).cuda(), torch.arange(11, device="cuda")
    expected = generate(copy.deepcopy(model), prompt, 40, temperature=0)
    model = spread_layers(model, ["cuda:0", "cuda:1"])
    assert torch.equal(generate(model, prompt, 40, temperature=0), expected)
    assert [cache.device.index for cache in model.kv_caches()] == [0, 0, 1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_may_stay_on_the_cpu():
    model, prompt = tiny_gpt(n_layer=5, **HYBRID), torch.arange(11)
    expected = greedy_without_caches(model, prompt, 12)
    model = spread_layers(model, ["cuda", "cpu"])
    tokens = generate(model, prompt.cuda(), 23, temperature=0, include_prompt=False)
    assert torch.equal(tokens.cpu(), expected)
