import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import litgpt
from litgpt.checkpoint.incremental import incremental_save
from litgpt.config import Config
from litgpt.indexing import batched_index_copy_, batched_index_select
from litgpt.model import GPT
from litgpt.parser_config import save_hyperparameters
from litgpt.utils import (
    CycleIterator,
    auto_download_checkpoint,
    capture_hparams,
    check_valid_checkpoint_dir,
    chunked_cross_entropy,
    copy_config_files,
    extend_checkpoint_dir,
    find_resume_path,
    fix_and_load_json,
    init_out_dir,
    instantiate_torch_optimizer,
    kill_process_tree,
    load_checkpoint,
    load_from_full_model_state_dict,
    map_old_state_dict_weights,
    num_parameters,
    parse_devices,
    save_config,
    select_sft_generate_example,
)


def test_modules_are_attributes_of_the_package_without_being_imported():
    code = "import sys, litgpt; assert 'torch' not in sys.modules; print(litgpt.lora.GPT, litgpt.utils.CLI, hasattr(litgpt, 'no'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_an_import_that_fails_inside_a_module_is_not_hidden():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        litgpt.nothing  # noqa: B018


@pytest.mark.parametrize("chunk_size", [0, 1, 4, 100])
@pytest.mark.parametrize("head_chunk", [None, 3])
def test_cross_entropy_in_chunks_is_that_of_all(chunk_size, head_chunk):
    logits, targets = torch.randn(2, 8, 11), torch.randint(11, (2, 8))
    targets[:, 3] = targets[1, 5] = -7
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-7)
    given = logits if head_chunk is None else list(logits.split(head_chunk, dim=1))
    torch.testing.assert_close(chunked_cross_entropy(given, targets, chunk_size, -7), expected)


def test_cross_entropy_without_targets_is_zero():
    assert chunked_cross_entropy(torch.randn(1, 4, 5), torch.full((1, 4), -100)) == 0


def test_parameters_are_counted_by_whether_they_are_trained():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad = False
    assert (num_parameters(layer), num_parameters(layer, True), num_parameters(layer, False)) == (8, 6, 2)


@dataclass
class Settings:
    steps: int = 3


def test_hyperparameters_are_the_callers_variables():
    def train(path, settings, shape, nothing=None):
        return capture_hparams()

    expected = {"path": Path("a"), "settings": {"steps": 3}, "shape": "(1, 2)", "nothing": None}
    assert train(Path("a"), Settings(), (1, 2)) == expected


def command(out_dir: Path, rate: float = 0.5, on: bool = False):
    raise AssertionError("is not called")


@pytest.mark.parametrize("words", [["any.py"], ["litgpt", "generate"], ["litgpt", "finetune_lora"]])
def test_hyperparameters_of_a_command_are_written(monkeypatch, tmp_path, words):
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path), "--rate", "2.5"])
    save_hyperparameters(command, tmp_path)
    written = yaml.safe_load((tmp_path / "hyperparameters.yaml").read_text())
    assert written == {"out_dir": str(tmp_path), "rate": 2.5, "on": False}
    assert sys.argv[: len(words)] == words


@pytest.mark.parametrize("devices", [0, -2, "two", 1.5])
def test_devices_that_are_none_are_refused(devices):
    with pytest.raises(ValueError, match="'auto' or a positive integer"):
        parse_devices(devices)


def test_devices_are_counted():
    assert parse_devices(5) == 5
    assert parse_devices("auto") == parse_devices(-1) == max(torch.cuda.device_count(), 1)


def test_a_cycle_counts_its_rounds():
    cycle = CycleIterator([1, 2])
    assert [(next(cycle), cycle.epoch) for _ in range(5)] == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2)]


def test_json_with_wrong_commas_is_read():
    text = '{"a": [1, 2,],\n "b": "x"\n "c": true\n "d": {"e": null,},\n}'
    assert fix_and_load_json(text) == {"a": [1, 2], "b": "x", "c": True, "d": {"e": None}}
    with pytest.raises(ValueError, match="not JSON"):
        fix_and_load_json("{1}")


def test_a_checkpoint_folder_lacks_files_by_name(tmp_path, capsys):
    save_config(Config(n_layer=1, n_embd=8, n_head=2), tmp_path)
    assert Config.from_file(tmp_path / "model_config.yaml").n_embd == 8
    with pytest.raises(FileNotFoundError, match=r"missing the files: \['lit_model.pth', 'tokenizer.json OR "):
        check_valid_checkpoint_dir(tmp_path, raise_error=True, verbose=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        check_valid_checkpoint_dir(tmp_path / "none")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"checkpoint_dir '{tmp_path / 'none'}' is not a checkpoint directory."
    assert lines[-2:] == ["See all download options by running:", " litgpt download"]
    (tmp_path / "lit_model.pth").touch()
    check_valid_checkpoint_dir(tmp_path, ignore_tokenizer_files=True)


def test_folders_are_found_below_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints/org/name")
    folder.mkdir(parents=True)
    assert extend_checkpoint_dir(Path("org/name")) == folder
    assert extend_checkpoint_dir(folder) == folder
    assert extend_checkpoint_dir(Path("org/other")) == Path("org/other")
    assert auto_download_checkpoint(str(folder)) == folder


def test_side_files_are_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    for name in ("model_config.yaml", "tokenizer.json", "lit_model.pth"):
        (source / name).write_text(name)
    copy_config_files(source, out)
    assert sorted(os.listdir(out)) == ["model_config.yaml", "tokenizer.json"]


def test_results_lie_below_the_artifacts_folder(monkeypatch):
    monkeypatch.delenv("LIGHTNING_ARTIFACTS_DIR", raising=False)
    assert init_out_dir("out/x") == Path("out/x")
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", "top")
    assert (init_out_dir("out/x"), init_out_dir("/abs")) == (Path("top/out/x"), Path("/abs"))


def test_training_resumes_from_the_latest_step(tmp_path):
    assert find_resume_path(False, tmp_path) is None
    assert find_resume_path("auto", tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint file was found"):
        find_resume_path(True, tmp_path)
    for step in ("step-9", "step-10"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "lit_model.pth").touch()
    assert find_resume_path(True, tmp_path) == tmp_path / "step-10" / "lit_model.pth"
    assert find_resume_path(Path("given.pth"), tmp_path) == Path("given.pth")


def test_an_optimizer_is_made_by_name_or_class_path():
    weights = [torch.nn.Parameter(torch.zeros(2))]
    by_name = instantiate_torch_optimizer("SGD", weights, lr=0.1, fused=False, unknown=1)
    assert (type(by_name), by_name.defaults["lr"]) == (torch.optim.SGD, 0.1)
    given = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.3}}
    by_path = instantiate_torch_optimizer(given, weights, lr=0.2)
    assert (by_path.defaults["lr"], by_path.defaults["weight_decay"]) == (0.2, 0.3)
    with pytest.raises(ValueError, match="by a name or a dict"):
        instantiate_torch_optimizer(3, weights)


def test_the_example_is_taken_from_the_test_data_first():
    class Part:
        def __init__(self, *texts):
            self.data = [{"instruction": text} for text in texts]

    class Data:
        test_dataset, train_dataset = Part("a"), Part("x", "y")

    class Eval:
        evaluate_example = "first"

    assert select_sft_generate_example(Eval, Data) == "a"
    Eval.evaluate_example = 1
    assert select_sft_generate_example(Eval, Data) == "y"
    Eval.evaluate_example = 2
    with pytest.raises(IndexError):
        select_sft_generate_example(Eval, Data)
    Eval.evaluate_example = "last"
    with pytest.raises(ValueError, match="'first', 'random' or an index"):
        select_sft_generate_example(Eval, Data)


def test_old_names_of_weights_are_replaced():
    assert map_old_state_dict_weights({"m.a": 1, "b": 2}, {"a": "c", "b": "d"}, "m.") == {"m.c": 1, "b": 2}


def test_a_batch_of_indices_selects_for_each_row():
    t, idx = torch.randn(3, 5, 4), torch.tensor([[0, 2], [4, 4]])
    for dim in (0, 1, 2, -1):
        if dim == 0:
            idx = idx.clamp(max=2)
        expected = torch.stack([t.index_select(dim, row.clamp(max=t.shape[dim] - 1)) for row in idx])
        assert torch.equal(batched_index_select(t, dim, idx.clamp(max=t.shape[dim] - 1)), expected)
    assert torch.equal(batched_index_select(t, 1, idx[0]), t[:, idx[0]])


def test_a_batch_of_indices_writes_for_each_row():
    t, idx, values = torch.zeros(2, 3, 5), torch.tensor([[0, 2], [4, 1]]), torch.randn(2, 3, 2)
    batched_index_copy_(t, -1, idx, values)
    for b in range(2):
        assert torch.equal(t[b, :, idx[b]], values[b])
    with pytest.raises(ValueError, match="idx must be"):
        batched_index_copy_(t, 0, idx, values)


@pytest.mark.parametrize("weights_only", [True, False])
def test_tensors_that_were_written_early_are_read_as_they_were(tmp_path, weights_only):
    whole = torch.randn(6, 2)
    weights = {"a": torch.randn(3).bfloat16(), "p": torch.nn.Parameter(torch.randn(2)), "w": whole, "v": whole[2:4]}
    weights["a"].note = 1
    with incremental_save(tmp_path / "x.pth") as saver:
        saver.save({name: saver.store_early(x) if name in "ap" else x for name, x in weights.items()})
        with pytest.raises(ValueError, match="saved already"):
            saver.store_early(whole)
    read = torch.load(tmp_path / "x.pth", weights_only=weights_only)
    assert read["a"].note == 1
    for name, x in weights.items():
        assert torch.equal(read[name], x)
        assert type(read[name]) is type(x)
    assert read["v"].untyped_storage().data_ptr() == read["w"].untyped_storage().data_ptr()


def test_a_tensor_position_does_not_break_a_compiled_graph():
    model = GPT(Config(n_layer=1, n_embd=8, n_head=2, block_size=8, padded_vocab_size=16))
    model.set_kv_cache(1, 8, model.rope_cache_length())
    with torch.inference_mode():
        explained = torch._dynamo.explain(model)(torch.arange(4)[None], torch.arange(4))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert model.next_token_pos == 4


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_whole_models_weights_go_into_parts_and_under_lora(mesh):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model = torch.nn.Sequential(torch.nn.Linear(4, 2, device="meta"), torch.nn.Module())
    model[1].linear = torch.nn.Linear(3, 3)
    weights = {"0.weight": torch.rand(2, 4), "0.bias": torch.rand(2), "1.weight": torch.rand(3, 3)}
    model[0].weight = torch.nn.Parameter(distribute_tensor(torch.zeros(2, 4), mesh, [Shard(0)]))
    result = load_from_full_model_state_dict(model, weights, torch.device("cpu"), cpu_offload=True)
    assert result.missing_keys == ["1.linear.bias"]
    assert isinstance(model[0].weight, DTensor)
    assert torch.equal(model[0].weight.full_tensor(), weights["0.weight"])
    assert torch.equal(model[1].linear.weight, weights["1.weight"])
    with pytest.raises(RuntimeError, match="Unexpected.*2.weight"):
        load_from_full_model_state_dict(model, {"2.weight": torch.ones(1)}, torch.device("cpu"), strict=True)


def test_a_fabrics_model_gets_the_weights_of_a_file(tmp_path):
    from lightning import Fabric

    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for saved in (model.state_dict(), {"model": model.state_dict()}):
        torch.save(saved, tmp_path / "lit_model.pth")
        torch.nn.init.zeros_(other.weight)
        load_checkpoint(Fabric(accelerator="cpu", devices=1), other, tmp_path / "lit_model.pth")
        assert torch.equal(other.weight, model.weight)


def test_a_process_ends_with_those_that_it_started():
    psutil = pytest.importorskip("psutil")
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout.readline().strip() == b"1"
    (child,) = psutil.Process(parent.pid).children()
    kill_process_tree(parent.pid)
    assert parent.wait(100) != 0
    child.wait(100)
    kill_process_tree(parent.pid)


def test_the_table_of_commands_holds_functions():
    from litgpt.__main__ import COMMANDS, PARSER_DATA

    assert list(PARSER_DATA) == list(COMMANDS)
    assert PARSER_DATA["merge_lora"].__name__ == "merge_lora"
    assert all(callable(function) for function in PARSER_DATA.values())
