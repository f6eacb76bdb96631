"""A model divided among processes says what it says in one. Every launch of processes checks many models."""

import json
import os
import signal
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, VOCABULARY, greedy_without_caches, tiny_gpt, tiny_tokenizer

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.checkpoint import open_checkpoint
from litgpt.checkpoint.load import fill_model, save_litgpt, weight_differences
from litgpt.checkpoint.meta_model import meta_model
from litgpt.config import Config
from litgpt.engine.loading import choose_kv_caches
from litgpt.generate.base import batched_generate_fn, generate
from litgpt.generate.tp import tensor_parallel, tensor_parallel_linear
from litgpt.kvcache import CacheSpec
from litgpt.model import GPT
from litgpt.parallel.processes import number_of_processes, run_in_processes
from litgpt.parallel.tensor import Shard, ShardedGPT, load_shard, shard_model
from litgpt.prompts import ChatTemplate
from litgpt.runners.compiled import compile_decode
from litgpt.runners.packed_weights import pack_linears

CPU = torch.device("cpu")
CAN_TELL_MEMORY = Path("/proc/self/clear_refs").exists()
MOE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
OLMO_2 = {"norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False}
OLMO_2 |= {"post_attention_norm": True, "post_mlp_norm": True}
WINDOWS = {"sliding_window_size": 5, "sliding_window_indices": [1, 0]}
NEOX = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "bias": True, "rotary_percentage": 0.25}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "one key/value head": {"n_query_groups": 1},
    "all heads": {"n_query_groups": 4},
    "nothing divides": {"n_head": 9, "n_query_groups": 3, "head_size": 16, "intermediate_size": 97}
    | {"vocab_size": 101, "padded_vocab_size": 101},
    "biases": {"bias": True, "lm_head_bias": True},
    "neox": NEOX | {"n_query_groups": 4, "parallel_residual": True},
    "phi": NEOX | {"parallel_residual": True, "shared_attention_norm": True, "lm_head_bias": True},
    "gemma": {"name": "Gemma", "mlp_class_name": "GemmaMLP", "scale_embeddings": True, "head_size": 24}
    | WINDOWS
    | {"post_attention_norm": True, "post_mlp_norm": True, "tied": True}
    | {"attention_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "qwen3": {"norm_qk": True},
    "olmo2": OLMO_2 | {"n_query_groups": 4},
    "olmo2 grouped": OLMO_2,
    "olmo2, one key/value head": OLMO_2 | {"n_query_groups": 1},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_divisor": 2.0},
    "experts": MOE,
    "gpt_oss": MOE
    | WINDOWS
    | {"bias": True, "attention_sinks": True, "swiglu_limit": 1.5, "router_bias": True, "moe_intermediate_size": None},
    "deepseek": MOE
    | {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2, "n_shared_expert": 2}
    | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.0, "n_query_groups": 4, "norm_topk_prob": True}
    | {"latent_attention": LATENT | {"q_lora_rank": 24}},
    "latent attention with plain queries": {"latent_attention": LATENT, "n_query_groups": 4, "bias": True},
}
OF_THREE = ["llama", "nothing divides", "olmo2 grouped", "experts"]
PROMPT, NEW = torch.arange(11), 6
PROMPTS = [torch.arange(n) + 7 for n in (3, 12, 6)]


def whole_model(case: str) -> GPT:
    """The model of a case; nothing in it is zero, so that nothing is left out, or counted twice, unnoticed."""
    torch.manual_seed(0)
    kwargs = dict(CASES[case])
    tied = kwargs.pop("tied", False)
    model = tiny_gpt(**kwargs)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1 and tensor.is_floating_point() and "rope" not in name:
            tensor += torch.randn_like(tensor) * 0.3
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def run_batch(model: GPT, **kwargs: Any) -> list[list[int]]:
    """Ragged prompts in chunks, drawn with settings of their own."""
    settings = [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}]
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for step in batched_generate_fn(
        model, PROMPTS, 20, 8, sample_args=settings, stop_tokens=([3], [50, 7]), include_prompt=False, include_eos=True
    ):
        for row, tokens in zip(rows, step, strict=True):
            row += [] if tokens is None else tokens.tolist()
    return rows


# --- what the processes do


def report(rank: int, world_size: int, folder: Path, names: list[str]) -> None:
    """Writes down what a process gets out of its parts of models."""
    results: dict[str, Any] = {}
    for name in names:
        model = load_shard(open_checkpoint(folder / name), torch.float32, CPU, rank, world_size)
        with torch.inference_mode():
            results[f"{name}: logits"] = model(PROMPT[None])
        results[f"{name}: tokens"] = generate(model, PROMPT, 11 + NEW, 6, temperature=0, include_prompt=False).tolist()
        results[f"{name}: heads"] = [cache.n_query_groups for cache in model.kv_caches()]
    model = shard_model(whole_model("llama"), torch.float32, CPU, rank, world_size)
    torch.manual_seed(rank)  # each process has random numbers of its own
    results["drawn"] = run_batch(model)
    choose_kv_caches(model, CacheSpec("lastrec", cache_length=8, n_sink=2))
    results["lastrec"] = generate(model, PROMPT, 20, temperature=0).tolist()
    if world_size == 2:
        results |= with_other_layers(folder / "llama", rank, world_size)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}  # as if something else had started them
        results["command"] = output_of_command(folder / "command")
        results["llm"] = answer_of_llm(folder / "command")
        if CAN_TELL_MEMORY:
            results["memory"] = memory_of_loading(folder / "large", rank, world_size)
    torch.save(results, folder / f"{world_size}-{rank}.pt")


def with_other_layers(folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Logits of a token after the prompt, of layers that are packed or quantised; and tokens of compiled ones."""
    results: dict[str, Any] = {}
    checkpoint = open_checkpoint(folder)
    for how, dtype in (("packed", torch.bfloat16), ("int8", torch.float32)):
        quantize = None if how == "packed" else how
        model = load_shard(checkpoint, dtype, CPU, rank, world_size, quantize)
        pack_linears(model)
        model.set_kv_caches(1)
        with torch.inference_mode():
            model(PROMPT[None, :-1], 0)
            results[how] = model(PROMPT[None, -1:], len(PROMPT) - 1)[0, -1].float()
    model = load_shard(checkpoint, torch.float32, CPU, rank, world_size)
    whole_compile, torch.compile = torch.compile, partial(torch.compile, backend="eager")  # one graph, but no compiler
    compile_decode(model)
    torch.compile = whole_compile
    return results | {"compiled": generate(model, PROMPT, 15, temperature=0, include_prompt=False).tolist()}


def memory_of_loading(folder: Path, rank: int, world_size: int) -> dict[str, int]:
    """Bytes of memory that loading a part takes in the end, and at most."""

    def status() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return {line[0][:-1]: 1024 * int(line[1]) for line in lines if line[-1] == "kB"}

    checkpoint = open_checkpoint(folder)
    assert not checkpoint.tied
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status()
    model = load_shard(checkpoint, torch.float32, CPU, rank, world_size)
    after = status()
    held = sum(parameter.nbytes for parameter in model.parameters())
    return {"held": held, "kept": after["RssAnon"] - before["RssAnon"], "peak": after["VmHWM"] - before["VmRSS"]}


def output_of_command(folder: Path) -> str:
    """What the command writes."""
    with redirect_stdout(StringIO()) as stdout:
        assert main(["generate_tp", *command_options(folder)]) == 0
    return stdout.getvalue()


def answer_of_llm(folder: Path) -> str:
    """What `LLM` says when it holds a part of the model, which it does not save."""
    llm = LLM.load(folder, distribute=None)
    llm.distribute("cpu", precision="32-true", generate_strategy="tensor_parallel")
    with pytest.raises(ValueError, match="a part of the model only"):
        llm.save(folder / "saved")
    return llm.generate("Hi!", temperature=0, max_new_tokens=9)


def command_options(folder: Path) -> list[str]:
    return [str(folder), "--prompt", "Hi!", "--max_new_tokens", "9", "--precision", "32-true"]


def fail_midway(rank: int, how: str) -> None:
    """The second process fails in its second layer, while the first one waits for something that does not come."""
    model = shard_model(whole_model("llama"), torch.float32, CPU, rank, 2)

    def hook(x: torch.Tensor, block_idx: int, input_pos: int | None) -> None:
        if rank == 1 and block_idx == 1:
            if how == "raises":
                raise ValueError("this is what went wrong")
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and block_idx == 1:
            time.sleep(3600)  # longer than a test may take

    model.set_start_of_layer_hook(hook)
    generate(model, PROMPT, 20)


# --- fixtures


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of all cases, a large one, and one with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in CASES:
        save_litgpt(whole_model(name), folder / name)
    gpt, tokenizer = tiny_gpt(**VOCABULARY), tiny_tokenizer()
    LLM(gpt, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)).save(folder / "command")
    return folder


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    """Results of two processes."""
    if CAN_TELL_MEMORY:
        sizes = {"n_embd": 1024, "intermediate_size": 4096, "n_head": 16, "n_query_groups": 16, "n_layer": 4}
        large = fill_model(meta_model(Config(**{**LLAMA, **sizes})), [], False, torch.float32, "cpu")
        torch.nn.init.ones_(large.lm_head.weight)
        save_litgpt(large.requires_grad_(False), folder / "large")
        del large
    run_in_processes(report, 2, 2, folder, list(CASES))
    return [torch.load(folder / f"2-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def three(folder) -> list[dict[str, Any]]:
    """Results of three processes."""
    run_in_processes(report, 3, 3, folder, OF_THREE)
    return [torch.load(folder / f"3-{rank}.pt") for rank in range(3)]


def check(results: list[dict[str, Any]], case: str) -> None:
    model = whole_model(case)
    expected = model(PROMPT[None])
    tokens = greedy_without_caches(model, PROMPT, NEW).tolist()
    top = expected[0, -1].topk(2).values
    assert top[0] - top[1] > 1e-3  # a clear winner
    for result in results:
        torch.testing.assert_close(result[f"{case}: logits"], expected, rtol=1e-4, atol=1e-4)
        assert result[f"{case}: tokens"] == tokens


# --- the same tokens


@pytest.mark.parametrize("case", CASES)
def test_two_processes_say_what_one_says(case, two):
    check(two, case)


@pytest.mark.parametrize("case", OF_THREE)
def test_three_processes_say_what_one_says(case, three):
    check(three, case)


def test_caches_hold_the_heads_of_their_process(two, three):
    heads = {
        name: [result[f"{name}: heads"][0] for result in two]
        for name in ("llama", "all heads", "one key/value head", "nothing divides", "deepseek")
    }
    assert heads == {
        "llama": [1, 1],
        "all heads": [2, 2],
        "one key/value head": [1, 1],  # the same one
        "nothing divides": [1, 2],
        "deepseek": [1, 1],  # the latent vector, which all heads share
    }
    assert [result["llama: heads"][0] for result in three] == [1, 1, 1]


def test_processes_go_on_with_the_same_tokens_whatever_their_random_numbers(two, three):
    for results in (two, three):
        assert all(result["drawn"] == results[0]["drawn"] for result in results)
    model = whole_model("llama")
    torch.manual_seed(0)  # as the first process, whose tokens count
    assert two[0]["drawn"] == run_batch(model)


@pytest.mark.parametrize("how", ["packed", "int8"])
def test_layers_that_are_replaced_are_summed_as_plain_ones_are(how, two):
    expected = whole_model("llama")(PROMPT[None])[0, -1]
    for result in two:
        assert (result[how] - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(two[0][how], two[1][how])


def test_compiled_decoding_is_one_graph_with_the_same_tokens(two):
    expected = greedy_without_caches(whole_model("llama"), PROMPT, 4).tolist()
    assert [result["compiled"] for result in two] == [expected, expected]


def test_a_cache_that_evicts_works_in_parts(two):
    model = whole_model("llama")
    choose_kv_caches(model, CacheSpec("lastrec", cache_length=8, n_sink=2))
    assert two[0]["lastrec"] == two[1]["lastrec"] == generate(model, PROMPT, 20, temperature=0).tolist()


# --- memory


@pytest.mark.skipif(not CAN_TELL_MEMORY, reason="needs /proc")
def test_a_process_reads_its_part_only(two, folder):
    nbytes = (folder / "large" / "lit_model.pth").stat().st_size
    assert nbytes > 250e6
    for memory in (result["memory"] for result in two):
        assert memory["held"] < 0.51 * nbytes
        assert memory["kept"] < 1.05 * memory["held"]
        assert memory["peak"] < 0.95 * nbytes  # its part, and of the file what was mapped last


@pytest.mark.parametrize("world_size", range(2, 5))
@pytest.mark.parametrize("case", CASES)
def test_parts_make_up_the_whole_and_nothing_is_held_twice_without_need(case, world_size):
    model = whole_model(case)
    config, weights = model.config, model.state_dict()
    numbered = [
        (name, 0, 1 + torch.arange(t.numel(), dtype=torch.float64).view(t.shape)) for name, t in weights.items()
    ]
    held = {name: torch.zeros(t.numel() + 1, dtype=torch.int64) for name, t in weights.items()}
    divided = set()
    for rank in range(world_size):
        shard = Shard(config, rank, world_size)
        part = meta_model(config, lambda config, shard=shard: ShardedGPT(shard)).state_dict()
        assert weight_differences(part, shard.pieces(numbered)) == ([], [], [])
        divided |= {name for name, t in part.items() if t.shape != weights[name].shape or name.endswith("proj.bias")}
        for name, _, piece in shard.pieces(numbered):
            held[name] += torch.bincount(piece.flatten().long(), minlength=len(held[name]))
    assert len(divided) >= 2 + 4 * config.n_layer
    for name, counts in held.items():
        most = 1 if name in divided else world_size
        if most == 1 and world_size > config.n_query_groups and (".qkv." in name or ".norm_k." in name):
            most = -(-world_size // config.n_query_groups)  # some hold the same keys and values
        assert 1 <= counts[1:].min() <= counts[1:].max() <= most, name


# --- what is refused, and what goes wrong


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "n_head = 4: too few for 5 processes"),
        ({"n_head": 16, "intermediate_size": 3}, "intermediate_size = 3: too few for 5 processes"),
        ({"n_head": 16, "vocab_size": 4, "padded_vocab_size": 4}, "padded_vocab_size = 4: too few for 5 processes"),
        (OLMO_2 | {"n_head": 16, "norm_class_name": "LayerNorm"}, "LayerNorm over all heads"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Shard(Config(**{**LLAMA, **kwargs}), 0, 5)


def test_a_process_that_fails_ends_the_others_and_says_why():
    with pytest.raises(ValueError, match="^this is what went wrong$"):
        run_in_processes(fail_midway, 2, "raises")


def test_a_process_that_is_killed_ends_the_others(monkeypatch):
    exitcode, ended = SpawnProcess.exitcode.fget, set()

    def exitcode_known_when_asked_again(process: SpawnProcess) -> int | None:
        code = exitcode(process)
        if code is None or process in ended:
            return code
        return ended.add(process)

    # a process can close its files, and so its sentinel, before there is an exit code
    monkeypatch.setattr(SpawnProcess, "exitcode", property(exitcode_known_when_asked_again))
    with pytest.raises(RuntimeError, match="process 1 of 2 was ended by SIGKILL"):
        run_in_processes(fail_midway, 2, "is killed")


# --- the command, and LLM


def test_llm_says_the_same_with_a_part_in_each_process(folder, two):
    expected = LLM.load(folder / "command", precision="32-true").generate("Hi!", temperature=0, max_new_tokens=9)
    assert [result["llm"] for result in two] == [expected, expected]


def test_the_command_says_what_generate_says(folder, two, capfd):
    assert main(["generate", *command_options(folder / "command")]) == 0
    expected = capfd.readouterr().out
    assert main(["generate_tp", *command_options(folder / "command")]) == 0
    captured = capfd.readouterr()
    assert captured.out == expected
    assert captured.err.count("by 2 processes") == 1
    assert [result["command"] for result in two] == [expected, ""]  # where they were started by something else


def test_the_command_answers_a_file_of_prompts_as_generate_does(folder, tmp_path, capfd):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi!", "id": 7}\n{"prompt": "So?", "max_new_tokens": 3}\n')
    records = []
    for name in ("generate", "generate_tp"):
        out = tmp_path / f"{name}.jsonl"
        options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(out), "--batch_size", "1"]
        command = [name, str(folder / "command"), *options, "--precision", "32-true", "--max_new_tokens", "9"]
        assert main(command) == 0
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.count("2 answers") == 1
        records.append([json.loads(line) for line in out.read_text().splitlines()])
    assert records[0] == records[1]
    assert [record["new_tokens"] for record in records[0]] == [9, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generate.jsonl", "generate_tp.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "5"], "n_head = 4: too few for 5 processes"),
        (["--devices", "0"], "devices must be at least 1, got 0"),
        (["--quantize", "bnb.nf4"], "quantize='bnb.nf4' is not available with divided layers: use int8 or int4"),
        (["--precision", "8"], "precision '8' is not one of"),
    ],
)
def test_the_command_refuses_before_it_starts_processes(folder, options, message, capfd, monkeypatch):
    monkeypatch.setattr("litgpt.generate.tp.run_in_processes", None)
    assert main(["generate_tp", str(folder / "command"), *options]) == 1
    assert message in capfd.readouterr().err


def test_the_number_of_processes_is_that_of_the_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert number_of_processes(None) == number_of_processes(3) == 3
    with pytest.raises(ValueError, match="devices=2, but there are 3 processes"):
        number_of_processes(2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_say_what_one_says(folder, capfd):
    assert main(["generate", *command_options(folder / "command")]) == 0
    expected = capfd.readouterr().out
    assert main(["generate_tp", *command_options(folder / "command"), "--devices", "2"]) == 0
    assert capfd.readouterr().out == expected


class Fabric:
    """As much of Lightning's fabric as LitGPT's functions look at."""

    def __init__(self, rank: int, world_size: int):
        self.global_rank, self.world_size = rank, world_size


def test_litgpts_function_gives_the_part_of_a_process():
    model = whole_model("llama")
    for rank in range(2):
        expected = shard_model(model, torch.float32, CPU, rank, 2).state_dict()
        found = tensor_parallel(Fabric(rank, 2), model).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_of_a_linear_layer_make_up_the_whole():
    x, whole = torch.randn(5, 8), torch.nn.Linear(8, 12)
    parts = []
    for rank in range(4):
        parts.append(torch.nn.Linear(8, 12))
        parts[-1].load_state_dict(whole.state_dict())
        tensor_parallel_linear(Fabric(rank, 4), parts[-1], "colwise")
    assert {(part.in_features, part.out_features) for part in parts} == {(8, 3)}
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=1), whole(x))
    total = torch.zeros(5, 12)
    for rank in range(4):
        part = torch.nn.Linear(8, 12, bias=False)
        part.weight.data = whole.weight.data.clone()
        tensor_parallel_linear(Fabric(rank, 4), part, "rowwise")
        total += part(x[:, 2 * rank : 2 * rank + 2])
    torch.testing.assert_close(total + whole.bias, whole(x))
    with pytest.raises(ValueError, match=r"out_features = 12 is not evenly divisible by the world size \(5\)"):
        tensor_parallel_linear(Fabric(0, 5), whole, "colwise")
